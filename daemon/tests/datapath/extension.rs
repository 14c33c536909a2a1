//! What a packet's verdict is about: the protocol behind IPv6's further headers, and the ports of
//! protocols that have some.

use reeve_common::{
    Direction, Hook, Reason,
    protocol::{SCTP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{Scope, World, assert_refused};

/// Protocols with ports, besides TCP and UDP.
const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// A header that may stand in front of another one: its number, and what follows the number of the
/// next.
type Header = (u8, &'static [u8]);

/// Eight bytes of options that mean nothing.
const OPTIONS: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
/// Sixteen of them.
const MORE_OPTIONS: &[u8] = &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A segment routing header, all of whose stops lie behind.
const ROUTE_AT_ITS_END: &[u8] = &[
    2, 4, 0, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
];
/// Length in words, less two.
const TWELVE_BYTES_OF_AUTHENTICATION: &[u8] = &[1, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1];
/// A whole packet may have a fragment header. The reserved byte is no length.
const NO_FRAGMENT: &[u8] = &[0, 0, 0, 0, 0, 0, 1];
const NO_FRAGMENT_WITH_RESERVED_BITS: &[u8] = &[9, 0, 6, 0, 0, 0, 1];

/// A port's beginning of a packet's last header.
fn to_port(port: u8) -> [u8; 12] {
    [0, 99, 0, port, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// An IPv6 packet of SCTP from here to there.
fn packet(headers: &[Header], port: u8) -> Vec<u8> {
    let mut behind = Vec::new();
    let numbers = headers.iter().map(|(number, _)| *number).chain([SCTP]);
    let mut numbers = numbers.peekable();
    let first = numbers.next().unwrap();
    for ((_, rest), next) in headers.iter().zip(numbers) {
        behind.push(next);
        behind.extend_from_slice(rest);
    }
    behind.extend(to_port(port));
    let mut packet = vec![0x60, 0, 0, 0, 0, behind.len() as u8, first, 64];
    for last in [1, 2] {
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    packet.extend(behind);
    packet
}

/// A workload that may send SCTP to port 53 of the far end, and a socket to write packets with.
fn by_hand() -> (World, Socket) {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(SCTP, 53));
    world.apply();
    let socket = world.as_workload(|| {
        let any = Protocol::from(libc::IPPROTO_RAW);
        Socket::new(Domain::IPV6, Type::RAW, Some(any)).unwrap()
    });
    (world, socket)
}

#[test]
fn further_headers_hide_nothing() {
    let (mut world, socket) = by_hand();
    let to = world.there.port6(0);
    let send =
        |world: &World, packet: &[u8]| world.as_workload(|| socket.send_to(packet, &to.into()));
    for headers in [
        &[][..],
        &[(HOP_BY_HOP, OPTIONS)],
        &[(HOP_BY_HOP, MORE_OPTIONS)],
        &[(DESTINATION, OPTIONS)],
        &[(DESTINATION, MORE_OPTIONS)],
        &[(ROUTING, ROUTE_AT_ITS_END)],
        &[(AUTHENTICATION, TWELVE_BYTES_OF_AUTHENTICATION)],
        &[(FRAGMENT, NO_FRAGMENT)],
        &[(FRAGMENT, NO_FRAGMENT_WITH_RESERVED_BITS)],
        &[
            (HOP_BY_HOP, MORE_OPTIONS),
            (ROUTING, ROUTE_AT_ITS_END),
            (FRAGMENT, NO_FRAGMENT),
            (AUTHENTICATION, TWELVE_BYTES_OF_AUTHENTICATION),
            (DESTINATION, OPTIONS),
        ],
        &[(DESTINATION, OPTIONS); 7],
    ] {
        let sent = send(&world, &packet(headers, 53));
        sent.unwrap_or_else(|error| panic!("{headers:?}: {error}"));
        world.verdict_event(Hook::PacketEgress, true, Reason::NotTunnelled);
        assert_refused(send(&world, &packet(headers, 54)));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!(
            (event.protocol, event.remote_port),
            (SCTP, 54),
            "{headers:?}"
        );
        // The next is new again.
        world.datapath().end_flows(|_, _| true).unwrap();
    }
}

#[test]
fn what_cannot_be_read_to_its_end_is_refused() {
    let (mut world, socket) = by_hand();
    let to = world.there.port6(0);
    let mut cut = packet(&[(DESTINATION, OPTIONS)], 53);
    cut.truncate(40 + 4);
    for packet in [
        packet(&[(DESTINATION, OPTIONS); 8], 53),
        // More to come; the middle; the end.
        packet(&[(FRAGMENT, &[0, 0, 1, 0, 0, 0, 1])], 53),
        packet(&[(FRAGMENT, &[0, 0, 9, 0, 0, 0, 1])], 53),
        packet(&[(FRAGMENT, &[0, 0, 8, 0, 0, 0, 1])], 53),
        packet(&[(FRAGMENT, &[0, 0x80, 0, 0, 0, 0, 1])], 53),
        packet(
            &[(DESTINATION, OPTIONS), (FRAGMENT, &[0, 0, 1, 0, 0, 0, 1])],
            53,
        ),
        cut,
    ] {
        assert_refused(world.as_workload(|| socket.send_to(&packet, &to.into())));
        world.verdict_event(Hook::PacketEgress, false, Reason::Malformed);
    }
}

#[test]
fn every_protocol_with_ports_is_judged_by_them() {
    for protocol in [SCTP, DCCP, UDP_LITE] {
        let mut world = World::enrolled();
        world.peer(0);
        world.allow(Direction::Egress, Scope::Port(protocol, 53));
        // By hand nobody speaks UDP at all.
        world.allow(Direction::Egress, Scope::Protocol(UDP));
        world.apply();
        for (to, domain) in [
            (world.there.port4(0), Domain::IPV4),
            (world.there.port6(0), Domain::IPV6),
        ] {
            let socket = world.as_workload(|| {
                let protocol = Protocol::from(i32::from(protocol));
                Socket::new(domain, Type::RAW, Some(protocol)).unwrap()
            });
            let send = |port| world.as_workload(|| socket.send_to(&to_port(port), &to.into()));
            send(53).unwrap();
            assert_refused(send(54));
            let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
            assert_eq!((event.protocol, event.remote_port), (protocol, 54));
        }
    }
}
