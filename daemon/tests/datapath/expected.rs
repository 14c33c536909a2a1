//! Cgroups that are enrolled when they are made.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
};

use aya::maps::{HashMap, Map, MapData};
use reeve_common::{
    Direction, ExpectedCgroup, Hook, NamespaceEntry, Reason, WORKLOAD_UNKNOWN, WorkloadEntry,
    protocol::TCP,
};

use crate::world::{PATIENCE, Scope, WORKLOAD, World, assert_refused};

/// A workload whose cgroup is to come, below an enforced parent.
fn expecting() -> World {
    let mut world = World::new();
    let (parent, depth) = (world.stranger.id(), world.stranger.depth());
    let unknown = WorkloadEntry {
        workload: 0,
        flags: WORKLOAD_UNKNOWN,
    };
    world.state.workloads.push((parent, depth, unknown));
    let key = ExpectedCgroup::new(parent, b"to-come").unwrap();
    world.state.expected.push((key, depth + 1, WORKLOAD));
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    world
}

fn enrolled(world: &World) -> HashMap<MapData, u64, WorkloadEntry> {
    let pin = world.settings.pins.join("WORKLOADS");
    let map = Map::HashMap(MapData::from_pin(pin).unwrap());
    map.try_into().unwrap()
}

#[test]
fn an_expected_cgroup_is_the_workloads_from_its_birth() {
    let mut world = expecting();
    let listen = || TcpListener::bind("[::]:80").unwrap();
    let _server = world.there.run(&world.workload, listen);
    let [allowed, refused] = [80, 81].map(|port| world.there.port4(port));
    // It comes again and again, and is another one each time.
    for _ in 0..3 {
        let cgroup = world.stranger.child("to-come");
        let id = cgroup.id();
        world.here.run(&cgroup, || {
            TcpStream::connect_timeout(&allowed, PATIENCE).unwrap()
        });
        let connected = world.here.run(&cgroup, || TcpStream::connect(refused));
        assert_refused(connected);
        let event = world.verdict_event(Hook::Connect, false, Reason::NoPolicy);
        assert_eq!(event.workload, WORKLOAD);
        let found = enrolled(&world);
        let of_workload = found.iter().map(Result::unwrap);
        let of_workload: Vec<_> = of_workload
            .filter(|(_, entry)| entry.workload == WORKLOAD)
            .map(|(id, _)| id)
            .collect();
        assert_eq!(of_workload, [id], "of those before nothing is left");
    }
}

#[test]
fn no_other_cgroup_is_enrolled_when_it_is_made() {
    let mut world = expecting();
    let to = world.there.port4(80);
    for (place, name) in [("stranger", "to-come-too"), ("workload", "to-come")] {
        let parent = match place {
            "stranger" => &world.stranger,
            _ => &world.workload,
        };
        let cgroup = parent.child(name);
        assert!(enrolled(&world).get(&cgroup.id(), 0).is_err(), "{name}");
    }
    // Nor is one below it enrolled by itself.
    let cgroup = world.stranger.child("to-come");
    let below = cgroup.child("to-come");
    assert!(enrolled(&world).get(&below.id(), 0).is_err());
    drop((below, cgroup));
    // Once it is no longer expected.
    world.state.expected.clear();
    world.apply();
    let cgroup = world.stranger.child("to-come");
    let inode = fs::metadata(cgroup.path()).unwrap().ino();
    assert!(enrolled(&world).get(&inode, 0).is_err());
    let connected = world.here.run(&cgroup, || TcpStream::connect(to));
    assert_refused(connected);
    world.verdict_event(Hook::Connect, false, Reason::UnknownWorkload);
}
