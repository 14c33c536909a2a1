//! The kernel's own sockets, which answer in a workload's namespace without a socket of its own:
//! they belong to the root cgroup, and only a datapath that is attached there sees them.

use std::{
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Instant,
};

use reeve_common::{
    Direction, Hook, Reason,
    protocol::{ICMP, ICMPV6, TCP, UDP},
};

use crate::{
    place::ping,
    world::{MOMENT, PATIENCE, Scope, World, reset_at_once},
};

fn enrolled() -> World {
    let mut world = World::of_machine();
    world.enrol();
    world.peer(0);
    world.apply();
    world
}

#[test]
fn the_kernel_answers_a_ping_that_a_policy_lets_in() {
    let mut world = enrolled();
    let both = [world.here.port4(0), world.here.port6(0)];
    for to in both {
        let silent = world.as_far_end(|| ping(to)).unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::WouldBlock);
    }
    world.allow(Direction::Ingress, Scope::Protocol(ICMP));
    world.apply();
    for to in both {
        world.as_far_end(|| ping(to)).unwrap();
    }
}

#[test]
fn the_kernel_resets_what_nobody_listens_for() {
    let mut world = enrolled();
    for to in [world.here.port4(80), world.here.port6(80)] {
        world.as_far_end(|| reset_at_once(to));
    }
    assert_eq!(world.other_events(), []);
}

/// What the far end is told of a datagram to a port of the workload at which no socket listens.
fn told_of_a_datagram(world: &World, to: SocketAddr) -> ErrorKind {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let told = world.as_far_end(|| {
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket.connect(to).unwrap();
        socket.send(b"x").unwrap();
        socket.recv(&mut [0])
    });
    told.unwrap_err().kind()
}

#[test]
fn the_kernel_says_that_nobody_hears_a_datagram() {
    let mut world = enrolled();
    world.allow(Direction::Ingress, Scope::Port(UDP, 9));
    world.apply();
    for to in [world.here.port4(9), world.here.port6(9)] {
        assert_eq!(told_of_a_datagram(&world, to), ErrorKind::ConnectionRefused);
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn the_kernel_says_nothing_of_a_datagram_that_no_policy_lets_in() {
    let mut world = enrolled();
    world.allow(Direction::Ingress, Scope::Port(UDP, 9));
    world.allow(Direction::Egress, Scope::Protocol(UDP));
    world.apply();
    for to in [world.here.port4(10), world.here.port6(10)] {
        assert_eq!(told_of_a_datagram(&world, to), ErrorKind::WouldBlock);
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert!([ICMP, ICMPV6].contains(&event.protocol));
    }
}

#[test]
fn the_kernel_acknowledges_the_end_of_a_connection_that_is_gone() {
    let mut world = enrolled();
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let client = world.as_workload(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        // The workload closes first, so that its end waits in TIME_WAIT.
        drop(client);
        assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
        drop(accepted);
    }
    // An end that is not acknowledged would wait in LAST_ACK.
    let waiting = || {
        let tables = world.there.netns.run(|| {
            Ok(["tcp", "tcp6"].map(|table| {
                std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap()
            }))
        });
        tables
            .unwrap()
            .join("")
            .lines()
            .filter(|line| line.split_whitespace().nth(3) == Some("09"))
            .count()
    };
    let deadline = Instant::now() + PATIENCE;
    while waiting() > 0 {
        assert!(Instant::now() < deadline, "an end is not acknowledged");
    }
}
