//! Network namespaces: entered by a thread for as long as a socket takes to open.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
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

/// A user namespace. It is held open, so that its inode means no other.
#[derive(Debug)]
pub struct UserNamespace {
    fd: OwnedFd,
    /// Inode number, for telling namespaces apart.
    pub inode: u64,
}

impl UserNamespace {
    /// Inode of the first user namespace, the same on every Linux (`PROC_USER_INIT_INO`).
    pub const INITIAL: u64 = 0xefff_fffd;

    /// The user namespace that a process is in.
    ///
    /// # Errors
    /// When the process is gone or may not be looked at.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::new(File::open(format!("/proc/{pid}/ns/user"))?)
    }

    /// The user namespace that owns another namespace: who has its capabilities rules the other.
    ///
    /// # Errors
    /// When it lies outside the caller's own user namespace.
    pub fn owning(namespace: &impl AsRawFd) -> io::Result<Self> {
        /// `NS_GET_USERNS` of `linux/nsfs.h`.
        const GET_OWNER: libc::Ioctl = 0xb701;
        Self::asked(namespace, GET_OWNER)
    }

    /// The user namespace around this one.
    ///
    /// # Errors
    /// When it lies outside the caller's own user namespace.
    pub fn parent(&self) -> io::Result<Self> {
        /// `NS_GET_PARENT` of `linux/nsfs.h`.
        const GET_PARENT: libc::Ioctl = 0xb702;
        Self::asked(&self.fd, GET_PARENT)
    }

    /// The user who made it, 0 for the host's root.
    ///
    /// # Errors
    /// From the kernel.
    pub fn maker(&self) -> io::Result<libc::uid_t> {
        /// `NS_GET_OWNER_UID` of `linux/nsfs.h`.
        const GET_OWNER_UID: libc::Ioctl = 0xb704;
        let mut user: libc::uid_t = 0;
        // SAFETY: the request writes one number to where the pointer leads, which outlives the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), GET_OWNER_UID, &raw mut user) };
        if result == 0 {
            Ok(user)
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn asked(namespace: &impl AsRawFd, what: libc::Ioctl) -> io::Result<Self> {
        // SAFETY: these requests take no argument.
        let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), what) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this file descriptor for the caller.
        Self::new(unsafe { File::from_raw_fd(fd) })
    }

    fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            inode: file.metadata()?.ino(),
            fd: file.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_says_who_owns_it() {
        let own = Netns::open("/proc/thread-self/ns/net").unwrap();
        let initial = UserNamespace::of_pid(std::process::id()).unwrap();
        assert_eq!(initial.inode, UserNamespace::INITIAL);
        assert!(initial.parent().is_err());
        assert_eq!(UserNamespace::owning(&own.fd).unwrap().inode, initial.inode);
        let unshare = ["--user", "--net", "--map-root-user", "sleep", "100"];
        let mut other = std::process::Command::new("unshare")
            .args(unshare)
            .spawn()
            .unwrap();
        let inside = loop {
            let netns = Netns::of_pid(other.id()).unwrap();
            if netns.inode != own.inode {
                break netns;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        let owner = UserNamespace::owning(&inside.fd).unwrap();
        let process = UserNamespace::of_pid(other.id()).unwrap();
        other.kill().and_then(|()| other.wait()).unwrap();
        assert_eq!(owner.inode, process.inode);
        assert_eq!(owner.parent().unwrap().inode, initial.inode);
        assert_eq!(owner.maker().unwrap(), nix::unistd::geteuid().as_raw());
    }

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
