//! What a packet says of itself cannot lead it past its verdict: routes in options and further
//! headers, addresses of others, messages that only the kernel has reason to send.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use reeve::datapath::address;
use reeve_common::{Direction, Hook, NamespaceEntry, PEER_NODE, PeerEntry, Reason, protocol::TCP};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    place::set_option,
    world::{CLASS, MOMENT, PATIENCE, PEER, Scope, WORKLOAD, World, assert_refused, udp_lite},
};

/// Options of IPv4: a loose source route by way of 10.0.0.9.
const ROUTE_V4: [u8; 8] = [131, 7, 4, 10, 0, 0, 9, 1];
/// Options that mean nothing: a time stamp's room for one, and filling.
const HARMLESS_V4: [u8; 12] = [68, 8, 5, 0, 0, 0, 0, 0, 1, 1, 1, 1];

/// The same route, behind options that mean nothing.
const HIDDEN_ROUTE_V4: [u8; 20] = [
    68, 8, 5, 0, 0, 0, 0, 0, 1, 1, 1, 1, 131, 7, 4, 10, 0, 0, 9, 1,
];

/// A segment routing header of IPv6 (RFC 8754) by way of fd00::9.
fn route_v6() -> [u8; 40] {
    let mut header = [0; 40];
    // 32 bytes behind the first eight, type 4, one stop left of two.
    header[1..5].copy_from_slice(&[4, 4, 1, 1]);
    for stop in [8, 24] {
        header[stop..stop + 2].copy_from_slice(&[0xfd, 0]);
        header[stop + 15] = 9;
    }
    header
}

/// Has a socket's packets travel by way of somebody whom no policy allows.
fn route(socket: &Socket, to: SocketAddr) {
    match to {
        SocketAddr::V4(_) => set_option(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &ROUTE_V4),
        SocketAddr::V6(_) => set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RTHDR, &route_v6()),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn socket(to: SocketAddr, kind: Type) -> Socket {
    Socket::new(Domain::for_address(to), kind, None).unwrap()
}

/// A workload that may send everything to the far end.
fn open() -> World {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    world
}

#[test]
fn a_connection_goes_nowhere_by_a_route_of_its_own() {
    let mut world = open();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let failed = world.as_workload(|| {
            let socket = socket(to, Type::STREAM);
            route(&socket, to);
            socket.connect_timeout(&to.into(), MOMENT)
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::TimedOut);
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::SourceRouted);
        assert_eq!(event.remote_port, 80);
    }
}

#[test]
fn a_route_behind_other_options_is_one_too() {
    let mut world = open();
    let to = world.there.port4(53);
    let sent = world.as_workload(|| {
        let socket = socket(to, Type::DGRAM);
        set_option(
            &socket,
            libc::IPPROTO_IP,
            libc::IP_OPTIONS,
            &HIDDEN_ROUTE_V4,
        );
        socket.send_to(b"x", &to.into())
    });
    assert_refused(sent);
    world.verdict_event(Hook::PacketEgress, false, Reason::SourceRouted);
}

#[test]
fn a_route_that_is_named_later_ends_what_was_allowed() {
    let mut world = open();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let mut client = world.as_workload(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();

        let client = Socket::from(client);
        route(&client, to);
        accepted.set_read_timeout(Some(MOMENT)).unwrap();
        let _ = world.as_workload(|| client.send(b"x"));
        assert!(accepted.read(&mut [0]).is_err());
        world.verdict_event(Hook::PacketEgress, false, Reason::SourceRouted);
    }
}

#[test]
fn options_that_name_no_route_are_no_matter() {
    let mut world = open();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let mut client: TcpStream = world.as_workload(|| {
        let socket = socket(to, Type::STREAM);
        set_option(&socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &HARMLESS_V4);
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        socket.into()
    });
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"hello").unwrap();
    accepted.read_exact(&mut [0; 5]).unwrap();
    world.verdict_event(Hook::Connect, true, Reason::NoTunnel);
    assert_eq!(world.other_events(), [], "and judged once");

    // They cannot carry anybody past a change of policy either.
    world.state.tables.verdicts.clear();
    world.apply();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    let _ = client.write_all(b"x");
    assert!(accepted.read(&mut [0]).is_err());
    world.verdict_event(Hook::PacketEgress, false, Reason::Revoked);
}

#[test]
fn a_datagram_goes_nowhere_by_a_route_of_its_own() {
    let mut world = open();
    for to in [world.there.port4(53), world.there.port6(53)] {
        for connect in [false, true] {
            let sent = world.as_workload(|| {
                let socket = socket(to, Type::DGRAM);
                route(&socket, to);
                if connect {
                    socket.connect(&to.into()).unwrap();
                    return socket.send(b"x");
                }
                socket.send_to(b"x", &to.into())
            });
            assert_refused(sent);
            world.verdict_event(Hook::PacketEgress, false, Reason::SourceRouted);
        }
    }
}

#[test]
fn what_is_written_by_hand_may_name_no_route() {
    let mut world = open();
    let raw = world.as_workload(|| {
        let any = Protocol::from(libc::IPPROTO_RAW);
        Socket::new(Domain::IPV4, Type::RAW, Some(any)).unwrap()
    });
    let to = world.there.port4(0);
    let packet = |options: &[u8]| {
        let mut packet = vec![0_u8; 20];
        packet[0] = 0x45 + (options.len() / 4) as u8;
        packet[8..10].copy_from_slice(&[64, 253]);
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend_from_slice(options);
        packet.extend_from_slice(&[0; 20]);
        packet
    };
    let send = |options: &[u8]| {
        let packet = packet(options);
        world.as_workload(|| raw.send_to(&packet, &to.into()))
    };
    // Behind others; the strict kind; and where an option is longer than the header.
    assert_refused(send(&[1, 1, 1, 131, 7, 4, 10, 0, 0, 9, 0, 0]));
    assert_refused(send(&[137, 7, 4, 10, 0, 0, 9, 0]));
    for malformed in [&[68, 0, 0, 0][..], &[68, 1, 131, 7]] {
        // The kernel itself may be the one who refuses.
        send(malformed).unwrap_err();
    }
    send(&[1, 1, 1, 0]).unwrap();
    // What stands behind the end of the options is none.
    send(&[0, 131, 7, 4]).unwrap();
    for _ in 0..2 {
        world.verdict_event(Hook::PacketEgress, false, Reason::SourceRouted);
    }
}

/// A raw socket whose packets have headers of their own.
fn by_hand(domain: Domain) -> Socket {
    let any = Protocol::from(libc::IPPROTO_RAW);
    Socket::new(domain, Type::RAW, Some(any)).unwrap()
}

/// An IPv6 packet of a protocol that no program knows.
fn packet_v6(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, 253, 64];
    packet.extend([source.octets(), destination.octets()].concat());
    packet.extend([7; 8]);
    packet
}

#[test]
fn a_packet_is_of_the_version_that_its_device_says() {
    let mut world = World::enrolled();
    let entry = PeerEntry {
        class: CLASS,
        peer: PEER,
        flags: 0,
    };
    // To the far end's IPv6 address alone.
    world
        .state
        .tables
        .peers
        .push((128, address(world.there.v6), entry));
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let (IpAddr::V6(here), IpAddr::V6(there)) = (world.here.v6, world.there.v6) else {
        panic!("IPv6 addresses");
    };
    let packet = packet_v6(here, there);
    let to = world.there.port6(0);
    world
        .as_workload(|| by_hand(Domain::IPV6).send_to(&packet, &to.into()))
        .unwrap();

    // The same bytes in an IPv4 packet, whose header is five words long.
    let mut packet = packet;
    packet[0] = 0x65;
    let to = world.there.port4(0);
    assert_refused(world.as_workload(|| by_hand(Domain::IPV4).send_to(&packet, &to.into())));
    world.verdict_event(Hook::PacketEgress, false, Reason::Malformed);
}

#[test]
fn an_ipv6_packet_has_no_address_of_ipv4() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.allow(Direction::Ingress, Scope::Anything);
    world.apply();
    let (IpAddr::V6(here), IpAddr::V4(there)) = (world.here.v6, world.there.v4) else {
        panic!("an address of either family");
    };
    let there = there.to_ipv6_mapped();
    let to = world.there.port6(0);
    let packet = packet_v6(here, there);
    assert_refused(world.as_workload(|| by_hand(Domain::IPV6).send_to(&packet, &to.into())));
    world.verdict_event(Hook::PacketEgress, false, Reason::Malformed);

    let listener = world.as_workload(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(253))).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket
    });
    let to = world.here.port6(0);
    let packet = packet_v6(there, here);
    world
        .as_far_end(|| by_hand(Domain::IPV6).send_to(&packet, &to.into()))
        .unwrap();
    assert!((&listener).read(&mut [0; 64]).is_err());
    world.verdict_event(Hook::PacketIngress, false, Reason::Malformed);
}

#[test]
fn a_workload_sends_under_nobody_elses_address() {
    let mut world = open();
    let others = ["10.0.0.9", "fd00::9", "10.0.0.8", "fd00::8"].map(ip);
    for ip in &others[..2] {
        let entry = PeerEntry {
            class: CLASS,
            peer: 9,
            flags: 0,
        };
        world.state.tables.peers.push((128, address(*ip), entry));
    }
    // The node's own are nobody's peer.
    let node = ["10.0.0.10", "fd00::10"].map(ip);
    for ip in &node {
        let entry = PeerEntry {
            class: CLASS,
            peer: 0,
            flags: PEER_NODE,
        };
        world.state.tables.peers.push((128, address(*ip), entry));
    }
    for ip in &others[2..] {
        let neighbour = (address(*ip), WORKLOAD + 1);
        world.state.local_addresses.push(neighbour);
    }
    world.apply();
    let _server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    let far_end = [world.there.port4(53), world.there.port6(53)];
    // And of these nothing is known at all.
    let unknown = ["10.0.0.99", "fd00::99"].map(ip);
    let all = others.into_iter().chain(node).chain(unknown);
    // Under IPv4's loopback address the kernel itself sends nothing.
    let loopback = (ip("::1"), far_end[1]);
    for (ip, to) in all.zip(far_end.into_iter().cycle()).chain([loopback]) {
        // For IPv6 anybody may do this, without any capability.
        let from = |kind: Type| {
            let socket = socket(to, kind);
            match to {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true).unwrap(),
                SocketAddr::V6(_) => {
                    set_option(
                        &socket,
                        libc::IPPROTO_IPV6,
                        libc::IPV6_FREEBIND,
                        &1_i32.to_ne_bytes(),
                    );
                }
            }
            socket.bind(&SocketAddr::new(ip, 0).into()).unwrap();
            socket
        };
        let sent = world.as_workload(|| from(Type::DGRAM).send_to(b"x", &to.into()));
        assert_refused(sent);
        world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
        let connected =
            world.as_workload(|| from(Type::STREAM).connect_timeout(&to.into(), MOMENT));
        assert_refused(connected);
        world.verdict_event(Hook::Connect, false, Reason::ForgedSource);
    }
    // Nor where it names none, and a route of its own making has the kernel choose it.
    world.here.ip(&[
        "address add 10.0.0.9/32 dev lo".into(),
        "address add fd00::9/128 dev lo nodad".into(),
        format!("route replace {}/32 dev wire src 10.0.0.9", world.there.v4),
        format!("route replace {}/128 dev wire src fd00::9", world.there.v6),
    ]);
    for to in far_end {
        let connected =
            world.as_workload(|| socket(to, Type::STREAM).connect_timeout(&to.into(), MOMENT));
        connected.unwrap_err();
        world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
    }
    world.here.ip(&[
        format!("route delete {}/32 dev wire", world.there.v4),
        format!("route delete {}/128 dev wire", world.there.v6),
    ]);
    // Its own it may name.
    let own = [
        (world.here.v4, world.there.port4(53)),
        (world.here.v6, world.there.port6(53)),
    ];
    for (ip, to) in own {
        let socket = world.as_workload(|| UdpSocket::bind((ip, 0)).unwrap());
        world.as_workload(|| socket.send_to(b"x", to)).unwrap();
    }
}

#[test]
fn an_address_of_ones_own_may_be_in_somebodys_network() {
    let mut world = open();
    world.here.ip(&[
        "addr add 10.0.0.7/24 dev wire".into(),
        "addr add fd00::7/64 dev wire nodad".into(),
    ]);
    for (bits, ip) in [(96 + 24, ip("10.0.0.0")), (64, ip("fd00::"))] {
        let entry = PeerEntry {
            class: CLASS,
            peer: 0,
            flags: 0,
        };
        world.state.tables.peers.push((bits, address(ip), entry));
    }
    world.apply();
    let own = ["10.0.0.7", "fd00::7"].map(ip);
    // Not before the daemon has seen it.
    let to = [world.there.port4(53), world.there.port6(53)];
    for (ip, to) in own.into_iter().zip(to) {
        let sent = world.as_workload(|| UdpSocket::bind((ip, 0)).unwrap().send_to(b"x", to));
        assert_refused(sent);
        world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
    }
    let known = own.map(|ip| (address(ip), WORKLOAD));
    world.state.local_addresses.extend(known);
    world.apply();
    sends_from(&world, own);
}

#[test]
fn a_host_that_is_a_peer_may_have_workloads_of_its_address() {
    let mut world = open();
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces = vec![shared];
    world.state.local_addresses.clear();
    let own = [world.here.v4, world.here.v6];
    for ip in own {
        let entry = PeerEntry {
            class: CLASS,
            peer: 9,
            flags: 0,
        };
        world.state.tables.peers.push((128, address(ip), entry));
    }
    world.apply();
    sends_from(&world, own);
}

/// What the workload sends from these addresses arrives.
fn sends_from(world: &World, own: [IpAddr; 2]) {
    let far_end = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    let server = world.as_far_end(|| TcpListener::bind("[::]:53").unwrap());
    far_end.set_read_timeout(Some(PATIENCE)).unwrap();
    for (ip, to) in own
        .into_iter()
        .zip([world.there.port4(53), world.there.port6(53)])
    {
        world
            .as_workload(|| UdpSocket::bind((ip, 0)).unwrap().send_to(b"x", to))
            .unwrap();
        let (_, from) = far_end.recv_from(&mut [0]).unwrap();
        assert_eq!(from.ip().to_canonical(), ip);
        world.as_workload(|| {
            let socket = socket(to, Type::STREAM);
            socket.bind(&SocketAddr::new(ip, 0).into()).unwrap();
            socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        });
        server.accept().unwrap();
    }
}

#[test]
fn messages_of_the_link_are_the_kernels_to_send() {
    let mut world = World::enrolled();
    // ICMPv6 sockets fill in the checksum.
    let raw = world.as_workload(|| {
        let raw = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        raw.set_unicast_hops_v6(255).unwrap();
        raw
    });
    let to = world.there.port6(0);
    // A neighbour's advertisement with a message in it, and an error about nothing.
    for kind in [136_u8, 1] {
        let message = [&[kind, 0, 0, 0][..], &[0; 20]].concat();
        assert_refused(world.as_workload(|| raw.send_to(&message, &to.into())));
        world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    }
    let raw =
        world.as_workload(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap());
    let message = [3, 1, 0xfc, 0xfe, 0, 0, 0, 0];
    let to = world.there.port4(0);
    assert_refused(world.as_workload(|| raw.send_to(&message, &to.into())));
    world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
}

#[test]
fn packets_inside_of_packets_are_judged_as_what_carries_them() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.apply();
    let to = world.there.port4(0);
    // IP in IP, GRE, IPsec, and a protocol that is nobody's.
    for protocol in [4, 41, 47, 50, 51, 253] {
        let raw = world.as_workload(|| {
            let protocol = Protocol::from(protocol);
            Socket::new(Domain::IPV4, Type::RAW, Some(protocol)).unwrap()
        });
        assert_refused(world.as_workload(|| raw.send_to(&[0x45; 40], &to.into())));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!(i32::from(event.protocol), protocol);
    }
    // A lighter UDP is not UDP.
    world.allow(Direction::Egress, Scope::Protocol(17));
    world.apply();
    let to = world.there.port4(53);
    if let Some(light) = world.as_workload(|| udp_lite(Domain::IPV4)) {
        assert_refused(world.as_workload(|| light.send_to(b"x", &to.into())));
    }
}
