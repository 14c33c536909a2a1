//! `bind()`: reeve's ports are reeve's, in every namespace of a workload and for every workload;
//! and a socket that a workload binds is the workload's, whoever made it.

use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::bpf_get_netns_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use reeve_common::{Direction, Hook, Reason, SocketTag, TAG_REEVE, protocol};

use crate::{
    address::field,
    connect::{PROCEED, REFUSE, STREAM, adopt, named_address, named_port, named_protocol, socket},
    event::{Connection, Outcome, report},
    judge::{self, is_reeve},
    maps::{NAMESPACES, set_tag, settings},
    packet::is_reeves_port,
};

#[cgroup_sock_addr(bind4)]
pub fn reeve_bind4(ctx: SockAddrContext) -> i32 {
    bind(ctx.sock_addr, false)
}

#[cgroup_sock_addr(bind6)]
pub fn reeve_bind6(ctx: SockAddrContext) -> i32 {
    bind(ctx.sock_addr, true)
}

#[inline(always)]
fn bind(ctx: *mut bpf_sock_addr, inet6: bool) -> i32 {
    let Some(settings) = settings() else {
        return REFUSE;
    };
    if settings.cgroup_depths == 0 {
        return PROCEED;
    }
    let port = named_port(ctx);
    // SAFETY: a field of the context. By type and not by protocol, for MPTCP takes TCP's ports.
    let stream = field(unsafe { &raw const (*ctx).type_ }) == STREAM;
    let reserved = stream && is_reeves_port(port, &settings);
    let caller = judge::caller(settings.cgroup_depths);
    let workload = match caller {
        Some(entry) if is_reeve(&entry) => {
            if reserved {
                // Without a mark it is known by its cgroup, as long as that is reeve's.
                let _ = set_tag(socket(ctx), &mut of_reeve());
            }
            return PROCEED;
        }
        Some(entry) if !reserved => {
            if adopt(socket(ctx), &entry, named_protocol(ctx)) {
                return PROCEED;
            }
            let mut connection = Connection::new(Hook::Bind);
            connection.workload = entry.workload;
            report(&connection, Outcome::deny(Reason::MapFailure));
            return REFUSE;
        }
        Some(entry) => entry.workload,
        None if !reserved => return PROCEED,
        None => {
            // SAFETY: `ctx` is the program's context.
            let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
            // SAFETY: only asked whether it is there, and one word of it.
            match unsafe { NAMESPACES.get(cookie) } {
                Some(entry) => entry.workload,
                None => return PROCEED,
            }
        }
    };
    let mut connection = Connection::new(Hook::Bind);
    connection.local = named_address(ctx, inet6);
    connection.local_port = port;
    connection.protocol = named_protocol(ctx);
    connection.direction = Direction::Ingress as u8;
    connection.workload = workload;
    report(&connection, Outcome::deny(Reason::ReservedPort));
    REFUSE
}

/// What a listener of reeve's remembers.
#[inline(always)]
fn of_reeve() -> SocketTag {
    SocketTag {
        remote: [0; 16],
        since: 0,
        workload: 0,
        peer: 0,
        rule: 0,
        generation: 0,
        remote_port: 0,
        protocol: protocol::TCP,
        direction: Direction::Ingress as u8,
        flags: TAG_REEVE,
    }
}
