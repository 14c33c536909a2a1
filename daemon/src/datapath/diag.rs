//! The sockets of a network namespace that carry a connection now, or listen, and their end: the
//! kernel's `sock_diag` (`sock_diag(7)`, `linux/inet_diag.h`), which no maintained library speaks
//! whole. [`message`] is how its messages are written.

pub(super) mod message;

use std::{collections::HashMap, io, net::SocketAddr, os::fd::BorrowedFd};

use reeve_common::{
    Direction, SocketTag, TAG_ALLOWED, TAG_DIRECTION, TAG_ONWARD, TAG_REDIRECTED, TAG_REEVE,
    TAG_TUNNELLED, WorkloadId, protocol,
};

use self::message::{
    Answer, COOKIE, IDENTITY_LENGTH, OTHER_ADDRESS, OTHER_PORT, OWN_ADDRESS, OWN_PORT, ask_storage,
    decode, request, word,
};
use super::{
    netlink::{ACKNOWLEDGE, DUMP, Netlink, REQUEST},
    netns::Netns,
};

/// `NETLINK_SOCK_DIAG`.
const NETLINK: i32 = 4;
/// Messages of the protocol.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

/// States of TCP in which there is a connection, and data may still pass: all but those of a
/// listener, of a handshake that has no socket yet, and of what has ended.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// A UDP socket that is connected.
const ESTABLISHED: u32 = 1 << 1;
/// A TCP socket that listens.
const LISTENING: u32 = 1 << 10;
/// Ports of a client that are tried for each of the listeners that share an address: that none of
/// them leads to the one that is meant is as good as impossible.
const TRIES: usize = 64;

/// What a socket remembers, see [`SocketTag`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The workload that it belongs to.
    pub workload: WorkloadId,
    /// The direction in which it was judged, if it was.
    pub direction: Option<Direction>,
    /// The tunnel judges it: it leads to the outbound listener, or to an application from a
    /// tunnel, or is one of reeve's own.
    pub in_tunnel: bool,
    /// It is one that reeve listens with, or has accepted or opened.
    pub of_reeve: bool,
    /// Generation of its verdict, and whether that was to allow it; 0 where there is none.
    pub generation: u32,
    /// See `generation`.
    pub allowed: bool,
}

/// A socket that is connected.
#[derive(Clone, Debug)]
pub struct LiveSocket {
    /// IP protocol number.
    pub protocol: u8,
    /// The socket's own address.
    pub local: SocketAddr,
    /// What it is connected to.
    pub remote: SocketAddr,
    /// Cgroup in which it was made.
    pub cgroup: u64,
    /// What the programs know of it.
    pub remembered: Option<Remembered>,
    /// Cgroup in which the socket was made to which it is connected, where that is one of TCP in this
    /// namespace. Looked for where the programs know nothing.
    pub other_cgroup: Option<u64>,
    /// The kernel's number for it, never used again.
    pub cookie: u64,
    family: u8,
    /// The kernel's name for it: ports, addresses, device and cookie.
    identity: [u8; IDENTITY_LENGTH],
}

impl LiveSocket {
    /// The direction in which its connection was opened, where the programs have seen that. A
    /// datagram socket may have been connected to whoever had called it.
    #[must_use]
    pub fn direction(&self) -> Option<Direction> {
        let remembered = self.remembered?;
        (self.protocol == protocol::TCP).then_some(remembered.direction)?
    }
}

/// A TCP socket that listens.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where.
    pub local: SocketAddr,
    /// Cgroup in which it was made.
    pub cgroup: u64,
    /// Number of the user who made it.
    pub user: u32,
    /// The programs know it for one of reeve's own.
    pub of_reeve: bool,
    family: u8,
    identity: [u8; IDENTITY_LENGTH],
}

/// A conversation with the kernel about the sockets of one namespace.
pub(super) struct Diagnosis {
    netlink: Netlink,
}

// === impl Diagnosis ===

impl Diagnosis {
    pub(super) fn open(netns: &Netns) -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open(netns, NETLINK)?,
        })
    }

    /// Every connected TCP and UDP socket. `tags` is the map of what they remember.
    pub(super) fn sockets(&mut self, tags: BorrowedFd<'_>) -> io::Result<Vec<LiveSocket>> {
        let mut sockets = Vec::new();
        for (protocol, states) in [(protocol::TCP, CONNECTED), (protocol::UDP, ESTABLISHED)] {
            self.list(protocol, states, 0, tags, |answer| {
                sockets.extend(answer.live(protocol));
            })?;
        }
        find_other_ends(&mut sockets);
        Ok(sockets)
    }

    /// Every TCP socket that listens on a port.
    pub(super) fn listeners(
        &mut self,
        port: u16,
        tags: BorrowedFd<'_>,
    ) -> io::Result<Vec<Listener>> {
        let mut listeners = Vec::new();
        self.list(protocol::TCP, LISTENING, port, tags, |answer| {
            listeners.extend(answer.listener());
        })?;
        Ok(listeners)
    }

    /// Calls `found` with each socket of either family in one of these states, and at this own port
    /// unless it is 0.
    fn list(
        &mut self,
        protocol: u8,
        states: u32,
        port: u16,
        tags: BorrowedFd<'_>,
        mut found: impl FnMut(Answer<'_>),
    ) -> io::Result<()> {
        let mut wanted = [0; IDENTITY_LENGTH];
        wanted[OWN_PORT].copy_from_slice(&port.to_be_bytes());
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut request = request(family as u8, protocol, states, &wanted);
            request.extend(ask_storage(tags));
            self.netlink
                .ask(BY_FAMILY, REQUEST | DUMP, &request, BY_FAMILY, |answer| {
                    if let Some(answer) = decode(answer) {
                        found(answer);
                    }
                })?;
        }
        Ok(())
    }

    /// Ends a connection: TCP's other end gets a reset, the application an error. False where it
    /// has ended by itself meanwhile.
    pub(super) fn destroy(&mut self, socket: &LiveSocket) -> io::Result<bool> {
        let request = request(socket.family, socket.protocol, 0, &socket.identity);
        match self.end(&request) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn end(&mut self, request: &[u8]) -> io::Result<()> {
        let flags = REQUEST | ACKNOWLEDGE;
        self.netlink.ask(DESTROY, flags, request, BY_FAMILY, |_| {})
    }

    /// Closes a listener, which is one of `sharing` at its address: whoever waits in its queue gets
    /// a reset, and whoever accepts an error. False where it has gone by itself meanwhile.
    ///
    /// The kernel looks for it as it does for a client's connection: of listeners that share an
    /// address, the client's port decides. So ports are tried until it is the one that is meant.
    pub(super) fn close(&mut self, listener: &Listener, sharing: usize) -> io::Result<bool> {
        let mut identity = listener.identity;
        // As of a connection from an address to itself, which no program judges on its way.
        identity.copy_within(OWN_ADDRESS, OTHER_ADDRESS.start);
        for port in (0..=u16::MAX).take(sharing.saturating_mul(TRIES)) {
            identity[OTHER_PORT].copy_from_slice(&port.to_be_bytes());
            let request = request(listener.family, protocol::TCP, 0, &identity);
            match self.end(&request) {
                Ok(()) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

// === impl Answer ===

impl Answer<'_> {
    fn live(&self, protocol: u8) -> Option<LiveSocket> {
        // The kernel gives it the state that its socket had, such as FIN_WAIT2.
        if self.is_over {
            return None;
        }
        let identity = self.identity;
        Some(LiveSocket {
            protocol,
            local: self.end(OWN_ADDRESS, OWN_PORT)?,
            remote: self.end(OTHER_ADDRESS, OTHER_PORT)?,
            cgroup: self.cgroup,
            remembered: self.tag.and_then(remembered),
            other_cgroup: None,
            // Two words, the low one first.
            cookie: u64::from(word(&identity, COOKIE)?)
                | u64::from(word(&identity, COOKIE + 4)?) << 32,
            family: self.family,
            identity,
        })
    }

    fn listener(&self) -> Option<Listener> {
        let flags = |tag| word(tag, std::mem::offset_of!(SocketTag, flags));
        Some(Listener {
            local: self.end(OWN_ADDRESS, OWN_PORT)?,
            cgroup: self.cgroup,
            user: self.user,
            of_reeve: self
                .tag
                .and_then(flags)
                .is_some_and(|flags| flags & TAG_REEVE != 0),
            family: self.family,
            identity: self.identity,
        })
    }
}

/// Finds out to which of these the others are connected of which nothing is known.
fn find_other_ends(sockets: &mut [LiveSocket]) {
    let is_unknown =
        |socket: &LiveSocket| socket.protocol == protocol::TCP && socket.remembered.is_none();
    if !sockets.iter().any(is_unknown) {
        return;
    }
    let streams = sockets
        .iter()
        .filter(|socket| socket.protocol == protocol::TCP);
    let cgroups: HashMap<_, _> = streams
        .map(|socket| ((socket.local, socket.remote), socket.cgroup))
        .collect();
    for socket in sockets.iter_mut().filter(|socket| is_unknown(socket)) {
        socket.other_cgroup = cgroups.get(&(socket.remote, socket.local)).copied();
    }
}

/// A [`SocketTag`] as it lies in the map.
fn remembered(value: &[u8]) -> Option<Remembered> {
    let at = |field: usize| word(value, field);
    let flags = at(std::mem::offset_of!(SocketTag, flags))?;
    let direction = *value.get(std::mem::offset_of!(SocketTag, direction))?;
    Some(Remembered {
        workload: at(std::mem::offset_of!(SocketTag, workload))?,
        direction: (flags & TAG_DIRECTION != 0).then_some(
            if direction == Direction::Egress as u8 {
                Direction::Egress
            } else {
                Direction::Ingress
            },
        ),
        in_tunnel: flags & (TAG_REDIRECTED | TAG_TUNNELLED | TAG_ONWARD | TAG_REEVE) != 0,
        of_reeve: flags & TAG_REEVE != 0,
        generation: at(std::mem::offset_of!(SocketTag, generation))?,
        allowed: flags & TAG_ALLOWED != 0,
    })
}
