//! Sockets that another process opened: of the daemon before, or kept by the service manager. A
//! socket says itself what it is for, so both are sorted alike.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};

use sd_notify::NotifyState;
use socket2::{Domain, Socket};

use crate::{
    config::Config,
    datapath::netns::{Netns, netns_cookie},
};

/// Under which the service manager keeps them.
const NAME: &str = "reeve";
/// Descriptors in one message to the service manager; the kernel takes 253.
const IN_ONE_MESSAGE: usize = 200;

/// Listening sockets, by what they are for.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Of tunnels and of redirected connections, by the cookie of their network namespace.
    pub listeners: HashMap<u64, Vec<Socket>>,
    /// Of the metrics endpoint.
    pub metrics: Option<TcpListener>,
    /// The admin socket.
    pub admin: Option<UnixListener>,
}

// === impl Inherited ===

impl Inherited {
    /// Sorts sockets. What the configuration has no use for is closed.
    #[must_use]
    pub fn sort(sockets: Vec<OwnedFd>, config: &Config) -> Self {
        let own = Netns::of_pid(std::process::id()).map(|netns| netns.cookie);
        let mut sorted = Self::default();
        for socket in sockets.into_iter().map(Socket::from) {
            if !socket.is_listener().unwrap_or(false) {
                continue;
            }
            if socket.domain().is_ok_and(|domain| domain == Domain::UNIX) {
                if is_admin(&socket, config) {
                    sorted.admin = Some(OwnedFd::from(socket).into());
                }
                continue;
            }
            let Some(address) = socket.local_addr().ok().and_then(|at| at.as_socket()) else {
                continue;
            };
            let Ok(cookie) = netns_cookie(&socket) else {
                continue;
            };
            if own.as_ref().is_ok_and(|own| *own == cookie)
                && config.metrics.address == Some(address)
            {
                sorted.metrics = Some(OwnedFd::from(socket).into());
            } else if is_reeves(address, config) {
                sorted.listeners.entry(cookie).or_default().push(socket);
            }
        }
        sorted
    }
}

/// Whether a socket is the configuration's admin socket, which is bound under a longer name and then
/// moved.
fn is_admin(socket: &Socket, config: &Config) -> bool {
    let bound = socket.local_addr().ok();
    let bound = bound.as_ref().and_then(|at| at.as_pathname());
    let wanted = &config.admin.socket;
    wanted.exists()
        && bound.is_some_and(|bound| bound == wanted || bound.with_extension("") == *wanted)
}

fn is_reeves(address: SocketAddr, config: &Config) -> bool {
    [config.ports.outbound, config.ports.tunnel].contains(&address.port())
}

// === The service manager ===

/// The sockets that the service manager kept since the daemon before stopped (`LISTEN_FDS`).
#[must_use]
pub fn from_service_manager() -> Vec<OwnedFd> {
    match sd_notify::listen_fds() {
        // SAFETY: the service manager opened these descriptors for this process, and this is
        // called once, before anything else could take them for its own.
        Ok(kept) => kept
            .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) })
            .collect(),
        Err(error) => {
            tracing::warn!(%error, "the service manager's sockets cannot be taken");
            Vec::new()
        }
    }
}

/// Has the service manager keep sockets for the next daemon. False where it does not.
#[must_use]
pub fn keep(sockets: &[OwnedFd]) -> bool {
    sockets.chunks(IN_ONE_MESSAGE).all(|some| {
        let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        let state = [NotifyState::FdStore, NotifyState::FdName(NAME)];
        sd_notify::notify_with_fds(&state, &some)
            .inspect_err(|error| tracing::warn!(%error, "the service manager keeps no sockets"))
            .is_ok()
    })
}

/// Has the service manager keep them no longer: with this daemon, connections end at once.
pub fn forget_kept() {
    let state = [NotifyState::FdStoreRemove, NotifyState::FdName(NAME)];
    if let Err(error) = sd_notify::notify(&state) {
        tracing::debug!(%error, "the service manager was not told");
    }
}
