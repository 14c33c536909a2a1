//! UDP and ICMP: no handshake, no tunnel, the same policy.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
};

use reeve_common::{
    Direction, Hook, Reason,
    protocol::{ICMP, UDP},
};

use crate::{
    place::{Place, ping},
    world::{MOMENT, PATIENCE, PEER, Scope, WORKLOAD, World, assert_refused},
};

fn udp(port: u16) -> impl Fn() -> UdpSocket {
    move || {
        let socket = UdpSocket::bind(("::", port)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket
    }
}

/// The far end's addresses, as a dual-stack socket names them.
fn addresses(place: &Place, port: u16) -> [SocketAddr; 2] {
    let SocketAddr::V4(v4) = place.port4(port) else {
        panic!("an IPv4 address")
    };
    [(v4.ip().to_ipv6_mapped(), port).into(), place.port6(port)]
}

fn arrives(socket: &UdpSocket) -> Option<SocketAddr> {
    match socket.recv_from(&mut [0; 16]) {
        Ok((_, from)) => Some(from),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            None
        }
    }
}

#[test]
fn a_workload_without_a_policy_sends_and_receives_nothing() {
    let mut world = World::enrolled();
    let here = world.as_workload(udp(1000));
    let there = world.as_far_end(udp(53));
    for to in addresses(&world.there, 53) {
        assert_refused(world.as_workload(|| here.send_to(b"x", to)));
        let event = world.verdict_event(Hook::Sendmsg, false, Reason::NoPolicy);
        assert_eq!((event.workload, event.remote_port), (WORKLOAD, 53));
        assert_eq!(event.local_port, 1000);
    }
    for to in addresses(&world.here, 1000) {
        world.as_far_end(|| there.send_to(b"x", to)).unwrap();
        assert_eq!(arrives(&here), None);
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        assert_eq!((event.local_port, event.remote_port), (1000, 53));
    }
}

#[test]
fn what_a_policy_allows_is_answered() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let here = world.as_workload(udp(1000));
    let there = world.as_far_end(udp(53));
    for to in addresses(&world.there, 53) {
        for _ in 0..3 {
            world.as_workload(|| here.send_to(b"x", to)).unwrap();
            let from = arrives(&there).expect("the question arrives");
            world.as_far_end(|| there.send_to(b"y", from)).unwrap();
            assert_eq!(arrives(&here), Some(to), "the answer arrives");
        }
        let event = world.verdict_event(Hook::Sendmsg, true, Reason::NotTunnelled);
        assert_eq!(
            (event.peer, event.direction),
            (PEER, Direction::Egress as u8)
        );
    }
    assert_eq!(world.other_events(), [], "a verdict is told once");

    // The far end's other ports are no answer.
    let other = world.as_far_end(udp(54));
    let [to, _] = addresses(&world.here, 1000);
    world.as_far_end(|| other.send_to(b"x", to)).unwrap();
    assert_eq!(arrives(&here), None);
}

#[test]
fn a_connected_socket_is_told_of_once() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let there = world.as_far_end(udp(53));
    for to in addresses(&world.there, 53) {
        let here = world.as_workload(udp(0));
        world.as_workload(|| here.connect(to)).unwrap();
        here.send(b"x").unwrap();
        let from = arrives(&there).expect("the question arrives");
        world.as_far_end(|| there.send_to(b"y", from)).unwrap();
        assert_eq!(arrives(&here), Some(to));
        world.verdict_event(Hook::PacketEgress, true, Reason::NotTunnelled);
    }
    assert_eq!(world.other_events(), []);

    // A socket that is connected sends elsewhere only what is allowed there.
    let [_, to] = addresses(&world.there, 53);
    let [_, other] = addresses(&world.there, 54);
    let here = world.as_workload(udp(0));
    world.as_workload(|| here.connect(to)).unwrap();
    assert_refused(world.as_workload(|| here.send_to(b"x", other)));

    world.state.tables.verdicts.clear();
    world.apply();
    assert_refused(here.send(b"x"));
}

#[test]
fn a_question_that_a_policy_lets_in_is_answered() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(UDP, 1000));
    world.apply();
    let here = world.as_workload(udp(1000));
    let there = world.as_far_end(udp(2000));
    for (from, to) in addresses(&world.there, 2000)
        .into_iter()
        .zip(addresses(&world.here, 1000))
    {
        assert_refused(world.as_workload(|| here.send_to(b"x", from)));
        world.as_far_end(|| there.send_to(b"x", to)).unwrap();
        assert_eq!(arrives(&here), Some(from));
        let event = world.verdict_event(Hook::PacketIngress, true, Reason::NotTunnelled);
        assert_eq!(event.direction, Direction::Ingress as u8);
        world.as_workload(|| here.send_to(b"y", from)).unwrap();
        assert_eq!(arrives(&there), Some(to));
    }
    // Once the policy is gone, so is the answer.
    world.state.tables.verdicts.clear();
    world.apply();
    let [from, _] = addresses(&world.there, 2000);
    assert_refused(world.as_workload(|| here.send_to(b"y", from)));
}

#[test]
fn what_stays_in_the_workload_is_not_judged() {
    let mut world = World::enrolled();
    let here = world.as_workload(udp(1000));
    let client = world.as_workload(udp(0));
    let [v4, v6] = addresses(&world.here, 1000);
    for to in [
        "[::1]:1000".parse().unwrap(),
        "[::ffff:127.0.0.1]:1000".parse().unwrap(),
        v4,
        v6,
    ] {
        world.as_workload(|| client.send_to(b"x", to)).unwrap();
        let from = arrives(&here).expect("it arrives");
        world.as_workload(|| here.send_to(b"y", from)).unwrap();
        assert_eq!(arrives(&client), Some(to));
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn a_ping_is_judged_and_answered() {
    let mut world = World::enrolled();
    world.peer(0);
    for to in [world.there.port4(0), world.there.port6(0)] {
        assert_refused(world.as_workload(|| ping(to)));
    }
    world.allow(Direction::Egress, Scope::Protocol(ICMP));
    world.apply();
    for to in [world.there.port4(0), world.there.port6(0)] {
        world.as_workload(|| ping(to)).unwrap();
    }
}

#[test]
fn an_error_about_what_was_sent_arrives() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Protocol(UDP));
    world.apply();
    for to in [world.there.port4(9), world.there.port6(9)] {
        let here = world.as_workload(|| {
            let any: SocketAddr = if to.is_ipv4() {
                "0.0.0.0:0".parse().unwrap()
            } else {
                "[::]:0".parse().unwrap()
            };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        here.send(b"x").unwrap();
        let refused = here.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}
