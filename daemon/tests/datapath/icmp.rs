//! ICMP that arrives at a workload's raw socket, where nobody but the hook judges it: what keeps
//! the network going is let in, and what only looks like it is not.

use std::io::Read;

use reeve_common::{Hook, Reason};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{MOMENT, World};

const ECHO: u8 = 8;
const UNREACHABLE: u8 = 3;
const REDIRECT: u8 = 5;
const PACKET_TOO_BIG_V6: u8 = 2;
const ECHO_V6: u8 = 128;
const LISTENER_REPORT: u8 = 131;
const LISTENER_REPORT_V2: u8 = 143;
const ADVERTISEMENT: u8 = 136;
const EXPERIMENT_V6: u8 = 200;

/// What the workload has not asked for is told apart from all else by this.
const MARK: [u8; 4] = [0xca, 0xfe, 0xf0, 0x0d];

/// A message whose checksum is right for IPv4.
fn message(kind: u8) -> [u8; 24] {
    let mut message = [0; 24];
    message[0] = kind;
    message[20..].copy_from_slice(&MARK);
    let sum: u32 = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// Whether a workload that no policy is about hears this of the far end.
fn hears(world: &World, domain: Domain, protocol: Protocol, hops: u32, kind: u8) -> bool {
    let open = || {
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket
    };
    let here = world.as_workload(open);
    let to = if domain == Domain::IPV4 {
        world.here.port4(0)
    } else {
        world.here.port6(0)
    };
    world.as_far_end(|| {
        let socket = open();
        if domain == Domain::IPV6 {
            socket.set_unicast_hops_v6(hops).unwrap();
        }
        socket.send_to(&message(kind), &to.into()).unwrap();
    });
    // The link's own messages may come in between.
    let mut buffer = [0; 128];
    while let Ok(length) = (&here).read(&mut buffer) {
        if buffer[..length].ends_with(&MARK) {
            return true;
        }
    }
    false
}

#[test]
fn the_links_own_messages_arrive() {
    let mut world = World::enrolled();
    let v6 = (Domain::IPV6, Protocol::ICMPV6);
    for ((domain, protocol), hops, kind) in [
        (v6, 255, ADVERTISEMENT),
        (v6, 1, LISTENER_REPORT),
        (v6, 1, LISTENER_REPORT_V2),
    ] {
        assert!(
            hears(&world, domain, protocol, hops, kind),
            "{protocol:?} {kind}"
        );
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn whatever_else_arrives_is_judged() {
    let mut world = World::enrolled();
    let v4 = (Domain::IPV4, Protocol::ICMPV4);
    let v6 = (Domain::IPV6, Protocol::ICMPV6);
    for ((domain, protocol), hops, kind) in [
        (v4, 64, ECHO),
        (v4, 64, REDIRECT),
        // Errors that enclose no packet.
        (v4, 64, UNREACHABLE),
        (v6, 64, PACKET_TOO_BIG_V6),
        (v6, 64, ECHO_V6),
        (v6, 255, ECHO_V6),
        (v6, 255, EXPERIMENT_V6),
        // From beyond the link.
        (v6, 254, ADVERTISEMENT),
        (v6, 64, LISTENER_REPORT),
        (v6, 64, LISTENER_REPORT_V2),
        // Each family's number in the other.
        ((Domain::IPV6, Protocol::ICMPV4), 64, UNREACHABLE),
        ((Domain::IPV4, Protocol::ICMPV6), 255, PACKET_TOO_BIG_V6),
    ] {
        assert!(
            !hears(&world, domain, protocol, hops, kind),
            "{protocol:?} {kind}"
        );
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        assert_eq!(i32::from(event.protocol), i32::from(protocol));
    }
}
