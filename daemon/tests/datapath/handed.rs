//! Sockets that a workload has not made itself, and ports that somebody took before reeve came; and
//! what no hook sees.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Instant,
};

use reeve::datapath::Listener;
use reeve_common::{
    Action, Direction, Hook, NAMESPACE_LISTENING, NamespaceEntry, PEER_TUNNEL, Reason,
    VERDICT_PREFIX_ANY_PROTOCOL, VerdictEntry, VerdictKey, WORKLOAD_UNKNOWN, WorkloadEntry,
    protocol::TCP,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::world::{MOMENT, PATIENCE, Scope, World};

/// A workload that shares its namespace with strangers, as on a host, so that nothing but its
/// cgroup tells its sockets from theirs.
pub(crate) fn sharing() -> World {
    let mut world = World::new();
    share(&mut world);
    world
}

fn share(world: &mut World) {
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, 1);
    let shared = NamespaceEntry::default();
    world
        .state
        .namespaces
        .push((world.here.netns.cookie, shared));
    world.apply();
}

#[test]
fn a_listener_from_elsewhere_serves_a_workload_nothing_that_no_policy_allows() {
    let mut world = sharing();
    let listener = world
        .here
        .run(&world.stranger, || TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        // The connection is the stranger's until the workload has taken it.
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let (mut accepted, from) = world.as_workload(|| listener.accept().unwrap());
        assert_eq!(accepted.peer_addr().unwrap(), from);
        assert_eq!(from.port(), client.local_addr().unwrap().port());
        accepted.set_read_timeout(Some(MOMENT)).unwrap();
        client.set_read_timeout(Some(MOMENT)).unwrap();
        client.write_all(b"x").unwrap();
        assert!(accepted.read(&mut [0]).is_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        let _ = accepted.write_all(b"x");
        assert!(client.read(&mut [0]).is_err());
    }
    // What stays on the machine's loopback device stays the machine's.
    let loopback: SocketAddr = "127.0.0.1:80".parse().unwrap();
    let mut client = world
        .here
        .run(&world.stranger, || TcpStream::connect(loopback).unwrap());
    let (mut accepted, _) = world.as_workload(|| listener.accept().unwrap());
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_socket_from_elsewhere_that_a_workload_binds_is_the_workloads() {
    let mut world = sharing();
    let to = world.here.port4(80);
    let socket = world.here.run(&world.stranger, || {
        Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
    });
    let bound: SocketAddr = (Ipv4Addr::UNSPECIFIED, 80).into();
    world.as_workload(|| {
        socket.bind(&bound.into()).unwrap();
        socket.listen(1).unwrap();
    });
    let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
}

#[test]
fn a_socket_from_elsewhere_serves_nobody_who_is_not_enrolled_below_an_enforced_parent() {
    let mut world = World::new();
    let parent = world.stranger.child("parent");
    let unknown = WorkloadEntry {
        workload: 0,
        flags: WORKLOAD_UNKNOWN,
    };
    world
        .state
        .workloads
        .push((parent.id(), parent.depth(), unknown));
    world.apply();
    // Bound by him, and bound by somebody else: the connection is his once he has taken it.
    let stream = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let made = world.here.run(&world.stranger, stream);
    let bound = world
        .here
        .run(&world.stranger, || TcpListener::bind("0.0.0.0:81").unwrap());
    world.here.run(&parent, || {
        let at: SocketAddr = (Ipv4Addr::UNSPECIFIED, 80).into();
        made.bind(&at.into()).unwrap();
        made.listen(1).unwrap();
    });
    let to = world.here.port4(80);
    let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketIngress, false, Reason::UnknownWorkload);
    let to = world.here.port4(81);
    let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
    let (mut accepted, _) = world.here.run(&parent, || bound.accept().unwrap());
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    client.write_all(b"x").unwrap();
    assert!(accepted.read(&mut [0]).is_err());
    world.verdict_event(Hook::PacketIngress, false, Reason::UnknownWorkload);

    // Once he is enrolled, what he takes is judged by his policy, and the listener with it.
    world.add_workload(parent.id(), parent.depth(), 1);
    world
        .state
        .workloads
        .retain(|(.., entry)| entry.flags != WORKLOAD_UNKNOWN);
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let again: SocketAddr = (Ipv4Addr::UNSPECIFIED, 80).into();
    world
        .here
        .run(&parent, || made.bind(&again.into()))
        .unwrap_err();
    let to = world.here.port4(80);
    world.as_far_end(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    drop(parent);
}

#[test]
fn a_socket_stays_whose_it_has_become() {
    let mut world = sharing();
    let other = world.stranger.child("other");
    world.add_workload(other.id(), other.depth(), 2);
    let everything = (
        VERDICT_PREFIX_ANY_PROTOCOL,
        VerdictKey {
            workload: 2,
            direction: Direction::Ingress as u8,
            ..VerdictKey::default()
        },
        VerdictEntry {
            action: Action::Allow as u32,
            ..VerdictEntry::default()
        },
    );
    world.state.tables.verdicts.push(everything);
    world.apply();
    let socket = world.here.run(&world.stranger, || {
        Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
    });
    let bound: SocketAddr = (Ipv4Addr::UNSPECIFIED, 80).into();
    world.as_workload(|| {
        socket.bind(&bound.into()).unwrap();
        socket.listen(1).unwrap();
    });
    // Another workload may hear everybody, and touches it; the first has it all the same.
    let touched = world.here.run(&other, || socket.bind(&bound.into()));
    touched.unwrap_err();
    let to = world.here.port4(80);
    let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    assert_eq!(event.workload, 1);
    drop(other);
}

#[test]
fn who_took_the_tunnels_port_before_gets_nothing_that_is_meant_for_it() {
    // By a stranger in a workload's namespace, by a workload, and by a workload in a namespace of
    // which the daemon knows nothing.
    for (by_stranger, is_known) in [(true, true), (false, true), (false, false)] {
        let mut world = World::new();
        world.apply();
        let at = (Ipv4Addr::UNSPECIFIED, 15008);
        let take = || TcpListener::bind(at).unwrap();
        let thief = if by_stranger {
            world.here.run(&world.stranger, take)
        } else {
            world.as_workload(take)
        };
        let elsewhere = world.as_far_end(take);
        let (id, depth) = (world.workload.id(), world.workload.depth());
        world.add_workload(id, depth, 1);
        if is_known {
            let shared = (world.here.netns.cookie, NamespaceEntry::default());
            world.state.namespaces.push(shared);
        }
        world.peer(0);
        world.allow(Direction::Ingress, Scope::Anything);
        world.apply();
        let to = world.here.port4(15008);
        let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
        assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::ReservedPort);
        assert_eq!(event.local_port, 15008);
        thief.set_nonblocking(true).unwrap();
        assert_eq!(
            thief.accept().unwrap_err().kind(),
            ErrorKind::WouldBlock,
            "by a stranger: {by_stranger}"
        );
        // Where no workload is, a port is a port.
        let to = world.there.port4(15008);
        let stranger = &world.stranger;
        world
            .here
            .run(stranger, || TcpStream::connect_timeout(&to, PATIENCE))
            .unwrap();
        elsewhere.accept().unwrap();
    }
}

#[test]
fn who_took_reeves_port_before_gets_nothing_of_a_tunnel() {
    for by_stranger in [true, false] {
        let mut world = World::new();
        world.apply();
        // At the address to which the workload's connection is redirected, and with leave to share the port,
        // as reeve's own listeners have it.
        let to = world.there.port4(80);
        let at = reeve_common::redirect_address(&reeve::datapath::address(to.ip()), 80);
        let take = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_port(true).unwrap();
            let at: SocketAddr = (at, 15001).into();
            socket.bind(&at.into()).unwrap();
            socket.listen(8).unwrap();
            socket.set_nonblocking(true).unwrap();
            TcpListener::from(socket)
        };
        let thief = if by_stranger {
            world.here.run(&world.stranger, take)
        } else {
            world.as_workload(take)
        };
        let (id, depth) = (world.workload.id(), world.workload.depth());
        world.add_workload(id, depth, 1);
        let shared = NamespaceEntry {
            workload: 0,
            flags: NAMESPACE_LISTENING,
        };
        world
            .state
            .namespaces
            .push((world.here.netns.cookie, shared));
        world.peer(PEER_TUNNEL);
        world.allow(Direction::Egress, Scope::Port(TCP, 80));
        world.apply();

        let connected = world.as_workload(|| TcpStream::connect_timeout(&to, MOMENT));
        assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::ReservedPort);
        assert_eq!(event.local_port, 15001);
        assert_eq!(
            thief.accept().unwrap_err().kind(),
            ErrorKind::WouldBlock,
            "by a stranger: {by_stranger}"
        );
    }
}

#[test]
fn who_listens_on_reeves_ports_before_is_closed() {
    let mut world = World::new();
    let nobody = world.state.clone();
    for (at, shared) in [
        ("127.0.0.1:15001", false),
        ("[::1]:15001", false),
        ("0.0.0.0:15001", false),
        ("10.0.0.1:15001", false),
        ("[::]:15008", false),
        ("0.0.0.0:15008", false),
        ("127.0.0.1:15001", true),
        ("[::]:15008", true),
    ] {
        world.state = nobody.clone();
        world.apply();
        let address: SocketAddr = at.parse().unwrap();
        // With a client in its queue, and another listener that is in nobody's way.
        let (listener, mut waiting, _other) = world.here.run(&world.stranger, || {
            let listener = listen_at(address, shared);
            let waiting = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            waiting.set_read_timeout(Some(PATIENCE)).unwrap();
            (listener, waiting, TcpListener::bind("[::]:80").unwrap())
        });
        share(&mut world);
        let closed = close_listeners(&world);
        let told: Vec<_> = closed
            .iter()
            .map(|closed| (closed.local, closed.cgroup, closed.user))
            .collect();
        assert_eq!(told, [(address, world.stranger.id(), 0)], "{at}");
        let error = listener.accept().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{at}");
        let reset = waiting.read(&mut [0]).unwrap_err();
        assert_eq!(reset.kind(), ErrorKind::ConnectionReset, "{at}");
        // And reeve has its ports, while who had them still holds the socket.
        world.as_reeve(|netns| {
            netns.outbound_listeners(15001).unwrap();
            netns.tunnel_listener(15008).unwrap();
        });
    }
}

#[test]
fn of_listeners_that_share_reeves_ports_only_others_are_closed() {
    let mut world = World::new();
    let at = (Ipv4Addr::LOCALHOST, 15001).into();
    let others: Vec<_> = (0..3)
        .map(|_| world.here.run(&world.stranger, || listen_at(at, true)))
        .collect();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    share(&mut world);
    let own: Vec<_> = (0..8)
        .flat_map(|_| world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap()))
        .collect();
    world.listening();
    world.apply();
    assert_eq!(close_listeners(&world).len(), 3);
    assert_eq!(close_listeners(&world).len(), 0);
    assert!(others.iter().all(|other| other.accept().is_err()));
    // Each connection reaches one of reeve's.
    let to = world.there.port4(80);
    for _ in 0..40 {
        let _client = world.as_workload(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !own.iter().any(|listener| listener.accept().is_ok()) {
            assert!(Instant::now() < deadline, "nobody has it");
        }
    }
}

#[test]
fn a_port_whose_holder_shares_it_with_nobody_is_free_once_he_lets_go() {
    let mut world = World::new();
    let holder = world.here.run(&world.stranger, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let at: SocketAddr = (Ipv4Addr::LOCALHOST, 15001).into();
        socket.bind(&at.into()).unwrap();
        socket.listen(8).unwrap();
        socket
    });
    share(&mut world);
    assert_eq!(close_listeners(&world).len(), 1);
    let open = || world.as_reeve(|netns| netns.outbound_listeners(15001));
    assert_eq!(open().unwrap_err().kind(), ErrorKind::AddrInUse);
    drop(holder);
    open().unwrap();
}

/// Closes what listens on reeve's ports and that no program knows for reeve's.
fn close_listeners(world: &World) -> Vec<Listener> {
    let closed = world
        .datapath()
        .close_listeners(&world.here.netns, |_| true);
    closed.unwrap()
}

/// A listener beside which others may listen later, or with leave to share its port now, as reeve's
/// own have it.
fn listen_at(address: SocketAddr, shared: bool) -> TcpListener {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(shared).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(8).unwrap();
    socket.into()
}

#[test]
fn a_listener_that_reeve_inherits_from_a_daemon_that_is_gone_is_still_reeves() {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let tunnel = world.as_reeve(|netns| netns.tunnel_listener(15008).unwrap());
    // The new daemon has another cgroup, and the old one's is nobody's any more.
    world
        .state
        .workloads
        .retain(|(id, ..)| *id != world.reeve.id());
    world.apply();
    for (to, listener) in [
        (world.there.port4(80), &listeners[0]),
        (world.there.port6(80), &listeners[1]),
    ] {
        let client = world.as_workload(|| TcpStream::connect_timeout(&to, PATIENCE));
        client.unwrap();
        listener.set_nonblocking(false).unwrap();
        listener.accept().unwrap();
    }
    // And what they accept.
    for to in [world.here.port4(15008), world.here.port6(15008)] {
        let mut client = world.as_far_end(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        tunnel.set_nonblocking(false).unwrap();
        let (accepted, _) = tunnel.accept().unwrap();
        let mut accepted = TcpStream::from(accepted);
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
        world.apply();
        accepted.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
}

// === What no hook sees: SECURITY.md says so, and this that it is true. ===

#[test]
fn a_connection_from_elsewhere_is_its_openers_until_its_peer_is_asked_for() {
    let world = sharing();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let mut client = world
        .here
        .run(&world.stranger, || TcpStream::connect(to).unwrap());
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    world.as_workload(|| client.write_all(b"x").unwrap());
    accepted.read_exact(&mut [0]).unwrap();
    world.as_workload(|| client.peer_addr().unwrap());
    let _ = world.as_workload(|| client.write_all(b"x"));
    assert!(accepted.read(&mut [0]).is_err());
}

#[test]
fn packet_sockets_are_seen_by_no_hook_but_what_arrives_is_judged() {
    let mut world = World::enrolled();
    let server = world.as_far_end(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let datagram = |from: [u8; 4], to: [u8; 4]| {
        let mut packet = [0; 29];
        packet[..10].copy_from_slice(&[0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17]);
        packet[12..16].copy_from_slice(&from);
        packet[16..20].copy_from_slice(&to);
        // From port 53 to port 53, nine bytes, without a checksum.
        packet[20..29].copy_from_slice(&[0, 53, 0, 53, 0, 9, 0, 0, b'x']);
        let sum: u32 = packet[..20]
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let send = |packet: [u8; 29]| {
        let kind = Protocol::from(i32::from((libc::ETH_P_IP as u16).to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(kind)).unwrap();
        let device = nix::net::if_::if_nametoindex("wire").unwrap();
        // To everybody on the wire, which is one.
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_IP as u16).to_be(),
            sll_ifindex: device.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0xff; 8],
        };
        // SAFETY: the address is written whole, and as long as is said.
        let ((), to) = unsafe {
            SockAddr::try_init(|storage, length| {
                storage.cast::<libc::sockaddr_ll>().write(to);
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                Ok(())
            })
            .unwrap()
        };
        socket.send_to(&packet, &to).unwrap();
    };
    world.as_workload(|| send(datagram([10, 0, 0, 1], [10, 0, 0, 2])));
    server.recv(&mut [0; 8]).unwrap();

    let guarded = world.as_workload(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    guarded.set_read_timeout(Some(MOMENT)).unwrap();
    world.as_far_end(|| send(datagram([10, 0, 0, 2], [10, 0, 0, 1])));
    assert!(guarded.recv(&mut [0; 8]).is_err());
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
}
