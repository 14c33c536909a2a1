//! Changes of a TCP socket's state: keeps original destinations with what the daemon accepts, knows
//! its connections to local applications again, and reports plaintext connections at their end.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
        BPF_TCP_SYN_SENT, bpf_sock, bpf_sock_ops,
    },
    helpers::{bpf_ktime_get_ns, bpf_setsockopt},
    macros::sock_ops,
    programs::SockOpsContext,
};
use reeve_common::{
    Address, Direction, FlowEntry, FlowKey, Hook, LOCAL_CONGESTION_CONTROL, NO_WORKLOAD, Reason,
    SocketTag, TAG_ALLOWED, TAG_DIRECTION, TAG_LOCAL, TAG_ONWARD, TAG_REDIRECTED, TAG_REEVE,
    TAG_TUNNELLED, protocol,
};

use crate::{
    address::{self, field},
    event::{Connection, Outcome, report, report_closed},
    judge::judge,
    maps::{ARRIVING, ONWARD, Settings, set_origin, set_tag, settings, tag},
};

#[sock_ops]
pub fn reeve_sock_ops(ctx: SockOpsContext) -> u32 {
    changed(&ctx);
    0
}

#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    // First: the kernel asks about much more than this.
    let op = ctx.op();
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return;
    }
    let Some(settings) = settings() else { return };
    if settings.cgroup_depths == 0 {
        return;
    }
    // SAFETY: a field of the context.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return;
    }
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        accepted(ctx, socket, &settings);
        return;
    }
    let Some(tag) = tag(socket) else { return };
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        if tag.flags & TAG_ONWARD != 0 {
            going_onward(ctx, &settings);
        }
    } else if op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        connected(ctx, tag);
    } else if ctx.arg(1) == BPF_TCP_CLOSE {
        closed(ctx, tag, &settings);
    }
}

/// The connection as this socket sees it.
#[inline(always)]
fn tuple(ctx: &SockOpsContext) -> FlowKey {
    let (local, local_port) = local(ctx.ops);
    let (remote, remote_port) = remote(ctx.ops);
    FlowKey {
        local,
        remote,
        local_port,
        remote_port,
        workload: 0,
        protocol: protocol::TCP,
        reserved: [0; 7],
    }
}

#[inline(always)]
fn local(ops: *mut bpf_sock_ops) -> (Address, u16) {
    // SAFETY: fields of the context, which is not null.
    unsafe {
        let address = address::of_family(
            field(&raw const (*ops).family),
            &raw const (*ops).local_ip4,
            &raw const (*ops).local_ip6,
        );
        (address, field(&raw const (*ops).local_port) as u16)
    }
}

#[inline(always)]
fn remote(ops: *mut bpf_sock_ops) -> (Address, u16) {
    // SAFETY: as above. The port is four bytes in network byte order.
    unsafe {
        let address = address::of_family(
            field(&raw const (*ops).family),
            &raw const (*ops).remote_ip4,
            &raw const (*ops).remote_ip6,
        );
        let port = u32::from_be(field(&raw const (*ops).remote_port));
        (address, port as u16)
    }
}

/// Has the socket's changes of state reported too.
#[inline(always)]
fn watch(ctx: &SockOpsContext) {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    // A socket that cannot be watched is not reported at its end; its verdict was.
    let _ = ctx.set_cb_flags(flags as i32);
}

/// The other end is on this host: see [`LOCAL_CONGESTION_CONTROL`].
#[inline(always)]
fn stays_local(ctx: &SockOpsContext) {
    /// `IPPROTO_TCP` as a level of socket options.
    const SOL_TCP: i32 = 6;
    /// linux/tcp.h.
    const TCP_CONGESTION: i32 = 13;
    let mut name = LOCAL_CONGESTION_CONTROL;
    // SAFETY: `ctx.ops` is the program's context, and `name` outlives the call.
    let _ = unsafe {
        // A socket that keeps the host's own is only slower.
        bpf_setsockopt(
            ctx.ops.cast(),
            SOL_TCP,
            TCP_CONGESTION,
            name.as_mut_ptr().cast(),
            name.len() as i32,
        )
    };
}

/// reeve opens a connection to a local application: its packets shall be known again.
#[inline(always)]
fn going_onward(ctx: &SockOpsContext, settings: &Settings) {
    // SAFETY: asking for the time has no condition.
    let last_seen = unsafe { bpf_ktime_get_ns() };
    let entry = FlowEntry {
        last_seen,
        generation: settings.generation,
        direction: Direction::Ingress as u32,
    };
    let key = seen_from_workload(tuple(ctx));
    // Without an entry the connection is refused like any other.
    let _ = ONWARD.insert(&key, &entry, 0);
    stays_local(ctx);
    watch(ctx);
}

/// The same connection from its other end.
#[inline(always)]
fn seen_from_workload(key: FlowKey) -> FlowKey {
    FlowKey {
        local: key.remote,
        remote: key.local,
        local_port: key.remote_port,
        remote_port: key.local_port,
        ..key
    }
}

/// A workload's connection is established.
#[inline(always)]
fn connected(ctx: &SockOpsContext, tag: &mut SocketTag) {
    // SAFETY: asking for the time has no condition.
    tag.since = unsafe { bpf_ktime_get_ns() };
    if tag.flags & TAG_REDIRECTED == 0 {
        if tag.flags & (TAG_ALLOWED | TAG_LOCAL) == TAG_ALLOWED {
            watch(ctx);
        }
        return;
    }
    stays_local(ctx);
}

/// A listening socket has a new connection: either reeve's own, from a tunnel, or one whose last
/// packet `packet` has just let in.
#[inline(always)]
fn accepted(ctx: &SockOpsContext, socket: *mut bpf_sock, settings: &Settings) {
    let key = tuple(ctx);
    let mut remembered = SocketTag {
        remote: key.remote,
        // SAFETY: asking for the time has no condition.
        since: unsafe { bpf_ktime_get_ns() },
        workload: 0,
        peer: 0,
        rule: 0,
        generation: settings.generation,
        remote_port: key.remote_port,
        protocol: protocol::TCP,
        direction: Direction::Ingress as u8,
        flags: TAG_ALLOWED | TAG_DIRECTION,
    };
    let Some(arriving) = ARRIVING.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the value is this processor's.
    let arriving = unsafe { &mut *arriving };
    let mut expected = key;
    expected.workload = arriving.key.workload;
    if arriving.generation == 0 || arriving.key != expected {
        return;
    }
    let generation = core::mem::take(&mut arriving.generation);
    if arriving.tunnelled != 0 {
        arriving.tunnelled = 0;
        remembered.flags |= TAG_TUNNELLED;
        // Without a tag the application's answers are judged, and refused.
        let _ = set_tag(socket, &mut remembered);
        stays_local(ctx);
        return;
    }
    if arriving.key.workload == NO_WORKLOAD {
        remembered.flags |= TAG_REEVE;
        // Without a tag it is judged like a workload's, and refused.
        let _ = set_tag(socket, &mut remembered);
        if arriving.origin.workload != NO_WORKLOAD {
            set_origin(socket, &mut arriving.origin);
        }
        return;
    }
    if generation != settings.generation {
        return;
    }
    remembered.workload = arriving.key.workload;
    remembered.peer = arriving.peer;
    remembered.rule = arriving.rule;
    if !set_tag(socket, &mut remembered) {
        return;
    }
    watch(ctx);
    let mut connection = Connection::new(Hook::SocketState);
    connection.local = key.local;
    connection.local_port = key.local_port;
    connection.remote = key.remote;
    connection.remote_port = key.remote_port;
    connection.workload = remembered.workload;
    connection.protocol = protocol::TCP;
    connection.direction = Direction::Ingress as u8;
    connection.peer = remembered.peer;
    connection.rule = remembered.rule;
    connection.dry_run = arriving.dry_run;
    connection.dry_run_rule = arriving.dry_run_rule;
    report(
        &connection,
        if arriving.reason == Reason::Permissive as u8 {
            Outcome::allow(Reason::Permissive)
        } else {
            Outcome::allow(Reason::NoTunnel)
        },
    );
}

/// A watched connection has come to its end.
#[inline(always)]
fn closed(ctx: &SockOpsContext, tag: &SocketTag, settings: &Settings) {
    if tag.flags & TAG_ONWARD != 0 {
        // The application refused it, or it is long established and the entry gone.
        let _ = ONWARD.remove(&seen_from_workload(tuple(ctx)));
        return;
    }
    let before = ctx.arg(0);
    if tag.since == 0 || before == BPF_TCP_SYN_SENT {
        return;
    }
    // The kernel counts SYN and FIN, each of which takes a sequence number, as a byte.
    // SAFETY: fields of the context.
    let (mut sent, mut received) = unsafe {
        (
            field(&raw const (*ctx.ops).bytes_acked),
            field(&raw const (*ctx.ops).bytes_received),
        )
    };
    if tag.direction == Direction::Egress as u8 {
        sent = sent.saturating_sub(1);
    }
    let both =
        before == BPF_TCP_FIN_WAIT2 || before == BPF_TCP_LAST_ACK || before == BPF_TCP_CLOSING;
    if both {
        sent = sent.saturating_sub(1);
    }
    if both || before == BPF_TCP_CLOSE_WAIT {
        received = received.saturating_sub(1);
    }
    let (address, port) = local(ctx.ops);
    let reason = if is_revoked(tag, port, settings) {
        Reason::Revoked
    } else {
        Reason::Closed
    };
    report_closed(tag, reason, address, port, sent, received);
}

/// Whether a connection that is at its end was no longer allowed: so one that the daemon has ended
/// is told apart from one that the application has.
#[inline(always)]
fn is_revoked(tag: &SocketTag, local_port: u16, settings: &Settings) -> bool {
    if tag.generation == settings.generation {
        return tag.flags & TAG_ALLOWED == 0;
    }
    let mut connection = Connection::new(Hook::SocketState);
    connection.remote = tag.remote;
    connection.remote_port = tag.remote_port;
    connection.local_port = local_port;
    connection.workload = tag.workload;
    connection.protocol = protocol::TCP;
    connection.direction = tag.direction;
    let outcome = judge(&mut connection);
    !outcome.allowed() || outcome.through_tunnel()
}
