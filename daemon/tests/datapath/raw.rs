//! Raw sockets in a workload's namespace that write TCP and UDP by hand: the workload's, and those
//! of somebody who is not enrolled and shares the namespace.

use std::io::Read;

use reeve_common::{Direction, Hook, Reason};
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{MOMENT, Scope, World, assert_refused};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PUSH: u8 = 8;
const ACK: u8 = 16;

/// A TCP segment to port 80.
fn segment(flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = vec![
        0, 99, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0,
    ];
    segment.extend_from_slice(data);
    segment
}

fn open() -> World {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    world
}

fn raw(domain: Domain, protocol: Protocol) -> Socket {
    Socket::new(domain, Type::RAW, Some(protocol)).unwrap()
}

#[test]
fn a_workload_writes_no_segment_of_any_kind() {
    let mut world = open();
    for (to, domain) in [
        (world.there.port4(0), Domain::IPV4),
        (world.there.port6(0), Domain::IPV6),
    ] {
        for flags in [SYN, ACK, RST, RST | ACK, FIN | ACK, PUSH | ACK] {
            let socket = world.as_workload(|| raw(domain, Protocol::TCP));
            let sent = world.as_workload(|| socket.send_to(&segment(flags, b""), &to.into()));
            assert_refused(sent);
            world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        }
    }
}

#[test]
fn a_raw_socket_that_was_refused_sends_and_hears_no_reset_either() {
    let mut world = open();
    for (to, own, domain) in [
        (world.there.port4(0), world.here.port4(0), Domain::IPV4),
        (world.there.port6(0), world.here.port6(0), Domain::IPV6),
    ] {
        let socket = world.as_workload(|| raw(domain, Protocol::TCP));
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        let send =
            |flags| world.as_workload(|| socket.send_to(&segment(flags, b"a secret"), &to.into()));
        assert_refused(send(PUSH | ACK));
        for flags in [RST, RST | ACK, RST] {
            assert_refused(send(flags));
        }
        world.as_far_end(|| {
            let far_end = raw(domain, Protocol::TCP);
            far_end
                .send_to(&segment(RST, b"a command"), &own.into())
                .unwrap();
        });
        assert!((&socket).read(&mut [0; 128]).is_err());
        world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
    }
}

#[test]
fn a_stranger_in_a_workloads_namespace_writes_none_either() {
    let mut world = open();
    for (to, domain) in [
        (world.there.port4(0), Domain::IPV4),
        (world.there.port6(0), Domain::IPV6),
    ] {
        let send = |world: &World, protocol, bytes: &[u8]| {
            world.here.run(&world.stranger, || {
                raw(domain, protocol).send_to(bytes, &to.into())
            })
        };
        for (flags, data) in [
            (SYN, &b""[..]),
            (SYN | ACK, b""),
            (FIN | ACK, b""),
            (0, b""),
            (ACK, b"a secret"),
            (RST, b"a secret"),
        ] {
            assert_refused(send(&world, Protocol::TCP, &segment(flags, data)));
            world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        }
        assert_refused(send(&world, Protocol::UDP, &segment(0, b"")));
        world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        // Not even what the kernel's own send, which answer for connections that are gone.
        for flags in [ACK, RST, RST | ACK] {
            assert_refused(send(&world, Protocol::TCP, &segment(flags, b"")));
            world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        }
    }
    assert_eq!(world.other_events(), []);
}

#[test]
fn a_workload_writes_and_hears_no_segment_of_others_on_loopback() {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    let mut world = crate::handed::sharing();
    for (domain, loopback) in [(Domain::IPV4, "127.0.0.1"), (Domain::IPV6, "::1")] {
        let at = SocketAddr::new(loopback.parse().unwrap(), 80);
        let socket = world.as_workload(|| raw(domain, Protocol::TCP));
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        // Of somebody else in the namespace.
        let _listener = world
            .here
            .run(&world.stranger, || TcpListener::bind(at).unwrap());
        let _client = world
            .here
            .run(&world.stranger, || TcpStream::connect(at).unwrap());
        assert!((&socket).read(&mut [0; 128]).is_err());
        world.verdict_event(Hook::PacketIngress, false, Reason::RawSocket);
        for own in [at.ip(), world.here.port4(0).ip(), world.here.port6(0).ip()] {
            if own.is_ipv4() != at.is_ipv4() {
                continue;
            }
            let to = SocketAddr::new(own, 0);
            let socket = world.as_workload(|| raw(domain, Protocol::TCP));
            for flags in [SYN, PUSH | ACK] {
                let sent = world.as_workload(|| socket.send_to(&segment(flags, b"x"), &to.into()));
                assert_refused(sent);
            }
            world.verdict_event(Hook::PacketEgress, false, Reason::RawSocket);
        }
    }
}
