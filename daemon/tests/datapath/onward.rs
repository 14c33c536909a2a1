//! The daemon's connections to local applications, with the client's own address.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use reeve::datapath::{netns::Netns, speak_as};
use reeve_common::{Action, Direction, Hook, Reason, protocol::TCP};
use socket2::{Domain, Socket};

use crate::world::{CLASS, MOMENT, PATIENCE, Scope, World};

fn world() -> World {
    let mut world = World::enrolled();
    world.peer(0);
    world.verdict(
        Direction::Ingress,
        CLASS,
        Scope::Port(TCP, 80),
        Action::TunnelOnly,
    );
    world.apply();
    let datapath = world.datapath().clone();
    datapath.attach_namespace(&world.here.netns).unwrap();
    world
        .block_on(datapath.prepare_namespace(&world.here.netns))
        .unwrap();
    // A second time is no mistake.
    world
        .block_on(datapath.prepare_namespace(&world.here.netns))
        .unwrap();
    world
}

fn connect(world: &World, client: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    world.as_reeve(|netns| connect_in(netns, client, to))
}

fn connect_in(netns: &Netns, client: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = onward(netns, client, to)?;
    socket.set_nonblocking(false)?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}

fn onward(netns: &Netns, client: IpAddr, to: SocketAddr) -> std::io::Result<Socket> {
    let mut sockets = netns.onward_sockets(Domain::for_address(to), 1)?;
    let socket = sockets.remove(0);
    speak_as(&socket, client, to)?;
    Ok(socket)
}

#[test]
fn an_application_sees_the_clients_address() {
    let mut world = world();
    let server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for (client, to) in [
        (world.there.v4, world.here.port4(80)),
        (world.there.v6, world.here.port6(80)),
        // An address that is nowhere near.
        ("203.0.113.9".parse().unwrap(), world.here.port4(80)),
        ("2001:db8::9".parse().unwrap(), world.here.port6(80)),
    ] {
        let mut stream = connect(&world, client, to).unwrap();
        let (mut accepted, from) = server.accept().unwrap();
        assert_eq!(from.ip().to_canonical(), client);
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        accepted.write_all(b"hi").unwrap();
        stream.read_exact(&mut [0; 2]).unwrap();
        // A change of policy is the tunnel's matter here.
        let verdicts = std::mem::take(&mut world.state.tables.verdicts);
        world.apply();
        stream.write_all(b"still").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        world.state.tables.verdicts = verdicts;
        world.apply();
    }
    assert_eq!(world.other_events(), [], "the tunnel tells of it");
    let usage = world.datapath().map_usage();
    let onward = usage.iter().find(|map| map.name == "ONWARD").unwrap();
    assert_eq!(onward.entries, 0);
}

/// Has the packets of the loopback device arrive at one processor and at another by turns.
fn scatter(world: &World, done: &AtomicBool) {
    let turns = world.here.netns.run(|| {
        // Of the devices of a namespace, a sysfs tells that was mounted in it.
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, private, nothing)?;
        mount(nothing, "/sys", Some("sysfs"), MsFlags::empty(), nothing)?;
        while !done.load(Ordering::Relaxed) {
            for processors in ["1", "2"] {
                fs::write("/sys/class/net/lo/queues/rx-0/rps_cpus", processors)?;
            }
        }
        Ok(())
    });
    turns.unwrap();
}

#[test]
fn what_comes_at_once_reaches_the_application_on_whichever_processor_it_arrives() {
    /// Of so many, some meet what they are about, where nothing is done about it.
    const MANY: usize = 20_000;
    let world = &world();
    let (server, done) = (
        world.as_workload(|| TcpListener::bind("[::]:80").unwrap()),
        &AtomicBool::new(false),
    );
    thread::scope(|scope| {
        scope.spawn(|| scatter(world, done));
        let application = scope.spawn(move || {
            let answered = server.incoming().take(MANY).filter(|accepted| {
                let mut accepted = accepted.as_ref().unwrap();
                accepted.set_read_timeout(Some(PATIENCE)).unwrap();
                accepted.read_exact(&mut [0]).is_ok()
            });
            answered.count()
        });
        let to = world.here.port4(80);
        world.as_reeve(|netns| {
            for _ in 0..MANY {
                let mut stream = connect_in(netns, world.there.v4, to).unwrap();
                stream.write_all(b"?").unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                // The application's end.
                let _ = stream.read(&mut [0]);
            }
        });
        let answered = application.join();
        done.store(true, Ordering::Relaxed);
        assert_eq!(answered.unwrap(), MANY);
    });
}

#[test]
fn nothing_is_left_of_a_connection_that_the_application_refused() {
    let world = world();
    let to = world.here.port4(81);
    let refused = connect(&world, world.there.v4, to).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let usage = world.datapath().map_usage();
    let onward = usage.iter().find(|map| map.name == "ONWARD").unwrap();
    assert_eq!(onward.entries, 0);
}

#[test]
fn a_mark_alone_opens_nothing() {
    let world = world();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    let to = world.here.port4(80);
    let client = world.there.v4;
    // Not reeve's cgroup: neither a stranger nor the workload itself is believed.
    let refused = world.here.run(&world.stranger, || {
        let socket = onward(&world.here.netns, client, to)?;
        socket.set_nonblocking(false)?;
        socket.connect_timeout(&to.into(), MOMENT)
    });
    assert!(refused.is_err());
}

#[test]
fn what_reeve_opens_without_its_mark_is_judged_like_anybodys() {
    let mut world = world();
    let _server = world.as_workload(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.here.port4(80), world.here.port6(80)] {
        let refused = world.there.run(&world.reeve, || TcpStream::connect(to));
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
        world.verdict_event(Hook::SocketLookup, false, Reason::PlaintextRefused);
    }
}
