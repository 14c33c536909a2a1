//! Sockets that a workload uses and has not made, in a namespace that it shares: its own from the
//! first call on of which the kernel tells.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::{
    handed::sharing,
    world::{MOMENT, PATIENCE, Scope, World},
};
use reeve_common::{
    Direction, Hook, Reason,
    protocol::{TCP, UDP},
};

/// `accept()` that asks for no address.
fn accept(listener: &TcpListener) -> TcpStream {
    // SAFETY: the descriptor is open, and no memory is handed over.
    let accepted = unsafe {
        libc::accept(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    assert!(accepted >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it.
    unsafe { OwnedFd::from_raw_fd(accepted) }.into()
}

#[test]
fn a_connection_is_the_workloads_once_it_sets_an_option() {
    let mut world = sharing();
    let listener = world
        .here
        .run(&world.stranger, || TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let mut accepted = world.as_workload(|| {
            let accepted = accept(&listener);
            accepted.set_nodelay(true).unwrap();
            accepted
        });
        accepted.set_read_timeout(Some(MOMENT)).unwrap();
        client.set_read_timeout(Some(MOMENT)).unwrap();
        client.write_all(b"x").unwrap();
        assert!(accepted.read(&mut [0]).is_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        let _ = accepted.write_all(b"x");
        assert!(client.read(&mut [0]).is_err());
    }
    // So is a listener, with all that comes from then on.
    world.as_workload(|| {
        let listener = socket2::SockRef::from(&listener);
        listener.set_keepalive(true).unwrap();
    });
    for to in [world.here.port4(80), world.here.port6(80)] {
        let dropped = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
        assert_eq!(dropped.unwrap_err().kind(), ErrorKind::TimedOut);
    }
    world.peer(0);
    world.allow(Direction::Ingress, Scope::Port(TCP, 80));
    world.apply();
    for to in [world.here.port4(80), world.here.port6(80)] {
        let mut client = world.as_far_end(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
        let mut accepted = world.as_workload(|| accept(&listener));
        client.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_listener_stays_its_makers_while_he_uses_it() {
    let world = sharing();
    let listener = world
        .here
        .run(&world.stranger, || TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let mut client = world.as_far_end(|| TcpStream::connect(to).unwrap());
        let mut accepted = world.here.run(&world.stranger, || {
            let accepted = accept(&listener);
            accepted.set_nodelay(true).unwrap();
            accepted
        });
        client.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
    }
}

/// Datagram sockets of both families at this port and the next, made outside of all workloads.
fn outside(world: &World, port: u16) -> [UdpSocket; 2] {
    world.here.run(&world.stranger, || {
        [
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap(),
            UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port + 1)).unwrap(),
        ]
    })
}

#[test]
fn a_datagram_socket_is_the_workloads_once_it_asks_who_has_sent() {
    let mut world = sharing();
    let server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    server.set_read_timeout(Some(MOMENT)).unwrap();
    let here = [world.here.port4(5300), world.here.port6(5301)];
    let there = [world.there.port4(53), world.there.port6(53)];
    for (socket, (here, there)) in outside(&world, 5300)
        .iter()
        .zip(here.into_iter().zip(there))
    {
        let send = || server.send_to(b"x", here).unwrap();
        world.as_far_end(send);
        world
            .here
            .run(&world.stranger, || socket.recv_from(&mut [0; 8]).unwrap());
        world.here.run(&world.stranger, || {
            socket.connect(there).unwrap();
            socket.send(b"of a stranger").unwrap();
        });
        server.recv(&mut [0; 32]).unwrap();
        // What has arrived has arrived.
        world.as_far_end(send);
        world.as_workload(|| socket.recv_from(&mut [0; 8]).unwrap());
        // From here on it is the workload's, in both directions.
        world.as_far_end(send);
        world.as_workload(|| {
            let socket = socket2::SockRef::from(socket);
            socket.set_read_timeout(Some(MOMENT)).unwrap();
        });
        world.as_workload(|| socket.recv(&mut [0; 8]).unwrap_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
        let refused = world.as_workload(|| socket.send(b"x"));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(server.recv(&mut [0; 32]).is_err());
    }
}

#[test]
fn a_datagram_socket_is_the_workloads_once_it_sends_to_an_address() {
    let mut world = sharing();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    let here = [world.here.port4(5300), world.here.port6(5301)];
    let there = [world.there.port4(53), world.there.port6(53)];
    for (socket, (here, there)) in outside(&world, 5300)
        .iter()
        .zip(here.into_iter().zip(there))
    {
        world
            .here
            .run(&world.stranger, || socket.set_read_timeout(Some(MOMENT)))
            .unwrap();
        world.as_workload(|| socket.send_to(b"x", there).unwrap());
        server.recv(&mut [0; 8]).unwrap();
        // The answer arrives, and nothing else.
        world.as_far_end(|| server.send_to(b"x", here).unwrap());
        world.as_workload(|| socket.recv(&mut [0; 8]).unwrap());
        let other = world.as_far_end(|| UdpSocket::bind("[::]:54").unwrap());
        world.as_far_end(|| other.send_to(b"x", here).unwrap());
        world.as_workload(|| socket.recv(&mut [0; 8]).unwrap_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    }
}
