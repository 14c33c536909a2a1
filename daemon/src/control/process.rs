//! The daemon as a process: what it may use, what may look into it, and what systemd is told.

use std::time::Duration;

use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use sd_notify::NotifyState;

/// Raises the number of file descriptors to what the system allows, and keeps private keys out of
/// core dumps and other users' debuggers. What is refused is logged: the daemon runs without it.
pub fn prepare() {
    let files = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = files {
        tracing::warn!(%error, "the limit of open files cannot be raised; many connections may fail");
    }
    let dumps = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| prctl::set_dumpable(false));
    if let Err(error) = dumps {
        tracing::warn!(%error, "core dumps cannot be switched off; one would hold private keys");
    }
}

/// For how long systemd waits to hear that the daemon is well before it starts another; none where
/// it does not (`WatchdogSec=` is not set, or there is no systemd).
pub(super) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Tells systemd that the daemon is well.
pub(super) fn notify_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

/// Tells systemd, where it listens (`NOTIFY_SOCKET`), that the daemon is ready.
pub(super) fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that the configuration is read again; [`notify_ready`] ends it.
pub(super) fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "systemd is not told of the reload"),
    }
}

/// Tells systemd that another process is the service now.
pub(super) fn notify_successor(process: i32) {
    notify(&[NotifyState::MainPid(process.unsigned_abs())]);
}

/// Tells systemd that the daemon is stopping.
pub(super) fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
