//! Word that something in a network namespace has changed: its links, addresses, routes or rules.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
    task::JoinHandle,
    time::sleep,
};

use super::netns::Netns;

/// Multicast groups of links, of addresses, of routes and of rules (`linux/rtnetlink.h`).
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// Between two words: a namespace in which much changes is looked at so often at most.
const PAUSE: Duration = Duration::from_millis(200);

/// Tells of changes for as long as it lives, and holds the namespace.
#[derive(Debug)]
pub struct NamespaceWatch {
    changed: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

// === impl NamespaceWatch ===

impl NamespaceWatch {
    /// Begins to watch; `word` is given at each change. Needs a tokio runtime.
    pub(super) fn start(netns: &Netns, word: Arc<Notify>) -> io::Result<Self> {
        let socket = netns.run(|| {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkRoute,
            )?;
            let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (group - 1));
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
            Ok(socket)
        })?;
        // SAFETY: the descriptor is owned by the `AsyncFd`, which alone closes it.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        let changed = Arc::new(AtomicBool::new(false));
        let flag = changed.clone();
        let task = tokio::spawn(async move {
            while drained(&socket).await.is_ok() {
                flag.store(true, Ordering::Release);
                word.notify_one();
                sleep(PAUSE).await;
            }
        });
        Ok(Self { changed, task })
    }

    /// Whether something has changed since this was last asked.
    #[must_use]
    pub fn take_change(&self) -> bool {
        self.changed.swap(false, Ordering::AcqRel)
    }
}

impl Drop for NamespaceWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for a message, and throws away all that are there: what they say is asked for anyway.
async fn drained(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut guard = socket.readable().await?;
    loop {
        // A message that is longer is cut off.
        match recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT) {
            // Messages were lost: something has changed in any case.
            Ok(1..) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(Errno::EAGAIN) => break,
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(error.into()),
        }
    }
    guard.clear_ready();
    Ok(())
}
