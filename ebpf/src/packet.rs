//! Every packet of every socket: the backstop behind the other hooks, and the only one for
//! sockets that were open before their workload was enrolled, for raw sockets, and for what
//! arrives.
//!
//! A packet of an established connection costs one look-up of what its socket remembers. Events
//! are emitted for new verdicts and for refused packets that no socket can remember.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::generated::{bpf_get_socket_cookie, bpf_sk_fullsock},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use reeve_common::{
    Address, Direction, Hook, NO_WORKLOAD, Reason, SocketTag, TAG_ALLOWED, TAG_LOCAL,
    TAG_REDIRECTED, TAG_REEVE, TAG_TUNNELLED, UNKNOWN_WORKLOAD, WORKLOAD_UNKNOWN, WorkloadEntry,
    WorkloadId, protocol,
};

use crate::{
    address::{self, field, is_loopback},
    event::{Connection, Outcome, count_verdict, report},
    flow, icmp,
    judge::{self, is_reeve, is_unknown},
    maps::{Settings, set_tag, settings, tag},
    namespace,
    parse::{Packet, RST, has_ports, is_plain, parse},
    segment,
    sender::{self, Onward},
    translate,
};

const PASS: i32 = 1;
const DROP: i32 = 0;

/// `SOCK_STREAM`.
const STREAM: u32 = 1;
/// `SOCK_RAW`.
const RAW: u32 = 3;
/// States of TCP in which a packet may complete a connection that others have opened: `TCP_LISTEN`, and
/// `TCP_SYN_SENT` and `TCP_SYN_RECV` where both ends open it.
const LISTEN: u32 = 10;
const SYN_SENT: u32 = 2;
const SYN_RECV: u32 = 3;
/// The loopback device's index, in every namespace.
pub const LOOPBACK_DEVICE: u32 = 1;

#[cgroup_skb(egress)]
pub fn reeve_egress(ctx: SkBuffContext) -> i32 {
    filter(&ctx, false)
}

#[cgroup_skb(ingress)]
pub fn reeve_ingress(ctx: SkBuffContext) -> i32 {
    filter(&ctx, true)
}

/// Who sends or receives a packet, and through what.
pub struct Subject {
    /// The workload.
    pub entry: WorkloadEntry,
    /// Found by the socket or its cgroup; otherwise only by the namespace, in which the kernel's
    /// own sockets are found too.
    pub by_socket: bool,
    /// The socket, not null.
    pub socket: *mut bpf_sock,
    /// Whether it is a raw one.
    pub raw: bool,
    /// Whether it is one of the kernel's own, by which it answers for connections, sends errors and
    /// finds neighbours. They are raw, and of the cgroup in which their namespace was made.
    pub kernels: bool,
    /// Whether it listens.
    pub listening: bool,
}

#[inline(always)]
fn filter(ctx: &SkBuffContext, arrives: bool) -> i32 {
    let skb = ctx.skb.skb;
    let Some(settings) = settings() else {
        return DROP;
    };
    let depths = settings.cgroup_depths;
    if depths == 0 {
        return PASS;
    }
    // SAFETY: the hook is only run for packets of a socket; the verifier wants it checked.
    let socket = unsafe { (*skb).__bindgen_anon_2.sk };
    if socket.is_null() {
        return DROP;
    }
    // SAFETY: not null.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return DROP;
    }
    // SAFETY: fields of a whole socket.
    let (kind, state) = unsafe {
        (
            field(&raw const (*socket).type_),
            field(&raw const (*socket).state),
        )
    };
    let listening = state == LISTEN;
    if arrives && (listening || state == SYN_SENT || state == SYN_RECV) {
        sender::forget_last();
    }
    let remembered = tag(socket);
    let at_reeves_port = kind == STREAM && is_reeves_port(port(socket), &settings);
    if kind == STREAM
        && !listening
        && let Some(tag) = remembered.as_deref()
        && tag.protocol == protocol::TCP
        && (!at_reeves_port || tag.flags & TAG_REEVE != 0)
        && let Some(verdict) = of_remembered(ctx, socket, tag, arrives, &settings)
    {
        return verdict;
    }
    // What reeve has accepted has a far end: who has such a socket has not reeve's listener.
    let inherited = remembered
        .as_deref()
        .is_some_and(|tag| tag.flags & TAG_REEVE != 0 && tag.remote_port == 0);
    let remembered_workload = remembered.as_deref().map_or(0, |tag| tag.workload);
    let found = subject(depths, skb, remembered_workload, arrives);
    let is_found = found.is_some();
    // Something in any case: the verifier follows the fields of what is not there, too.
    let nobody = WorkloadEntry {
        workload: 0,
        flags: 0,
    };
    let (entry, by_socket) = found.unwrap_or((nobody, false));
    // A listener stays reeve's with a later daemon, in another cgroup, that has inherited it.
    if is_reeve(&entry) || (listening && inherited) {
        let passes = !listening || !arrives || sender::to_reeve(skb, settings.outbound_port);
        return if passes { PASS } else { DROP };
    }
    if at_reeves_port {
        // Taken before `bind()` was watched, or given by the kernel: its holder would get what is meant
        // for the tunnel, also without listening (a simultaneous open, RFC 9293, section 3.5).
        if is_found || namespace::is_known(skb, arrives) {
            refuse_at_reeves_port(entry.workload, port(socket), arrives);
            return DROP;
        }
    }
    if arrives && sender::may_be_onward(skb) {
        let owner = if is_unknown(&entry) {
            UNKNOWN_WORKLOAD
        } else {
            entry.workload
        };
        match sender::onward(skb, owner, listening, settings.generation) {
            Onward::Pass => return PASS,
            Onward::Refuse => return DROP,
            Onward::No => {}
        }
    }
    if !is_found {
        let may_leak = !arrives && kind == RAW && !is_on_loopback(skb);
        if may_leak && namespace::is_known(skb, false) && icmp::is_leak(skb) {
            // It is none of one workload's, so that there is none to tell of.
            let outcome = Outcome::deny(Reason::ForgedSource);
            count_verdict(Direction::Egress as u8, outcome);
            return DROP;
        }
        return PASS;
    }
    let subject = Subject {
        entry,
        by_socket,
        socket,
        raw: kind == RAW,
        kernels: kind == RAW && namespace::is_kernels(skb, !by_socket),
        listening,
    };
    if judge_packet(ctx, arrives, &settings, &subject) {
        PASS
    } else {
        DROP
    }
}

/// Whether a port is one of reeve's own.
#[inline(always)]
pub fn is_reeves_port(port: u16, settings: &Settings) -> bool {
    port == settings.outbound_port || port == settings.tunnel_port
}

/// Somebody other than reeve holds one of its ports, in a workload's namespace or as a workload.
#[inline(never)]
fn refuse_at_reeves_port(workload: WorkloadId, port: u16, arrives: bool) {
    let (hook, direction) = if arrives {
        (Hook::PacketIngress, Direction::Ingress)
    } else {
        (Hook::PacketEgress, Direction::Egress)
    };
    let mut connection = Connection::new(hook);
    connection.workload = workload;
    connection.direction = direction as u8;
    connection.protocol = protocol::TCP;
    connection.local_port = port;
    report(&connection, Outcome::deny(Reason::ReservedPort));
}

/// The port that a socket is bound to, host byte order.
#[inline(always)]
pub fn port(socket: *mut bpf_sock) -> u16 {
    // SAFETY: a field of a whole socket.
    field(unsafe { &raw const (*socket).src_port }) as u16
}

/// What a TCP socket remembers decides, as long as the packet is what the socket was judged for.
#[inline(always)]
fn of_remembered(
    ctx: &SkBuffContext,
    socket: *mut bpf_sock,
    tag: &SocketTag,
    arrives: bool,
    settings: &Settings,
) -> Option<i32> {
    if tag.flags & TAG_REEVE != 0 {
        return Some(PASS);
    }
    let stays = is_on_loopback(ctx.skb.skb);
    if tag.flags & (TAG_REDIRECTED | TAG_TUNNELLED) != 0 {
        // The tunnel judges it, and both its ends are here. What leaves all the same was turned
        // aside, and is judged like a connection that nobody has seen before.
        return stays.then_some(PASS);
    }
    if tag.generation != settings.generation || (tag.flags & TAG_LOCAL != 0 && !stays) {
        return None;
    }
    if tag.flags & TAG_ALLOWED != 0 {
        // One with options or further headers may go elsewhere than its socket is connected to, and
        // so may one that was translated.
        let expected = if arrives {
            stays || is_plain(ctx)
        } else {
            translate::leaves_as_asked(ctx.skb.skb, socket, tag)
        };
        return expected.then_some(PASS);
    }
    Some(if is_reset(ctx) { PASS } else { DROP })
}

/// Whether a packet ends its connection: the other end of one that is refused shall know.
#[inline(always)]
fn is_reset(ctx: &SkBuffContext) -> bool {
    let mut packet = Packet::new();
    parse(ctx.skb.skb, &mut packet)
        && packet.protocol == protocol::TCP
        && packet.tcp_flags & RST != 0
}

/// The workload of a packet: by the cgroup in which its socket was made, else by what a hook
/// wrote down when a workload used the socket, else by the namespace.
#[inline(always)]
fn subject(
    depths: u32,
    skb: *mut __sk_buff,
    remembered: WorkloadId,
    arrives: bool,
) -> Option<(WorkloadEntry, bool)> {
    if let Some(entry) = judge::owner(depths, skb) {
        return Some((entry, true));
    }
    let by_socket = remembered != NO_WORKLOAD;
    let workload = if by_socket {
        remembered
    } else {
        namespace::owner(skb, arrives)
    };
    let entry = match workload {
        NO_WORKLOAD => return None,
        UNKNOWN_WORKLOAD => WorkloadEntry {
            workload: NO_WORKLOAD,
            flags: WORKLOAD_UNKNOWN,
        },
        workload => WorkloadEntry { workload, flags: 0 },
    };
    Some((entry, by_socket))
}

/// Whether a workload sends under an address that it has no right to.
#[inline(never)]
fn is_forged(skb: *mut __sk_buff, subject: &Subject, source: &Address) -> bool {
    let workload = subject.entry.workload;
    subject.by_socket
        && workload != 0
        && judge::is_forged(source, workload, || namespace::owner(skb, false))
}

#[inline(always)]
fn judge_packet(
    ctx: &SkBuffContext,
    arrives: bool,
    settings: &Settings,
    subject: &Subject,
) -> bool {
    let mut connection = Connection::new(if arrives {
        Hook::PacketIngress
    } else {
        Hook::PacketEgress
    });
    connection.workload = subject.entry.workload;
    connection.direction = if arrives {
        Direction::Ingress as u8
    } else {
        Direction::Egress as u8
    };
    let mut packet = Packet::new();
    if !parse(ctx.skb.skb, &mut packet) {
        report(&connection, Outcome::deny(Reason::Malformed));
        return false;
    }
    connection.protocol = packet.protocol;
    if arrives {
        connection.local = packet.destination;
        connection.local_port = packet.destination_port;
        connection.remote = packet.source;
        connection.remote_port = packet.source_port;
    } else {
        connection.local = packet.source;
        connection.local_port = packet.source_port;
        connection.remote = packet.destination;
        connection.remote_port = packet.destination_port;
    }
    if packet.routed {
        report(&connection, Outcome::deny(Reason::SourceRouted));
        return false;
    }
    // From here on the connection of a packet that leaves is what its socket asked for.
    let translated = !arrives
        && !subject.raw
        && match packet.protocol {
            protocol::TCP if subject.listening => false,
            protocol::TCP => translate::of_stream(subject.socket, &mut connection),
            protocol::UDP => translate::of_datagram(subject.socket, &mut connection),
            _ => false,
        };
    let remote = if arrives {
        &packet.source
    } else {
        &packet.destination
    };
    let stays = stays(ctx.skb.skb, arrives, subject, &connection, remote);
    if !arrives && !stays && is_forged(ctx.skb.skb, subject, &packet.source) {
        report(&connection, Outcome::deny(Reason::ForgedSource));
        return false;
    }
    // Loopback may be shared, and what a raw socket writes there would be taken for another's.
    let is_raw_segment = subject.raw && has_ports(packet.protocol);
    if stays && !translated && !is_raw_segment {
        if packet.protocol == protocol::TCP && !subject.raw && !subject.listening {
            // Not remembered: the next packet takes this way again.
            let _ = remember(
                subject.socket,
                &connection,
                settings.generation,
                TAG_ALLOWED | TAG_LOCAL,
            );
        }
        return true;
    }
    if matches!(packet.protocol, protocol::ESP | protocol::AH)
        && !arrives
        && !subject.raw
        && is_secured(subject.socket, &connection.remote)
    {
        as_connected(subject.socket, &mut connection);
    }
    match connection.protocol {
        protocol::TCP => {
            if subject.raw {
                return segment::raw(&connection, &packet, settings, subject);
            }
            // What a socket asks of itself is not in question, whatever becomes of it is.
            let allowed =
                if translated && translate::is_settled(subject.socket, settings.generation) {
                    true
                } else if translated && judge::is_own(&connection.remote, connection.workload) {
                    let flags = TAG_ALLOWED | TAG_LOCAL;
                    // Not remembered: the next packet takes this way again.
                    let _ = remember(subject.socket, &connection, settings.generation, flags);
                    true
                } else {
                    segment::tcp(ctx.skb.skb, settings, subject, &mut connection, &packet)
                };
            allowed
                && (!translated
                    || translate::reaches(settings, subject, &mut connection, &packet, stays))
        }
        protocol::UDP if subject.raw => segment::raw(&connection, &packet, settings, subject),
        // The other family's number is a protocol like any other.
        protocol::ICMP | protocol::ICMPV6
            if (connection.protocol == protocol::ICMPV6) == packet.inet6 =>
        {
            icmp::icmp(
                ctx.skb.skb,
                arrives,
                settings,
                subject,
                &mut connection,
                &packet,
            )
        }
        _ => {
            // What was asked for is remembered as well: answers come from there. What is told of is
            // where the packet goes, below.
            if translated
                && !is_unknown(&subject.entry)
                && !judge::is_own(&connection.remote, connection.workload)
                && !flow::pass(&mut connection, settings, true, cookie(ctx.skb.skb))
            {
                return false;
            }
            if translated {
                connection.local_port = packet.source_port;
                connection.remote = packet.destination;
                connection.remote_port = packet.destination_port;
            }
            stays || flow(ctx.skb.skb, settings, subject, &mut connection)
        }
    }
}

/// Whether IPsec has made a packet of one that a connected socket sends: it goes to where the socket
/// is connected, as in transport mode. Only a raw socket writes IPsec's protocols by itself.
#[inline(never)]
fn is_secured(socket: *mut bpf_sock, destination: &Address) -> bool {
    // SAFETY: fields of a whole socket.
    unsafe {
        let connected = address::of_family(
            field(&raw const (*socket).family),
            &raw const (*socket).dst_ip4,
            &raw const (*socket).dst_ip6,
        );
        has_ports(field(&raw const (*socket).protocol) as u8)
            && field(&raw const (*socket).dst_port) != 0
            && connected == *destination
    }
}

/// What cannot be read in such a packet is what its socket says.
#[inline(always)]
fn as_connected(socket: *mut bpf_sock, connection: &mut Connection) {
    // SAFETY: fields of a whole socket.
    unsafe {
        connection.protocol = field(&raw const (*socket).protocol) as u8;
        connection.remote_port = u16::from_be(field(&raw const (*socket).dst_port));
    }
    connection.local_port = port(socket);
}

/// Whether a packet goes from the workload to itself: both its ends are the workload's, and it
/// takes the loopback device. The addresses alone say nothing, for a raw socket writes any of them;
/// and a packet to the workload under a stranger's address has the kernel answer the stranger. In a
/// namespace that several share, the daemon knows of no address whose it is: loopback's at one end
/// will do there, and `icmp::is_leak` looks at the kernel's answers.
///
/// A function of its own, as the other questions are that a packet is asked beside its verdict: what
/// they need does not lie on the stack while the verdict is found.
#[inline(never)]
fn stays(
    skb: *mut __sk_buff,
    arrives: bool,
    subject: &Subject,
    connection: &Connection,
    remote: &Address,
) -> bool {
    if !is_on_loopback(skb) {
        return false;
    }
    let workload = connection.workload;
    // What answers a redirected client bears the address that was asked for.
    let from_here = judge::is_own(&connection.local, workload)
        || (!arrives && subject.listening && translate::listens_here(subject.socket, workload));
    from_here && judge::is_own(remote, workload)
        || (is_loopback(&connection.local) || is_loopback(remote))
            && namespace::owner(skb, false) != workload
}

#[inline(always)]
pub fn is_on_loopback(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context.
    field(unsafe { &raw const (*skb).ifindex }) == LOOPBACK_DEVICE
}

/// Has the socket remember a verdict of this generation. Only sockets of TCP do, and raw ones.
#[inline(never)]
#[must_use]
pub fn remember(
    socket: *mut bpf_sock,
    connection: &Connection,
    generation: u32,
    flags: u32,
) -> bool {
    if socket.is_null() {
        return false;
    }
    let mut value = SocketTag {
        remote: connection.remote,
        since: 0,
        workload: connection.workload,
        peer: connection.peer,
        rule: connection.rule,
        generation,
        remote_port: connection.remote_port,
        protocol: connection.protocol,
        direction: connection.direction,
        flags,
    };
    if let Some(tag) = tag(socket) {
        value.since = tag.since;
    }
    set_tag(socket, &mut value)
}

/// Everything without a handshake.
#[inline(always)]
pub fn flow(
    skb: *mut __sk_buff,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
) -> bool {
    if is_unknown(&subject.entry) {
        report(connection, Outcome::deny(Reason::UnknownWorkload));
        return false;
    }
    // Where it opens a connection, as of SCTP, `connect()` told of the verdict before the socket had a port.
    let told = !subject.raw
        && tag(subject.socket).is_some_and(|tag| {
            tag.generation == settings.generation
                && tag.flags & TAG_ALLOWED != 0
                && tag.protocol == connection.protocol
                && tag.direction == connection.direction
                && tag.remote_port == connection.remote_port
                && tag.remote == connection.remote
        });
    flow::pass(connection, settings, told, cookie(skb))
}

/// The cookie of a packet's socket.
#[inline(always)]
fn cookie(skb: *mut __sk_buff) -> u64 {
    // SAFETY: `skb` is the program's context.
    unsafe { bpf_get_socket_cookie(skb.cast()) }
}
