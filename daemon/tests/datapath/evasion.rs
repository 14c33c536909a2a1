//! Calls and kinds of sockets that a workload may try in place of `connect()` and `send()`.

use std::{
    io::{ErrorKind, Read},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd,
};

use reeve_common::{
    Direction, Hook, ONWARD_MARK, PEER_TUNNEL, Reason,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    place::{disconnect, set_option},
    ring,
    world::{MOMENT, PATIENCE, Scope, World, assert_refused},
};

/// A workload that may open TCP to port 80 and UDP to port 53 of the far end, where somebody
/// listens there and next to it.
struct Half {
    world: World,
    tcp: TcpListener,
    udp: UdpSocket,
    _next: (TcpListener, UdpSocket),
}

fn half() -> Half {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let bind = |tcp: u16, udp: u16| {
        let any = Ipv6Addr::UNSPECIFIED;
        let listener = TcpListener::bind((any, tcp)).unwrap();
        let socket = UdpSocket::bind((any, udp)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        (listener, socket)
    };
    let (tcp, udp) = world.as_far_end(|| bind(80, 53));
    let next = world.as_far_end(|| bind(81, 54));
    Half {
        world,
        tcp,
        udp,
        _next: next,
    }
}

impl Half {
    /// Allowed and refused TCP ports, by each family.
    fn streams(&self) -> [(SocketAddr, SocketAddr); 3] {
        let there = &self.world.there;
        [
            (there.port4(80), there.port4(81)),
            (there.port6(80), there.port6(81)),
            (mapped(there.port4(80)), mapped(there.port4(81))),
        ]
    }

    /// The same for UDP.
    fn datagrams(&self) -> [(SocketAddr, SocketAddr); 3] {
        self.streams()
            .map(|(allowed, refused)| (with_port(allowed, 53), with_port(refused, 54)))
    }

    /// Reads what the far end's allowed TCP port gets next.
    fn accepted(&self, bytes: &mut [u8]) {
        let (mut accepted, _) = self.tcp.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        accepted.read_exact(bytes).unwrap();
    }
}

/// In IPv6's notation.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        SocketAddr::V6(_) => address,
    }
}

fn with_port(mut address: SocketAddr, port: u16) -> SocketAddr {
    address.set_port(port);
    address
}

fn stream(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap()
}

fn datagram(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::DGRAM, None).unwrap()
}

#[test]
fn a_connection_that_is_opened_by_sending_is_judged() {
    let mut half = half();
    for (allowed, refused) in half.streams() {
        let open = |to: SocketAddr| {
            half.world.as_workload(|| {
                stream(to).send_to_with_flags(b"hello", &to.into(), libc::MSG_FASTOPEN)
            })
        };
        assert_refused(open(refused));
        assert_eq!(open(allowed).unwrap(), 5);
        half.accepted(&mut [0; 5]);
        // The other way: the call connects nothing, and the first data does.
        let later = |to: SocketAddr| {
            half.world.as_workload(|| {
                let socket = stream(to);
                set_option(
                    &socket,
                    libc::IPPROTO_TCP,
                    libc::TCP_FASTOPEN_CONNECT,
                    &1_i32.to_ne_bytes(),
                );
                socket.connect(&to.into())?;
                socket.send(b"hello")
            })
        };
        assert_refused(later(refused));
        assert_eq!(later(allowed).unwrap(), 5);
        half.accepted(&mut [0; 5]);
    }
    for _ in 0..6 {
        half.world
            .verdict_event(Hook::Connect, false, Reason::NoPolicy);
    }
}

#[test]
fn a_socket_that_connects_again_is_judged_again() {
    let half = half();
    for (allowed, refused) in half.streams() {
        half.world.as_workload(|| {
            let socket = stream(allowed);
            socket.connect(&allowed.into()).unwrap();
            let _ = half.tcp.accept().unwrap();
            disconnect(&socket);
            assert_refused(socket.connect(&refused.into()));
            socket.connect(&allowed.into()).unwrap();
            socket.send(b"again").unwrap();
        });
        half.accepted(&mut [0; 5]);
    }
}

#[test]
fn a_tunnels_socket_that_connects_again_takes_nothing_along() {
    let mut half = half();
    half.world.state.tables.peers.clear();
    half.world.peer(PEER_TUNNEL);
    half.world.listening();
    half.world.apply();
    let listeners = half
        .world
        .as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let (allowed, refused) = (half.world.there.port4(80), half.world.there.port4(81));
    let socket = half.world.as_workload(|| {
        let socket = stream(allowed);
        socket.connect(&allowed.into()).unwrap();
        disconnect(&socket);
        assert_refused(socket.connect(&refused.into()));
        socket.connect(&allowed.into()).unwrap();
        socket
    });
    // A thread of the workload leaves, and takes the socket along.
    let of_stranger = half.world.here.run(&half.world.stranger, || {
        disconnect(&socket);
        socket.connect_timeout(&refused.into(), MOMENT)
    });
    assert_eq!(of_stranger.unwrap_err().kind(), ErrorKind::TimedOut);
    half.world
        .verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
    drop(listeners);
}

#[test]
fn a_connected_datagram_socket_sends_nowhere_else() {
    let half = half();
    for (allowed, refused) in half.datagrams() {
        half.world.as_workload(|| {
            let socket = datagram(allowed);
            socket.connect(&allowed.into()).unwrap();
            socket.send(b"x").unwrap();
            assert_refused(socket.send_to(b"x", &refused.into()));
            socket.connect(&refused.into()).unwrap();
            assert_refused(socket.send(b"x"));
            assert_refused(socket.send_to(b"x", &refused.into()));
            disconnect(&socket);
            assert_refused(socket.send_to(b"x", &refused.into()));
            socket.send_to(b"x", &allowed.into()).unwrap();
        });
        for _ in 0..2 {
            half.udp.recv(&mut [0]).unwrap();
        }
    }
}

#[test]
fn an_address_of_no_family_is_judged_as_what_it_is_taken_for() {
    let half = half();
    let send = |port: u16| {
        half.world.as_workload(|| {
            let socket = datagram(half.world.there.port4(53));
            let to = libc::sockaddr_in {
                sin_family: libc::AF_UNSPEC as libc::sa_family_t,
                sin_port: port.to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes([10, 0, 0, 2]),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the data and the address are as long as is said.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    b"x".as_ptr().cast(),
                    1,
                    0,
                    (&raw const to).cast(),
                    size_of::<libc::sockaddr_in>() as libc::socklen_t,
                )
            };
            if sent == 1 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
    };
    assert_refused(send(54));
    send(53).unwrap();
    half.udp.recv(&mut [0]).unwrap();
}

#[test]
fn multipath_tcp_is_tcp() {
    let mut half = half();
    for (allowed, refused) in half.streams() {
        let connect = |to: SocketAddr| {
            half.world.as_workload(|| {
                let socket =
                    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))
                        .unwrap();
                socket.connect(&to.into())?;
                socket.send(b"hello")
            })
        };
        let refusal = connect(refused);
        connect(allowed).unwrap();
        assert_refused(refusal);
        half.world
            .verdict_event(Hook::Connect, false, Reason::NoPolicy);
        half.accepted(&mut [0; 5]);
        let event = half
            .world
            .verdict_event(Hook::Connect, true, Reason::NoTunnel);
        assert_eq!(event.protocol, TCP);
    }
}

#[test]
fn a_ring_connects_where_its_owner_may() {
    let mut half = half();
    for (allowed, refused) in half.streams() {
        let connect = |to: SocketAddr| {
            half.world.as_workload(|| {
                let socket = stream(to);
                ring::connect(&socket, to)?;
                socket.send(b"hello")
            })
        };
        let refusal = connect(refused);
        connect(allowed).unwrap();
        assert_refused(refusal);
        half.world
            .verdict_event(Hook::Connect, false, Reason::NoPolicy);
        half.accepted(&mut [0; 5]);
    }
}

#[test]
fn a_message_to_many_is_judged_like_one_to_a_single_one() {
    let half = half();
    for to in [
        SocketAddr::from((Ipv4Addr::BROADCAST, 53)),
        "10.0.0.255:53".parse().unwrap(),
        "224.0.0.251:53".parse().unwrap(),
        "[ff02::fb]:53".parse().unwrap(),
    ] {
        let sent = half.world.as_workload(|| {
            let socket = datagram(to);
            if to.is_ipv4() {
                socket.set_broadcast(true).unwrap();
            } else {
                socket.set_multicast_if_v6(2).unwrap();
            }
            socket.send_to(b"x", &to.into())
        });
        assert_refused(sent);
    }
}

#[test]
fn reeves_mark_is_worth_nothing_on_a_workloads_socket() {
    let half = half();
    let datapath = half.world.datapath().clone();
    half.world
        .block_on(datapath.prepare_namespace(&half.world.here.netns))
        .unwrap();
    for ((_, stream_to), (_, datagram_to)) in half.streams().into_iter().zip(half.datagrams()) {
        half.world.as_workload(|| {
            let socket = stream(stream_to);
            socket.set_mark(ONWARD_MARK).unwrap();
            assert_refused(socket.connect(&stream_to.into()));
            let socket = datagram(datagram_to);
            socket.set_mark(ONWARD_MARK).unwrap();
            assert_refused(socket.send_to(b"x", &datagram_to.into()));
        });
    }
}

#[test]
fn every_notation_of_reeves_own_ports_is_refused() {
    let mut half = half();
    half.world.allow(Direction::Egress, Scope::Anything);
    half.world.apply();
    let tunnel = [half.world.here.port4(15008), half.world.here.port6(15008)];
    let loopback = [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:0.0.0.0",
    ]
    .into_iter()
    .flat_map(|ip| [15001, 15008].map(|port| SocketAddr::new(ip.parse().unwrap(), port)));
    for to in loopback.chain(tunnel).chain(tunnel.map(mapped)) {
        assert_refused(half.world.as_workload(|| stream(to).connect(&to.into())));
        half.world
            .verdict_event(Hook::Connect, false, Reason::ReservedPort);
        let opened = half
            .world
            .as_workload(|| stream(to).send_to_with_flags(b"x", &to.into(), libc::MSG_FASTOPEN));
        assert_refused(opened);
        half.world
            .verdict_event(Hook::Connect, false, Reason::ReservedPort);
    }
}

#[test]
fn a_redirected_connection_that_is_turned_aside_leaves_nothing() {
    let mut half = half();
    half.world.state.tables.peers.clear();
    half.world.peer(PEER_TUNNEL);
    half.world.listening();
    half.world.apply();
    let _listeners = half
        .world
        .as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    // Whoever may change the namespace's routes can have loopback's packets leave it.
    half.world
        .here
        .netns
        .run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1"))
        .unwrap();
    half.world.here.ip(&[
        "rule add pref 10 lookup local".into(),
        "rule del pref 0".into(),
        "rule add pref 5 to 127.0.0.0/8 lookup 77".into(),
        "route add 127.0.0.0/8 via 10.0.0.2 dev wire table 77 onlink".into(),
    ]);
    let to = half.world.there.port4(80);
    let connected = half
        .world
        .as_workload(|| stream(to).connect_timeout(&to.into(), MOMENT));
    assert!(connected.is_err());
    let event = half.world.event("it was refused at the packet", |event| {
        event.hook == Hook::PacketEgress as u8 && event.allowed == 0
    });
    assert_eq!(event.remote_port, 15001);
}
