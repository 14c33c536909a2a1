//! `setsockopt()`: what a workload tells and hears by packets that are none of its sockets'; and a
//! socket whose options a workload sets is the workload's, whoever made it.
//!
//! The kernel tells the link of each multicast group that a socket joins, so that joining is a
//! matter of policy. And it files the beginning of packets that ICMP errors enclose into the error
//! queues of sockets, without any hook between: only TCP's have one.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sockopt},
    helpers::bpf_get_netns_cookie,
    macros::cgroup_sockopt,
    programs::SockoptContext,
};
use reeve_common::{Direction, Hook, NO_WORKLOAD, Reason, WorkloadEntry, ipv4_mapped, protocol};

use crate::{
    address::field,
    connect::{PROCEED, REFUSE, STREAM, adopt_used},
    event::{Connection, Outcome, report},
    judge::{self, is_reeve, is_unknown, judge},
    maps::{NAMESPACES, Settings, settings},
};

/// `IPPROTO_IP` and `IPPROTO_IPV6`, as levels of options.
const IP: i32 = 0;
const IPV6: i32 = 41;

/// Options of `linux/in.h` and `linux/in6.h`.
const IP_RECVERR: i32 = 11;
const IPV6_RECVERR: i32 = 25;
const IP_ADD_MEMBERSHIP: i32 = 35;
const IP_ADD_SOURCE_MEMBERSHIP: i32 = 39;
const IPV6_ADD_MEMBERSHIP: i32 = 20;
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;

/// The longest value that every kernel shows to a program: a page.
const LONGEST: i32 = 4096;
/// Has the kernel take the caller's own value, of which the program has seen the beginning.
const UNCHANGED: i32 = 0;
/// Has the call succeed without the kernel's doing anything.
const SKIPPED: i32 = -1;

/// Where a `group_req` has its address. A caller of 32 bits has it elsewhere; for such a one the kernel
/// runs no program.
const GROUP: usize = 8;
/// Address families, as the beginning of an address has them.
const INET: u16 = 2;
const INET6: u16 = 10;

#[cgroup_sockopt(setsockopt)]
pub fn reeve_setsockopt(ctx: SockoptContext) -> i32 {
    let ctx = ctx.sockopt;
    // SAFETY: fields of the context, which is not null.
    let (level, name, length) = unsafe {
        (
            field(&raw const (*ctx).level),
            field(&raw const (*ctx).optname),
            field(&raw const (*ctx).optlen),
        )
    };
    adopt_socket(socket(ctx));
    match (level, name) {
        (IP, IP_RECVERR) | (IPV6, IPV6_RECVERR) => error_queue(ctx),
        (IP, IP_ADD_MEMBERSHIP | IP_ADD_SOURCE_MEMBERSHIP)
        | (IPV6, IPV6_ADD_MEMBERSHIP)
        | (IP | IPV6, MCAST_JOIN_GROUP | MCAST_JOIN_SOURCE_GROUP) => join(ctx, level, name, length),
        _ => {
            if length > LONGEST {
                // SAFETY: a program of this hook may write the field.
                unsafe { (&raw mut (*ctx).optlen).write_volatile(UNCHANGED) };
            }
            PROCEED
        }
    }
}

/// Has a socket that carries IP be the caller's. Other kinds send no packet that is judged.
#[inline(always)]
fn adopt_socket(socket: *mut bpf_sock) {
    // SAFETY: fields of the hook's socket.
    let (family, protocol) = unsafe {
        (
            field(&raw const (*socket).family),
            field(&raw const (*socket).protocol),
        )
    };
    if family == u32::from(INET) || family == u32::from(INET6) {
        adopt_used(socket, protocol as u8);
    }
}

/// The workload that calls, or in whose namespace the socket is.
#[inline(always)]
fn subject(ctx: *mut bpf_sockopt, settings: &Settings) -> Option<WorkloadEntry> {
    if settings.cgroup_depths == 0 {
        return None;
    }
    if let Some(caller) = judge::caller(settings.cgroup_depths) {
        return (!is_reeve(&caller)).then_some(caller);
    }
    // SAFETY: `ctx` is the program's context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    // SAFETY: the entry is copied at once.
    let workload = unsafe { NAMESPACES.get(&cookie) }?.workload;
    (workload != NO_WORKLOAD).then_some(WorkloadEntry { workload, flags: 0 })
}

/// The socket of the call; never null.
#[inline(always)]
fn socket(ctx: *mut bpf_sockopt) -> *mut bpf_sock {
    // SAFETY: every call has a socket.
    unsafe { (*ctx).__bindgen_anon_1.sk }
}

/// A socket asks for an error queue. TCP looks for its own sequence number in what an error
/// encloses; others take what comes, also once they are connected elsewhere, or once the policy that
/// allowed their far end is gone, of which no hook tells. So no other kind gets one. The call
/// succeeds all the same, for resolvers that give up where it fails.
#[inline(always)]
fn error_queue(ctx: *mut bpf_sockopt) -> i32 {
    let Some(settings) = settings() else {
        return REFUSE;
    };
    // SAFETY: a field of the hook's socket.
    let kind = field(unsafe { &raw const (*socket(ctx)).type_ });
    if kind != STREAM && subject(ctx, &settings).is_some() {
        // SAFETY: a program of this hook may write the field.
        unsafe { (&raw mut (*ctx).optlen).write_volatile(SKIPPED) };
    }
    PROCEED
}

/// A socket joins a group, of which the kernel tells the link: allowed where ICMP to the group is
/// (the message is MLD, a part of ICMPv6, or IPv4's IGMP), or UDP to it at the socket's own port.
#[inline(always)]
fn join(ctx: *mut bpf_sockopt, level: i32, name: i32, length: i32) -> i32 {
    let Some(settings) = settings() else {
        return REFUSE;
    };
    let Some(subject) = subject(ctx, &settings) else {
        return PROCEED;
    };
    let mut connection = Connection::new(Hook::SocketOption);
    connection.workload = subject.workload;
    connection.direction = Direction::Egress as u8;
    connection.protocol = protocol::ICMP;
    if is_unknown(&subject) {
        report(&connection, Outcome::deny(Reason::UnknownWorkload));
        return REFUSE;
    }
    // The kernel would read the caller's memory again, which may be another by then.
    if length > LONGEST {
        report(&connection, Outcome::deny(Reason::Malformed));
        return REFUSE;
    }
    let socket = socket(ctx);
    // SAFETY: fields of the hook's socket.
    let (socket_protocol, port) = unsafe {
        (
            field(&raw const (*socket).protocol),
            field(&raw const (*socket).src_port) as u16,
        )
    };
    if socket_protocol == u32::from(protocol::UDP) {
        connection.remote_port = port;
    }
    let allowed = match (level, name) {
        (IP, IP_ADD_MEMBERSHIP | IP_ADD_SOURCE_MEMBERSHIP) => {
            !names_v4(ctx, 0, &mut connection) || may_join(&mut connection)
        }
        (IPV6, IPV6_ADD_MEMBERSHIP) => {
            !names_v6(ctx, 0, &mut connection) || may_join(&mut connection)
        }
        _ => !names_group(ctx, &mut connection) || may_join(&mut connection),
    };
    if allowed { PROCEED } else { REFUSE }
}

/// Bytes of the option's value. None: it is shorter, and the kernel refuses it.
#[inline(always)]
fn value<const N: usize>(ctx: *mut bpf_sockopt, at: usize) -> Option<[u8; N]> {
    // SAFETY: fields of the context, which the kernel gives as addresses.
    let (start, end) = unsafe {
        (
            field(&raw const (*ctx).__bindgen_anon_2.optval) as usize,
            field(&raw const (*ctx).__bindgen_anon_3.optval_end) as usize,
        )
    };
    if start + at + N > end {
        return None;
    }
    // SAFETY: the value is as long as that.
    Some(unsafe { *((start + at) as *const [u8; N]) })
}

/// Whether the value has an IPv4 address here, which is the group.
#[inline(always)]
fn names_v4(ctx: *mut bpf_sockopt, at: usize, connection: &mut Connection) -> bool {
    let Some(group) = value(ctx, at) else {
        return false;
    };
    connection.remote = ipv4_mapped(group);
    true
}

/// The same for IPv6.
#[inline(always)]
fn names_v6(ctx: *mut bpf_sockopt, at: usize, connection: &mut Connection) -> bool {
    let Some(group) = value(ctx, at) else {
        return false;
    };
    connection.remote = group;
    true
}

/// The same for a `sockaddr` of either family, behind the number of a device.
#[inline(always)]
fn names_group(ctx: *mut bpf_sockopt, connection: &mut Connection) -> bool {
    match value(ctx, GROUP).map(u16::from_ne_bytes) {
        Some(INET) => names_v4(ctx, GROUP + 4, connection),
        Some(INET6) => names_v6(ctx, GROUP + 8, connection),
        _ => false,
    }
}

/// Whether the group may be joined. A refusal is told.
#[inline(never)]
fn may_join(connection: &mut Connection) -> bool {
    let outcome = judge(connection);
    if outcome.allowed() {
        return true;
    }
    if connection.remote_port != 0 {
        connection.protocol = protocol::UDP;
        let allowed = judge(connection).allowed();
        connection.protocol = protocol::ICMP;
        if allowed {
            return true;
        }
    }
    report(connection, outcome);
    false
}
