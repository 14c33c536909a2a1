//! Connections over the loopback device that end at a listener: from a redirected client to reeve,
//! and from reeve to an application. The socket that sent the packet lives in the same namespace.
//! What it remembers says where the connection was meant to go, and for whom; a socket cannot be
//! mistaken for an earlier or a later one with the same addresses.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock, bpf_sock_tuple},
    helpers::generated::{
        bpf_get_socket_uid, bpf_sk_cgroup_id, bpf_sk_lookup_tcp, bpf_sk_release, bpf_tcp_sock,
    },
};
use reeve_common::{
    Arriving, Direction, FlowKey, Hook, NO_WORKLOAD, ONWARD_MARK, Origin, Reason, SETTINGS_BESIDE,
    SETTINGS_JOINING, SocketTag, TAG_ONWARD, TAG_REDIRECTED, TAG_REEVE, TAG_WRONG_LISTENER,
    WorkloadId, protocol,
};

use crate::{
    address::{self, field, is_mapped, to_words},
    event::{Connection, Outcome, count_verdict, report},
    judge::is_reeve,
    maps::{ARRIVING, LISTENERS_PACKET, WORKLOADS, has_flags, tag},
    packet::{is_on_loopback, port},
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
        && !(is_on_loopback(skb)
            && ask_sender(skb, packet, true, |_, tag| {
                tag.is_some_and(|tag| origin(tag, arriving))
            }))
    {
        // The other layout's programs know its origin, and refuse it where it has none there.
        let of_other = is_on_loopback(skb) && has_flags(SETTINGS_JOINING);
        if packet.tcp_flags & SYN != 0 && !of_other {
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
    let sent_by_reeve = ask_sender(skb, packet, listening, |socket, tag| {
        let Some(tag) = tag else {
            meant = is_of_other(socket);
            return meant;
        };
        if tag.flags & TAG_ONWARD == 0 {
            return false;
        }
        // Of another layout's daemon, whose programs know for whom it is meant.
        meant = !(listening || opening)
            || tag.workload == NO_WORKLOAD
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

/// Asks the socket that sent a TCP packet from this namespace, and what it remembers. False where there
/// is none, or `ask` says so.
///
/// `in_flight` asks as well whether the socket has sent these very bytes and waits for their
/// acknowledgement, as it does with all that completes a handshake: a packet may still be on its
/// way when its socket is closed and another one has its addresses.
#[inline(always)]
fn ask_sender(
    skb: *mut __sk_buff,
    packet: &Packet,
    in_flight: bool,
    ask: impl FnOnce(*mut bpf_sock, Option<&mut SocketTag>) -> bool,
) -> bool {
    let socket = sender(skb, packet);
    if socket.is_null() {
        return false;
    }
    let answer = (!in_flight || is_in_flight(socket, packet.sequence)) && ask(socket, tag(socket));
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

// === Sockets of another layout's daemon ===

/// What a socket of another layout's daemon to an application remembers, see [`SETTINGS_BESIDE`].
#[inline(always)]
pub fn onward_of_other() -> SocketTag {
    SocketTag {
        remote: [0; 16],
        since: 0,
        workload: NO_WORKLOAD,
        peer: 0,
        rule: 0,
        generation: 0,
        remote_port: 0,
        protocol: protocol::TCP,
        direction: Direction::Ingress as u8,
        flags: TAG_ONWARD | TAG_REEVE,
    }
}

/// Whether a socket is one of another layout's daemon to an application: it bears reeve's mark, and was made
/// in a cgroup of reeve's. `socket` is not null.
#[inline(always)]
fn is_of_other(socket: *mut bpf_sock) -> bool {
    // SAFETY: a field of a whole socket, which is not null.
    if !has_flags(SETTINGS_BESIDE) || field(unsafe { &raw const (*socket).mark }) != ONWARD_MARK {
        return false;
    }
    // SAFETY: the socket is not null.
    let cgroup = unsafe { bpf_sk_cgroup_id(socket.cast()) };
    // SAFETY: only asked for its flags.
    unsafe { WORKLOADS.get(&cgroup) }.is_some_and(is_reeve)
}

/// Whether a socket is an application's, and the other end of its connection is one of another layout's daemon.
///
/// A function of its own, as [`sender`].
#[inline(never)]
pub fn is_end_of_other(skb: *mut __sk_buff, socket: *mut bpf_sock) -> bool {
    if socket.is_null() || !may_be_onward(skb) || !has_flags(SETTINGS_BESIDE) {
        return false;
    }
    // As a packet of the opposite direction would name the connection of the other end.
    // SAFETY: numbers only, of which zero is one.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    // SAFETY: fields of a whole socket.
    let (family, far_port) = unsafe {
        (
            field(&raw const (*socket).family),
            field(&raw const (*socket).dst_port),
        )
    };
    let near_port = port(socket).to_be();
    // SAFETY: as above.
    let (near, far) = unsafe {
        (
            address::of_family(
                family,
                &raw const (*socket).src_ip4,
                &raw const (*socket).src_ip6,
            ),
            address::of_family(
                family,
                &raw const (*socket).dst_ip4,
                &raw const (*socket).dst_ip6,
            ),
        )
    };
    let is_mapped = is_mapped(&near);
    let (near, far) = (to_words(&near), to_words(&far));
    let length = if is_mapped {
        tuple.__bindgen_anon_1.ipv4.saddr = near[3];
        tuple.__bindgen_anon_1.ipv4.daddr = far[3];
        tuple.__bindgen_anon_1.ipv4.sport = near_port;
        tuple.__bindgen_anon_1.ipv4.dport = far_port;
        IPV4_TUPLE
    } else {
        tuple.__bindgen_anon_1.ipv6.saddr = near;
        tuple.__bindgen_anon_1.ipv6.daddr = far;
        tuple.__bindgen_anon_1.ipv6.sport = near_port;
        tuple.__bindgen_anon_1.ipv6.dport = far_port;
        size_of::<bpf_sock_tuple>() as u32
    };
    // SAFETY: `skb` is the program's context, and `tuple` is at least as long as is said.
    let other = unsafe { bpf_sk_lookup_tcp(skb.cast(), &raw mut tuple, length, THIS_NAMESPACE, 0) };
    if other.is_null() {
        return false;
    }
    let is = is_of_other(other);
    // SAFETY: the socket was found here, and is not used any more.
    unsafe { bpf_sk_release(other.cast()) };
    is
}
