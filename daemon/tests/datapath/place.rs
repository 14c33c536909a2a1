//! Where things run: cgroups and network namespaces, for threads.

use std::{
    fs,
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Once},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use reeve::datapath::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{MOMENT, PATIENCE};

/// Of `linux/ipv6_route.h`: what goes there stays here.
const RTF_LOCAL: u32 = 0x8000_0000;
/// Of `linux/if_addr.h`.
const IFA_F_NODAD: u32 = 0x02;

/// A threaded cgroup; dropping it removes it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    depth: u32,
}

impl Cgroup {
    pub(crate) fn root(name: &str) -> Self {
        static MOVED: Once = Once::new();
        // Threads can only spread over cgroups below the one that their process is in. Once: it
        // moves all threads, those of the other tests out of their workloads too.
        MOVED.call_once(|| fs::write(mount().join("cgroup.procs"), "0").unwrap());
        Self::new(mount().join(name), 1)
    }

    fn new(path: PathBuf, depth: u32) -> Self {
        fs::create_dir(&path).unwrap();
        fs::write(path.join("cgroup.type"), "threaded").unwrap();
        Self { path, depth }
    }

    /// A cgroup below this one.
    pub(crate) fn child(&self, name: &str) -> Self {
        Self::new(self.path.join(name), self.depth + 1)
    }

    /// The kernel's number for it.
    pub(crate) fn id(&self) -> u64 {
        fs::metadata(&self.path).unwrap().ino()
    }

    /// How far below the hierarchy's root it is.
    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A thread that has just ended may still be counted for a moment.
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.path).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Where the cgroup2 hierarchy is mounted.
pub(crate) fn mount() -> PathBuf {
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .find(|(_, kind)| kind.starts_with("cgroup2 "))
        .map(|(mount, _)| PathBuf::from(mount.split(' ').nth(4).unwrap()))
        .expect("a cgroup2 hierarchy is mounted")
}

/// One end of the wire.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its network namespace.
    pub(crate) netns: Arc<Netns>,
    /// Its IPv4 address.
    pub(crate) v4: IpAddr,
    /// Its IPv6 address.
    pub(crate) v6: IpAddr,
}

impl Place {
    pub(crate) fn new(number: u8) -> Self {
        Self::made(number, None)
    }

    /// A namespace that is made by a process in a cgroup.
    pub(crate) fn made_in(number: u8, cgroup: &Cgroup) -> Self {
        Self::made(number, Some(cgroup))
    }

    fn made(number: u8, by: Option<&Cgroup>) -> Self {
        let netns = thread::scope(|scope| {
            scope
                .spawn(|| {
                    if let Some(cgroup) = by {
                        fs::write(cgroup.path.join("cgroup.threads"), "0").unwrap();
                    }
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    Netns::open("/proc/thread-self/ns/net").unwrap()
                })
                .join()
                .unwrap()
        });
        Self {
            netns: Arc::new(netns),
            v4: Ipv4Addr::new(10, 0, 0, number).into(),
            v6: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()).into(),
        }
    }

    /// Does something in a cgroup and here.
    pub(crate) fn run<T: Send>(&self, cgroup: &Cgroup, work: impl FnOnce() -> T + Send) -> T {
        self.run_in(&cgroup.path, work)
    }

    /// The same, in the cgroup with this folder.
    pub(crate) fn run_in<T: Send>(&self, cgroup: &Path, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    fs::write(cgroup.join("cgroup.threads"), "0").unwrap();
                    self.netns.run(|| Ok(work())).unwrap()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` here with several command lines, after which the addresses that they add are there.
    pub(crate) fn ip(&self, lines: &[String]) {
        self.ip_at_once(lines);
        if lines.iter().any(|line| line.ends_with("nodad")) {
            self.settle();
        }
    }

    /// Waits until packets to the IPv6 addresses of this place stay in it: the kernel adds their routes
    /// some time after the addresses. A device whose far end is down gets none, so no longer than a moment.
    fn settle(&self) {
        let until = Instant::now() + PATIENCE / 5;
        let table = |name: &str| {
            let path = format!("/proc/thread-self/net/{name}");
            self.netns.run(|| fs::read_to_string(path)).unwrap()
        };
        while Instant::now() < until {
            let addresses = table("if_inet6");
            let routes = table("ipv6_route");
            let is_local = |address: &str| {
                let mut routes = routes.lines();
                // Destination and its length are followed by six more fields, the flags, and the device.
                routes.any(|route| {
                    let flags = route.split_whitespace().nth(8);
                    let flags = flags.and_then(|flags| u32::from_str_radix(flags, 16).ok());
                    route.starts_with(&format!("{address} 80 "))
                        && flags.is_some_and(|flags| flags & RTF_LOCAL != 0)
                })
            };
            // Those whose flags say that nobody is asked whether he has the address, too.
            let mut addresses = addresses.lines().filter_map(|line| {
                let mut fields = line.split_whitespace();
                let address = fields.next()?;
                let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
                (flags & IFA_F_NODAD != 0).then_some(address)
            });
            if addresses.all(is_local) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn ip_at_once(&self, lines: &[String]) {
        let status = self
            .netns
            .run(|| {
                let mut child = Command::new("ip")
                    .args(["-batch", "-"])
                    .stdin(Stdio::piped())
                    .spawn()?;
                let mut input = child.stdin.take().unwrap();
                std::io::Write::write_all(&mut input, lines.join("\n").as_bytes())?;
                drop(input);
                child.wait()
            })
            .unwrap();
        assert!(status.success(), "ip: {lines:?}");
    }

    /// A port at the IPv4 address.
    pub(crate) fn port4(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// A port at the IPv6 address.
    pub(crate) fn port6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }
}

/// Joins two namespaces.
pub(crate) fn wire(here: &Place, there: &Place) {
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        there.netns.fd.as_raw_fd()
    );
    here.ip(&[format!(
        "link add wire type veth peer name wire netns {path}"
    )]);
    for place in [here, there] {
        place.ip_at_once(&[
            "link set lo up".into(),
            "link set wire up".into(),
            format!("addr add {}/24 dev wire", place.v4),
            format!("addr add {}/64 dev wire nodad", place.v6),
        ]);
    }
    for place in [here, there] {
        place.settle();
    }
}

/// Asks for an echo and waits for it, with a raw socket.
pub(crate) fn ping(to: SocketAddr) -> std::io::Result<()> {
    let (domain, protocol, request) = match to {
        SocketAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        SocketAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(MOMENT))?;
    // The checksum is right for IPv4; for IPv6 the kernel sees to it.
    let echo = [request, 0, 0xf7, 0xf7, 0, 7, 0, 1];
    socket.send_to(&echo, &to.into())?;
    let mut buffer = [0; 128];
    loop {
        let _ = (&socket).read(&mut buffer)?;
        // IPv4's header is part of what is read.
        let kind = buffer[if to.is_ipv4() { 20 } else { 0 }];
        if [0, 129].contains(&kind) {
            return Ok(());
        }
    }
}

/// Sets an option that the standard library and socket2 have no word for.
#[track_caller]
pub(crate) fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: &[u8]) {
    // SAFETY: `value` is as long as is said.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// Takes back what `connect()` did: connects to the address family "none".
pub(crate) fn disconnect(socket: &impl AsRawFd) {
    let mut nowhere = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // SAFETY: `nowhere` is as long as is said.
    let done = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw mut nowhere,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
