//! Network address translation in the workload's own namespace (NAT).
//!
//! The hooks of packets stand behind it: what leaves bears the addresses that it really goes
//! between, and no longer those that its socket asked for. Both have to be allowed. What arrives
//! bears the addresses that its socket shall see; who really sent it is seen again in the answer,
//! which leaves for him.

use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use reeve_common::{
    Address, Direction, Reason, SocketTag, TAG_ALLOWED, TAG_DIRECTION, TAG_REDIRECTED, Translated,
    WorkloadId, protocol,
};

use crate::{
    address::{self, field, to_words},
    event::{Connection, Outcome, report},
    judge::{self, is_unknown},
    maps::{Settings, set_translated, tag, translated},
    packet::{Subject, port},
    parse::{self, Packet},
    segment,
};

/// Where the addresses and TCP's or UDP's ports lie in a packet whose first header is its only one.
const V4_SOURCE: usize = 12;
const V4_DESTINATION: usize = 16;
const V4_DESTINATION_PORT: usize = 22;
const V6_SOURCE: usize = 8;
const V6_DESTINATION: usize = 24;
const V6_DESTINATION_PORT: usize = 42;

/// Whether a TCP packet leaves from the address of its socket for the far end that was asked for.
/// Where that cannot be seen at once, it is not so.
#[inline(never)]
pub fn leaves_as_asked(skb: *mut __sk_buff, socket: *mut bpf_sock, tag: &SocketTag) -> bool {
    if socket.is_null() {
        return false;
    }
    let Some(data) = packet(skb, V4_DESTINATION_PORT + 2) else {
        return false;
    };
    let remote = to_words(&tag.remote);
    let own = to_words(&local(socket));
    // SAFETY: the packet is longer than what is read, and a load may lie anywhere in it.
    unsafe {
        if *(data as *const u8) == parse::V4_PLAIN {
            return word(data + V4_DESTINATION) == remote[3]
                && address::is_mapped(&tag.remote)
                && half(data + V4_DESTINATION_PORT) == tag.remote_port.to_be()
                && word(data + V4_SOURCE) == own[3];
        }
    }
    let Some(data) = packet(skb, V6_DESTINATION_PORT + 2) else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        *(data as *const u8) >> 4 == 6
            && *((data + parse::V6_NEXT_HEADER) as *const u8) == protocol::TCP
            && word(data + V6_DESTINATION) == remote[0]
            && word(data + V6_DESTINATION + 4) == remote[1]
            && word(data + V6_DESTINATION + 8) == remote[2]
            && word(data + V6_DESTINATION + 12) == remote[3]
            && half(data + V6_DESTINATION_PORT) == tag.remote_port.to_be()
            && word(data + V6_SOURCE) == own[0]
            && word(data + V6_SOURCE + 4) == own[1]
            && word(data + V6_SOURCE + 8) == own[2]
            && word(data + V6_SOURCE + 12) == own[3]
    }
}

/// Address of the packet, if it is at least so long.
///
/// The context is asked anew each time: the compiler would otherwise make one comparison of two, by
/// arithmetic on the packet's end, which the verifier refuses.
#[inline(always)]
fn packet(skb: *mut __sk_buff, length: usize) -> Option<usize> {
    // SAFETY: fields of the context, which the kernel gives as addresses of the packet.
    let (data, end) = unsafe {
        (
            field(&raw const (*skb).data) as usize,
            field(&raw const (*skb).data_end) as usize,
        )
    };
    (data + length <= end).then_some(data)
}

/// # Safety
///
/// Four bytes of the packet lie there.
#[inline(always)]
unsafe fn word(at: usize) -> u32 {
    field(at as *const u32)
}

/// # Safety
///
/// Two bytes of the packet lie there.
#[inline(always)]
unsafe fn half(at: usize) -> u16 {
    field(at as *const u16)
}

/// The far end of a socket, if it has one.
#[inline(always)]
fn peer(socket: *mut bpf_sock) -> (Address, u16) {
    // SAFETY: fields of a whole socket.
    unsafe {
        let address = address::of_family(
            field(&raw const (*socket).family),
            &raw const (*socket).dst_ip4,
            &raw const (*socket).dst_ip6,
        );
        (address, u16::from_be(field(&raw const (*socket).dst_port)))
    }
}

/// The far end that a connected TCP socket asked for.
#[inline(always)]
fn asked(socket: *mut bpf_sock) -> (Address, u16) {
    if let Some(tag) = tag(socket)
        && tag.protocol == protocol::TCP
        && tag.flags & (TAG_DIRECTION | TAG_REDIRECTED) != 0
    {
        return (tag.remote, tag.remote_port);
    }
    peer(socket)
}

/// The address that a socket has, or is bound to.
#[inline(always)]
fn local(socket: *mut bpf_sock) -> Address {
    // SAFETY: fields of a whole socket.
    unsafe {
        address::of_family(
            field(&raw const (*socket).family),
            &raw const (*socket).src_ip4,
            &raw const (*socket).src_ip6,
        )
    }
}

/// Whether a socket listens at an address of its workload's, or at all of them.
#[inline(never)]
pub fn listens_here(socket: *mut bpf_sock, workload: WorkloadId) -> bool {
    !socket.is_null() && judge::is_own(&local(socket), workload)
}

/// Whether a TCP socket knows that what it asked for is allowed in this generation.
#[inline(never)]
pub fn is_settled(socket: *mut bpf_sock, generation: u32) -> bool {
    !socket.is_null()
        && tag(socket).is_some_and(|tag| {
            tag.protocol == protocol::TCP
                && tag.generation == generation
                && tag.flags & TAG_ALLOWED != 0
        })
}

/// Whether a TCP packet leaves between other ends than those of its socket. `connection` is what
/// the packet says, and then what the socket asked for.
#[inline(never)]
pub fn of_stream(socket: *mut bpf_sock, connection: &mut Connection) -> bool {
    if socket.is_null() {
        return false;
    }
    let local = local(socket);
    let (remote, remote_port) = asked(socket);
    let local_port = port(socket);
    // A socket without a far end's port, such as a test run's, has not been asked for another.
    let differs = remote != connection.remote
        || (remote_port != connection.remote_port && remote_port != 0)
        || local != connection.local;
    // A port that is published is judged by the one at which its socket is.
    if local_port != 0 {
        connection.local_port = local_port;
    }
    if differs {
        connection.local = local;
        connection.remote = remote;
        connection.remote_port = remote_port;
    }
    differs
}

/// The same for UDP, which has an address of its own for each packet: only a socket that is
/// connected says what was asked for. One that is not says at which port it is answered.
#[inline(never)]
pub fn of_datagram(socket: *mut bpf_sock, connection: &mut Connection) -> bool {
    if socket.is_null() {
        return false;
    }
    let (remote, remote_port) = peer(socket);
    let local_port = port(socket);
    let differs = remote_port != 0
        && (remote != connection.remote
            || remote_port != connection.remote_port
            || local_port != connection.local_port);
    if local_port != 0 {
        connection.local_port = local_port;
    }
    if differs {
        connection.remote = remote;
        connection.remote_port = remote_port;
    }
    differs
}

/// Whether what a TCP packet was translated to is allowed, too; `connection` is what its socket
/// asked for. `stays` says that it does not leave the workload.
#[inline(never)]
pub fn reaches(
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
    stays: bool,
) -> bool {
    if subject.socket.is_null() {
        return false;
    }
    // Opened in the same direction as what was asked for.
    connection.direction = match tag(subject.socket) {
        Some(tag) if tag.flags & TAG_DIRECTION != 0 => tag.direction,
        _ => Direction::Egress as u8,
    };
    connection.remote = packet.destination;
    connection.remote_port = packet.destination_port;
    let known = known(subject.socket, connection, settings.generation);
    if let Some(allowed) = known {
        return allowed;
    }
    let outcome = if stays {
        Outcome::allow(Reason::NoTunnel)
    } else if is_unknown(&subject.entry) {
        Outcome::deny(Reason::UnknownWorkload)
    } else {
        segment::plaintext(connection)
    };
    let mut value = Translated {
        remote: connection.remote,
        generation: settings.generation,
        remote_port: connection.remote_port,
        direction: connection.direction,
        allowed: u8::from(outcome.allowed()),
    };
    // Where there is no memory for it, it is asked for again.
    set_translated(subject.socket, &mut value);
    if !outcome.allowed() {
        report(connection, outcome);
    }
    outcome.allowed()
}

/// What was found out about a translation in this generation.
#[inline(always)]
fn known(socket: *mut bpf_sock, connection: &Connection, generation: u32) -> Option<bool> {
    let translated = translated(socket)?;
    let same = translated.generation == generation
        && translated.direction == connection.direction
        && translated.remote_port == connection.remote_port
        && translated.remote == connection.remote;
    same.then_some(translated.allowed != 0)
}
