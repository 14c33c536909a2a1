//! Two datapaths that judge beside each other, as where a daemon takes over from one of another layout: what
//! one refuses is refused, what one redirects or opens passes the other, and nobody else profits.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use reeve::datapath::{self, Datapath, KernelState, SocketStorage as _, netns::Netns, speak_as};
use reeve_common::{
    Action, Direction, NamespaceEntry, ONWARD_MARK, Origin, PEER_TUNNEL, Reason, WorkloadId,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Socket, Type};

use crate::{
    place::Cgroup,
    world::{CLASS, MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused},
};

/// The workload's id in the maps of the second datapath: each gives its own.
const OTHER_ID: WorkloadId = WORKLOAD + 70;

/// A user who is not root.
const NOBODY: u32 = 65534;

/// What two daemons have in the kernel.
struct Two {
    world: World,
    /// The one that comes.
    new: Option<Arc<Datapath>>,
    /// What its maps hold.
    state: KernelState,
}

impl Two {
    /// A datapath that redirects, and another one that is about to take over.
    fn joining() -> Self {
        Self::beside(Self::redirecting())
    }

    /// The same once the other one has taken over.
    fn taken_over() -> Self {
        let two = Self::joining();
        two.take_over();
        two
    }

    fn redirecting() -> World {
        let mut world = World::enrolled();
        world.peer(PEER_TUNNEL);
        world.allow(Direction::Egress, Scope::Port(TCP, 80));
        world.allow(Direction::Egress, Scope::Port(UDP, 80));
        world.verdict(
            Direction::Ingress,
            CLASS,
            Scope::Port(TCP, 80),
            Action::TunnelOnly,
        );
        world.listening();
        world.apply();
        let datapath = world.datapath().clone();
        datapath.attach_namespace(&world.here.netns).unwrap();
        world
            .block_on(datapath.prepare_namespace(&world.here.netns))
            .unwrap();
        world
    }

    fn beside(world: World) -> Self {
        let mut settings = world.settings.clone();
        settings.beside = true;
        let new = Datapath::load(settings).unwrap();
        new.attach_namespace(&world.here.netns).unwrap();
        let state = renumbered(&world.state);
        new.apply(&state).unwrap();
        Self {
            world,
            new: Some(Arc::new(new)),
            state,
        }
    }

    fn take_over(&self) {
        self.old().step_aside().unwrap();
        self.coming().take_place().unwrap();
    }

    fn old(&self) -> &Datapath {
        self.world.datapath()
    }

    fn coming(&self) -> &Datapath {
        self.new.as_ref().unwrap()
    }

    /// What the old and the new datapath know of an accepted connection.
    fn origins(&self, accepted: &TcpStream) -> [Option<Origin>; 2] {
        [self.old(), self.coming()].map(|datapath| datapath.origin(accepted.as_fd()))
    }

    /// Folders of pins beside the first one's, by what follows its name.
    fn folders(&self) -> Vec<String> {
        let pins = &self.world.settings.pins;
        let name = pins.file_name().unwrap().to_str().unwrap();
        let entries = fs::read_dir(pins.parent().unwrap()).unwrap();
        let mut found: Vec<String> = entries
            .filter_map(|entry| {
                let entry = entry.unwrap().file_name().into_string().unwrap();
                let rest = entry.strip_prefix(name)?;
                (rest.is_empty() || rest.starts_with('-')).then(|| rest.to_owned())
            })
            .collect();
        found.sort();
        found
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        self.new = None;
        let pins = self.world.settings.pins.clone();
        let removed = datapath::detach(&pins);
        // The world removes its folder itself.
        let made = fs::create_dir(&pins);
        if !thread::panicking() {
            removed.unwrap();
            made.unwrap();
        }
    }
}

/// The same state with another id of the workload.
fn renumbered(state: &KernelState) -> KernelState {
    let mut state = state.clone();
    let renumber = |id: &mut WorkloadId| {
        if *id == WORKLOAD {
            *id = OTHER_ID;
        }
    };
    state
        .workloads
        .iter_mut()
        .for_each(|(.., entry)| renumber(&mut entry.workload));
    state
        .expected
        .iter_mut()
        .for_each(|(.., workload)| renumber(workload));
    state
        .shown_addresses
        .iter_mut()
        .for_each(|(workload, _)| renumber(workload));
    state
        .namespaces
        .iter_mut()
        .for_each(|(_, entry)| renumber(&mut entry.workload));
    state
        .local_addresses
        .iter_mut()
        .for_each(|(_, workload)| renumber(workload));
    state
        .tables
        .verdicts
        .iter_mut()
        .for_each(|(_, key, _)| renumber(&mut key.workload));
    state
}

fn listeners(world: &World) -> [TcpListener; 2] {
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let listeners: Vec<TcpListener> = listeners.into_iter().map(Into::into).collect();
    listeners.try_into().unwrap()
}

/// Accepts what is there within [`PATIENCE`].
fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((accepted, _)) => {
                accepted.set_nonblocking(false).unwrap();
                accepted.set_read_timeout(Some(PATIENCE)).unwrap();
                return accepted;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn nothing_comes(listener: &TcpListener) {
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

fn passes_both_ways(one: &mut TcpStream, other: &mut TcpStream) {
    for (from, to) in [(0, 1), (1, 0)] {
        let ends = [&mut *one, &mut *other];
        ends[from].write_all(b"hello").unwrap();
        ends[to].set_read_timeout(Some(PATIENCE)).unwrap();
        ends[to].read_exact(&mut [0; 5]).unwrap();
    }
}

/// A connection of a daemon's to an application.
fn deliver(
    two: &Two,
    by: &Datapath,
    workload: WorkloadId,
    client: IpAddr,
    to: SocketAddr,
) -> std::io::Result<TcpStream> {
    two.world.as_reeve(|netns| {
        let socket = onward(netns, by, workload, client, to)?;
        socket.set_nonblocking(false)?;
        socket.connect_timeout(&to.into(), MOMENT)?;
        Ok(socket.into())
    })
}

fn onward(
    netns: &Netns,
    by: &Datapath,
    workload: WorkloadId,
    client: IpAddr,
    to: SocketAddr,
) -> std::io::Result<Socket> {
    let socket = netns
        .onward_sockets(Domain::for_address(to), 1)?
        .pop()
        .unwrap();
    by.deliver_to(socket.as_fd(), workload)?;
    speak_as(&socket, client, to)?;
    Ok(socket)
}

#[test]
fn what_one_redirects_passes_the_other_and_each_knows_what_it_has_redirected() {
    let two = Two::joining();
    let world = &two.world;
    let listeners = listeners(world);
    let each = [
        (&listeners[0], world.there.port4(80)),
        (&listeners[1], world.there.port6(80)),
    ];
    let mut before = Vec::new();
    for (listener, to) in each {
        let mut client = world.as_workload(|| TcpStream::connect(to)).unwrap();
        let mut accepted = accept(listener);
        let [old, new] = two.origins(&accepted);
        let old = old.unwrap();
        assert_eq!((old.workload, old.port), (WORKLOAD, 80), "{to}");
        assert_eq!(new, None, "{to}");
        passes_both_ways(&mut client, &mut accepted);
        before.push((client, accepted));
    }
    two.take_over();
    for (listener, to) in each {
        let mut client = world.as_workload(|| TcpStream::connect(to)).unwrap();
        assert_eq!(client.peer_addr().unwrap(), to);
        let mut accepted = accept(listener);
        // The old daemon may accept it as well.
        let known = two.origins(&accepted).map(|origin| {
            let origin = origin.unwrap();
            (origin.workload, origin.port)
        });
        assert_eq!(known, [(WORKLOAD, 80), (OTHER_ID, 80)], "{to}");
        passes_both_ways(&mut client, &mut accepted);
    }
    for (client, accepted) in &mut before {
        passes_both_ways(client, accepted);
    }
}

#[test]
fn nobody_calls_the_outbound_listener_by_itself() {
    for two in [Two::joining(), Two::taken_over()] {
        let world = &two.world;
        let listeners = listeners(world);
        for (listener, at) in listeners.iter().zip(["127.0.0.1:15001", "[::1]:15001"]) {
            let at: SocketAddr = at.parse().unwrap();
            assert_refused(world.as_workload(|| TcpStream::connect(at)));
            assert_refused(world.here.run(&world.stranger, || TcpStream::connect(at)));
            nothing_comes(listener);
        }
        let outside = world
            .as_far_end(|| TcpStream::connect_timeout(&world.here.port4(15001), MOMENT).map(drop));
        assert!(outside.is_err());
    }
}

#[test]
fn a_connection_that_is_not_redirected_by_either_leaves_nothing_as_plaintext() {
    let two = Two::taken_over();
    let world = &two.world;
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    // The new one says that it goes without a tunnel.
    let mut state = two.state.clone();
    for (.., entry) in &mut state.tables.peers {
        entry.flags = 0;
    }
    two.coming().apply(&state).unwrap();
    let to = world.there.port4(80);
    let left = world.as_workload(|| TcpStream::connect_timeout(&to, MOMENT).map(drop));
    assert!(left.is_err());
    nothing_comes(&server);
    // Nor does the listener take what only one of them would have sent there.
    two.coming().apply(&two.state).unwrap();
    let mut state = world.state.clone();
    for (.., entry) in &mut state.tables.peers {
        entry.flags = 0;
    }
    two.old().apply(&state).unwrap();
    let listeners = listeners(world);
    let left = world.as_workload(|| TcpStream::connect_timeout(&to, MOMENT).map(drop));
    assert!(left.is_err());
    nothing_comes(&listeners[0]);
    nothing_comes(&server);
}

#[test]
fn what_either_refuses_is_refused() {
    for (two, both) in [(Two::joining(), false), (Two::taken_over(), true)] {
        let world = &two.world;
        let listeners = listeners(world);
        let to = world.there.port4(80);
        let call = || world.as_workload(|| TcpStream::connect(to));
        let send = || {
            world.as_workload(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.send_to(b"hello", to)
            })
        };
        call().unwrap();
        accept(&listeners[0]);
        send().unwrap();
        for (datapath, state, is_old) in [
            (two.old(), &world.state, true),
            (two.coming(), &two.state, false),
        ] {
            let mut without = state.clone();
            without.tables.verdicts.clear();
            datapath.apply(&without).unwrap();
            assert_refused(send());
            // Before it redirects, the new one does not see what such a connection is meant for.
            if is_old || both {
                assert_refused(call());
            }
            datapath.apply(state).unwrap();
            send().unwrap();
            call().unwrap();
            accept(&listeners[0]);
        }
    }
}

#[test]
fn connections_to_applications_from_before_go_on_whichever_end_speaks_first() {
    let world = Two::redirecting();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let mut open = Vec::new();
    for (client, to) in [
        (world.there.v4, world.here.port4(80)),
        (world.there.v6, world.here.port6(80)),
    ] {
        for application_first in [true, false] {
            let stream = world.as_reeve(|netns| {
                let datapath = world.datapath();
                let socket = onward(netns, datapath, WORKLOAD, client, to).unwrap();
                socket.set_nonblocking(false).unwrap();
                socket.connect_timeout(&to.into(), PATIENCE).unwrap();
                TcpStream::from(socket)
            });
            open.push((stream, accept(&server), application_first));
        }
    }
    let two = Two::beside(world);
    let mut speak = || {
        for (reeves, application, application_first) in &mut open {
            if *application_first {
                passes_both_ways(application, reeves);
            } else {
                passes_both_ways(reeves, application);
            }
        }
    };
    speak();
    two.take_over();
    speak();
    // A change of policy is the tunnel's matter here.
    two.coming()
        .apply(&KernelState {
            tables: Default::default(),
            ..two.state.clone()
        })
        .unwrap();
    speak();
}

/// Two workloads in one namespace, as on a host.
fn sharing() -> (World, Cgroup) {
    let mut world = World::new();
    let (id, depth) = (world.workload.id(), world.workload.depth());
    world.add_workload(id, depth, WORKLOAD);
    let other = world.stranger.child("other");
    world.add_workload(other.id(), other.depth(), WORKLOAD + 1);
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.apply();
    let datapath = world.datapath().clone();
    world
        .block_on(datapath.prepare_namespace(&world.here.netns))
        .unwrap();
    (world, other)
}

#[test]
fn each_daemon_reaches_applications_and_no_listener_of_another_workload() {
    // The one that comes opens no connection before it has taken over.
    for both in [false, true] {
        let (world, other) = sharing();
        let two = Two::beside(world);
        // Removed before the cgroup that it is in.
        let other = other;
        if both {
            two.take_over();
        }
        let world = &two.world;
        for (client, to) in [
            (world.there.v4, world.here.port4(80)),
            (world.there.v6, world.here.port6(80)),
        ] {
            let each = [(two.old(), WORKLOAD), (two.coming(), OTHER_ID)];
            let each = if both { &each[..] } else { &each[..1] };
            let own = world.as_workload(|| TcpListener::bind(to).unwrap());
            for (by, workload) in each {
                let mut reeves = deliver(&two, by, *workload, client, to).unwrap();
                passes_both_ways(&mut reeves, &mut accept(&own));
            }
            drop(own);
            let elsewhere = world.here.run(&other, || TcpListener::bind(to).unwrap());
            for (by, workload) in each {
                assert!(deliver(&two, by, *workload, client, to).is_err(), "{to}");
                nothing_comes(&elsewhere);
            }
        }
    }
}

#[test]
fn a_mark_alone_opens_nothing_beside_another_layout_either() {
    for two in [Two::joining(), Two::taken_over()] {
        let world = &two.world;
        let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
        let (client, to) = (world.there.v4, world.here.port4(80));
        // With a tag of either, or of none, in a cgroup that is not reeve's.
        for (by, workload) in [(two.old(), WORKLOAD), (two.coming(), OTHER_ID)] {
            let refused = world.here.run(&world.stranger, || {
                let socket = onward(&world.here.netns, by, workload, client, to)?;
                socket.set_nonblocking(false)?;
                socket.connect_timeout(&to.into(), MOMENT)
            });
            assert!(refused.is_err());
        }
        let refused = world.here.run(&world.stranger, || {
            let netns = &world.here.netns;
            let socket = netns.onward_sockets(Domain::IPV4, 1)?.pop().unwrap();
            speak_as(&socket, client, to)?;
            socket.set_nonblocking(false)?;
            socket.connect_timeout(&to.into(), MOMENT)
        });
        assert!(refused.is_err());
        nothing_comes(&server);
        // The workload's own socket with the mark is the workload's.
        let marked = world.as_workload(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_mark(ONWARD_MARK).unwrap();
            socket.connect_timeout(&world.there.port4(81).into(), MOMENT)
        });
        assert_refused(marked);
    }
}

#[test]
fn a_marked_connection_from_before_that_is_not_reeves_is_judged() {
    let mut world = World::new();
    let datapath = world.datapath().clone();
    world
        .block_on(datapath.prepare_namespace(&world.here.netns))
        .unwrap();
    // As reeve makes them, but by whoever is enrolled nowhere.
    let to = world.here.port4(80);
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let mut client = world.here.run(&world.stranger, || {
        let netns = &world.here.netns;
        let socket = netns
            .onward_sockets(Domain::IPV4, 1)
            .unwrap()
            .pop()
            .unwrap();
        speak_as(&socket, world.there.v4, to).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        TcpStream::from(socket)
    });
    let mut application = accept(&server);
    passes_both_ways(&mut client, &mut application);
    world.enrol();
    // The old one lets everything pass still, so that the new one judges alone.
    let two = Two::beside(world);
    for turn in [false, true] {
        let (from, to) = match turn {
            false => (&mut client, &mut application),
            true => (&mut application, &mut client),
        };
        from.write_all(b"hello").unwrap();
        to.set_read_timeout(Some(MOMENT)).unwrap();
        assert!(to.read(&mut [0; 5]).is_err());
    }
    drop(two);
}

#[test]
fn pins_are_their_daemons_until_it_ends() {
    let mut two = Two::joining();
    assert_eq!(two.folders(), ["", "-next"]);
    two.take_over();
    assert_eq!(two.folders(), ["", "-old-1"]);
    // Neither looks at the other's.
    assert_eq!(two.old().keep_pinned().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(two.coming().keep_pinned().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(two.coming().sweep().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(two.folders(), ["", "-old-1"]);
    assert!(two.coming().is_beside());

    // The one that serves is restarted, and takes what is its own.
    two.new = None;
    let new = Datapath::load(two.world.settings.clone()).unwrap();
    assert!(new.is_beside());
    new.apply(&two.state).unwrap();
    two.new = Some(Arc::new(new));
    assert_eq!(two.coming().sweep().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(two.folders(), ["", "-old-1"]);
    assert_refused(
        two.world
            .as_workload(|| TcpStream::connect(two.world.there.port4(81))),
    );

    // The old one is killed.
    two.world.stop();
    assert_eq!(two.coming().sweep().unwrap().len(), 1);
    assert_eq!(two.folders(), [""]);
    assert!(!two.coming().is_beside());
    assert_refused(
        two.world
            .as_workload(|| TcpStream::connect(two.world.there.port4(81))),
    );
}

#[test]
fn what_did_not_come_to_take_over_is_removed_and_the_old_one_goes_on() {
    let mut two = Two::joining();
    let listeners = listeners(&two.world);
    two.new = None;
    assert_eq!(two.folders(), ["", "-next"]);
    assert_eq!(two.old().sweep().unwrap().len(), 1);
    assert_eq!(two.folders(), [""]);
    let to = two.world.there.port4(80);
    two.world.as_workload(|| TcpStream::connect(to)).unwrap();
    assert!(
        two.world
            .datapath()
            .origin(accept(&listeners[0]).as_fd())
            .is_some()
    );
}

#[test]
fn an_end_between_the_two_steps_of_a_takeover_leaves_what_judges_alone() {
    let mut two = Two::joining();
    two.old().step_aside().unwrap();
    assert_eq!(two.folders(), ["-next", "-old-1"]);
    two.new = None;
    two.world.stop();
    let refused = |two: &Two| {
        let to = two.world.there.port4(81);
        assert_refused(two.world.as_workload(|| TcpStream::connect(to)));
    };
    refused(&two);
    two.new = Some(Arc::new(
        Datapath::load(two.world.settings.clone()).unwrap(),
    ));
    refused(&two);
    two.coming().apply(&two.state).unwrap();
    two.coming().sweep().unwrap();
    assert_eq!(two.folders(), [""]);
    refused(&two);
}

#[test]
fn what_others_put_where_the_name_was_is_neither_followed_nor_in_the_way() {
    type Squat = fn(&Path, &Path);
    let link: Squat = |name, next| symlink(next, name).unwrap();
    let empty: Squat = |name, _| fs::create_dir(name).unwrap();
    // What it seems to hold are the links of the one that comes.
    let full: Squat = |name, next| {
        fs::create_dir(name).unwrap();
        fs::set_permissions(name, fs::Permissions::from_mode(0o777)).unwrap();
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            symlink(entry.path(), name.join(entry.file_name())).unwrap();
        }
    };
    for squat in [link, empty, full] {
        let two = Two::joining();
        let name = two.world.settings.pins.clone();
        let next = name.with_file_name(format!("{}-next", name.file_name().unwrap().display()));
        two.old().step_aside().unwrap();
        squat(&name, &next);
        lchown(&name, Some(NOBODY), None).unwrap();
        two.coming().take_place().unwrap();
        assert!(fs::symlink_metadata(&name).unwrap().is_dir());
        assert_eq!(fs::metadata(&name).unwrap().uid(), 0);
        two.coming().sweep().unwrap();
        two.old().retire().unwrap();
        two.coming().sweep().unwrap();
        let to = two.world.there.port4(81);
        assert_refused(two.world.as_workload(|| TcpStream::connect(to)));
        assert!(
            two.coming().keep_pinned().unwrap().is_empty(),
            "all is pinned and attached"
        );
        // Of a folder that is full the owner has to be found by root.
        let left = two.folders();
        assert!(left == [""] || left == ["", "-next"], "{left:?}");
        if left.len() > 1 {
            fs::remove_dir_all(&next).unwrap();
        }
    }
}

#[test]
fn the_old_one_retires_without_an_open_moment() {
    let two = Two::taken_over();
    let listeners = listeners(&two.world);
    two.old().retire().unwrap();
    assert_eq!(two.folders(), [""]);
    two.coming().sweep().unwrap();
    assert!(!two.coming().is_beside());
    let world = &two.world;
    assert_refused(world.as_workload(|| TcpStream::connect(world.there.port4(81))));
    world
        .as_workload(|| TcpStream::connect(world.there.port4(80)))
        .unwrap();
    let accepted = accept(&listeners[0]);
    assert!(two.coming().origin(accepted.as_fd()).is_some());
    let denied = two.coming().counters().unwrap();
    assert_eq!(
        denied.verdicts(Direction::Egress, false, Reason::ReservedPort),
        0
    );
}
