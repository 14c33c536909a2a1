//! Beside the programs of a daemon whose maps have another layout: which of the two redirects, whose the name of
//! the pins is, and what is removed when.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use reeve_common::{
    Direction, SETTINGS_ASIDE, SETTINGS_BESIDE, SETTINGS_JOINING, SocketTag, TAG_REEVE, protocol,
};

use super::{Datapath, Error, lock, sys};

impl Datapath {
    /// Leaves sending connections to the outbound listener to the programs of the next daemon, which are
    /// of another layout. These go on judging, by what [`Datapath::apply`] says. Blocks until no call is
    /// under way that was sent to the listener by these.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn step_aside(&self) -> Result<(), Error> {
        lock(&self.state).set_flags(SETTINGS_BESIDE | SETTINGS_ASIDE)?;
        lock(&self.pins).step_aside()
    }

    /// The daemon of another layout that served until now has stepped aside, or has ended.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn take_place(&self) -> Result<(), Error> {
        let (mut pins, mut state) = (lock(&self.pins), lock(&self.state));
        state.set_flags(SETTINGS_BESIDE)?;
        pins.take_name()
    }

    /// Removes what daemons of other layouts have left in the kernel that were killed: those before, and one
    /// that did not come to take over. For the daemon that serves, while no other one takes over. Gives
    /// what was removed.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn sweep(&self) -> Result<Vec<PathBuf>, Error> {
        let (mut pins, mut state) = (lock(&self.pins), lock(&self.state));
        if state.has_flags(SETTINGS_JOINING) || state.has_flags(SETTINGS_ASIDE) {
            return Ok(Vec::new());
        }
        pins.take_name()?;
        let (removed, stays) = pins.sweep()?;
        if !stays && state.has_flags(SETTINGS_BESIDE) {
            state.set_flags(0)?;
        }
        Ok(removed)
    }

    /// Whether programs of another layout judge as well.
    #[must_use]
    pub fn is_beside(&self) -> bool {
        lock(&self.state).has_flags(SETTINGS_BESIDE)
    }

    /// Removes what this daemon has in the kernel, since its last connection has ended and another
    /// daemon's programs judge.
    ///
    /// # Errors
    ///
    /// When a pin cannot be removed.
    pub fn retire(&self) -> Result<(), Error> {
        lock(&self.pins).remove()
    }

    /// Has a listener that another daemon has opened be reeve's.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn adopt_listener(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        let tag = SocketTag {
            protocol: protocol::TCP,
            direction: Direction::Ingress as u8,
            flags: TAG_REEVE,
            ..SocketTag::default()
        };
        sys::set_of_socket(self.tags.as_fd(), listener, &tag)
    }
}
