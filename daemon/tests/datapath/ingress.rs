//! Connections that arrive at a workload.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use reeve::datapath::address;
use reeve_common::{
    Action, Direction, EventKind, Hook, NamespaceEntry, PEER_TUNNEL, PeerEntry, Reason,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{
    CLASS, MOMENT, PATIENCE, PEER, RULE, Scope, WORKLOAD, World, assert_refused, reset_at_once,
};

#[test]
fn plaintext_is_reset_at_once() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    datapath.attach_namespace(&world.here.netns).unwrap();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        world.as_far_end(|| reset_at_once(to));
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
fn an_address_that_is_a_tunnels_may_be_let_in_without_it() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        world.verdict_event(Hook::SocketState, true, Reason::NoTunnel);
        // And is, after whatever else has changed.
        world.allow(Direction::Ingress, Scope::Port(TCP, 81 + to.port()));
        world.apply();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn who_is_permissive_lets_in_and_not_out() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    world.peer(0);
    for direction in [Direction::Ingress, Direction::Egress] {
        world.verdict(direction, CLASS, Scope::Anything, Action::Permissive);
    }
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let _far_end = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for (in_, out) in [
        (world.here.port4(80), world.there.port4(80)),
        (world.here.port6(80), world.there.port6(80)),
    ] {
        let _client = world.as_far_end(|| TcpStream::connect(in_).unwrap());
        server.accept().unwrap();
        world.verdict_event(Hook::SocketState, true, Reason::Permissive);
        assert_refused(world.as_workload(|| TcpStream::connect(out)));
        world.verdict_event(Hook::Connect, false, Reason::PolicyDeny);
    }
}

#[test]
fn the_look_up_of_a_listener_leaves_alone_what_is_not_its_business() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(UDP, 53));
    world.apply();
    // Datagrams, which no policy about TCP is about; the tunnel's port; an address that is nobody's.
    let datagrams = world.as_workload(|| UdpSocket::bind("[::]:53").unwrap());
    datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
    let tunnel = world.as_reeve(|netns| netns.tunnel_listener(15008).unwrap());
    tunnel.set_nonblocking(false).unwrap();
    for (datagram, stream) in [
        (world.here.port4(53), world.here.port4(15008)),
        (world.here.port6(53), world.here.port6(15008)),
    ] {
        world.as_far_end(|| {
            let any = if datagram.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            UdpSocket::bind(any)
                .unwrap()
                .send_to(b"x", datagram)
                .unwrap();
        });
        datagrams.recv(&mut [0]).unwrap();
        let _client = world.as_far_end(|| TcpStream::connect(stream).unwrap());
        tunnel.accept().unwrap();
    }
    world.state.local_addresses.clear();
    world.apply();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.here.port4(80);
    let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
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
fn a_verdict_that_nothing_came_of_is_not_anothers() {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let _guarded = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let stranger = world
        .here
        .run(&world.stranger, || TcpListener::bind("[::]:82").unwrap());
    let (opened, connected) = (world.here.port4(0), world.here.port4(82));
    world.as_far_end(|| {
        // What a processor has let in last is known to it alone.
        let mut one = CpuSet::new();
        one.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
        raw.send_to(&opening(), &opened.into()).unwrap();
        TcpStream::connect(connected).unwrap();
    });
    stranger.accept().unwrap();
    assert_eq!(world.other_events(), []);
}

/// A segment from the far end that asks port 80 for a connection, and that nothing follows.
fn opening() -> [u8; 20] {
    let mut segment = [0; 20];
    segment[..4].copy_from_slice(&[0, 99, 0, 80]);
    segment[12..16].copy_from_slice(&[0x50, 2, 0xff, 0xff]);
    let addresses_and_length = [10, 0, 0, 2, 10, 0, 0, 1, 0, TCP, 0, 20];
    let sum: u32 = addresses_and_length
        .chunks(2)
        .chain(segment.chunks(2))
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
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
