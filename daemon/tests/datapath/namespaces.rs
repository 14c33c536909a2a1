//! Sockets of no workload in a workload's network namespace: judged like the workload's, however
//! the programs find a packet's namespace. Linux 6.16 and later tell it; before, the programs read
//! it from kernel memory; where they may not, the packet's address stands for it.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use reeve::datapath::PacketNamespaces;
use reeve_common::{
    Direction, Hook, NamespaceEntry, NamespaceSource, Reason,
    protocol::{ICMP, UDP},
};

use crate::{
    place::ping,
    world::{MOMENT, PATIENCE, Scope, WORKLOAD, World},
};

/// What reeve finds out by itself.
fn found() -> PacketNamespaces {
    let mut world = World::new();
    world.stop();
    world.settings.namespace_source = None;
    world.start().unwrap();
    world.datapath().packet_namespaces().clone()
}

/// The ways that this kernel offers, the best one first.
fn sources() -> Vec<NamespaceSource> {
    let best = found().source();
    let all = [
        NamespaceSource::Helper,
        NamespaceSource::KernelMemory,
        NamespaceSource::Address,
    ];
    all.into_iter().filter(|source| *source <= best).collect()
}

/// Does something in a world of each of them.
fn each(check: impl Fn(&mut World)) {
    for source in sources() {
        let mut world = World::of_machine_by(source);
        assert_eq!(world.datapath().packet_namespaces().source(), source);
        world.peer(0);
        check(&mut world);
    }
}

/// An unconnected socket at a port of both families.
fn udp(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(("::", port)).unwrap();
    socket.set_read_timeout(Some(MOMENT)).unwrap();
    socket
}

fn hears(socket: &UdpSocket) -> bool {
    match socket.recv(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    }
}

/// Sends from a socket of the family.
fn send(to: SocketAddr) -> std::io::Result<usize> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any)?.send_to(b"x", to)
}

/// Does something as a process of no workload in the workload's namespace.
fn as_stranger<T: Send>(world: &World, work: impl FnOnce() -> T + Send) -> T {
    world.here.run(&world.stranger, work)
}

#[test]
fn a_process_of_no_workload_in_a_workloads_namespace_reaches_nobody() {
    each(|world| {
        world.enrol();
        world.apply();
        let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
        let listening = world.as_far_end(|| udp(53));
        let there = world.there.clone();
        for ip in [there.v4, there.v6] {
            let port = |port| SocketAddr::new(ip, port);
            let refused = as_stranger(world, || TcpStream::connect_timeout(&port(80), MOMENT));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::TimedOut);
            world.event("its segment is refused", |event| {
                event.hook == Hook::PacketEgress as u8
                    && event.reason == Reason::NoPolicy as u8
                    && (event.workload, event.remote_port) == (WORKLOAD, 80)
            });
            // The kernel tells the sender, or not; it does not arrive.
            let _ = as_stranger(world, || send(port(53)));
            assert!(!hears(&listening));
            assert!(as_stranger(world, || ping(port(0))).is_err());
        }
        drop(server);

        // What the workload may do, they may.
        world.allow(Direction::Egress, Scope::Port(UDP, 53));
        world.apply();
        for to in [there.port4(53), there.port6(53)] {
            as_stranger(world, || send(to)).unwrap();
            assert!(hears(&listening));
        }
    });
}

#[test]
fn a_process_of_no_workload_in_a_workloads_namespace_serves_nobody() {
    each(|world| {
        world.enrol();
        world.apply();
        let listener = as_stranger(world, || TcpListener::bind("[::]:80").unwrap());
        let server = as_stranger(world, || udp(53));
        for (tcp, datagram) in [
            (world.here.port4(80), world.here.port4(53)),
            (world.here.port6(80), world.here.port6(53)),
        ] {
            world.as_far_end(|| send(datagram)).unwrap();
            assert!(!hears(&server));
            world.event("the datagram is refused", |event| {
                event.hook == Hook::PacketIngress as u8
                    && event.reason == Reason::NoPolicy as u8
                    && (event.workload, event.local_port) == (WORKLOAD, 53)
            });
            let refused = world.as_far_end(|| TcpStream::connect_timeout(&tcp, MOMENT));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::TimedOut);
        }
        drop(listener);

        // Within the namespace it is as it was.
        for loopback in ["127.0.0.1:53", "[::1]:53"] {
            as_stranger(world, || send(loopback.parse().unwrap())).unwrap();
            assert!(hears(&server));
        }
        // And what may come in to the workload, may to them.
        world.allow(Direction::Ingress, Scope::Port(UDP, 53));
        world.apply();
        for to in [world.here.port4(53), world.here.port6(53)] {
            world.as_far_end(|| send(to)).unwrap();
            assert!(hears(&server));
        }
    });
}

#[test]
fn sockets_from_before_the_enrolment_are_the_workloads_afterwards() {
    each(|world| {
        let there = world.there.clone();
        let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
        let heard = world.as_far_end(|| udp(53));
        let listener = as_stranger(world, || TcpListener::bind("[::]:80").unwrap());
        let mut open = Vec::new();
        for ((out, back), datagram) in [
            (there.port4(80), world.here.port4(80)),
            (there.port6(80), world.here.port6(80)),
        ]
        .into_iter()
        .zip([there.port4(53), there.port6(53)])
        {
            let client = as_stranger(world, || TcpStream::connect(out).unwrap());
            let accepted = server.accept().unwrap().0;
            let caller = world.as_far_end(|| TcpStream::connect(back).unwrap());
            let serving = listener.accept().unwrap().0;
            let speaks = as_stranger(world, || {
                let any = if out.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                UdpSocket::bind(any).unwrap()
            });
            speaks.send_to(b"x", datagram).unwrap();
            assert!(hears(&heard));
            open.push(([client, serving], [accepted, caller], speaks, datagram));
        }
        world.enrol();
        world.apply();
        for (own, far, speaks, datagram) in &mut open {
            for (own, far) in own.iter_mut().zip(far) {
                let _ = own.write(b"x");
                far.set_read_timeout(Some(MOMENT)).unwrap();
                let silent = far.read(&mut [0]).unwrap_err();
                assert_eq!(silent.kind(), ErrorKind::WouldBlock);
                far.write_all(b"y").unwrap();
                own.set_read_timeout(Some(MOMENT)).unwrap();
                let silent = own.read(&mut [0]).unwrap_err();
                assert_eq!(silent.kind(), ErrorKind::WouldBlock);
            }
            let _ = speaks.send_to(b"x", *datagram);
            assert!(!hears(&heard));
        }
    });
}

#[test]
fn a_namespace_is_the_workloads_to_which_it_belongs_at_the_moment() {
    each(|world| {
        let heard = world.as_far_end(|| udp(53));
        world.enrol();
        world.allow(Direction::Egress, Scope::Port(UDP, 53));
        world.apply();
        let there = world.there.clone();
        let both = [there.port4(53), there.port6(53)];
        let sockets = both.map(|to| {
            as_stranger(world, || {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any).unwrap();
                socket.send_to(b"x", to).unwrap();
                (socket, to)
            })
        });
        assert!(hears(&heard) && hears(&heard));
        // Another workload, to which nothing is allowed, gets the namespace and its addresses.
        for (_, entry) in &mut world.state.namespaces {
            entry.workload = WORKLOAD + 1;
        }
        for (_, owner) in &mut world.state.local_addresses {
            *owner = WORKLOAD + 1;
        }
        world.apply();
        for (socket, to) in &sockets {
            let _ = socket.send_to(b"x", *to);
            assert!(!hears(&heard));
            let told = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
            assert_eq!(told.workload, WORKLOAD + 1);
        }
        // And nobody, when it is none's.
        world.state.namespaces.clear();
        world.state.local_addresses.clear();
        world.apply();
        for (socket, to) in &sockets {
            socket.send_to(b"x", *to).unwrap();
            assert!(hears(&heard));
        }
    });
}

#[test]
fn a_namespace_that_several_share_is_nobodys() {
    each(|world| {
        let (id, depth) = (world.workload.id(), world.workload.depth());
        world.add_workload(id, depth, WORKLOAD);
        let shared = NamespaceEntry::default();
        world
            .state
            .namespaces
            .push((world.here.netns.cookie, shared));
        world.apply();
        let heard = world.as_far_end(|| udp(53));
        let server = as_stranger(world, || udp(53));
        for (out, back) in [
            (world.there.port4(53), world.here.port4(53)),
            (world.there.port6(53), world.here.port6(53)),
        ] {
            as_stranger(world, || send(out)).unwrap();
            assert!(hears(&heard));
            world.as_far_end(|| send(back)).unwrap();
            assert!(hears(&server));
        }
    });
}

#[test]
fn the_kernel_answers_only_whom_a_policy_lets_in() {
    each(|world| {
        world.enrol();
        world.apply();
        let both = [world.here.port4(0), world.here.port6(0)];
        for to in both {
            let silent = world.as_far_end(|| ping(to)).unwrap_err();
            assert_eq!(silent.kind(), ErrorKind::WouldBlock);
        }
        world.allow(Direction::Ingress, Scope::Protocol(ICMP));
        world.apply();
        for to in both {
            world.as_far_end(|| ping(to)).unwrap();
        }
        // It resets what nobody listens for.
        for to in [world.here.port4(80), world.here.port6(80)] {
            let refused = world.as_far_end(|| TcpStream::connect_timeout(&to, PATIENCE));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    });
}

#[test]
fn a_socket_belongs_to_the_namespace_that_made_it() {
    each(|world| {
        world.enrol();
        world.apply();
        let heard = world.as_far_end(|| udp(53));
        // Made outside, used by a process inside: it sends from where it was made.
        let outside = world.as_far_end(|| UdpSocket::bind("[::]:0").unwrap());
        let own = SocketAddr::new(world.there.v6, 53);
        as_stranger(world, || outside.send_to(b"x", own)).unwrap();
        assert!(hears(&heard));
        // Made inside, used by a process outside.
        let inside = as_stranger(world, || UdpSocket::bind("[::]:0").unwrap());
        let to = world.there.port6(53);
        let _ = world.as_far_end(|| inside.send_to(b"x", to));
        assert!(!hears(&heard));
    });
}

#[test]
fn a_kernel_that_lacks_the_helper_is_found_out() {
    let found = found();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>());
    let version = (
        numbers.next().unwrap().unwrap(),
        numbers.next().unwrap().unwrap(),
    );
    let expected = if version >= (6, 16) {
        NamespaceSource::Helper
    } else {
        NamespaceSource::KernelMemory
    };
    assert_eq!(found.source(), expected);
    assert_eq!(found.gap(), None);
    let by_address = World::of_machine_by(NamespaceSource::Address);
    let gap = by_address.datapath().packet_namespaces().gap();
    assert!(gap.unwrap().contains(release.trim()));
}
