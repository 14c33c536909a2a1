//! Connections over the loopback device that end at a listener: from a redirected client to reeve,
//! and from reeve to an application. The socket that sent the packet lives in the same namespace.
//! What it remembers says where the connection was meant to go, and for whom; a socket cannot be
//! mistaken for an earlier or a later one with the same addresses.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock, bpf_sock_tuple},
    helpers::generated::{bpf_get_socket_uid, bpf_sk_lookup_tcp, bpf_sk_release, bpf_tcp_sock},
};
use reeve_common::{
    Arriving, Direction, FlowKey, Hook, NO_WORKLOAD, ONWARD_MARK, Origin, Reason, SocketTag,
    TAG_ONWARD, TAG_REDIRECTED, TAG_WRONG_LISTENER, WorkloadId, protocol,
};

use crate::{
    address::{field, to_words},
    event::{Connection, Outcome, count_verdict, report},
    maps::{ARRIVING, LISTENERS_PACKET, tag},
    packet::is_on_loopback,
    parse::{ACK, Packet, RST, SYN, parse},
};

/// `BPF_F_CURRENT_NETNS` of `linux/bpf.h`.
const THIS_NAMESPACE: u64 = u64::MAX;
/// Length of an IPv4 `bpf_sock_tuple`; an IPv6 one fills the type.
const IPV4_TUPLE: u32 = 12;

/// Forgets what an earlier packet has left for the connection that it would complete. Whatever is accepted
/// now is completed by the packet that arrives now; the next one may be in another namespace, where the
/// same addresses are somebody else's.
#[inline(always)]
pub fn forget_last() {
    if let Some(arriving) = ARRIVING.get_ptr_mut(0) {
        // SAFETY: the value is this processor's.
        unsafe { (&raw mut (*arriving).generation).write_volatile(0) };
    }
}

/// Whether a packet that arrives at a listener of reeve's may pass. The connection that it may
/// complete will be known for reeve's. One to the outbound listener gets its origin with it.
///
/// A function of its own, for its buffers not to lie on the stack while other packets are judged.
#[inline(never)]
pub fn to_reeve(skb: *mut __sk_buff, outbound_port: u16) -> bool {
    let (Some(arriving), Some(packet)) = (ARRIVING.get_ptr_mut(0), LISTENERS_PACKET.get_ptr_mut(0))
    else {
        return false;
    };
    // SAFETY: the values are this processor's.
    let (arriving, packet) = unsafe { (&mut *arriving, &mut *packet) };
    *packet = Packet::new();
    if !parse(skb, packet) || packet.protocol != protocol::TCP {
        count_verdict(Direction::Ingress as u8, Outcome::deny(Reason::Malformed));
        return false;
    }
    if packet.tcp_flags & RST != 0 {
        return true;
    }
    arriving.origin.workload = NO_WORKLOAD;
    arriving.tunnelled = 0;
    if packet.destination_port == outbound_port
        && !(is_on_loopback(skb) && ask_sender(skb, packet, true, |tag| origin(tag, arriving)))
    {
        if packet.tcp_flags & SYN != 0 {
            refuse_without_origin(packet);
            return false;
        }
        // Of a connection that has begun: the daemon refuses what has no origin.
        return true;
    }
    // Nothing is said of reeve's own, so no generation is too old.
    file(arriving, packet, 1);
    true
}

/// What a redirected client asked for. False: the socket is nothing of the kind.
#[inline(always)]
fn origin(tag: &SocketTag, arriving: &mut Arriving) -> bool {
    if tag.flags & TAG_REDIRECTED == 0 {
        return false;
    }
    // Field by field: the value does not lie on the stack first.
    let origin: &mut Origin = &mut arriving.origin;
    origin.address = tag.remote;
    origin.port = tag.remote_port;
    origin.workload = tag.workload;
    origin.peer = tag.peer;
    origin.rule = tag.rule;
    true
}

/// A function of its own, for its buffer to lie on the stack only where it is needed.
#[inline(never)]
fn refuse_without_origin(packet: &Packet) {
    let mut connection = Connection::new(Hook::PacketIngress);
    connection.local = packet.destination;
    connection.local_port = packet.destination_port;
    connection.remote = packet.source;
    connection.remote_port = packet.source_port;
    connection.protocol = protocol::TCP;
    connection.direction = Direction::Ingress as u8;
    report(&connection, Outcome::deny(Reason::NoOrigin));
}

/// What is to be done with a packet that bears reeve's mark.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Onward {
    /// reeve's own socket did not send it: it is judged like any other.
    No,
    /// It passes.
    Pass,
    /// The listener is not the workload's.
    Refuse,
}

/// Whether a packet may be one of reeve's own to an application.
#[inline(always)]
pub fn may_be_onward(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context.
    field(unsafe { &raw const (*skb).mark }) == ONWARD_MARK && is_on_loopback(skb)
}

/// Judges such a packet: whose socket takes the connection is asked where it begins. `owner` is the
/// workload of the socket at which it arrives, [`NO_WORKLOAD`] where that is in no workload.
#[inline(never)]
pub fn onward(skb: *mut __sk_buff, owner: WorkloadId, listening: bool, generation: u32) -> Onward {
    let (Some(arriving), Some(packet)) = (ARRIVING.get_ptr_mut(0), LISTENERS_PACKET.get_ptr_mut(0))
    else {
        return Onward::No;
    };
    // SAFETY: the values are this processor's.
    let (arriving, packet) = unsafe { (&mut *arriving, &mut *packet) };
    *packet = Packet::new();
    if !parse(skb, packet) || packet.protocol != protocol::TCP {
        return Onward::No;
    }
    // So is a socket that opens a connection itself, and meets this one half-way.
    let opening = packet.tcp_flags & (SYN | ACK) == SYN;
    let mut meant = false;
    let sent_by_reeve = ask_sender(skb, packet, listening, |tag| {
        if tag.flags & TAG_ONWARD == 0 {
            return false;
        }
        meant = !(listening || opening)
            || tag.workload == owner
            || (owner == NO_WORKLOAD && is_roots(skb));
        if !meant {
            tag.flags |= TAG_WRONG_LISTENER;
        }
        true
    });
    if !sent_by_reeve {
        return Onward::No;
    }
    if !meant {
        count_verdict(
            Direction::Ingress as u8,
            Outcome::deny(Reason::WrongListener),
        );
        return Onward::Refuse;
    }
    if listening {
        arriving.tunnelled = 1;
        file(arriving, packet, generation);
    }
    Onward::Pass
}

/// Whether root made the socket of a packet: so do service managers that listen for a workload
/// until it runs. Any other process outside of all workloads has no right to what is meant for one.
#[inline(always)]
fn is_roots(skb: *mut __sk_buff) -> bool {
    // SAFETY: `skb` is the program's context.
    unsafe { bpf_get_socket_uid(skb) == 0 }
}

/// Leaves the connection of a packet for `sock_ops`.
#[inline(always)]
fn file(arriving: &mut Arriving, packet: &Packet, generation: u32) {
    let key: &mut FlowKey = &mut arriving.key;
    key.local = packet.destination;
    key.remote = packet.source;
    key.local_port = packet.destination_port;
    key.remote_port = packet.source_port;
    key.workload = NO_WORKLOAD;
    key.protocol = protocol::TCP;
    arriving.generation = generation;
}

/// Asks what the socket remembers that sent a TCP packet from this namespace. False where there is
/// none, or `ask` says so.
///
/// `in_flight` asks as well whether the socket has sent these very bytes and waits for their
/// acknowledgement, as it does with all that completes a handshake: a packet may still be on its
/// way when its socket is closed and another one has its addresses.
#[inline(always)]
fn ask_sender(
    skb: *mut __sk_buff,
    packet: &Packet,
    in_flight: bool,
    ask: impl FnOnce(&mut SocketTag) -> bool,
) -> bool {
    let socket = sender(skb, packet);
    if socket.is_null() {
        return false;
    }
    let answer = (!in_flight || is_in_flight(socket, packet.sequence))
        && match tag(socket) {
            Some(tag) => ask(tag),
            None => false,
        };
    // SAFETY: the socket was found here, and is not used any more.
    unsafe { bpf_sk_release(socket.cast()) };
    answer
}

/// Whether a socket has sent what begins with this sequence number, and has no acknowledgement.
#[inline(always)]
fn is_in_flight(socket: *mut bpf_sock, sequence: u32) -> bool {
    // SAFETY: the socket is not null.
    let tcp = unsafe { bpf_tcp_sock(socket) };
    if tcp.is_null() {
        return false;
    }
    // SAFETY: not null.
    let (first, next) = unsafe {
        (
            field(&raw const (*tcp).snd_una),
            field(&raw const (*tcp).snd_nxt),
        )
    };
    sequence.wrapping_sub(first) <= next.wrapping_sub(first)
}

/// The socket of this namespace that has sent a TCP packet, to be released; or null.
///
/// A function of its own, for its buffer not to lie on the stack while the packet is read.
#[inline(never)]
fn sender(skb: *mut __sk_buff, packet: &Packet) -> *mut bpf_sock {
    // As a packet of the opposite direction would name the connection.
    // SAFETY: numbers only, of which zero is one.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (near, far) = (to_words(&packet.destination), to_words(&packet.source));
    let (near_port, far_port) = (packet.destination_port.to_be(), packet.source_port.to_be());
    let length = if packet.inet6 {
        tuple.__bindgen_anon_1.ipv6.saddr = near;
        tuple.__bindgen_anon_1.ipv6.daddr = far;
        tuple.__bindgen_anon_1.ipv6.sport = near_port;
        tuple.__bindgen_anon_1.ipv6.dport = far_port;
        size_of::<bpf_sock_tuple>() as u32
    } else {
        tuple.__bindgen_anon_1.ipv4.saddr = near[3];
        tuple.__bindgen_anon_1.ipv4.daddr = far[3];
        tuple.__bindgen_anon_1.ipv4.sport = near_port;
        tuple.__bindgen_anon_1.ipv4.dport = far_port;
        IPV4_TUPLE
    };
    // SAFETY: `skb` is the program's context, and `tuple` is at least as long as is said.
    unsafe { bpf_sk_lookup_tcp(skb.cast(), &raw mut tuple, length, THIS_NAMESPACE, 0) }
}
