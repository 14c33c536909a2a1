//! Options of sockets by which a workload would tell or hear something without a packet of its own:
//! multicast groups, of which the kernel tells the link, and error queues.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use reeve::datapath::address;
use reeve_common::{
    Direction, Hook, PeerEntry, Reason,
    protocol::{ICMP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{CLASS, Scope, World, assert_refused, udp_lite};

const GROUP_V4: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0x1234, 0x5678);
const PORT: u16 = 5353;

/// Options of `linux/in.h` that the `libc` crate has no name for.
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;

fn set(socket: &Socket, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: `value` is as long as is said.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A `sockaddr_storage`.
fn storage(ip: IpAddr) -> [u8; 128] {
    let mut bytes = [0; 128];
    match ip {
        IpAddr::V4(ip) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            bytes[8..24].copy_from_slice(&ip.octets());
        }
    }
    bytes
}

/// The device at this end of the wire.
const DEVICE: [u8; 4] = 2_u32.to_ne_bytes();

/// Every way to join a group: level, option and value.
fn joins(group: IpAddr, source: IpAddr) -> Vec<(i32, i32, Vec<u8>)> {
    let request = [&DEVICE[..], &[0; 4], &storage(group)].concat();
    let of_source = [&request[..], &storage(source)].concat();
    match (group, source) {
        (IpAddr::V4(group), IpAddr::V4(source)) => {
            let by_device = [&group.octets()[..], &[0; 4], &DEVICE].concat();
            let with_source = [&group.octets()[..], &[10, 0, 0, 1], &source.octets()].concat();
            vec![
                (libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, by_device),
                (
                    libc::IPPROTO_IP,
                    libc::IP_ADD_SOURCE_MEMBERSHIP,
                    with_source,
                ),
                (libc::IPPROTO_IP, MCAST_JOIN_GROUP, request),
                (libc::IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, of_source),
            ]
        }
        (IpAddr::V6(group), _) => {
            let by_device = [&group.octets()[..], &DEVICE].concat();
            vec![
                (libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, by_device),
                (libc::IPPROTO_IPV6, MCAST_JOIN_GROUP, request),
                (libc::IPPROTO_IPV6, MCAST_JOIN_SOURCE_GROUP, of_source),
            ]
        }
        _ => panic!("one family"),
    }
}

fn datagram(domain: Domain, port: u16) -> Socket {
    let socket = Socket::new(domain, Type::DGRAM, None).unwrap();
    let any: SocketAddr = if domain == Domain::IPV4 {
        (Ipv4Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, port).into()
    };
    socket.bind(&any.into()).unwrap();
    socket
}

/// Joins a group in every way, each with a socket of its own.
fn join(world: &World, group: IpAddr, port: u16) -> Vec<io::Result<()>> {
    let source = if group.is_ipv4() {
        world.there.v4
    } else {
        world.there.v6
    };
    let domain = Domain::for_address((group, 0).into());
    let ways = joins(group, source);
    let set = |(level, name, value): &(i32, i32, Vec<u8>)| {
        world.as_workload(|| set(&datagram(domain, port), *level, *name, value))
    };
    ways.iter().map(set).collect()
}

#[test]
fn a_group_that_no_policy_names_is_not_joined() {
    let mut world = World::enrolled();
    for group in [IpAddr::from(GROUP_V4), GROUP_V6.into()] {
        for refused in join(&world, group, PORT) {
            assert_refused(refused);
            let event = world.verdict_event(Hook::SocketOption, false, Reason::NoPolicy);
            assert_eq!((event.remote, event.protocol), (address(group), ICMP));
        }
    }
    // Elsewhere anybody joins.
    for (level, name, value) in joins(GROUP_V4.into(), world.there.v4) {
        let joined = world.as_far_end(|| set(&datagram(Domain::IPV4, PORT), level, name, &value));
        // The workload's own address, by which one of them names the device, is not there.
        assert!(joined.is_ok() || name == libc::IP_ADD_SOURCE_MEMBERSHIP);
    }
}

#[test]
fn a_group_is_joined_where_icmp_or_the_sockets_own_port_is_allowed() {
    for (scope, port, others) in [
        (Scope::Protocol(ICMP), 0, true),
        (Scope::Port(UDP, PORT), PORT, false),
    ] {
        let mut world = World::enrolled();
        for group in [IpAddr::from(GROUP_V4), GROUP_V6.into()] {
            let entry = PeerEntry {
                class: CLASS,
                peer: 0,
                flags: 0,
            };
            world.state.tables.peers.push((128, address(group), entry));
        }
        world.allow(Direction::Egress, scope);
        world.apply();
        for group in [IpAddr::from(GROUP_V4), GROUP_V6.into()] {
            for joined in join(&world, group, port) {
                joined.unwrap();
            }
            for joined in join(&world, group, PORT + 1) {
                assert_eq!(joined.is_ok(), others);
            }
        }
        let other = Ipv4Addr::new(239, 1, 2, 4).into();
        for refused in join(&world, other, PORT) {
            assert_refused(refused);
        }
    }
}

/// Asks for an error queue; whether the kernel has made one.
fn has_error_queue(socket: &Socket, level: i32, name: i32) -> bool {
    set(socket, level, name, &1_i32.to_ne_bytes()).unwrap();
    let mut value = 0_i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` is as long as is said.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    value != 0
}

#[test]
fn only_tcp_gets_an_error_queue() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 9));
    world.apply();
    let ping_groups = "/proc/sys/net/ipv4/ping_group_range";
    world
        .here
        .netns
        .run(|| std::fs::write(ping_groups, "0 0"))
        .unwrap();
    let icmp = |domain| {
        if domain == Domain::IPV4 {
            Protocol::ICMPV4
        } else {
            Protocol::ICMPV6
        }
    };
    for (own, there, level, name) in [
        (
            world.here.port4(99),
            world.there.port4(9),
            libc::IPPROTO_IP,
            libc::IP_RECVERR,
        ),
        (
            world.here.port6(99),
            world.there.port6(9),
            libc::IPPROTO_IPV6,
            libc::IPV6_RECVERR,
        ),
    ] {
        let domain = Domain::for_address(own);
        let asks = |kind: Type, protocol: Option<Protocol>, to: Option<SocketAddr>| {
            world.as_workload(|| {
                let socket = Socket::new(domain, kind, protocol).unwrap();
                if let Some(to) = to {
                    socket.connect(&to.into()).unwrap();
                }
                has_error_queue(&socket, level, name)
            })
        };
        let mut loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 99).into();
        if domain == Domain::IPV6 {
            loopback = (Ipv6Addr::LOCALHOST, 99).into();
        }
        assert!(!asks(Type::DGRAM, None, Some(there)));
        assert!(asks(Type::STREAM, None, None), "TCP knows its own packets");
        assert!(!asks(Type::DGRAM, None, None));
        assert!(!asks(Type::DGRAM, None, Some(own)));
        assert!(!asks(Type::DGRAM, None, Some(loopback)));
        if let Some(light) = world.as_workload(|| udp_lite(domain)) {
            assert!(!world.as_workload(|| has_error_queue(&light, level, name)));
        }
        assert!(!asks(Type::DGRAM, Some(icmp(domain)), None));
        assert!(!asks(Type::RAW, Some(icmp(domain)), None));
        assert!(!asks(Type::RAW, Some(Protocol::UDP), None));
        // A process of no workload is in nothing hindered, but in a workload's namespace.
        let of_nobody = || has_error_queue(&datagram(domain, 0), level, name);
        assert!(world.as_far_end(of_nobody));
        assert!(!world.here.run(&world.stranger, of_nobody));
    }
    // Neither does a new generation leave it to a socket that was allowed.
    let socket = world.as_workload(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.connect(&world.there.port4(9).into()).unwrap();
        socket
    });
    world.state.tables.verdicts.clear();
    world.apply();
    let asks = || has_error_queue(&socket, libc::IPPROTO_IP, libc::IP_RECVERR);
    assert!(!world.as_workload(asks));
}

#[test]
fn a_value_longer_than_a_page_reaches_the_kernel_whole() {
    let world = World::enrolled();
    let socket = world.as_workload(|| Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap());
    let mut value = vec![0; 3 * 4096];
    value[..4].copy_from_slice(&70_000_i32.to_ne_bytes());
    world
        .as_workload(|| set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &value))
        .unwrap();
    assert_eq!(socket.recv_buffer_size().unwrap(), 140_000);
}
