//! Maps without room: whatever could be about what does not fit is refused, and it is said.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use reeve::{
    config::Maps,
    datapath::{Error, address},
};
use reeve_common::{
    Action, Direction, Hook, PeerEntry, PeerPortKey, Reason, WORKLOAD_UNKNOWN, WorkloadEntry,
    protocol::{TCP, UDP},
};

use crate::world::{CLASS, PEER, Scope, WORKLOAD, World, assert_refused};

/// A workload, and maps with other capacities than usual. One entry of `PEERS` and of `VERDICTS` is
/// left free.
pub(crate) fn with(capacities: impl FnOnce(&mut Maps)) -> World {
    let mut world = World::new();
    world.stop();
    fs::remove_dir_all(&world.settings.pins).unwrap();
    capacities(&mut world.settings.maps);
    world.start().unwrap();
    world.enrol();
    world.peer(0);
    world
}

fn send(world: &World, to: SocketAddr) -> io::Result<usize> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    world.as_workload(|| UdpSocket::bind(any)?.send_to(b"x", to))
}

#[test]
fn a_cgroup_without_room_is_left_to_an_enforced_parent() {
    // reeve's own, the workload's and the parent's.
    let mut world = with(|maps| maps.workloads = 3);
    let parent = world.stranger.child("parent");
    let child = parent.child("child");
    let unknown = WorkloadEntry {
        workload: 0,
        flags: WORKLOAD_UNKNOWN,
    };
    world.allow(Direction::Egress, Scope::Anything);
    world.apply();
    let late = (parent.id(), parent.depth(), unknown);
    world.state.workloads.push(late);
    world.add_workload(child.id(), child.depth(), WORKLOAD);
    match world.datapath().apply(&world.state) {
        Err(Error::NotEnrolled {
            missing: 1,
            capacity: 3,
        }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(missing(&world, "WORKLOADS"), 1);
    // Who was enrolled is, and who is not is refused.
    let to = world.there.port4(80);
    send(&world, to).unwrap();
    let refused = world
        .here
        .run(&child, || UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", to));
    assert_refused(refused);
    world.verdict_event(Hook::Sendmsg, false, Reason::UnknownWorkload);
    // reeve's own is not among those who are left out.
    world
        .as_reeve(|netns| netns.tunnel_listener(15008).map(drop))
        .unwrap();
    world.state.workloads.retain(|(id, ..)| *id != child.id());
    world.apply();
    assert_eq!(missing(&world, "WORKLOADS"), 0);
    drop(child);
}

/// Applies what does not fit, and gives the map that is said to be full.
fn full_map(world: &World) -> &'static str {
    match world.datapath().apply(&world.state) {
        Err(Error::Full { map, .. }) => map,
        other => panic!("{other:?}"),
    }
}

fn missing(world: &World, map: &str) -> u64 {
    let usage = world.datapath().map_usage();
    usage
        .iter()
        .find(|usage| usage.name == map)
        .unwrap()
        .missing
}

#[test]
fn a_new_refusal_without_room_leaves_no_wider_allowance() {
    let mut world = with(|maps| maps.verdicts = 3);
    let denied = world.there.port4(81);
    world.allow(Direction::Egress, Scope::Anything);
    world.verdict(
        Direction::Ingress,
        CLASS,
        Scope::Protocol(TCP),
        Action::Allow,
    );
    world.apply();
    send(&world, denied).unwrap();

    let before = world.state.tables.verdicts.clone();
    world.verdict(Direction::Egress, CLASS, Scope::Port(UDP, 81), Action::Deny);
    assert_eq!(full_map(&world), "VERDICTS");
    assert_refused(send(&world, denied));
    world.verdict_event(Hook::Sendmsg, false, Reason::MapFailure);
    // The whole direction is closed, and the other is not.
    assert_refused(send(&world, world.there.port6(80)));
    assert_eq!(world.datapath().closed(), [(WORKLOAD, Direction::Egress)]);
    let ingress = world
        .datapath()
        .verdict(WORKLOAD, Direction::Ingress, world.there.v4, TCP, 80);
    assert_eq!(ingress.unwrap().action, Action::Allow as u32);
    assert_eq!(missing(&world, "VERDICTS"), 2);
    // Asked again it changes nothing.
    let generation = world.datapath().generation();
    assert_eq!(full_map(&world), "VERDICTS");
    assert_eq!(world.datapath().generation(), generation);

    world.state.tables.verdicts = before;
    world.apply();
    send(&world, denied).unwrap();
    assert_eq!(world.datapath().closed(), []);
    assert_eq!(missing(&world, "VERDICTS"), 0);
}

#[test]
fn room_is_made_before_it_is_missed() {
    let mut world = with(|maps| maps.verdicts = 4);
    for port in [80, 81, 82] {
        world.allow(Direction::Egress, Scope::Port(UDP, port));
    }
    world.apply();
    world.state.tables.verdicts.clear();
    world.verdict(Direction::Egress, CLASS, Scope::Anything, Action::Allow);
    for port in [90, 91] {
        world.verdict(
            Direction::Egress,
            CLASS,
            Scope::Port(UDP, port),
            Action::Deny,
        );
    }
    world.apply();
    send(&world, world.there.port4(80)).unwrap();
    for port in [90, 91] {
        assert_refused(send(&world, world.there.port4(port)));
    }
}

#[test]
fn an_address_without_room_is_not_taken_for_its_neighbours() {
    let mut world = with(|maps| maps.peers = 2);
    let stranger = [IpAddr::from([10, 0, 0, 9])];
    world.verdict(Direction::Egress, 0, Scope::Anything, Action::Allow);
    world.verdict(Direction::Egress, CLASS, Scope::Anything, Action::Deny);
    assert_eq!(full_map(&world), "PEERS");
    for ip in [world.there.v4, world.there.v6].iter().chain(&stranger) {
        assert_refused(send(&world, SocketAddr::new(*ip, 80)));
    }
    world.verdict_event(Hook::Sendmsg, false, Reason::MapFailure);
    assert!(missing(&world, "PEERS") > 0);
    // What is left has room.
    world.state.tables.peers.truncate(1);
    world.apply();
    assert_refused(send(&world, world.there.port4(80)));
    send(&world, SocketAddr::new(stranger[0], 80)).unwrap();
}

#[test]
fn a_workload_whose_addresses_find_no_room_is_refused_everything() {
    let mut world = with(|maps| maps.local_addresses = 4);
    world.allow(Direction::Egress, Scope::Anything);
    let other = world.stranger.child("other");
    world.add_workload(other.id(), other.depth(), WORKLOAD + 1);
    let mut verdict = world.state.tables.verdicts[0];
    verdict.1.workload = WORKLOAD + 1;
    world.state.tables.verdicts.push(verdict);
    let ip = |last: u8| address(IpAddr::from([192, 0, 2, last]));
    world.state.local_addresses.push((ip(1), WORKLOAD + 1));
    world.apply();
    let fits = world.state.local_addresses.clone();
    let remotes = [world.there.port4(80), world.there.port6(80)];
    for to in remotes {
        send(&world, to).unwrap();
    }
    world
        .state
        .local_addresses
        .extend([(ip(2), WORKLOAD), (ip(3), WORKLOAD)]);
    assert_eq!(full_map(&world), "LOCAL_ADDRESSES");
    assert_eq!(missing(&world, "LOCAL_ADDRESSES"), 4);
    let both = [Direction::Egress, Direction::Ingress].map(|direction| (WORKLOAD, direction));
    assert_eq!(world.datapath().closed(), both);
    for to in remotes {
        assert_refused(send(&world, to));
        world.verdict_event(Hook::Sendmsg, false, Reason::MapFailure);
    }
    // The other one has room.
    let as_other = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", remotes[0]);
    world.here.run(&other, as_other).unwrap();
    world.state.local_addresses = fits;
    world.apply();
    for to in remotes {
        send(&world, to).unwrap();
    }
    drop(other);
}

#[test]
fn a_port_without_room_is_not_taken_for_the_rest_of_its_address() {
    let mut world = with(|maps| maps.peer_ports = 1);
    world.verdict(Direction::Egress, CLASS, Scope::Anything, Action::Allow);
    for (_, _, entry) in &mut world.state.tables.peers {
        entry.flags |= reeve_common::PEER_BY_PORT;
    }
    let entry = PeerEntry {
        class: CLASS + 1,
        peer: PEER + 1,
        flags: 0,
    };
    for port in [81, 82] {
        let key = PeerPortKey {
            address: address(world.there.v4),
            port,
            protocol: UDP,
            reserved: 0,
        };
        world.state.tables.peer_ports.push((key, entry));
    }
    assert_eq!(full_map(&world), "PEER_PORTS");
    for port in [80, 81, 82] {
        assert_refused(send(&world, world.there.port4(port)));
    }
    world.verdict_event(Hook::Sendmsg, false, Reason::MapFailure);
    send(&world, world.there.port6(80)).unwrap();
}

#[test]
fn a_workload_that_floods_the_ring_buffer_leaves_room_for_the_events_of_another() {
    // Room for some forty events.
    let mut world = with(|maps| maps.events = 4096);
    let (id, depth) = (world.stranger.id(), world.stranger.depth());
    world.add_workload(id, depth, WORKLOAD + 1);
    world.apply();
    let to = world.there.port4(81);
    world.here.run(&world.stranger, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..1000 {
            assert_refused(socket.send_to(b"x", to));
        }
    });
    assert!(world.datapath().lost_events().unwrap() > 0);
    assert_refused(send(&world, to));
    world.event("the workload is refused", |event| {
        event.workload == WORKLOAD
    });
}
