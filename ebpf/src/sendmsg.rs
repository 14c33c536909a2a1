//! `sendmsg()` with a destination on a socket without a handshake: judged like a `connect()`,
//! except that a reply passes. `recvmsg()` that asks for the sender. By either, a socket that was made
//! elsewhere is the workload's that uses it.

use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use reeve_common::{Address, Direction, Hook, Reason};

use crate::{
    address::{self, field, is_loopback},
    connect::{
        PROCEED, REFUSE, adopt, adopt_used, named_address, named_port, named_protocol,
        namespace_owner, socket,
    },
    event::{Connection, Outcome, report},
    flow,
    judge::{self, is_reeve, is_unknown},
    maps::settings,
};

#[cgroup_sock_addr(sendmsg4)]
pub fn reeve_sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(ctx.sock_addr, false)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn reeve_sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg(ctx.sock_addr, true)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn reeve_recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(ctx.sock_addr)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn reeve_recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg(ctx.sock_addr)
}

/// What has arrived has arrived: the next packet is judged.
#[inline(always)]
fn recvmsg(ctx: *mut bpf_sock_addr) -> i32 {
    adopt_used(socket(ctx), named_protocol(ctx));
    PROCEED
}

/// The address that the message is sent under, unspecified where the kernel is to choose one of the
/// namespace's own.
#[inline(always)]
fn source_address(ctx: *mut bpf_sock_addr, inet6: bool) -> Address {
    // SAFETY: fields of the context, which is not null.
    unsafe {
        if inet6 {
            address::v6(&raw const (*ctx).msg_src_ip6)
        } else {
            address::v4(field(&raw const (*ctx).msg_src_ip4))
        }
    }
}

#[inline(always)]
fn sendmsg(ctx: *mut bpf_sock_addr, inet6: bool) -> i32 {
    let Some(settings) = settings() else {
        return REFUSE;
    };
    if settings.cgroup_depths == 0 {
        return PROCEED;
    }
    let Some(caller) = judge::caller(settings.cgroup_depths) else {
        return PROCEED;
    };
    if is_reeve(&caller) {
        return PROCEED;
    }
    if !adopt(socket(ctx), &caller, named_protocol(ctx)) {
        let mut connection = Connection::new(Hook::Sendmsg);
        connection.workload = caller.workload;
        report(&connection, Outcome::deny(Reason::MapFailure));
        return REFUSE;
    }
    let remote = named_address(ctx, inet6);
    // Under a stranger's address the kernel would answer the stranger.
    let source = source_address(ctx, inet6);
    let from_here = judge::is_from_here(&source, caller.workload, || namespace_owner(ctx));
    if from_here && is_loopback(&remote) {
        return PROCEED;
    }
    let mut connection = Connection::new(Hook::Sendmsg);
    connection.remote = remote;
    connection.remote_port = named_port(ctx);
    connection.protocol = named_protocol(ctx);
    connection.direction = Direction::Egress as u8;
    connection.workload = caller.workload;
    if is_unknown(&caller) {
        report(&connection, Outcome::deny(Reason::UnknownWorkload));
        return REFUSE;
    }
    if from_here && judge::is_own(&remote, caller.workload) {
        return PROCEED;
    }
    // SAFETY: a field of the hook's socket. The kernel has chosen a port before it asks.
    connection.local_port = field(unsafe { &raw const (*socket(ctx)).src_port }) as u16;
    // SAFETY: `ctx` is the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    if flow::pass(&mut connection, &settings, false, cookie) {
        PROCEED
    } else {
        REFUSE
    }
}
