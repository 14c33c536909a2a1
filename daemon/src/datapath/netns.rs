//! Network namespaces: entered by a thread for as long as a socket takes to open.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// Cookie of the network namespace that `socket` belongs to, which nix has no option for.
pub(crate) fn netns_cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals that outlive the call, and `length` is the size of
    // what `cookie` points to.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

thread_local! {
    /// Where the thread comes back to. Kept open: each connection to an application needs it.
    static HOME: OnceCell<File> = const { OnceCell::new() };
}

/// An open network namespace. It lives as long as the value does.
#[derive(Debug)]
pub struct Netns {
    /// The namespace.
    pub fd: OwnedFd,
    /// `SO_NETNS_COOKIE`, the key of the kernel's maps.
    pub cookie: u64,
    /// Inode number, for people and for telling namespaces apart.
    pub inode: u64,
}

impl Netns {
    /// The namespace that a process is in.
    ///
    /// # Errors
    /// When the process is gone (a zombie has no namespace) or may not be looked at.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The namespace of a file, as of `/run/netns/NAME`.
    ///
    /// # Errors
    /// When it cannot be opened or is not a network namespace.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let mut namespace = Self {
            fd: file.into(),
            cookie: 0,
            inode,
        };
        namespace.cookie =
            namespace.run(|| netns_cookie(&Socket::new(Domain::IPV4, Type::DGRAM, None)?))?;
        Ok(namespace)
    }

    /// Runs `work` with the calling thread inside this namespace, and brings the thread back to the
    /// one in which it first did this. `work` must not await. A thread that cannot come back aborts
    /// the process.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `work`'s own.
    pub fn run<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        /// Brings the thread back even when `work` panics.
        struct Back<'a>(&'a File);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                if let Err(error) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "a thread cannot leave a workload's network namespace");
                    process::abort();
                }
            }
        }
        HOME.with(|home| {
            let home = match home.get() {
                Some(home) => home,
                None => {
                    let file = File::open("/proc/thread-self/ns/net")?;
                    home.get_or_init(|| file)
                }
            };
            setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)?;
            let _back = Back(home);
            work()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_enters_another_namespace_and_comes_back() {
        let own = Netns::open("/proc/thread-self/ns/net").unwrap();
        let other = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Netns::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        assert_ne!(own.cookie, other.cookie);
        assert_ne!(own.inode, other.inode);
        let inside = other
            .run(|| netns_cookie(&Socket::new(Domain::IPV4, Type::DGRAM, None)?))
            .unwrap();
        assert_eq!(inside, other.cookie);
        let after = Netns::open("/proc/thread-self/ns/net").unwrap();
        assert_eq!(after.cookie, own.cookie);
    }
}
