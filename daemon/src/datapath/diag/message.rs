//! Messages of `sock_diag`: netlink's header, a request or an answer, and attributes. Header and
//! attributes are those of every netlink protocol.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Bytes of a message's header, of a request and of an answer behind it, and of an attribute's
/// header; and what each is filled up to a multiple of.
pub(in crate::datapath) const HEADER: usize = 16;
const REQUEST_LENGTH: usize = 56;
const ANSWER_LENGTH: usize = 72;
const ATTRIBUTE: usize = 4;
const ALIGNMENT: usize = 4;
/// Where an answer says which timer its socket has, names the socket, and how long such a name is; and
/// where it names its user.
const TIMER: usize = 2;
const IDENTITY: usize = 4;
pub(super) const IDENTITY_LENGTH: usize = 48;
const USER: usize = 64;
/// Where in such a name are the socket's own port and the other end's, both addresses, and the
/// socket's number.
pub(super) const OWN_PORT: Range<usize> = 0..2;
pub(super) const OTHER_PORT: Range<usize> = 2..4;
pub(super) const OWN_ADDRESS: Range<usize> = 4..20;
pub(super) const OTHER_ADDRESS: Range<usize> = 20..36;
pub(super) const COOKIE: usize = 40;

/// Attributes: what is asked of the sockets' storage, and what is answered.
const ASK_STORAGES: u16 = 2;
const ASK_MAP_FD: u16 = 1;
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;
const CGROUP_ID: u16 = 21;
/// The timer of what is left of a socket that both the application and the kernel are done with, and that
/// only waits for the other end: it remembers nothing, nor in which cgroup it was made.
const TIME_WAIT: u8 = 3;
/// What of an attribute's kind is not a flag.
const KIND: u16 = 0x3fff;

/// A `struct inet_diag_msg` and its attributes.
pub(super) struct Answer<'a> {
    pub(super) family: u8,
    pub(super) identity: [u8; IDENTITY_LENGTH],
    pub(super) user: u32,
    pub(super) cgroup: u64,
    /// No socket any more, whatever its state is said to be.
    pub(super) is_over: bool,
    /// The socket's [`SocketTag`].
    pub(super) tag: Option<&'a [u8]>,
}

/// A `struct inet_diag_req_v2`.
pub(super) fn request(
    family: u8,
    protocol: u8,
    states: u32,
    identity: &[u8; IDENTITY_LENGTH],
) -> Vec<u8> {
    let mut request = Vec::with_capacity(REQUEST_LENGTH);
    request.extend([family, protocol, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.extend(identity);
    request
}

/// Asks for what each socket remembers in the map `tags`.
pub(super) fn ask_storage(tags: BorrowedFd<'_>) -> Vec<u8> {
    let fd = tags.as_raw_fd().to_ne_bytes();
    attribute(ASK_STORAGES, &attribute(ASK_MAP_FD, &fd))
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
pub(in crate::datapath) fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = word(bytes, 0)? as usize;
    let kind = half(bytes, 4)?;
    let body = bytes.get(HEADER..length)?;
    let next = length.next_multiple_of(ALIGNMENT).min(bytes.len());
    Some((kind, body, bytes.get(next..)?))
}

/// The value of the first attribute of a kind.
pub(in crate::datapath) fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(half(bytes, 0)?);
        let value = bytes.get(ATTRIBUTE..length)?;
        if half(bytes, 2)? & KIND == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..)?;
    }
}

/// What an answer says of a socket.
pub(super) fn decode(answer: &[u8]) -> Option<Answer<'_>> {
    let attributes = answer.get(ANSWER_LENGTH..)?;
    Some(Answer {
        family: *answer.first()?,
        identity: answer
            .get(IDENTITY..IDENTITY + IDENTITY_LENGTH)?
            .try_into()
            .ok()?,
        user: word(answer, USER)?,
        cgroup: find(attributes, CGROUP_ID)
            .and_then(|id| id.try_into().ok())
            .map_or(0, u64::from_ne_bytes),
        is_over: *answer.get(TIMER)? == TIME_WAIT,
        tag: find(attributes, STORAGES)
            .and_then(|storages| find(storages, STORAGE))
            .and_then(|storage| find(storage, STORAGE_VALUE)),
    })
}

pub(in crate::datapath) fn word(bytes: &[u8], at: usize) -> Option<u32> {
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

// === impl Answer ===

impl Answer<'_> {
    /// One end of the socket's connection.
    pub(super) fn end(&self, address: Range<usize>, port: Range<usize>) -> Option<SocketAddr> {
        let octets: [u8; 16] = self.identity.get(address)?.try_into().ok()?;
        let ip = if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = octets;
            IpAddr::from([a, b, c, d])
        } else {
            Ipv6Addr::from(octets).to_canonical()
        };
        let port = self.identity.get(port)?.try_into().ok()?;
        Some(SocketAddr::new(ip, u16::from_be_bytes(port)))
    }
}
