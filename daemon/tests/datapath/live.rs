//! Live connections, listed with what the programs know of them, and ended.

use std::{
    io::{ErrorKind, Read},
    net::{TcpListener, TcpStream, UdpSocket},
    time::Instant,
};

use reeve::datapath::LiveSocket;
use reeve_common::{
    Direction, Flow, FlowSlot,
    protocol::{TCP, UDP},
};

use crate::world::{MOMENT, PATIENCE, Scope, WORKLOAD, World};

/// Connections of the measurement: what a busy proxy has.
const MANY: usize = 2000;

fn open() -> World {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    world
}

#[test]
fn only_what_is_over_is_ended() {
    let world = open();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for (over, stays) in [
        (world.there.port4(80), world.there.port6(80)),
        (world.there.port6(80), world.there.port4(80)),
    ] {
        let connect = |to| {
            let client = world.as_workload(|| TcpStream::connect(to).unwrap());
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let (accepted, _) = server.accept().unwrap();
            accepted.set_read_timeout(Some(PATIENCE)).unwrap();
            (client, accepted)
        };
        let ((mut client, mut accepted), (kept, _kept)) = (connect(over), connect(stays));
        let generation = world.datapath().generation();
        let cgroup = world.workload.id();
        let own = |socket: &LiveSocket| socket.local == client.local_addr().unwrap();
        let mut seen = None;
        let ended = world
            .datapath()
            .end_connections(&world.here.netns, |socket| {
                seen = seen.take().or(own(socket).then(|| socket.clone()));
                own(socket)
            })
            .unwrap();
        assert_eq!(ended.len(), 1);
        let seen = seen.unwrap();
        assert_eq!(
            (seen.protocol, seen.remote, seen.cgroup),
            (TCP, over, cgroup)
        );
        let remembered = seen.remembered.unwrap();
        assert_eq!(remembered.workload, WORKLOAD);
        assert_eq!(remembered.direction, Some(Direction::Egress));
        assert!(remembered.allowed && !remembered.in_tunnel);
        assert_eq!(remembered.generation, generation);

        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        let error = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        kept.set_nonblocking(true).unwrap();
        let silent = (&kept).read(&mut [0]).unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn what_only_waits_for_the_other_end_to_close_is_no_connection() {
    let world = open();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(80), world.there.port6(80)] {
        let client = world.as_workload(|| TcpStream::connect(to).unwrap());
        let local = client.local_addr().unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        let is_listed = || {
            let mut is_listed = false;
            let ended = world
                .datapath()
                .end_connections(&world.here.netns, |socket| {
                    is_listed |= socket.local == local;
                    false
                })
                .unwrap();
            assert!(ended.is_empty());
            is_listed
        };
        assert!(is_listed());
        drop(client);
        // Its FIN has come, and was acknowledged.
        assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
        let deadline = Instant::now() + MOMENT;
        while is_listed() {
            assert!(Instant::now() < deadline, "{local} is listed");
        }
    }
}

#[test]
fn a_connected_datagram_socket_is_ended_and_its_flow_forgotten() {
    let world = open();
    let (to, other) = (world.there.port4(53), world.there.port4(54));
    let socket = world.as_workload(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"x", other).unwrap();
        socket.connect(to).unwrap();
        socket.send(b"x").unwrap();
        socket
    });
    let ended = world
        .datapath()
        .end_connections(&world.here.netns, |socket| socket.protocol == UDP)
        .unwrap();
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].remote, to);
    let error = socket.recv(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted);

    let to_other = |_: &FlowSlot, flow: &Flow| flow.remote_port == other.port();
    let ended = world.datapath().end_flows(to_other).unwrap();
    assert_eq!(ended.len(), 1);
    assert_eq!(
        (ended[0].0.workload, ended[0].1.protocol),
        (WORKLOAD, UDP.into())
    );
    assert!(world.datapath().end_flows(to_other).unwrap().is_empty());
    let usage = world.datapath().map_usage();
    let flows = usage.iter().find(|map| map.name == "FLOWS").unwrap();
    assert_eq!(flows.entries, 1, "the other is still there");
}

#[test]
fn thousands_are_looked_through_and_ended_in_a_moment() {
    let world = open();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    let clients: Vec<_> = world.as_workload(|| {
        let connect = |_| {
            let client = TcpStream::connect(to).unwrap();
            (client, server.accept().unwrap())
        };
        (0..MANY).map(connect).collect()
    });
    let datapath = world.datapath();
    let netns = &world.here.netns;
    let started = Instant::now();
    let none = datapath.end_connections(netns, |_| false).unwrap();
    let looked = started.elapsed();
    let started = Instant::now();
    let all = datapath.end_connections(netns, |_| true).unwrap();
    let ended = started.elapsed();
    println!("{MANY} connections: looked through in {looked:?}, ended in {ended:?}");
    assert_eq!((none.len(), all.len()), (0, MANY));
    assert!(looked + ended < PATIENCE);
    drop(clients);
}
