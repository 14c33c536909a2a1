//! `connect()` of a workload.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use reeve::datapath::{SocketStorage as _, monotonic_nanoseconds};
use reeve_common::{
    Action, Direction, EventKind, FAILING_FORGOTTEN_NANOSECONDS, FailingEntry, FailingKey, Hook,
    NAMESPACE_WITHOUT_V6, PEER_TUNNEL, Reason, WorkloadId, protocol::TCP,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{CLASS, MOMENT, PATIENCE, PEER, RULE, Scope, WORKLOAD, World, assert_refused};

const OTHER: WorkloadId = WORKLOAD + 1;

#[test]
fn who_is_not_enrolled_may_do_everything() {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let client = world
            .here
            .run(&world.stranger, || TcpStream::connect(to).unwrap());
        let (_, from) = server.accept().unwrap();
        assert_eq!(from.port(), client.local_addr().unwrap().port());
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn a_workload_without_a_policy_is_refused() {
    let mut world = World::enrolled();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        let event = world.verdict_event(Hook::Connect, false, Reason::NoPolicy);
        assert_eq!(event.workload, WORKLOAD);
        assert_eq!(event.remote, reeve::datapath::address(to.ip()));
        assert_eq!((event.remote_port, event.protocol), (80, TCP));
        assert_eq!(event.direction, Direction::Egress as u8);
    }
    assert_eq!(world.count(Direction::Egress, false, Reason::NoPolicy), 2);
}

#[test]
fn a_socket_of_datagrams_asks_where_it_would_send_from_and_connects_to_nobody() {
    let mut world = World::enrolled();
    let there = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    there.set_read_timeout(Some(MOMENT)).unwrap();
    for (to, from) in [
        (world.there.port4(53), world.here.v4),
        (world.there.port6(53), world.here.v6),
    ] {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = world.as_workload(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        assert_eq!(socket.local_addr().unwrap().ip(), from);
        assert_eq!(world.other_events(), [], "nothing was judged");
        // What it sends is, whoever holds it by then.
        assert_refused(world.as_workload(|| socket.send(b"x")));
        world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        let of_stranger = world.here.run(&world.stranger, || socket.send(b"x"));
        assert_refused(of_stranger);
        world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        // Nor does it hear anything.
        let here = socket.local_addr().unwrap();
        world.as_far_end(|| there.send_to(b"y", here)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket.recv(&mut [0]).unwrap_err();
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    }
    there.recv(&mut [0]).unwrap_err();
}

#[test]
fn nothing_is_redirected_in_a_family_that_does_not_lead_out_and_nothing_leaves() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    for (_, entry) in &mut world.state.namespaces {
        entry.flags |= NAMESPACE_WITHOUT_V6;
    }
    world.apply();
    let _listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let v4 = world.there.port4(80);
    world.as_workload(|| TcpStream::connect(v4).unwrap());
    world.verdict_event(Hook::Connect, true, Reason::Policy);
    // There is a route all the same.
    let v6 = world.there.port6(80);
    let connected = world.as_workload(|| TcpStream::connect_timeout(&v6, MOMENT));
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketEgress, false, Reason::TunnelBypassed);
}

#[test]
fn what_a_policy_allows_goes_as_it_is_where_no_tunnel_leads() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let mut client = world.as_workload(|| TcpStream::connect(to).unwrap());
        let event = world.verdict_event(Hook::Connect, true, Reason::NoTunnel);
        assert_eq!((event.peer, event.rule), (PEER, RULE));
        let (mut accepted, _) = server.accept().unwrap();
        client.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        accepted.write_all(b"hi").unwrap();
        client.read_exact(&mut [0; 2]).unwrap();
        drop(client);
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        drop(accepted);
        let closed = world.event("it was closed", |event| {
            event.kind == EventKind::Closed as u8
        });
        assert_eq!((closed.bytes_sent, closed.bytes_received), (5, 2));
        assert_eq!(
            (closed.workload, closed.peer, closed.rule),
            (WORKLOAD, PEER, RULE)
        );
        assert!(closed.duration > 0 && closed.duration < 10_000_000_000);
    }
    let other = world.there.port4(81);
    assert_refused(world.as_workload(|| TcpStream::connect(other)));
}

#[test]
fn a_rule_that_denies_is_named() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.verdict(Direction::Egress, CLASS, Scope::Port(TCP, 22), Action::Deny);
    world.apply();
    let to = world.there.port4(22);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    let event = world.verdict_event(Hook::Connect, false, Reason::PolicyDeny);
    assert_eq!(event.rule, RULE);
}

#[test]
fn a_tunnels_connection_goes_to_the_daemon_and_looks_as_it_was_asked_for() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let [v4, v6]: [TcpListener; 2] = listeners
        .into_iter()
        .map(|socket| {
            socket.set_nonblocking(false).unwrap();
            socket.into()
        })
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();

    let mapped: SocketAddr = "[::ffff:10.0.0.2]:80".parse().unwrap();
    for (to, listener) in [
        (world.there.port4(80), &v4),
        (mapped, &v4),
        (world.there.port6(80), &v6),
    ] {
        let client = world.as_workload(|| TcpStream::connect(to).unwrap());
        assert_eq!(client.peer_addr().unwrap(), to, "getpeername()");
        let (accepted, _) = listener.accept().unwrap();
        let origin = world.datapath().origin(accepted.as_fd());
        let origin = origin.unwrap_or_else(|| panic!("{to} has no origin"));
        assert_eq!(
            origin.address,
            reeve::datapath::address(to.ip().to_canonical())
        );
        assert_eq!((origin.port, origin.workload), (80, WORKLOAD));
        assert_eq!((origin.peer, origin.rule), (PEER, RULE));
        world.verdict_event(Hook::Connect, true, Reason::Policy);
    }
    let tunnel_port = world.there.port4(15008);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.apply();
    assert_refused(world.as_workload(|| TcpStream::connect(tunnel_port)));
    world.verdict_event(Hook::Connect, false, Reason::ReservedPort);
}

#[test]
fn a_tunnels_socket_has_an_address_of_its_workload() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    let _listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let mapped: SocketAddr = "[::ffff:10.0.0.2]:80".parse().unwrap();
    let own_mapped = "::ffff:10.0.0.1".parse().unwrap();
    world.here.ip(&["addr add 10.0.0.5/24 dev wire".into()]);
    world.state.local_addresses.push((
        reeve::datapath::address("10.0.0.5".parse().unwrap()),
        WORKLOAD,
    ));
    world.apply();
    let connect = |world: &World, from: Option<&str>, to: SocketAddr| {
        world.as_workload(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            if let Some(from) = from {
                let from: SocketAddr = from.parse().unwrap();
                socket.bind(&from.into()).unwrap();
            }
            socket.connect(&to.into()).unwrap();
            TcpStream::from(socket)
        })
    };
    for (from, to, own) in [
        (None, world.there.port4(80), world.here.v4),
        (None, mapped, own_mapped),
        (None, world.there.port6(80), world.here.v6),
        // What the application has bound is what it sees.
        (
            Some("10.0.0.5:0"),
            world.there.port4(80),
            "10.0.0.5".parse().unwrap(),
        ),
    ] {
        let client = connect(&world, from, to);
        let local = client.local_addr().unwrap();
        assert_eq!(local.ip(), own, "getsockname() towards {to}");
        assert_ne!(local.port(), 0);
        assert_eq!(client.peer_addr().unwrap(), to);
    }
    // Where the workload has no address, as the kernel has it.
    world.state.shown_addresses.clear();
    world.apply();
    let client = connect(&world, None, world.there.port4(80));
    assert!(client.local_addr().unwrap().ip().is_loopback());
    // And loopback's own is loopback's.
    let server = world.as_workload(|| TcpListener::bind("127.0.0.1:80").unwrap());
    let client = connect(&world, None, server.local_addr().unwrap());
    assert!(client.local_addr().unwrap().ip().is_loopback());
}

#[test]
fn a_socket_that_is_bound_to_a_device_reaches_its_tunnel_or_fails_at_once() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    for (to, listener) in [world.there.port4(80), world.there.port6(80)]
        .into_iter()
        .zip(&listeners)
    {
        let bound = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            socket.bind_device(Some(b"wire")).unwrap();
            socket
        };
        let client = world.as_workload(|| {
            let client = bound();
            client.connect_timeout(&to.into(), PATIENCE).unwrap();
            client
        });
        let (accepted, _) = listener.accept().unwrap();
        assert!(world.datapath().origin(accepted.as_fd()).is_some());
        assert_eq!(client.device().unwrap(), None);
        // Only who has this capability may bind a socket to another device, or to none.
        assert_refused(world.as_workload(|| {
            let client = bound();
            without_raw();
            client.connect_timeout(&to.into(), PATIENCE)
        }));
        world.verdict_event(Hook::Connect, false, Reason::BoundToDevice);
    }
}

/// Takes `CAP_NET_RAW` from this thread.
fn without_raw() {
    caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_RAW).unwrap();
}

#[test]
fn a_multipath_socket_in_a_tunnel_looks_as_it_was_asked_for() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    let _listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    for (to, own) in [
        (world.there.port4(80), world.here.v4),
        (world.there.port6(80), world.here.v6),
    ] {
        let client = world.as_workload(|| {
            let domain = Domain::for_address(to);
            let client = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP)).unwrap();
            client.connect(&to.into()).unwrap();
            TcpStream::from(client)
        });
        assert_eq!(client.peer_addr().unwrap(), to, "getpeername()");
        assert_eq!(client.local_addr().unwrap().ip(), own, "getsockname()");
    }
}

#[test]
fn a_local_port_serves_for_each_destination() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.listening();
    world.apply();
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let accept = |listener: &Socket| {
        listener.set_nonblocking(false).unwrap();
        TcpListener::from(listener.try_clone().unwrap()).accept()
    };
    let connect = |from: SocketAddr, to: SocketAddr| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect(&to.into())?;
        Ok::<_, std::io::Error>(TcpStream::from(socket))
    };
    let own = world.here.port4(4000);
    let mapped: SocketAddr = "[::ffff:10.0.0.1]:4000".parse().unwrap();
    let mut clients = Vec::new();
    for (from, to) in [
        (own, world.there.port4(80)),
        (own, world.there.port4(81)),
        (mapped, "[::ffff:10.0.0.2]:82".parse().unwrap()),
    ] {
        let client = world.as_workload(|| connect(from, to)).unwrap();
        let (accepted, source) = accept(&listeners[0]).unwrap();
        assert_eq!(source, own);
        let origin = world.datapath().origin(accepted.as_fd()).unwrap();
        assert_eq!(origin.port, to.port());
        assert_eq!(client.peer_addr().unwrap(), to);
        clients.push((client, accepted));
    }
    // To one destination once, as without reeve.
    let to = world.there.port4(80);
    let error = world.as_workload(|| connect(own, to)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
    // IPv6 has one loopback address.
    let own = world.here.port6(4000);
    let [one, other] = [80, 81].map(|port| world.there.port6(port));
    let _client = world.as_workload(|| connect(own, one)).unwrap();
    let error = world.as_workload(|| connect(own, other)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
}

#[test]
fn a_tunnel_is_refused_without_a_listener() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    world.verdict_event(Hook::Connect, false, Reason::NoListener);
}

#[test]
fn a_destination_that_has_just_failed_fails_at_once_for_its_workload_until_one_tries() {
    let mut world = World::enrolled();
    let (id, depth) = (world.stranger.id(), world.stranger.depth());
    world.add_workload(id, depth, OTHER);
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    let (bits, mut key, entry) = world.state.tables.verdicts[0];
    key.workload = OTHER;
    world.state.tables.verdicts.push((bits, key, entry));
    world.listening();
    world.apply();
    let _listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());

    for to in [world.there.port4(80), world.there.port6(80)] {
        let key = FailingKey {
            remote: reeve::datapath::address(to.ip()),
            workload: WORKLOAD,
            remote_port: 80,
            reserved: 0,
        };
        let fails_until = |until| {
            let how = FailingEntry {
                until,
                trial_until: 0,
                error: libc::ECONNREFUSED.unsigned_abs(),
                reason: Reason::PeerFailed as u32,
            };
            world.datapath().set_failing(key, how).unwrap();
        };
        let connect = || world.as_workload(|| TcpStream::connect(to));
        let kind = || connect().unwrap_err().kind();
        let now = monotonic_nanoseconds();
        fails_until(now + 60_000_000_000);
        assert_eq!(kind(), ErrorKind::ConnectionRefused);
        assert_eq!(kind(), ErrorKind::ConnectionRefused);
        // Nobody else's, and nowhere else.
        let of_other = || TcpStream::connect(to);
        world.here.run(&world.stranger, of_other).unwrap();
        let elsewhere = SocketAddr::new(to.ip(), 81);
        world.as_workload(|| TcpStream::connect(elsewhere)).unwrap();
        // One tries, once the time is over; others fail meanwhile.
        fails_until(now);
        connect().unwrap();
        assert_eq!(kind(), ErrorKind::ConnectionRefused);
        // It serves again.
        world
            .datapath()
            .set_failing(key, FailingEntry::default())
            .unwrap();
        connect().unwrap();
        // Those who try make nothing last longer.
        fails_until(monotonic_nanoseconds() - FAILING_FORGOTTEN_NANOSECONDS + 2_000_000_000);
        connect().unwrap();
        assert_eq!(kind(), ErrorKind::ConnectionRefused);
        thread::sleep(Duration::from_millis(2100));
        connect().unwrap();
        connect().unwrap();
        // What nobody has tried for long is forgotten.
        fails_until(1);
        connect().unwrap();
        connect().unwrap();
    }
    let failed = world.count(Direction::Egress, false, Reason::PeerFailed);
    assert_eq!(failed, 8, "each is counted");
    world.verdict_event(Hook::Connect, false, Reason::PeerFailed);
}

#[test]
fn what_stays_in_the_workload_is_not_judged() {
    let mut world = World::enrolled();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [
        "127.0.0.1:80".parse().unwrap(),
        "127.9.9.9:80".parse().unwrap(),
        "[::1]:80".parse().unwrap(),
        "0.0.0.0:80".parse().unwrap(),
        "[::]:80".parse().unwrap(),
        "[::ffff:127.0.0.1]:80".parse().unwrap(),
        world.here.port4(80),
        world.here.port6(80),
    ] {
        let mut client = world
            .as_workload(|| TcpStream::connect(to))
            .expect("connecting");
        let (mut accepted, _) = server.accept().unwrap();
        client.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn reeves_ports_are_not_for_workloads() {
    let mut world = World::enrolled();
    let _reeve = world.as_reeve(|netns| {
        (
            netns.outbound_listeners(15001).unwrap(),
            netns.tunnel_listener(15008).unwrap(),
        )
    });
    for to in ["127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15008"] {
        let to: SocketAddr = to.parse().unwrap();
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        world.verdict_event(Hook::Connect, false, Reason::ReservedPort);
    }
    let own = world.here.port4(15008);
    assert_refused(world.as_workload(|| TcpStream::connect(own)));
}
