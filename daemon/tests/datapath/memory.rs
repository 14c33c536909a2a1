//! Sockets that the kernel has no memory to remember anything for: whoever uses up what a socket
//! may have is refused, and nothing goes by unjudged.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
};

use reeve::datapath::SocketStorage as _;
use reeve_common::{Direction, Hook, Reason, protocol::TCP};

use crate::world::{MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused};

/// Bytes that the options and the memory of a socket may have, of each namespace since Linux 6.8.
const MEMORY: &str = "/proc/sys/net/core/optmem_max";

/// A workload that may do everything, in a namespace whose sockets have no memory once it is said.
fn open() -> World {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.allow(Direction::Ingress, Scope::Anything);
    world.apply();
    world
}

/// False where an older kernel has one limit for the whole machine, which is not a test's to change.
fn is_of_namespace(world: &World) -> bool {
    let here = world.here.netns.run(|| Ok(fs::exists(MEMORY).unwrap()));
    if !here.unwrap() {
        println!("not tested: this kernel has one limit for all namespaces");
        return false;
    }
    true
}

fn take_memory(world: &World) {
    world.here.netns.run(|| fs::write(MEMORY, "0")).unwrap();
}

#[test]
fn a_socket_without_memory_is_refused() {
    let mut world = open();
    if !is_of_namespace(&world) {
        return;
    }
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let (connect, bind) = (world.there.port4(80), world.here.port4(1000));
    world.as_workload(|| TcpStream::connect(connect)).unwrap();
    world.as_workload(|| TcpListener::bind(bind)).unwrap();
    take_memory(&world);
    assert_refused(world.as_workload(|| TcpStream::connect(connect)));
    world.verdict_event(Hook::Connect, false, Reason::MapFailure);
    assert_refused(world.as_workload(|| TcpListener::bind(bind)));
    world.verdict_event(Hook::Bind, false, Reason::MapFailure);
}

#[test]
fn packets_of_a_socket_without_memory_are_refused() {
    let mut world = World::new();
    world.apply();
    if !is_of_namespace(&world) {
        return;
    }
    // Older than its workload, so that nothing is remembered of it.
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let mut client = world.as_workload(|| TcpStream::connect(to).unwrap());
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    world.enrol();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    take_memory(&world);
    world.apply();
    let _ = client.write_all(b"x");
    assert!(accepted.read(&mut [0]).is_err());
    world.verdict_event(Hook::PacketEgress, false, Reason::MapFailure);
}

#[test]
fn what_is_accepted_without_memory_is_refused() {
    let mut world = open();
    if !is_of_namespace(&world) {
        return;
    }
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    take_memory(&world);
    let to = world.here.port4(80);
    let mut client = world.as_far_end(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    let (mut accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(MOMENT)).unwrap();
    client.write_all(b"x").unwrap();
    assert!(accepted.read(&mut [0]).is_err());
    world.verdict_event(Hook::PacketIngress, false, Reason::MapFailure);
    assert!(!world.other_events().iter().any(|event| event.allowed == 1));
}

#[test]
fn reeve_opens_nothing_to_an_application_that_could_not_be_known_again() {
    let world = open();
    if !is_of_namespace(&world) {
        return;
    }
    take_memory(&world);
    let (client, to): (IpAddr, SocketAddr) = (world.there.v4, world.here.port4(80));
    let failed = world.as_reeve(|netns| {
        let mut sockets = netns.onward_sockets(socket2::Domain::IPV4, 1).unwrap();
        let socket = sockets.remove(0);
        let told = world.datapath().deliver_to(socket.as_fd(), WORKLOAD);
        told.unwrap_err();
        reeve::datapath::speak_as(&socket, client, to).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.connect(&to.into())
    });
    assert_refused(failed);
    assert_eq!(world.count(Direction::Egress, false, Reason::MapFailure), 1);
}
