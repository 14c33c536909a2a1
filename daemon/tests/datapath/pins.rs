//! What stays when the daemon goes, and what the next one makes of it.

use std::{
    collections::BTreeSet,
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::{MetadataExt as _, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use aya::maps::{Array, Map, MapData};
use reeve::datapath::{self, Datapath, Error, KernelState};
use reeve_common::{Direction, LAYOUT_VERSION, Settings, protocol::TCP};

use crate::world::{MOMENT, Scope, World, assert_refused};

/// A user who is not root.
const NOBODY: u32 = 65534;

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
fn a_map_of_another_type_is_refused_though_its_entries_have_the_same_size() {
    let mut world = World::enrolled();
    world.stop();
    let pins = &world.settings.pins;
    fs::rename(pins.join("PEERS"), pins.join("PEER_PORTS")).unwrap();
    match world.start() {
        Err(error @ Error::Shape { .. }) => {
            let said = error.to_string();
            assert!(said.contains("LpmTrie with keys of 20 bytes"), "{said}");
        }
        other => panic!("{other:?}"),
    }
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
}

#[test]
fn a_link_of_another_hook_is_not_taken_for_the_one_that_its_pin_names() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    world.stop();
    let pins = &world.settings.pins;
    let [four, six] = ["link_reeve_connect4", "link_reeve_connect6"].map(|name| pins.join(name));
    let aside = pins.join("aside");
    for (from, to) in [(&four, &aside), (&six, &four), (&aside, &six)] {
        fs::rename(from, to).unwrap();
    }
    world.start().unwrap();
    for to in [world.there.port4(80), world.there.port6(80)] {
        world.as_workload(|| TcpStream::connect(to)).unwrap();
        server.accept().unwrap();
    }
    for to in [world.there.port4(81), world.there.port6(81)] {
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
    }
}

#[test]
fn refuses_a_folder_of_pins_that_is_not_roots_alone() {
    let mut world = World::enrolled();
    world.stop();
    let pins = world.settings.pins.clone();
    let to = world.there.port4(80);
    let mut refused = |why: &str| {
        match world.start() {
            Err(error @ Error::NotRoots { .. }) => {
                let said = error.to_string();
                assert!(said.contains(why), "{said}");
            }
            other => panic!("{why}: {other:?}"),
        }
        assert!(matches!(
            datapath::detach(&world.settings.pins),
            Err(Error::NotRoots { .. })
        ));
        // What is enforced stays so.
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
    };
    let set_mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };

    set_mode(&pins, 0o720);
    refused("its mode 0720 lets others write");
    set_mode(&pins, 0o1777);
    refused("its mode 1777 lets others write");
    set_mode(&pins, 0o700);
    chown(&pins, Some(NOBODY), None).unwrap();
    refused("its owner is the user 65534");
    chown(&pins, Some(0), None).unwrap();

    // The folder above it, in which others could put another in its place.
    let above = pins.with_file_name(format!("{}-above", name_of(&pins)));
    let inside = above.join("pins");
    fs::create_dir(&above).unwrap();
    fs::rename(&pins, &inside).unwrap();
    world.settings.pins = inside.clone();
    let mut refused = |why: &str| match world.start() {
        Err(error @ Error::NotRoots { .. }) => {
            let said = error.to_string();
            assert!(said.contains(why), "{said}");
        }
        other => panic!("{why}: {other:?}"),
    };
    set_mode(&above, 0o777);
    refused("its mode 0777 lets others write");
    set_mode(&above, 0o755);
    chown(&above, Some(NOBODY), None).unwrap();
    refused("its owner is the user 65534");
    chown(&above, Some(0), None).unwrap();
    // With the sticky bit others leave alone what is not theirs.
    set_mode(&above, 0o1777);
    world.start().unwrap();
    world.stop();

    // A symbolic link, which whoever made it may point elsewhere.
    fs::rename(&inside, &pins).unwrap();
    fs::remove_dir(&above).unwrap();
    symlink(&pins, &above).unwrap();
    world.settings.pins = above.clone();
    let linked = world.start();
    fs::remove_file(&above).unwrap();
    world.settings.pins = pins;
    match linked {
        Err(Error::NotRoots { path, .. }) => assert_eq!(path, above),
        other => panic!("{other:?}"),
    }
    world.start().unwrap();
}

#[test]
fn what_others_put_at_the_next_name_keeps_nobody_from_starting() {
    let mut world = World::enrolled();
    world.stop();
    let next = successor(&world);
    let to = world.there.port4(80);
    let squat = |full: bool| {
        fs::create_dir(&next).unwrap();
        if full {
            fs::create_dir(next.join("inside")).unwrap();
        }
        chown(&next, Some(NOBODY), None).unwrap();
    };
    squat(false);
    world.start().unwrap();
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
    world.stop();
    for full in [false, true] {
        let _ = fs::remove_dir_all(&next);
        squat(full);
        pretend_layout(&world, LAYOUT_VERSION + 1);
        world.start().unwrap();
        world.apply();
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        assert!(!next.exists() || fs::metadata(&next).unwrap().uid() == NOBODY);
        world.stop();
    }
    let _ = fs::remove_dir_all(&next);
    // What is in another's folder is not removed either.
    squat(true);
    datapath::detach(&world.settings.pins).unwrap();
    assert!(next.join("inside").exists());
    fs::remove_dir_all(&next).unwrap();
    world.start().unwrap();
    // What was full has changed places, and stays for root to look at.
    for entry in fs::read_dir(next.parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        if entry
            .file_name()
            .to_str()
            .unwrap()
            .starts_with(name_of(&next))
        {
            fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}

#[test]
fn refuses_a_pin_that_another_user_made() {
    let mut world = World::enrolled();
    world.stop();
    let to = world.there.port4(80);
    for pin in ["SETTINGS", "VERDICTS", "link_reeve_connect4"] {
        let pin = world.settings.pins.join(pin);
        chown(&pin, Some(NOBODY), None).unwrap();
        let said = world.start().map_err(|error| error.to_string());
        let said = said.unwrap_err();
        assert!(said.contains("its owner is the user 65534"), "{said}");
        assert_refused(world.as_workload(|| TcpStream::connect(to)));
        chown(&pin, Some(0), None).unwrap();
    }
    world.start().unwrap();
}

#[test]
fn pins_again_whichever_pin_is_removed_or_replaced() {
    let mut world = World::enrolled();
    let netns = world.here.netns.inode;
    world
        .datapath()
        .attach_namespace(&world.here.netns)
        .unwrap();
    let pins = world.settings.pins.clone();
    let all: BTreeSet<PathBuf> = pins_in(&pins);
    assert!(all.contains(&pins.join(format!("netns_{netns}"))));
    let keep = || world.datapath().keep_pinned().unwrap();
    assert_eq!(keep(), Vec::<PathBuf>::new());
    for pin in &all {
        fs::remove_file(pin).unwrap();
        assert_eq!(keep(), std::slice::from_ref(pin));
    }
    // Something else under the same name.
    for (pin, other) in [
        ("link_reeve_ingress", "SETTINGS"),
        ("link_reeve_egress", "link_reeve_connect4"),
        ("VERDICTS", "PEERS"),
    ] {
        let (pin, other) = (pins.join(pin), pins.join(other));
        fs::rename(&other, &pin).unwrap();
        let again: BTreeSet<_> = keep().into_iter().collect();
        assert_eq!(again, BTreeSet::from([pin, other]));
    }
    assert_eq!(pins_in(&pins), all);
    assert_eq!(keep(), Vec::<PathBuf>::new());

    // A folder that others may write in since is not taken for well.
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o777)).unwrap();
    let error = world.datapath().keep_pinned().unwrap_err();
    assert!(matches!(error, Error::NotRoots { .. }), "{error}");
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o700)).unwrap();

    // It outlives the daemon.
    world.stop();
    let to = world.there.port4(80);
    assert_refused(world.as_workload(|| TcpStream::connect(to)));
}

fn pins_in(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn name_of(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
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
