//! A network namespace that was made inside the workload's own cgroup, as a container engine in a
//! unit makes it: the kernel's sockets for neighbours and resets are then of that cgroup, and speak for
//! the kernel all the same.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use reeve::datapath::address;
use reeve_common::{
    Direction, Hook, PeerEntry, Reason,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    place::{Place, wire},
    world::{CLASS, PATIENCE, PEER, Scope, World, assert_refused, reset_at_once},
};

/// A workload, a namespace that it has made, and a far end of that namespace.
fn nested() -> (World, Place, Place) {
    let mut world = World::of_machine();
    world.enrol();
    let inner = Place::made_in(1, &world.workload);
    let outer = Place::new(2);
    wire(&inner, &outer);
    for ip in [outer.v4, outer.v6] {
        let entry = PeerEntry {
            class: CLASS,
            peer: PEER,
            flags: 0,
        };
        world.state.tables.peers.push((128, address(ip), entry));
    }
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    (world, inner, outer)
}

#[test]
fn ipv6_finds_its_neighbours_in_a_namespace_that_the_workload_made() {
    let (mut world, inner, outer) = nested();
    let server = outer.run(&world.stranger, || UdpSocket::bind("[::]:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let listener = inner.run(&world.workload, || TcpListener::bind("[::]:80").unwrap());
    for (to, own) in [
        (outer.port4(53), inner.port4(80)),
        (outer.port6(53), inner.port6(80)),
    ] {
        inner.run(&world.workload, || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any).unwrap().send_to(b"x", to).unwrap();
        });
        server.recv(&mut [0]).unwrap();
        // The other way round, it answers whoever looks for it.
        outer.ip(&["neigh flush dev wire".into()]);
        let _client = outer.run(&world.stranger, || {
            TcpStream::connect_timeout(&own, PATIENCE).unwrap()
        });
        listener.accept().unwrap();
        // And whoever finds no listener is told at once.
        let closed = SocketAddr::new(own.ip(), 81);
        outer.run(&world.stranger, || reset_at_once(closed));
    }
    let of_kernel = |event: &reeve_common::Event| event.hook == Hook::PacketEgress as u8;
    assert!(!world.other_events().iter().any(of_kernel));
}

#[test]
fn a_raw_socket_in_a_namespace_that_the_workload_made_is_the_workloads() {
    let (mut world, inner, outer) = nested();
    let raw = |protocol| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(protocol)).unwrap();
        socket.set_unicast_hops_v6(255).unwrap();
        socket.set_multicast_hops_v6(255).unwrap();
        socket.set_multicast_if_v6(2).unwrap();
        socket
    };
    let groups: SocketAddr = "[ff02::1]:0".parse().unwrap();
    let solicited: SocketAddr = "[ff02::1:ff00:2]:0".parse().unwrap();
    for to in [outer.port6(0), groups, solicited] {
        // Router and neighbour solicitations and advertisements, and a redirect.
        for kind in 133..=137 {
            let message = [&[kind, 0, 0, 0][..], &[7; 20]].concat();
            let sent = inner.run(&world.workload, || {
                raw(Protocol::ICMPV6).send_to(&message, &to.into())
            });
            assert_refused(sent);
            world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        }
    }
    let reset = [
        0, 99, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 4, 1, 0, 0, 0, 0, 0,
    ];
    let sent = inner.run(&world.workload, || {
        raw(Protocol::TCP).send_to(&reset, &outer.port6(0).into())
    });
    assert_refused(sent);
    world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
}
