//! The sockets of a network namespace that carry a connection now, and their end: the kernel's
//! `sock_diag` (`sock_diag(7)`, `linux/inet_diag.h`), which no maintained library speaks whole.

use std::{
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
};

use reeve_common::{
    Direction, SocketTag, TAG_ALLOWED, TAG_DIRECTION, TAG_ONWARD, TAG_REDIRECTED, TAG_REEVE,
    TAG_TUNNELLED, WorkloadId, protocol,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::Netns;

/// `NETLINK_SOCK_DIAG`.
const NETLINK: i32 = 4;
/// Messages of the protocol.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// Messages of every netlink protocol, and flags of requests.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;

/// Bytes of a message's header, of a request and of an answer behind it, and of an attribute's
/// header; and what each is filled up to a multiple of.
const HEADER: usize = 16;
const REQUEST_LENGTH: usize = 56;
const ANSWER_LENGTH: usize = 72;
const ATTRIBUTE: usize = 4;
const ALIGNMENT: usize = 4;
/// Where an answer names its socket, and how long such a name is.
const IDENTITY: usize = 4;
const IDENTITY_LENGTH: usize = 48;
/// Where in it the socket's number is.
const COOKIE: usize = 40;

/// Attributes: what is asked of the sockets' storage, and what is answered.
const ASK_STORAGES: u16 = 2;
const ASK_MAP_FD: u16 = 1;
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;
const CGROUP_ID: u16 = 21;
/// What of an attribute's kind is not a flag.
const KIND: u16 = 0x3fff;

/// States of TCP in which there is a connection, and data may still pass: all but those of a
/// listener, of a handshake that has no socket yet, and of what has ended.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// A UDP socket that is connected.
const ESTABLISHED: u32 = 1 << 1;

/// The kernel fills at most this much with one part of its answer.
const PART: usize = 64 << 10;

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

/// A conversation with the kernel about the sockets of one namespace.
pub(super) struct Diagnosis {
    socket: Socket,
    buffer: Vec<u8>,
}

// === impl Diagnosis ===

impl Diagnosis {
    pub(super) fn open(netns: &Netns) -> io::Result<Self> {
        let kind = (
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Protocol::from(NETLINK),
        );
        let socket = netns.run(|| Socket::new(kind.0, kind.1, Some(kind.2)))?;
        Ok(Self {
            socket,
            buffer: vec![0; PART],
        })
    }

    /// Every connected TCP and UDP socket. `tags` is the map of what they remember.
    pub(super) fn sockets(&mut self, tags: BorrowedFd<'_>) -> io::Result<Vec<LiveSocket>> {
        let mut sockets = Vec::new();
        for (protocol, states) in [(protocol::TCP, CONNECTED), (protocol::UDP, ESTABLISHED)] {
            for family in [libc::AF_INET, libc::AF_INET6] {
                let family = family as u8;
                let mut request = request(family, protocol, states, &[0; IDENTITY_LENGTH]);
                let fd = tags.as_raw_fd().to_ne_bytes();
                request.extend(attribute(ASK_STORAGES, &attribute(ASK_MAP_FD, &fd)));
                self.ask(BY_FAMILY, REQUEST | DUMP, &request, |answer| {
                    sockets.extend(decode(answer, protocol));
                })?;
            }
        }
        Ok(sockets)
    }

    /// Ends a connection: TCP's other end gets a reset, the application an error. False where it
    /// has ended by itself meanwhile.
    pub(super) fn destroy(&mut self, socket: &LiveSocket) -> io::Result<bool> {
        let request = request(socket.family, socket.protocol, 0, &socket.identity);
        match self.ask(DESTROY, REQUEST | ACKNOWLEDGE, &request, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a request, and calls `answer` with each part of the answer until the last.
    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut answer: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Neither a sequence number nor an address: there is one question at a time.
        message.extend([0; 8]);
        message.extend(body);
        self.socket.send(&message)?;
        loop {
            let read = (&self.socket).read(&mut self.buffer)?;
            let mut rest = self.buffer.get(..read).unwrap_or_default();
            while let Some((kind, body, next)) = split_message(rest) {
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        // 0 acknowledges.
                        return match word(body, 0) {
                            Some(0) => Ok(()),
                            code => Err(io::Error::from_raw_os_error(
                                code.map_or(libc::EPROTO, |code| code.cast_signed().wrapping_neg()),
                            )),
                        };
                    }
                    BY_FAMILY => answer(body),
                    _ => {}
                }
                rest = next;
            }
        }
    }
}

/// A `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, states: u32, identity: &[u8; IDENTITY_LENGTH]) -> Vec<u8> {
    let mut request = Vec::with_capacity(REQUEST_LENGTH);
    request.extend([family, protocol, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.extend(identity);
    request
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (ATTRIBUTE + value.len()) as u16;
    let mut attribute = length.to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(ALIGNMENT), 0);
    attribute
}

/// The kind and the body of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = word(bytes, 0)? as usize;
    let kind = half(bytes, 4)?;
    let body = bytes.get(HEADER..length)?;
    let next = length.next_multiple_of(ALIGNMENT).min(bytes.len());
    Some((kind, body, bytes.get(next..)?))
}

/// The value of the first attribute of a kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(half(bytes, 0)?);
        let value = bytes.get(ATTRIBUTE..length)?;
        if half(bytes, 2)? & KIND == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..)?;
    }
}

/// A `struct inet_diag_msg` and its attributes.
fn decode(answer: &[u8], protocol: u8) -> Option<LiveSocket> {
    let family = *answer.first()?;
    let identity: [u8; IDENTITY_LENGTH] = answer
        .get(IDENTITY..IDENTITY + IDENTITY_LENGTH)?
        .try_into()
        .ok()?;
    let attributes = answer.get(ANSWER_LENGTH..)?;
    let [a, b, c, d, ..] = identity;
    let storage = find(attributes, STORAGES)
        .and_then(|storages| find(storages, STORAGE))
        .and_then(|storage| find(storage, STORAGE_VALUE));
    Some(LiveSocket {
        protocol,
        local: SocketAddr::new(ip(family, &identity, 4)?, u16::from_be_bytes([a, b])),
        remote: SocketAddr::new(ip(family, &identity, 20)?, u16::from_be_bytes([c, d])),
        cgroup: find(attributes, CGROUP_ID)
            .and_then(|id| id.try_into().ok())
            .map_or(0, u64::from_ne_bytes),
        remembered: storage.and_then(remembered),
        // Two words, the low one first.
        cookie: u64::from(word(&identity, COOKIE)?) | u64::from(word(&identity, COOKIE + 4)?) << 32,
        family,
        identity,
    })
}

fn ip(family: u8, identity: &[u8; IDENTITY_LENGTH], at: usize) -> Option<IpAddr> {
    if i32::from(family) == libc::AF_INET {
        let octets: [u8; 4] = identity.get(at..at + 4)?.try_into().ok()?;
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets: [u8; 16] = identity.get(at..at + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).to_canonical())
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
        generation: at(std::mem::offset_of!(SocketTag, generation))?,
        allowed: flags & TAG_ALLOWED != 0,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u16::from_ne_bytes(*bytes))
}
