//! The look-up of a socket for an arriving TCP connection or UDP datagram, in each workload's
//! namespace: the place where a refusal reaches a TCP client at once, as a reset. An ICMP error about a
//! datagram looks for the datagram's socket here as well.
//!
//! What passes here is judged once more when its packet reaches the socket, which reports it; here
//! only refusals are.

use aya_ebpf::{bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};
use reeve_common::{Direction, FlowKey, Hook, Reason, SETTINGS_JOINING, protocol};

use crate::{
    address::{self, FAMILY_INET6, field, is_mapped},
    event::{Connection, Outcome, report},
    flow,
    judge::{self, judge},
    maps::{ONWARD, has_flags, settings},
};

/// The kernel goes on looking.
const PASS: u32 = 1;
/// The connection is reset.
const DROP: u32 = 0;

#[sk_lookup]
pub fn reeve_lookup(ctx: SkLookupContext) -> u32 {
    lookup(ctx.lookup)
}

#[inline(always)]
fn lookup(ctx: *mut bpf_sk_lookup) -> u32 {
    // SAFETY: fields of the context, which is not null.
    let (family, ip_protocol) = unsafe {
        (
            field(&raw const (*ctx).family),
            field(&raw const (*ctx).protocol),
        )
    };
    let tcp = ip_protocol == u32::from(protocol::TCP);
    if !tcp && ip_protocol != u32::from(protocol::UDP) {
        return PASS;
    }
    let Some(settings) = settings() else {
        return DROP;
    };
    let mut connection = Connection::new(Hook::SocketLookup);
    connection.protocol = ip_protocol as u8;
    connection.direction = Direction::Ingress as u8;
    // SAFETY: as above.
    unsafe {
        connection.local = address::of_family(
            family,
            &raw const (*ctx).local_ip4,
            &raw const (*ctx).local_ip6,
        );
        connection.remote = address::of_family(
            family,
            &raw const (*ctx).remote_ip4,
            &raw const (*ctx).remote_ip6,
        );
        connection.local_port = field(&raw const (*ctx).local_port) as u16;
        connection.remote_port = u16::from_be(field(&raw const (*ctx).remote_port));
    }
    // In an IPv6 packet they would be judged as IPv4's, and answered elsewhere.
    if family == FAMILY_INET6 && (is_mapped(&connection.local) || is_mapped(&connection.remote)) {
        report(&connection, Outcome::deny(Reason::Malformed));
        return DROP;
    }
    if tcp && connection.local_port == settings.tunnel_port {
        return PASS;
    }
    // A connection of the other daemon's may have begun before these programs looked. At the packet it is
    // known.
    if tcp && has_flags(SETTINGS_JOINING) {
        return PASS;
    }
    let Some(workload) = judge::workload_at(&connection.local) else {
        return PASS;
    };
    if tcp && connection.local_port == settings.outbound_port {
        // What is redirected arrives at loopback's addresses.
        connection.workload = workload;
        report(&connection, Outcome::deny(Reason::ReservedPort));
        return DROP;
    }
    // Who writes such a source from elsewhere is found out at the packet, which comes by a device.
    if judge::is_own(&connection.remote, workload) {
        return PASS;
    }
    connection.workload = workload;
    let known = if tcp {
        is_onward(&connection)
    } else {
        flow::is_live(&mut connection, &settings)
    };
    if known {
        return PASS;
    }
    let outcome = judge(&mut connection);
    if outcome.allowed() {
        return PASS;
    }
    report(&connection, outcome);
    DROP
}

/// Whether reeve is opening this connection to a local application. Who writes such a source from
/// elsewhere is found out at the packet, too.
#[inline(always)]
fn is_onward(connection: &Connection) -> bool {
    let key = FlowKey {
        local: connection.local,
        remote: connection.remote,
        local_port: connection.local_port,
        remote_port: connection.remote_port,
        workload: 0,
        protocol: protocol::TCP,
        reserved: [0; 7],
    };
    // SAFETY: only asked whether it is there.
    unsafe { ONWARD.get(&key) }.is_some()
}
