//! What stays when the daemon goes, and what the next one makes of it.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use aya::maps::{Array, Map, MapData};
use reeve::datapath::{self, Datapath, Error, KernelState};
use reeve_common::{Direction, LAYOUT_VERSION, Settings, protocol::TCP};

use crate::world::{MOMENT, Scope, World, assert_refused};

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
fn another_layout_is_replaced_without_an_open_moment_and_without_a_closed_one() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let (allowed, refused) = (world.there.port4(80), world.there.port6(81));
    world.stop();
    pretend_layout(&world, LAYOUT_VERSION + 1);
    assert_eq!(
        datapath::require_layout(&world.settings.pins)
            .unwrap_err()
            .to_string()
            .matches(&format!("layout {}", LAYOUT_VERSION + 1))
            .count(),
        1
    );

    let done = AtomicBool::new(false);
    let (here, workload) = (world.here.clone(), world.workload.path().to_owned());
    let hammered = thread::scope(|scope| {
        let hammer = scope.spawn(|| {
            here.run_in(&workload, || {
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) {
                    TcpStream::connect(allowed).unwrap();
                    server.accept().unwrap();
                    assert_refused(TcpStream::connect(refused));
                    rounds += 1;
                }
                rounds
            })
        });
        world.start().unwrap();
        assert!(successor(&world).exists());
        world.apply();
        thread::sleep(MOMENT);
        done.store(true, Ordering::Relaxed);
        hammer.join().unwrap()
    });
    assert!(hammered > 10, "{hammered}");
    assert!(!successor(&world).exists());
    datapath::require_layout(&world.settings.pins).unwrap();

    // It is the one that the next daemon adopts.
    world.stop();
    assert_refused(world.as_workload(|| TcpStream::connect(refused)));
    world.start().unwrap();
    let usage = world.datapath().map_usage();
    let verdicts = usage.iter().find(|map| map.name == "VERDICTS").unwrap();
    assert_eq!(verdicts.entries, 1);
}

#[test]
fn a_replacement_that_was_cut_short_is_finished_by_the_next_daemon() {
    let mut world = World::enrolled();
    let refused = world.there.port4(81);
    let is_refused = |world: &World| {
        assert_refused(world.as_workload(|| TcpStream::connect(refused)));
    };
    // Before anything was written: both layouts are there.
    world.stop();
    pretend_layout(&world, LAYOUT_VERSION + 1);
    world.start().unwrap();
    world.stop();
    is_refused(&world);
    world.start().unwrap();
    is_refused(&world);
    world.apply();
    assert!(!successor(&world).exists());
    is_refused(&world);

    // After the old one was removed, and before the new one had its name.
    world.stop();
    fs::rename(&world.settings.pins, successor(&world)).unwrap();
    world.start().unwrap();
    is_refused(&world);
    assert!(!successor(&world).exists());

    // By a daemon of the old layout, which was put back: what the other one began is removed.
    world.stop();
    pretend_layout(&world, LAYOUT_VERSION + 1);
    world.start().unwrap();
    world.stop();
    pretend_layout(&world, LAYOUT_VERSION);
    world.start().unwrap();
    is_refused(&world);
    world.apply();
    assert!(!successor(&world).exists());
    is_refused(&world);
}

#[test]
fn detaching_removes_every_layout() {
    let mut world = World::enrolled();
    let to = world.there.port4(80);
    world.stop();
    pretend_layout(&world, LAYOUT_VERSION + 1);
    world.start().unwrap();
    world.stop();
    datapath::detach(&world.settings.pins).unwrap();
    assert!(!world.settings.pins.exists() && !successor(&world).exists());
    let open = world.as_workload(|| TcpStream::connect(to)).unwrap_err();
    assert_eq!(open.kind(), std::io::ErrorKind::ConnectionRefused);
    world.start().unwrap();
}

#[test]
fn a_guard_refuses_what_is_not_known_and_takes_nothing_back() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let _server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let (allowed, refused) = (world.there.port4(80), world.there.port4(81));
    // Not the far end's own cgroup, which would hear nobody any more.
    let unknown = world.stranger.child("unknown");
    let guarded: Vec<_> = [&world.workload, &unknown]
        .map(|cgroup| (cgroup.id(), cgroup.depth()))
        .to_vec();
    world.datapath().guard(&guarded).unwrap();
    // What is known stays as it was.
    world.as_workload(|| TcpStream::connect(allowed)).unwrap();
    assert_refused(world.as_workload(|| TcpStream::connect(refused)));
    // The other one, and whatever is born in it, may do nothing.
    let born = unknown.child("born");
    for cgroup in [&unknown, &born] {
        assert_refused(world.here.run(cgroup, || TcpStream::connect(allowed)));
    }
    world.stop();
    assert_refused(world.here.run(&born, || TcpStream::connect(allowed)));
    // Until a daemon says what holds.
    world.start().unwrap();
    let guards = |world: &World| {
        let usage = world.datapath().map_usage();
        let map = usage.iter().find(|map| map.name == "WORKLOADS").unwrap();
        map.entries
    };
    assert_eq!(guards(&world), 3);
    world.apply();
    assert_eq!(guards(&world), 2);
    drop((born, unknown));
}

#[test]
fn a_pinned_map_of_another_kind_is_no_layout() {
    let mut world = World::enrolled();
    world.stop();
    let pins = &world.settings.pins;
    fs::rename(pins.join("WORKLOADS"), pins.join("SETTINGS")).unwrap();
    match world.start() {
        Err(Error::Shape { path, .. }) => assert!(path.ends_with("SETTINGS")),
        other => panic!("{other:?}"),
    }
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
}

/// Makes what is pinned look like another reeve's.
fn pretend_layout(world: &World, layout: u32) {
    let settings = world.settings.pins.join("SETTINGS");
    let mut map: Array<_, Settings> = Map::Array(MapData::from_pin(settings).unwrap())
        .try_into()
        .unwrap();
    let mut other = map.get(&0, 0).unwrap();
    other.layout_version = layout;
    map.set(0, other, 0).unwrap();
}

/// Where a successor is until it has taken another layout's place.
fn successor(world: &World) -> PathBuf {
    let mut name = world.settings.pins.as_os_str().to_owned();
    name.push("-next");
    name.into()
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
