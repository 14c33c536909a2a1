//! How a verdict is found: whose it is, who is at the far end, and which rule is about both.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use reeve::datapath::address;
use reeve_common::{
    Action, Direction, Hook, MAX_CGROUP_DEPTH, PEER_BY_PORT, PeerEntry, PeerPortKey, Reason,
    WORKLOAD_UNKNOWN, WorkloadEntry,
    protocol::{TCP, UDP},
};

use crate::{
    place::Cgroup,
    world::{CLASS, MOMENT, PEER, Scope, WORKLOAD, World, assert_refused},
};

/// A connection that nobody accepts, and that is not refused by a program.
fn connect(world: &World, cgroup: &Cgroup, to: SocketAddr) -> io::Result<()> {
    match world.here.run(cgroup, || TcpStream::connect(to)) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => Err(error),
        _ => Ok(()),
    }
}

#[test]
fn a_range_of_ports_is_a_prefix() {
    let mut world = World::enrolled();
    world.peer(0);
    // 8080 to 8095.
    world.allow(Direction::Egress, Scope::Ports(TCP, 8080, 12));
    world.apply();
    for (port, allowed) in [(8079, false), (8080, true), (8095, true), (8096, false)] {
        let result = connect(&world, &world.workload, world.there.port4(port));
        assert_eq!(result.is_ok(), allowed, "port {port}: {result:?}");
    }
    assert_refused(world.as_workload(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"x", world.there.port4(8080))
    }));
}

#[test]
fn the_narrower_rule_wins() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.verdict(Direction::Egress, CLASS, Scope::Protocol(UDP), Action::Deny);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    connect(&world, &world.workload, world.there.port6(1)).unwrap();
    let udp = |port| {
        let to = world.there.port4(port);
        world.as_workload(move || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", to))
    };
    udp(53).unwrap();
    assert_refused(udp(54));
}

#[test]
fn a_far_ends_own_rules_are_asked_before_those_for_everybody() {
    let mut world = World::enrolled();
    world.peer(0);
    world.verdict(Direction::Egress, 0, Scope::Port(TCP, 80), Action::Allow);
    world.verdict(
        Direction::Egress,
        CLASS,
        Scope::Port(TCP, 81),
        Action::Allow,
    );
    world.verdict(Direction::Egress, 0, Scope::Port(TCP, 82), Action::Allow);
    world.verdict(Direction::Egress, CLASS, Scope::Port(TCP, 82), Action::Deny);
    world.apply();
    for (port, allowed) in [(80, true), (81, true), (82, false), (83, false)] {
        let result = connect(&world, &world.workload, world.there.port4(port));
        assert_eq!(result.is_ok(), allowed, "port {port}: {result:?}");
    }
    // Of whom nothing is known, only what holds for everybody.
    for (port, allowed) in [(80, true), (81, false), (82, true)] {
        let to: SocketAddr = ([10, 0, 0, 9], port).into();
        let result = world.as_workload(|| {
            let socket = socket2::Socket::new(
                socket2::Domain::IPV4,
                socket2::Type::STREAM.nonblocking(),
                None,
            )?;
            socket.connect(&to.into())
        });
        let refused = result.unwrap_err().raw_os_error() == Some(libc::EPERM);
        assert_eq!(refused, !allowed, "port {port}");
    }
}

#[test]
fn a_longer_prefix_says_more_of_a_far_end() {
    let mut world = World::enrolled();
    world.peer(0);
    let network = PeerEntry {
        class: CLASS + 1,
        peer: 0,
        flags: 0,
    };
    let tables = &mut world.state.tables;
    tables.peers.push((96 + 8, address(world.here.v4), network));
    world.verdict(Direction::Egress, CLASS + 1, Scope::Anything, Action::Allow);
    world.apply();
    assert_refused(connect(&world, &world.workload, world.there.port4(80)));
    world.state.tables.peers.retain(|(bits, ..)| *bits != 128);
    world.apply();
    connect(&world, &world.workload, world.there.port4(80)).unwrap();
}

#[test]
fn peers_that_share_an_address_are_told_apart_by_port() {
    let mut world = World::enrolled();
    world.peer(PEER_BY_PORT);
    let entry = PeerEntry {
        class: CLASS + 1,
        peer: PEER + 1,
        flags: 0,
    };
    for ip in [world.there.v4, world.there.v6] {
        let key = PeerPortKey {
            address: address(ip),
            port: 81,
            protocol: TCP,
            reserved: 0,
        };
        world.state.tables.peer_ports.push((key, entry));
    }
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.apply();
    connect(&world, &world.workload, world.there.port4(80)).unwrap();
    for to in [world.there.port4(81), world.there.port6(81)] {
        assert_refused(connect(&world, &world.workload, to));
        let event = world.verdict_event(Hook::Connect, false, Reason::NoPolicy);
        assert_eq!(event.peer, PEER + 1);
    }
}

#[test]
fn a_clients_port_says_nothing_of_who_it_is() {
    let mut world = World::enrolled();
    world.peer(PEER_BY_PORT);
    let trusted = PeerEntry {
        class: CLASS + 1,
        peer: PEER + 1,
        flags: 0,
    };
    for ip in [world.there.v4, world.there.v6] {
        let key = PeerPortKey {
            address: address(ip),
            port: 81,
            protocol: TCP,
            reserved: 0,
        };
        world.state.tables.peer_ports.push((key, trusted));
    }
    for direction in [Direction::Ingress, Direction::Egress] {
        world.verdict(direction, CLASS + 1, Scope::Anything, Action::Allow);
    }
    world.apply();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for (from, to) in [
        (world.there.port4(81), world.here.port4(80)),
        (world.there.port6(81), world.here.port6(80)),
    ] {
        let dropped = world.as_far_end(|| {
            let domain = socket2::Domain::for_address(from);
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect_timeout(&to.into(), MOMENT)
        });
        assert_eq!(dropped.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        assert_eq!(event.peer, PEER);
        // Nor is a port of TCP one of UDP.
        connect(&world, &world.workload, from).unwrap();
        assert_refused(world.as_workload(|| {
            let any = if from.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            UdpSocket::bind(any).unwrap().send_to(b"x", from)
        }));
    }
}

#[test]
fn a_workload_may_lie_as_deep_as_any() {
    let mut world = World::new();
    world.peer(0);
    let mut path = vec![world.workload.child("1")];
    while path.last().unwrap().depth() < MAX_CGROUP_DEPTH {
        let next = path.last().unwrap().child("1");
        path.push(next);
    }
    for cgroup in &path {
        world.state.workloads.truncate(1);
        world.add_workload(cgroup.id(), cgroup.depth(), WORKLOAD);
        world.apply();
        let refused = connect(&world, cgroup, world.there.port4(80));
        assert!(refused.is_err(), "depth {}", cgroup.depth());
        assert_refused(refused);
    }
    // The innermost is removed first.
    while path.pop().is_some() {}
}

#[test]
fn a_cgroup_below_a_workloads_belongs_to_it() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let child = world.workload.child("child");
    let grandchild = child.child("grandchild");
    for cgroup in [&child, &grandchild] {
        connect(&world, cgroup, world.there.port4(80)).unwrap();
        assert_refused(connect(&world, cgroup, world.there.port4(81)));
    }
    // One that is a workload of its own is only that.
    world.add_workload(grandchild.id(), grandchild.depth(), WORKLOAD + 1);
    world.apply();
    connect(&world, &child, world.there.port4(80)).unwrap();
    assert_refused(connect(&world, &grandchild, world.there.port4(80)));
    let event = world.event("the inner workload is refused", |event| {
        event.workload == WORKLOAD + 1
    });
    assert_eq!(event.reason, Reason::NoPolicy as u8);
    // The child's own files are closed before its parent's.
    drop(grandchild);
    drop(child);
}

#[test]
fn what_is_not_enrolled_below_an_enforced_parent_is_refused() {
    let mut world = World::enrolled();
    let parent = world.stranger.child("parent");
    let child = parent.child("child");
    world.state.workloads.push((
        parent.id(),
        parent.depth(),
        WorkloadEntry {
            workload: 0,
            flags: WORKLOAD_UNKNOWN,
        },
    ));
    world.apply();
    assert_refused(connect(&world, &child, world.there.port4(80)));
    world.verdict_event(Hook::Connect, false, Reason::UnknownWorkload);
    let to = world.there.port4(53);
    assert_refused(world.here.run(&child, || {
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", to)
    }));
    world.verdict_event(Hook::Sendmsg, false, Reason::UnknownWorkload);
    let server = world
        .here
        .run(&child, || TcpListener::bind("127.0.0.1:80").unwrap());
    let own = server.local_addr().unwrap();
    connect(&world, &child, own).unwrap();

    world.add_workload(child.id(), child.depth(), WORKLOAD);
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    connect(&world, &child, world.there.port4(80)).unwrap();
    drop(child);
}
