//! Connections that arrive at a workload.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use reeve::datapath::address;
use reeve_common::{
    Action, Direction, EventKind, Hook, NamespaceEntry, PeerEntry, Reason, protocol::TCP,
};

use crate::world::{CLASS, MOMENT, PATIENCE, PEER, RULE, Scope, WORKLOAD, World};

#[test]
fn plaintext_is_reset_at_once() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    datapath.attach_namespace(&world.here.netns).unwrap();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let start = Instant::now();
        let refused = world.as_far_end(|| TcpStream::connect(to)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(start.elapsed() < MOMENT);
        let event = world.verdict_event(Hook::SocketLookup, false, Reason::NoPolicy);
        assert_eq!((event.workload, event.local_port), (WORKLOAD, 80));
        assert_eq!(event.direction, Direction::Ingress as u8);
        assert_eq!(event.local, address(to.ip()));
    }
    assert_eq!(world.count(Direction::Ingress, false, Reason::NoPolicy), 2);

    // An identity is what the policy asks for, and plaintext has none.
    world.peer(0);
    world.verdict(
        Direction::Ingress,
        CLASS,
        Scope::Port(TCP, 80),
        Action::TunnelOnly,
    );
    world.apply();
    let to = world.here.port4(80);
    let refused = world.as_far_end(|| TcpStream::connect(to)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let event = world.verdict_event(Hook::SocketLookup, false, Reason::PlaintextRefused);
    assert_eq!((event.peer, event.rule), (PEER, RULE));
}

#[test]
fn an_address_that_a_policy_allows_is_let_in() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    // Two networks: IPv4's prefix is 96 bits longer than written.
    for (ip, bits) in [(world.there.v4, 96 + 24), (world.there.v6, 64)] {
        let entry = PeerEntry {
            class: CLASS,
            peer: 0,
            flags: 0,
        };
        world.state.tables.peers.push((bits, address(ip), entry));
    }
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        let event = world.verdict_event(Hook::SocketState, true, Reason::NoTunnel);
        assert_eq!((event.workload, event.rule), (WORKLOAD, RULE));
        assert_eq!(event.direction, Direction::Ingress as u8);
        assert_eq!(event.remote_port, client.local_addr().unwrap().port());
        client.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        accepted.write_all(b"hi!").unwrap();
        client.read_exact(&mut [0; 3]).unwrap();
        drop(client);
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        drop(accepted);
        let closed = world.event("it was closed", |event| {
            event.kind == EventKind::Closed as u8
        });
        assert_eq!((closed.bytes_sent, closed.bytes_received), (3, 5));
        assert_eq!(closed.direction, Direction::Ingress as u8);
    }
    assert_eq!(world.other_events(), [], "a verdict is told once");
}

#[test]
fn a_workload_in_a_shared_namespace_is_guarded_by_its_socket() {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    let shared = NamespaceEntry {
        workload: 0,
        flags: 0,
    };
    world
        .state
        .namespaces
        .push((world.here.netns.cookie, shared));
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 81));
    world.apply();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    let bind = |port: u16| move || TcpListener::bind(("::", port)).unwrap();
    let _refused = world.as_workload(bind(80));
    let allowed = world.as_workload(bind(81));
    let stranger = world.here.run(&world.stranger, bind(82));

    let to = world.here.port4(80);
    let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);

    for (port, server) in [(81, allowed), (82, stranger)] {
        let to = world.here.port4(port);
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        client.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
    }

    // The address is the host's, so what comes from the host itself is judged too.
    let own = world.here.port4(80);
    let dropped = world
        .here
        .run(&world.stranger, || TcpStream::connect_timeout(&own, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    // Loopback is not.
    let loopback = "127.0.0.1:80".parse().unwrap();
    world
        .here
        .run(&world.stranger, || {
            TcpStream::connect_timeout(&loopback, PATIENCE)
        })
        .unwrap();
}

#[test]
fn a_namespace_that_is_left_is_judged_no_more() {
    let world = World::enrolled();
    let datapath = world.datapath().clone();
    let netns = &world.here.netns;
    datapath.attach_namespace(netns).unwrap();
    let pin = world.settings.pins.join(format!("netns_{}", netns.inode));
    assert!(pin.exists());
    datapath.detach_namespace(netns.inode).unwrap();
    assert!(!pin.exists());
    datapath.detach_namespace(netns.inode).unwrap();
}
