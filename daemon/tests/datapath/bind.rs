//! `bind()` to the daemon's ports.

use std::net::{SocketAddr, TcpListener, UdpSocket};

use reeve_common::{Direction, Hook, Reason, protocol::TCP};

use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{WORKLOAD, World, assert_refused};

const ADDRESSES: [&str; 4] = ["0.0.0.0", "127.0.0.1", "::", "::1"];

fn reserved() -> impl Iterator<Item = SocketAddr> {
    ADDRESSES.into_iter().flat_map(|ip| {
        [15001, 15008].map(|port| (ip.parse::<std::net::IpAddr>().unwrap(), port).into())
    })
}

#[test]
fn nobody_but_reeve_takes_reeves_ports() {
    let mut world = World::enrolled();
    for address in reserved() {
        assert_refused(world.as_workload(|| TcpListener::bind(address)));
        let event = world.verdict_event(Hook::Bind, false, Reason::ReservedPort);
        assert_eq!(
            (event.workload, event.local_port),
            (WORKLOAD, address.port())
        );
        assert_eq!(
            (event.protocol, event.direction),
            (TCP, Direction::Ingress as u8)
        );
        // Multipath TCP takes TCP's ports.
        assert_refused(world.as_workload(|| {
            let domain = Domain::for_address(address);
            Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP))
                .unwrap()
                .bind(&address.into())
        }));
        world.verdict_event(Hook::Bind, false, Reason::ReservedPort);
        // Somebody else in the namespace is no better.
        let stranger = &world.stranger;
        assert_refused(world.here.run(stranger, || TcpListener::bind(address)));
        world.verdict_event(Hook::Bind, false, Reason::ReservedPort);
        // Elsewhere a port is a port, but not for a workload.
        world.as_far_end(|| TcpListener::bind(address)).unwrap();
        assert_refused(
            world
                .there
                .run(&world.workload, || TcpListener::bind(address)),
        );
        world.verdict_event(Hook::Bind, false, Reason::ReservedPort);
    }
    world
        .as_workload(|| TcpListener::bind("[::]:15002"))
        .unwrap();
    // UDP's ports are not TCP's.
    world.as_workload(|| {
        let socket = UdpSocket::bind("[::]:15001").unwrap();
        socket.connect("[::1]:15001").unwrap();
        socket.send(b"x").unwrap();
    });
    world.as_reeve(|netns| {
        let first = netns.outbound_listeners(15001).unwrap();
        let second = netns.outbound_listeners(15001).unwrap();
        assert_eq!((first.len(), second.len()), (2, 2));
        netns.tunnel_listener(15008).unwrap();
    });
}
