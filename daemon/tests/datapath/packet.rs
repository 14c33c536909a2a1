//! Packets of sockets that no other hook has seen: opened before their workload was enrolled, or
//! raw.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
};

use reeve_common::{
    Action, Direction, EventKind, Hook, PEER_TUNNEL, Reason,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{CLASS, MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused};

/// A connection from the workload's cgroup to the far end, as it is before anybody is enrolled.
fn connected(world: &World) -> (TcpStream, TcpStream) {
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let client = world.as_workload(|| TcpStream::connect(to).unwrap());
    let (accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    (client, accepted)
}

/// Whether what the one end writes reaches the other.
fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    // Refused packets are an error of the first write or of none.
    let _ = from.write_all(b"x");
    match to.read_exact(&mut [0]) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    }
}

#[test]
fn a_connection_that_is_older_than_its_workload_is_cut() {
    let mut world = World::new();
    world.apply();
    let (mut client, mut accepted) = connected(&world);
    assert!(passes(&mut client, &mut accepted));

    world.enrol();
    world.apply();
    assert!(!passes(&mut client, &mut accepted));
    let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    assert_eq!((event.workload, event.remote_port), (WORKLOAD, 80));
    assert_eq!(world.other_events(), [], "a refusal is told once");

    // A policy for it brings it back: TCP sends again what was lost.
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(passes(&mut client, &mut accepted));
    world.verdict_event(Hook::PacketEgress, true, Reason::NoTunnel);
}

#[test]
fn a_connection_that_is_older_than_its_tunnel_is_cut() {
    let mut world = World::new();
    world.apply();
    let (mut client, mut accepted) = connected(&world);
    world.enrol();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.listening();
    world.apply();
    assert!(!passes(&mut client, &mut accepted));
    world.verdict_event(Hook::PacketEgress, false, Reason::TunnelBypassed);
}

#[test]
fn a_connection_that_a_new_policy_does_not_allow_is_cut() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let (mut client, mut accepted) = connected(&world);
    assert!(passes(&mut client, &mut accepted));

    world.allow(Direction::Egress, Scope::Port(TCP, 81));
    world.apply();
    assert!(
        passes(&mut client, &mut accepted),
        "another rule is no matter"
    );

    let generation = world.datapath().generation();
    world.state.tables.verdicts.clear();
    world.apply();
    assert_eq!(world.datapath().generation(), generation + 1);
    assert!(!passes(&mut client, &mut accepted));
    let event = world.verdict_event(Hook::PacketEgress, false, Reason::Revoked);
    assert_eq!(event.workload, WORKLOAD);
}

#[test]
fn an_accepted_connection_that_a_new_policy_does_not_allow_is_cut() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.here.port6(80);
    let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    assert!(passes(&mut client, &mut accepted));

    world.state.tables.verdicts.clear();
    world.verdict(
        Direction::Ingress,
        CLASS,
        Scope::Port(TCP, 80),
        Action::TunnelOnly,
    );
    world.apply();
    assert!(!passes(&mut client, &mut accepted));
    world.verdict_event(Hook::PacketIngress, false, Reason::Revoked);
}

#[test]
fn a_connection_is_judged_in_the_direction_in_which_it_was_opened() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.here.port4(80);
    let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    client.set_read_timeout(Some(MOMENT)).unwrap();
    assert!(passes(&mut client, &mut accepted));

    // To open a connection to anywhere is no leave to go on with one that was accepted.
    world.state.tables.verdicts.clear();
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    assert!(!passes(&mut accepted, &mut client));
    let event = world.event("it is revoked", |event| event.allowed == 0);
    assert_eq!(event.direction, Direction::Ingress as u8);
    assert_eq!(event.reason, Reason::Revoked as u8);

    // Nor the other way round, for who only opens one.
    world.state.tables.verdicts.clear();
    world.allow(Direction::Ingress, Scope::Anything);
    world.apply();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let socket = world.as_workload(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    let dropped = world.here.run(&world.stranger, || {
        socket.connect_timeout(&to.into(), MOMENT)
    });
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    assert_eq!(event.direction, Direction::Egress as u8);
}

#[test]
fn a_connection_that_is_older_than_its_workload_goes_on_whoever_speaks_first() {
    let mut world = World::new();
    world.apply();
    let (mut client, mut accepted) = connected(&world);
    assert!(passes(&mut client, &mut accepted));
    world.enrol();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    accepted.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let event = world.verdict_event(Hook::PacketIngress, true, Reason::NoTunnel);
    assert_eq!(event.direction, Direction::Egress as u8);
}

#[test]
fn the_far_end_of_a_refused_connection_is_told_of_its_end() {
    // Before a packet was refused, and after.
    for refused in [false, true] {
        let mut world = World::new();
        world.apply();
        let (mut client, mut accepted) = connected(&world);
        world.enrol();
        world.apply();
        if refused {
            assert!(!passes(&mut client, &mut accepted));
        }
        socket2::SockRef::from(&client)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
        drop(client);
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let reset = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn an_unenrolled_caller_may_use_a_socket_that_a_workload_had_no_verdict_for() {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    world.apply();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    // A stranger's socket in the workload's hands is judged like one of its own.
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let of_stranger = world.here.run(&world.stranger, socket);
    assert_refused(world.as_workload(|| of_stranger.connect(&to.into())));
    // A workload's socket in a stranger's hands is judged by its packets.
    let of_workload = world.as_workload(socket);
    let dropped = world.here.run(&world.stranger, || {
        of_workload.connect_timeout(&to.into(), MOMENT)
    });
    assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    assert_eq!(event.workload, WORKLOAD);
}

#[test]
fn a_raw_socket_speaks_neither_tcp_nor_udp() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let raw =
        |protocol: Protocol| move || Socket::new(Domain::IPV4, Type::RAW, Some(protocol)).unwrap();
    let to: SocketAddr = world.there.port4(0);
    for (protocol, length) in [(Protocol::TCP, 20), (Protocol::UDP, 8)] {
        let socket = world.as_workload(raw(protocol));
        for _ in 0..3 {
            assert_refused(world.as_workload(|| socket.send_to(&vec![0; length], &to.into())));
        }
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        assert_eq!(event.workload, WORKLOAD);
    }
    assert_eq!(world.other_events(), [], "a socket's refusal is told once");

    // Anything else is a matter of policy.
    let socket = world.as_workload(raw(Protocol::ICMPV4));
    let echo = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    world
        .as_workload(|| socket.send_to(&echo, &to.into()))
        .unwrap();
    world.state.tables.verdicts.clear();
    world.apply();
    assert_refused(world.as_workload(|| socket.send_to(&echo, &to.into())));
}

/// A socket for packets with headers of one's own.
fn by_hand(world: &World) -> Socket {
    world.as_workload(|| {
        let any = Protocol::from(libc::IPPROTO_RAW);
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(any)).unwrap();
        socket.set_header_included_v4(true).unwrap();
        socket
    })
}

/// A packet of a protocol that nobody speaks, from and to the ends of the wire.
fn packet() -> [u8; 40] {
    let mut packet = [0; 40];
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 253;
    packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
    packet
}

#[test]
fn a_fragment_is_refused() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let socket = by_hand(&world);
    let to = world.there.port4(0);
    world
        .as_workload(|| socket.send_to(&packet(), &to.into()))
        .unwrap();
    // More fragments, or eight bytes further on.
    for fragment in [0x2000_u16, 0x0001] {
        let mut packet = packet();
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        assert_refused(world.as_workload(|| socket.send_to(&packet, &to.into())));
        world.verdict_event(Hook::PacketEgress, false, Reason::Malformed);
    }
}

#[test]
fn a_packet_that_claims_to_stay_is_judged_when_it_leaves() {
    let mut world = World::enrolled();
    let socket = by_hand(&world);
    let to = world.there.port4(0);
    for (source, reason) in [
        ([127, 0, 0, 1], Reason::ForgedSource),
        ([10, 0, 0, 1], Reason::NoPolicy),
        ([10, 0, 0, 2], Reason::ForgedSource),
    ] {
        let mut packet = packet();
        packet[12..16].copy_from_slice(&source);
        assert_refused(world.as_workload(|| socket.send_to(&packet, &to.into())));
        world.verdict_event(Hook::PacketEgress, false, reason);
    }
}

#[test]
fn what_lies_behind_extension_headers_is_judged() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    // Eight bytes each: a destination header, and a hop-by-hop header, filled up with nothing.
    let options = [libc::IPV6_DSTOPTS, libc::IPV6_HOPOPTS];
    let socket = world.as_workload(|| {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        for option in options {
            let header = [0_u8, 0, 1, 4, 0, 0, 0, 0];
            // SAFETY: `header` is as long as is said.
            let set = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_IPV6,
                    option,
                    header.as_ptr().cast(),
                    8,
                )
            };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        }
        socket
    });
    let (allowed, refused) = (world.there.port6(53), world.there.port6(54));
    world.as_workload(|| socket.send_to(b"x", allowed)).unwrap();
    server.recv(&mut [0]).unwrap();
    assert_refused(world.as_workload(|| socket.send_to(b"x", refused)));

    // Connected before anybody asked, so that only its packets can tell.
    let older = world.here.run(&world.stranger, || {
        socket.connect(refused).unwrap();
        socket
    });
    assert_refused(older.send(b"x"));
    let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    assert_eq!((event.protocol, event.remote_port), (UDP, 54));
}

#[test]
fn a_closed_event_follows_a_connection_that_was_reset() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let (mut client, mut accepted) = connected(&world);
    assert!(passes(&mut client, &mut accepted));
    socket2::SockRef::from(&accepted)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();
    drop(accepted);
    assert!(client.read(&mut [0]).is_err());
    let closed = world.event("it was closed", |event| {
        event.kind == EventKind::Closed as u8
    });
    assert_eq!((closed.bytes_sent, closed.bytes_received), (1, 0));
}
