//! `sendmsg()` with a destination on a socket without a handshake: judged like a `connect()`,
//! except that a reply passes.

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use reeve_common::{Direction, Hook, Reason};

use crate::{
    address::{field, is_loopback},
    connect::{PROCEED, REFUSE, named_address, named_port, named_protocol, socket},
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
    let remote = named_address(ctx, inet6);
    if is_loopback(&remote) {
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
    if judge::workload_at(&remote) == Some(caller.workload) {
        return PROCEED;
    }
    // SAFETY: a field of the hook's socket. The kernel has chosen a port before it asks.
    connection.local_port = field(unsafe { &raw const (*socket(ctx)).src_port }) as u16;
    if flow::pass(&mut connection, settings.generation, false) {
        PROCEED
    } else {
        REFUSE
    }
}
