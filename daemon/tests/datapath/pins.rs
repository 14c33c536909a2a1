//! What stays when the daemon goes, and what the next one makes of it.

use std::{
    fs,
    net::{TcpListener, TcpStream},
};

use aya::maps::{Array, Map, MapData};
use reeve::datapath::{self, Datapath, Error, KernelState};
use reeve_common::{Direction, LAYOUT_VERSION, Settings, protocol::TCP};

use crate::world::{Scope, World, assert_refused};

#[test]
fn what_is_enforced_stays_while_no_daemon_runs() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    let generation = datapath.generation();
    drop(datapath);
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let (allowed, refused) = (world.there.port4(80), world.there.port4(81));
    let guarded = world.here.port4(80);
    let _own = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let check = |world: &World| {
        world.as_workload(|| TcpStream::connect(allowed)).unwrap();
        server.accept().unwrap();
        assert_refused(world.as_workload(|| TcpStream::connect(refused)));
        let reset = world.as_far_end(|| TcpStream::connect(guarded));
        assert_eq!(
            reset.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
    };
    check(&world);
    world.stop();
    check(&world);

    // The next daemon takes over what is there, before it knows of anything.
    world.start().unwrap();
    check(&world);
    assert_eq!(world.datapath().generation(), generation);
    let usage = world.datapath().map_usage();
    let entries = |name: &str| usage.iter().find(|map| map.name == name).unwrap().entries;
    assert_eq!(entries("VERDICTS"), 1);
    assert_eq!(entries("WORKLOADS"), 2);
    assert_eq!(entries("LOCAL_ADDRESSES"), 2);

    // The same state is no change; another one is.
    world.apply();
    assert_eq!(world.datapath().generation(), generation);
    world.state.tables.verdicts.clear();
    world.apply();
    assert_eq!(world.datapath().generation(), generation + 1);
    assert_refused(world.as_workload(|| TcpStream::connect(allowed)));
}

#[test]
fn an_empty_state_lets_everything_pass_again() {
    let mut world = World::enrolled();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    world.state = KernelState::default();
    world.apply();
    world.as_workload(|| TcpStream::connect(to)).unwrap();
}

#[test]
fn a_datapath_leaves_another_owners_programs_alone() {
    let world = World::enrolled();
    let mut other = world.settings.clone();
    other.pins.set_file_name(format!(
        "{}b",
        other.pins.file_name().unwrap().to_str().unwrap()
    ));
    let beside = Datapath::load(other.clone()).unwrap();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    beside.apply(&world.state).unwrap();
    // Now two refuse it; each on its own is enough.
    world.datapath().apply(&KernelState::default()).unwrap();
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    drop(beside);
    datapath::detach(&other.pins).unwrap();
    assert!(!other.pins.exists());
    world.as_workload(|| TcpStream::connect(to)).unwrap();
    world.apply();
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
}

#[test]
fn another_layout_is_refused() {
    let mut world = World::enrolled();
    world.stop();
    let settings = world.settings.pins.join("SETTINGS");
    let mut map: Array<_, Settings> = Map::Array(MapData::from_pin(settings).unwrap())
        .try_into()
        .unwrap();
    let mut other = map.get(&0, 0).unwrap();
    other.layout_version += 1;
    map.set(0, other, 0).unwrap();
    match world.start() {
        Err(Error::Layout {
            found, expected, ..
        }) => {
            assert_eq!((found, expected), (LAYOUT_VERSION + 1, LAYOUT_VERSION));
        }
        other => panic!("{other:?}"),
    }
    // What is pinned is as it was.
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
}

#[test]
fn a_map_that_is_not_reeves_is_refused() {
    let mut world = World::enrolled();
    world.stop();
    let pins = &world.settings.pins;
    fs::rename(pins.join("WORKLOADS"), pins.join("PEER_PORTS")).unwrap();
    match world.start() {
        Err(Error::Shape { path, .. }) => assert!(path.ends_with("PEER_PORTS")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_full_map_is_said_and_what_does_not_fit_is_refused() {
    let mut world = World::new();
    world.stop();
    fs::remove_dir_all(&world.settings.pins).unwrap();
    world.settings.maps.verdicts = 2;
    world.start().unwrap();
    world.enrol();
    world.peer(0);
    for port in [80, 81, 82] {
        world.allow(Direction::Egress, Scope::Port(TCP, port));
    }
    match world.datapath().apply(&world.state) {
        Err(Error::Full { map, capacity }) => assert_eq!((map, capacity), ("VERDICTS", 2)),
        other => panic!("{other:?}"),
    }
    let connect = |port| {
        let to = world.there.port4(port);
        world.as_workload(|| TcpStream::connect(to)).unwrap_err()
    };
    let refused = [80, 81, 82]
        .into_iter()
        .filter(|port| connect(*port).raw_os_error() == Some(libc::EPERM))
        .count();
    assert_eq!(refused, 1);
    // Room is made before it is missed again.
    world.state.tables.verdicts.clear();
    for port in [90, 91] {
        world.allow(Direction::Egress, Scope::Port(TCP, port));
    }
    world.apply();
}

#[test]
fn the_cgroup_may_be_another_one_the_next_time() {
    let mut world = World::enrolled();
    world.stop();
    world.settings.cgroup_root = world.workload.path().to_owned();
    world.start().unwrap();
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    let inside = world.workload.child("inside");
    world.stop();
    world.settings.cgroup_root = inside.path().to_owned();
    world.start().unwrap();
    assert_refused(world.here.run(&inside, || TcpStream::connect(to)));
    let outside = world.as_workload(|| TcpStream::connect(to)).unwrap_err();
    assert_eq!(outside.kind(), std::io::ErrorKind::ConnectionRefused);
    drop(inside);
}
