//! ICMP: echoes are judged, what keeps the network going is not.

use reeve_common::Settings;

use crate::{
    event::Connection,
    flow,
    packet::{Subject, flow},
    parse::Packet,
};

/// ICMP types of RFC 792: answers to a packet, which carry its beginning.
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_SOURCE_QUENCH: u8 = 4;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER_PROBLEM: u8 = 12;

/// ICMPv6 types of RFC 4443, 2710, 3810 and 4861.
const ICMPV6_LAST_ERROR: u8 = 4;
const ICMPV6_ECHO_REPLY: u8 = 129;
const MLD_QUERY: u8 = 130;
const MLD_DONE: u8 = 132;
const MLD_V2_REPORT: u8 = 143;
const NDP_FIRST: u8 = 133;
const NDP_LAST: u8 = 137;
/// Hop limits that say that a packet has not left, and does not leave, its link.
const NDP_HOPS: u8 = 255;
const MLD_HOPS: u8 = 1;

/// ICMP for IPv4.
#[inline(always)]
pub fn icmp(
    arrives: bool,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
) -> bool {
    let error = matches!(
        packet.icmp_type,
        ICMP_UNREACHABLE | ICMP_SOURCE_QUENCH | ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM
    );
    let reply = packet.icmp_type == ICMP_ECHO_REPLY;
    icmp_of_either(arrives, settings, subject, connection, packet, error, reply)
}

/// ICMP for IPv6. What keeps the link going is never in question.
#[inline(always)]
pub fn icmpv6(
    arrives: bool,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
) -> bool {
    let kind = packet.icmp_type;
    let ndp = (NDP_FIRST..=NDP_LAST).contains(&kind) && packet.hops == NDP_HOPS;
    let mld = ((MLD_QUERY..=MLD_DONE).contains(&kind) || kind == MLD_V2_REPORT)
        && packet.hops == MLD_HOPS;
    // It is the kernel that speaks so. A workload that does is judged: it may write into such
    // messages what it likes, and send them to whom it likes.
    if (ndp || mld) && (arrives || !subject.by_socket) {
        return true;
    }
    let error = kind <= ICMPV6_LAST_ERROR;
    let reply = kind == ICMPV6_ECHO_REPLY;
    icmp_of_either(arrives, settings, subject, connection, packet, error, reply)
}

#[inline(always)]
fn icmp_of_either(
    arrives: bool,
    settings: &Settings,
    subject: &Subject,
    connection: &mut Connection,
    packet: &Packet,
    error: bool,
    reply: bool,
) -> bool {
    // Errors that arrive concern what the workload sent; those that the kernel sends concern
    // what it received. A workload that makes its own is judged.
    if error && (arrives || !subject.by_socket) {
        return true;
    }
    connection.local_port = packet.icmp_id;
    if reply {
        connection.direction = flow::opposite(connection.direction);
    }
    flow(settings, subject, connection)
}
