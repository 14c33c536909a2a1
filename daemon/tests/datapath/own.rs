//! What stays in a workload is never in question, and what only looks so is judged.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
};

use reeve::datapath::address;
use reeve_common::{
    Direction, Hook, NamespaceEntry, PEER_TUNNEL, Reason, link_local_key, protocol::TCP,
};
use socket2::{Domain, Socket, Type};

use crate::{
    place::{disconnect, set_option},
    world::{MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused},
};

/// A TCP connection from an address of one's own.
fn connect_from(from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), MOMENT)?;
    Ok(socket.into())
}

/// Whether bytes pass both ways.
fn speaks(mut client: TcpStream, server: &TcpListener) {
    let (mut accepted, _) = server.accept().unwrap();
    for end in [&client, &accepted] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    accepted.write_all(b"y").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn what_only_looks_like_loopback_is_judged() {
    let mut world = World::enrolled();
    for ip in [
        "126.255.255.255",
        "128.0.0.1",
        "0.0.0.1",
        "255.127.0.1",
        // An IPv4 address in an older notation, and one too many for `::1`.
        "::127.0.0.1",
        "::2",
        // Whose end is that of loopback.
        "2001:db8::1",
        "0:0:1::1",
        "::1:0:0:1",
        "::fffe:7f00:1",
        "::ffff:0:127.0.0.1",
    ] {
        let to = SocketAddr::new(ip.parse().unwrap(), 80);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = world.as_workload(|| UdpSocket::bind(any).unwrap());
        assert_refused(world.as_workload(|| socket.send_to(b"x", to)));
        let event = world.verdict_event(Hook::Sendmsg, false, Reason::NoPolicy);
        assert_eq!(event.remote, address(to.ip()));
    }
}

#[test]
fn another_workloads_address_is_not_ones_own() {
    let mut world = World::enrolled();
    for ip in [world.there.v4, world.there.v6] {
        let neighbour = (address(ip), WORKLOAD + 1);
        world.state.local_addresses.push(neighbour);
    }
    world.apply();
    for to in [world.there.port4(80), world.there.port6(80)] {
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        world.verdict_event(Hook::Connect, false, Reason::NoPolicy);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = world.as_workload(|| UdpSocket::bind(any).unwrap());
        assert_refused(world.as_workload(|| socket.send_to(b"x", to)));
        world.verdict_event(Hook::Sendmsg, false, Reason::NoPolicy);
    }
}

#[test]
fn all_addresses_of_a_workload_are_its_own() {
    let mut world = World::enrolled();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    let second: [IpAddr; 2] = ["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
    world.here.ip(&[
        format!("addr add {}/24 dev wire", second[0]),
        format!("addr add {}/64 dev wire nodad", second[1]),
    ]);
    for ip in second {
        world.state.local_addresses.push((address(ip), WORKLOAD));
    }
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let first = [world.here.v4, world.here.v6];
    let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    for (from, to) in [
        (first, first),
        (first, second),
        (second, first),
        (loopback, first),
    ]
    .into_iter()
    .flat_map(|(from, to)| from.into_iter().zip(to))
    {
        let client = world.as_workload(|| connect_from(from, SocketAddr::new(to, 80)));
        speaks(
            client.unwrap_or_else(|error| panic!("{from} {to}: {error}")),
            &server,
        );
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn a_workload_reaches_its_own_link_local_addresses_and_no_others() {
    let mut world = World::enrolled();
    let (v4, v6): (IpAddr, IpAddr) = ([169, 254, 7, 7].into(), "fe80::7".parse().unwrap());
    world.here.ip(&[
        format!("addr add {v4}/16 dev wire"),
        format!("addr add {v6}/64 dev wire nodad"),
    ]);
    for ip in [v4, v6] {
        let key = link_local_key(&address(ip), WORKLOAD).unwrap();
        world.state.local_addresses.push((key, WORKLOAD));
        // Another workload may have the same one on its own link.
        let other = link_local_key(&address(ip), WORKLOAD + 1).unwrap();
        world.state.local_addresses.push((other, WORKLOAD + 1));
    }
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let datagrams = world.as_workload(|| UdpSocket::bind("[::]:53").unwrap());
    datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
    for to in ["169.254.7.7:80", "[fe80::7%2]:80"] {
        let mut to: SocketAddr = to.parse().unwrap();
        let client = world.as_workload(|| TcpStream::connect_timeout(&to, PATIENCE));
        speaks(client.unwrap(), &server);
        to.set_port(53);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        world
            .as_workload(|| UdpSocket::bind(any).unwrap().send_to(b"x", to))
            .unwrap();
        datagrams.recv(&mut [0]).unwrap();
    }
    assert_eq!(world.other_events(), []);
    for to in ["169.254.7.8:80", "[fe80::8%2]:80"] {
        let to: SocketAddr = to.parse().unwrap();
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        world.verdict_event(Hook::Connect, false, Reason::NoPolicy);
    }
    // As what they are filed under, they are nobody's.
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let to = world.there.port6(53);
    for ip in [v4, v6] {
        let key = link_local_key(&address(ip), WORKLOAD).unwrap();
        let sent = world.as_workload(|| {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
            let on = 1_i32.to_ne_bytes();
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, &on);
            let from = SocketAddrV6::new(key.into(), 0, 0, 2);
            socket.bind(&SocketAddr::V6(from).into()).unwrap();
            socket.send_to(b"x", &to.into())
        });
        assert_refused(sent);
        world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
    }
}

#[test]
fn loopback_stays_loopback_where_a_namespace_is_shared() {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.apply();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for (from, to) in [
        (world.here.v4, "127.0.0.1".parse().unwrap()),
        (world.here.v6, IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])),
    ] {
        // The address is the host's and everybody's; the way is loopback's.
        let client = world.here.run(&world.stranger, || {
            connect_from(from, SocketAddr::new(to, 80))
        });
        speaks(client.unwrap(), &server);
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn a_connection_to_oneself_that_is_turned_aside_leaves_nothing() {
    let mut world = World::enrolled();
    let server = world.as_workload(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let mut client = world.as_workload(|| {
        let to: SocketAddr = ([127, 0, 0, 1], 80).into();
        TcpStream::connect(to).unwrap()
    });
    let (mut accepted, _) = server.accept().unwrap();
    client.write_all(b"x").unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    world
        .here
        .netns
        .run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1"))
        .unwrap();
    world.here.ip(&[
        "rule add pref 10 lookup local".into(),
        "rule del pref 0".into(),
        "rule add pref 5 to 127.0.0.1 lookup 77".into(),
        "route add 127.0.0.1 via 10.0.0.2 dev wire table 77 onlink".into(),
        "route flush cache".into(),
    ]);
    let _ = world.as_workload(|| client.write_all(b"a secret"));
    let event = world.event("it was refused at the packet", |event| {
        event.hook == Hook::PacketEgress as u8 && event.allowed == 0
    });
    assert_eq!(event.remote_port, 80);
}

// === Sockets that connect to oneself after they were somewhere else ===

#[test]
fn a_socket_that_comes_home_is_not_taken_for_what_it_was() {
    for tunnel in [0, PEER_TUNNEL] {
        let mut world = World::enrolled();
        world.peer(tunnel);
        world.allow(Direction::Egress, Scope::Port(TCP, 80));
        world.listening();
        world.apply();
        let _far_end = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
        let _listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
        let server = world.as_workload(|| TcpListener::bind("[::]:81").unwrap());
        for (away, home) in [
            (world.there.port4(80), "127.0.0.1:81"),
            (world.there.port6(80), "[::1]:81"),
        ] {
            let home: SocketAddr = home.parse().unwrap();
            let client: TcpStream = world.as_workload(|| {
                let socket = Socket::new(Domain::for_address(away), Type::STREAM, None).unwrap();
                socket.connect(&away.into()).unwrap();
                disconnect(&socket);
                socket.connect_timeout(&home.into(), PATIENCE).unwrap();
                socket.into()
            });
            assert_eq!(client.peer_addr().unwrap(), home, "getpeername()");
            speaks(client, &server);
        }
    }
}

#[test]
fn a_socket_that_has_connected_listens_for_nobody_whom_no_policy_allows() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let _far_end = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for (away, guarded) in [
        (world.there.port4(80), world.here.port4(1000)),
        (world.there.port6(80), world.here.port6(1000)),
    ] {
        let _server = world.as_workload(|| {
            let socket = Socket::new(Domain::for_address(away), Type::STREAM, None).unwrap();
            socket.bind(&guarded.into()).unwrap();
            socket.connect(&away.into()).unwrap();
            disconnect(&socket);
            socket.listen(8).unwrap();
            socket
        });
        let intruder = world.as_far_end(|| TcpStream::connect_timeout(&guarded, MOMENT));
        assert_eq!(intruder.unwrap_err().kind(), io::ErrorKind::TimedOut);
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    }
}

#[test]
fn a_datagram_socket_that_has_connected_hears_nobody_whom_no_policy_allows() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(
        Direction::Egress,
        Scope::Port(reeve_common::protocol::UDP, 53),
    );
    world.apply();
    let far_end = world.as_far_end(|| UdpSocket::bind("[::]:54").unwrap());
    for (away, own) in [
        (world.there.port4(53), world.here.port4(1000)),
        (world.there.port6(53), world.here.port6(1000)),
    ] {
        let socket = world.as_workload(|| {
            let socket = UdpSocket::bind(own).unwrap();
            socket.connect(away).unwrap();
            disconnect(&socket);
            socket
        });
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        let to = match own {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            SocketAddr::V6(_) => own,
        };
        world.as_far_end(|| far_end.send_to(b"x", to)).unwrap();
        assert!(socket.recv(&mut [0]).is_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    }
}
