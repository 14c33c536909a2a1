//! Connections that meet half-way: a socket that opens a connection itself takes one that is opened
//! towards it, without ever listening (a simultaneous open, RFC 9293, section 3.5).

use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use reeve_common::{
    Direction, Hook, NAMESPACE_LISTENING, NamespaceEntry, PEER_TUNNEL, Reason, protocol::TCP,
};
use socket2::{Domain, Socket, Type};

use crate::{
    place::set_option,
    world::{MOMENT, Scope, World, assert_refused},
};

/// Reeve's outbound port.
const OUTBOUND: u16 = 15001;
/// From where the workload connects.
const CLIENT: u16 = 45_000;

/// A socket that may share its address.
fn open(domain: Domain) -> Socket {
    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// The loopback address of a family.
fn loopback(domain: Domain) -> IpAddr {
    let text = if domain == Domain::IPV4 {
        "127.0.0.1"
    } else {
        "::1"
    };
    text.parse().unwrap()
}

/// Has a socket sign what it sends to a far end, or with an empty key no longer (`TCP_MD5SIG`, RFC 2385).
/// A reset without a signature does not end it.
fn sign(socket: &Socket, far_end: IpAddr, key: &[u8]) {
    const TCP_MD5SIG: i32 = 14;
    let mut option = vec![0; 216];
    let to = socket2::SockAddr::from(SocketAddr::new(far_end, 0));
    // SAFETY: the address is as long as it says.
    let bytes = unsafe { std::slice::from_raw_parts(to.as_ptr().cast::<u8>(), to.len() as usize) };
    option[..bytes.len()].copy_from_slice(bytes);
    option[130..132].copy_from_slice(&(key.len() as u16).to_ne_bytes());
    option[136..136 + key.len()].copy_from_slice(key);
    set_option(socket, libc::IPPROTO_TCP, TCP_MD5SIG, &option);
}

/// Begins a connection to a closed port, and goes on trying.
fn begin(socket: &Socket, to: SocketAddr) -> std::io::Result<()> {
    sign(socket, to.ip(), b"k");
    let begun = socket.connect(&to.into());
    sign(socket, to.ip(), b"");
    begun
}

/// A workload in a namespace that it shares, whose connections are redirected.
fn enrol(world: &mut World) {
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, 1);
    let shared = NamespaceEntry {
        workload: 0,
        flags: NAMESPACE_LISTENING,
    };
    let namespace = (world.here.netns.cookie, shared);
    world.state.namespaces.push(namespace);
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
}

#[test]
fn who_has_bound_reeves_port_before_opens_no_connection_from_it() {
    for by_stranger in [true, false] {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let mut world = World::new();
            world.apply();
            let take = || {
                let socket = open(domain);
                let at = SocketAddr::new(loopback(domain), OUTBOUND);
                socket.bind(&at.into()).unwrap();
                socket
            };
            let cgroup = if by_stranger {
                &world.stranger
            } else {
                &world.workload
            };
            let thief = world.here.run(cgroup, take);
            enrol(&mut world);
            let cgroup = if by_stranger {
                &world.stranger
            } else {
                &world.workload
            };
            let to = SocketAddr::new(loopback(domain), CLIENT);
            assert_refused(world.here.run(cgroup, || begin(&thief, to)));
            world.verdict_event(Hook::Connect, false, Reason::ReservedPort);
        }
    }
}

#[test]
fn who_is_given_reeves_port_by_the_kernel_meets_no_redirected_connection() {
    for domain in [Domain::IPV4, Domain::IPV6] {
        let mut world = World::new();
        enrol(&mut world);
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        let narrow = format!("{OUTBOUND} {OUTBOUND}");
        let netns = &world.here.netns;
        netns.run(|| std::fs::write(range, &narrow)).unwrap();
        let to = if domain == Domain::IPV4 {
            world.there.port4(80)
        } else {
            world.there.port6(80)
        };
        let thief = world.here.run(&world.stranger, || {
            let socket = open(domain);
            // At the address to which connections to the far end are redirected.
            if domain == Domain::IPV4 {
                let at = reeve_common::redirect_address(&reeve::datapath::address(to.ip()), 80);
                setsockopt(&socket, IpBindAddressNoPort, &true).unwrap();
                socket.bind(&SocketAddr::from((at, 0)).into()).unwrap();
            }
            let begun = begin(&socket, SocketAddr::new(loopback(domain), CLIENT));
            assert_eq!(begun.unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
            socket
        });
        let own = thief.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(own.port(), OUTBOUND);
        let connected = world.as_workload(|| {
            let socket = open(domain);
            let any = if domain == Domain::IPV4 {
                "0.0.0.0"
            } else {
                "::"
            };
            let any = SocketAddr::new(any.parse().unwrap(), CLIENT);
            socket.bind(&any.into()).unwrap();
            socket.set_nonblocking(false).unwrap();
            socket.connect_timeout(&to.into(), MOMENT)
        });
        connected.unwrap_err();
        assert!(thief.peer_addr().is_err(), "{domain:?}: it is connected");
        world.verdict_event(Hook::PacketIngress, false, Reason::ReservedPort);
        // The daemon closes what holds its ports before it listens.
        let closed = world
            .datapath()
            .close_listeners(&world.here.netns, |_| true);
        assert!(closed.unwrap().is_empty());
        let error = thief.take_error().unwrap();
        assert_eq!(error.unwrap().kind(), std::io::ErrorKind::ConnectionAborted);
    }
}
