//! ICMP errors, which the kernel sends and hears without any socket of the workload: judged by the
//! packet that they enclose, so that they carry nothing to a stranger and nothing from one.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use reeve::datapath::address;
use reeve_common::{Direction, Hook, NamespaceEntry, PeerEntry, Reason, protocol::UDP};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    place::{Place, set_option},
    world::{CLASS, MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused},
};

/// What may not pass between a workload and a stranger.
const SECRET: &[u8] = b"the ledger";

/// ICMP types and codes that say that no socket listens at a port.
const UNREACHABLE_V4: [u8; 2] = [3, 3];
const UNREACHABLE_V6: [u8; 2] = [1, 4];

/// An enrolled workload, programs that see the kernel's own sockets, and the look-up of sockets in
/// the workload's namespace.
fn enrolled() -> World {
    let mut world = World::of_machine();
    world.enrol();
    world.apply();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    world
}

/// Makes a network one that policies name; IPv4's prefix is 96 bits longer than written.
fn add_network(world: &mut World, bits: u32, network: &str) {
    let entry = PeerEntry {
        class: CLASS,
        peer: 0,
        flags: 0,
    };
    let network = address(network.parse().unwrap());
    world.state.tables.peers.push((bits, network, entry));
}

/// A UDP socket that is bound to an address which is not the namespace's.
fn bound_to_a_strangers(from: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(from), Type::DGRAM, None).unwrap();
    match from {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true).unwrap(),
        // IPv6 asks for no capability.
        SocketAddr::V6(_) => set_option(
            &socket,
            libc::IPPROTO_IPV6,
            libc::IPV6_FREEBIND,
            &1_i32.to_ne_bytes(),
        ),
    }
    socket.bind(&from.into()).unwrap();
    socket
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let sum = (sum >> 16) + (sum & 0xffff);
    !((sum >> 16) + (sum & 0xffff)) as u16
}

/// A UDP datagram with its IP header.
fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = (8 + data.len()) as u16;
    let mut packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, UDP, 0, 0];
            header[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            header.extend([source.octets(), destination.octets()].concat());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, UDP, 64];
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header.extend([source.octets(), destination.octets()].concat());
            header
        }
        _ => panic!("one family"),
    };
    for word in [from.port(), to.port(), length, 0] {
        packet.extend(word.to_be_bytes());
    }
    packet.extend(data);
    packet
}

/// Sends an ICMP error of the far end to the workload.
fn send_error(world: &World, enclosed: &[u8], v6: bool) {
    let [kind, code] = if v6 { UNREACHABLE_V6 } else { UNREACHABLE_V4 };
    let mut error = vec![kind, code, 0, 0, 0, 0, 0, 0];
    error.extend(enclosed);
    // The kernel fills in the checksum of ICMPv6.
    let sum = checksum(&error);
    error[2..4].copy_from_slice(&sum.to_be_bytes());
    let (to, domain, protocol) = if v6 {
        (world.here.port6(0), Domain::IPV6, Protocol::ICMPV6)
    } else {
        (world.here.port4(0), Domain::IPV4, Protocol::ICMPV4)
    };
    world.as_far_end(|| {
        let raw = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
        raw.send_to(&error, &to.into()).unwrap();
    });
}

/// A raw ICMP socket.
fn listening(domain: Domain) -> Socket {
    let protocol = match domain {
        Domain::IPV4 => Protocol::ICMPV4,
        _ => Protocol::ICMPV6,
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(MOMENT)).unwrap();
    socket
}

/// Whether a raw socket is sent the secret within a moment.
fn hears(mut socket: &Socket) -> bool {
    let mut buffer = [0; 2048];
    while let Ok(length) = socket.read(&mut buffer) {
        if buffer[..length]
            .windows(SECRET.len())
            .any(|part| part == SECRET)
        {
            return true;
        }
    }
    false
}

fn ask_for_errors(socket: &impl AsRawFd, v6: bool) {
    let (level, name) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    };
    set_option(socket, level, name, &1_i32.to_ne_bytes());
}

/// What a socket's error queue gets within a moment.
fn queued(socket: &impl AsRawFd, patience: Duration) -> Option<Vec<u8>> {
    let deadline = Instant::now() + patience;
    let mut buffer = [0_u8; 2048];
    while Instant::now() < deadline {
        // SAFETY: the buffer is as long as is said.
        let read = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
            )
        };
        if let Ok(length) = usize::try_from(read) {
            return Some(buffer[..length].to_vec());
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

#[test]
fn a_datagram_under_a_strangers_address_goes_nowhere_in_the_workload() {
    let mut world = enrolled();
    let v4: [SocketAddr; 2] = [world.here.port4(9), (Ipv4Addr::LOCALHOST, 9).into()];
    let v6: [SocketAddr; 2] = [world.here.port6(9), (Ipv6Addr::LOCALHOST, 9).into()];
    for (from, targets) in [(world.there.port4(0), v4), (world.there.port6(0), v6)] {
        let there = world.as_far_end(|| listening(Domain::for_address(from)));
        for to in targets {
            let socket = world.as_workload(|| bound_to_a_strangers(from));
            assert_refused(world.as_workload(|| socket.send_to(SECRET, &to.into())));
            let event = world.verdict_event(Hook::Sendmsg, false, Reason::NoPolicy);
            assert_eq!(event.remote, address(to.ip()));
            let sent = world.as_workload(|| {
                socket.connect(&to.into()).unwrap();
                socket.send(SECRET)
            });
            assert_refused(sent);
            world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
            // No hook sees a caller who is not enrolled: the packet tells.
            let sent = world
                .here
                .run(&world.stranger, || socket.send_to(SECRET, &to.into()));
            assert_refused(sent);
            world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
        }
        assert!(!hears(&there), "{from}");
    }
}

#[test]
fn a_host_tells_a_stranger_nothing_of_what_its_workloads_say_under_its_address() {
    let mut world = World::of_machine();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.apply();
    // As nodes of Kubernetes have it; without it, IPv4 itself answers nobody so.
    world
        .here
        .netns
        .run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1"))
        .unwrap();
    for (from, to) in [
        (world.there.port4(0), IpAddr::from(Ipv4Addr::LOCALHOST)),
        (world.there.port6(0), Ipv6Addr::LOCALHOST.into()),
    ] {
        let there = world.as_far_end(|| listening(Domain::for_address(from)));
        world
            .as_workload(|| {
                let socket = bound_to_a_strangers(from);
                socket.send_to(SECRET, &SocketAddr::new(to, 9).into())
            })
            .unwrap();
        assert!(!hears(&there), "{from}");
    }
    assert_eq!(
        world.count(Direction::Egress, false, Reason::ForgedSource),
        2
    );
    // Under its own address the host is answered.
    let own = world.as_workload(|| {
        let socket = UdpSocket::bind(world.here.port6(0)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        socket.connect((Ipv6Addr::LOCALHOST, 9)).unwrap();
        socket.send(b"x").unwrap();
        socket.recv(&mut [0]).unwrap_err()
    });
    assert_eq!(own.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn an_unreachable_neighbour_is_no_way_to_a_stranger() {
    let mut world = enrolled();
    for (bits, network) in [(96 + 24, "10.0.0.0"), (64, "fd00::")] {
        add_network(&mut world, bits, network);
    }
    world.allow(Direction::Egress, Scope::Protocol(UDP));
    world.apply();
    // The kernel answers the source that the neighbour cannot be found.
    for (from, to) in [
        (world.there.port4(0), "10.0.0.77:53"),
        (world.there.port6(0), "[fd00::77]:53"),
    ] {
        let to: SocketAddr = to.parse().unwrap();
        let there = world.as_far_end(|| listening(Domain::for_address(from)));
        there.set_read_timeout(Some(PATIENCE)).unwrap();
        let socket = world.as_workload(|| bound_to_a_strangers(from));
        assert_refused(world.as_workload(|| socket.send_to(SECRET, &to.into())));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
        assert_eq!(event.local, address(from.ip()));
        there.set_read_timeout(Some(MOMENT)).unwrap();
        assert!(!hears(&there), "{from}");
    }
}

#[test]
fn an_error_about_what_was_never_sent_reaches_no_error_queue() {
    let mut world = enrolled();
    for (any, own, elsewhere) in [
        ("0.0.0.0:5555", world.here.port4(5555), "10.0.0.9:99"),
        ("[::]:5555", world.here.port6(5555), "[2001:db8::1]:99"),
    ] {
        let v6 = own.is_ipv6();
        let socket = world.as_workload(|| {
            let socket = UdpSocket::bind(any).unwrap();
            ask_for_errors(&socket, v6);
            socket
        });
        let elsewhere: SocketAddr = elsewhere.parse().unwrap();
        send_error(&world, &datagram(own, elsewhere, SECRET), v6);
        assert_eq!(queued(&socket, MOMENT), None, "{own}");
        let event = world.verdict_event(Hook::SocketLookup, false, Reason::NoPolicy);
        assert_eq!((event.protocol, event.local_port), (UDP, 5555));

        // No look-up judges an error about what a connected socket sends.
        let loopback: SocketAddr = match own {
            SocketAddr::V4(_) => (Ipv4Addr::LOCALHOST, 5555).into(),
            SocketAddr::V6(_) => (Ipv6Addr::LOCALHOST, 5555).into(),
        };
        drop(socket);
        for from in [own, loopback] {
            let mut to = from;
            to.set_port(99);
            let socket = world.as_workload(|| {
                let socket = UdpSocket::bind(from).unwrap();
                ask_for_errors(&socket, v6);
                socket.connect(to).unwrap();
                ask_for_errors(&socket, v6);
                socket
            });
            send_error(&world, &datagram(from, to, SECRET), v6);
            assert_eq!(queued(&socket, MOMENT), None, "{from}");
        }
    }
}

#[test]
fn an_error_about_what_was_sent_is_told_without_an_error_queue() {
    let mut world = enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 9));
    world.apply();
    for (any, to) in [
        ("0.0.0.0:0", world.there.port4(9)),
        ("[::]:0", world.there.port6(9)),
    ] {
        let socket = world.as_workload(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            ask_for_errors(&socket, to.is_ipv6());
            socket.send(SECRET).unwrap();
            socket
        });
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let told = socket.recv(&mut [0]).unwrap_err();
        assert_eq!(told.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
        assert_eq!(queued(&socket, MOMENT), None, "{to}");
    }
}

#[test]
fn a_raw_socket_hears_errors_about_what_was_sent_and_no_others() {
    let mut world = enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 9));
    world.apply();
    for (own, to) in [
        (world.here.port4(5555), world.there.port4(9)),
        (world.here.port6(5555), world.there.port6(9)),
    ] {
        let raw = world.as_workload(|| listening(Domain::for_address(to)));
        world.as_workload(|| UdpSocket::bind(own).unwrap().send_to(SECRET, to).unwrap());
        assert!(hears(&raw), "{to}");
        // Of another port, to another place, and with the error's own addressee in no part of it.
        let (mut other_port, mut elsewhere, mut foreign) = (own, to, own);
        other_port.set_port(5556);
        elsewhere.set_port(10);
        foreign.set_ip(to.ip());
        for (from, to) in [(other_port, to), (own, elsewhere), (foreign, to)] {
            send_error(&world, &datagram(from, to, SECRET), to.is_ipv6());
            assert!(!hears(&raw), "{from} {to}");
            world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        }
    }
}

#[test]
fn a_strangers_datagram_is_refused_before_it_finds_a_socket() {
    let mut world = enrolled();
    for (any, to) in [
        ("0.0.0.0:7", world.here.port4(7)),
        ("[::]:7", world.here.port6(7)),
    ] {
        let here = world.as_workload(|| UdpSocket::bind(any).unwrap());
        here.set_read_timeout(Some(MOMENT)).unwrap();
        let there = world.as_far_end(|| {
            let family = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(family).unwrap();
            socket.set_read_timeout(Some(MOMENT)).unwrap();
            socket.connect(to).unwrap();
            socket.send(b"x").unwrap();
            socket
        });
        assert!(here.recv(&mut [0]).is_err());
        let event = world.verdict_event(Hook::SocketLookup, false, Reason::NoPolicy);
        assert_eq!((event.protocol, event.local_port), (UDP, 7));
        let silent = there.recv(&mut [0]).unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::WouldBlock, "no error either");
    }
}

/// Sends datagrams of 1,400 bytes that no router may cut, until the kernel knows that they do not
/// reach the far end.
fn fill_path(to: SocketAddr) -> io::Result<()> {
    let (any, level, name) = if to.is_ipv4() {
        ("0.0.0.0:0", libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
    } else {
        ("[::]:0", libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
    };
    let socket = UdpSocket::bind(any)?;
    set_option(&socket, level, name, &libc::IP_PMTUDISC_DO.to_ne_bytes());
    socket.connect(to)?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        socket.send(&[0; 1400])?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A network behind the far end, which has addresses 3 and 4 and takes packets of at most 1,300
/// bytes.
fn narrow_network(world: &World) -> Place {
    let beyond = Place::new(3);
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        beyond.netns.fd.as_raw_fd()
    );
    world.there.ip(&[
        format!("link add narrow mtu 1300 type veth peer name wire mtu 1500 netns {path}"),
        "link set narrow up".into(),
        "addr add 10.0.3.1/24 dev narrow".into(),
        "addr add fd00:3::1/64 dev narrow nodad".into(),
    ]);
    let mut lines = vec!["link set wire up".into()];
    for number in [3, 4] {
        lines.push(format!("addr add 10.0.3.{number}/24 dev wire"));
        lines.push(format!("addr add fd00:3::{number}/64 dev wire nodad"));
    }
    lines.push("route add default via 10.0.3.1".into());
    lines.push("route add default via fd00:3::1".into());
    beyond.ip(&lines);
    world.here.ip(&[
        "route add 10.0.3.0/24 via 10.0.0.2".into(),
        "route add fd00:3::/64 via fd00::2".into(),
    ]);
    for family in ["ipv4", "ipv6"] {
        let forwarding = format!("/proc/sys/net/{family}/conf/all/forwarding");
        world
            .there
            .netns
            .run(|| std::fs::write(&forwarding, "1"))
            .unwrap();
    }
    beyond
}

#[test]
fn the_path_to_an_allowed_far_end_tells_its_mtu() {
    let mut world = enrolled();
    let beyond = narrow_network(&world);
    for (bits, network) in [(96 + 24, "10.0.3.0"), (64, "fd00:3::")] {
        add_network(&mut world, bits, network);
    }
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    for (to, other) in [("10.0.3.3", "10.0.3.4"), ("fd00:3::3", "fd00:3::4")] {
        let [to, other]: [IpAddr; 2] = [to, other].map(|ip| ip.parse().unwrap());
        let error = world.as_workload(|| fill_path((to, 9).into())).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{to}");

        let server = beyond.run(&world.stranger, || TcpListener::bind((other, 80)).unwrap());
        let mut client = world.as_workload(|| TcpStream::connect((other, 80)).unwrap());
        let (mut accepted, _) = server.accept().unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let sender = thread::spawn(move || client.write_all(&[7; 100_000]));
        accepted.read_exact(&mut [0; 100_000]).unwrap();
        sender.join().unwrap().unwrap();
    }
}
