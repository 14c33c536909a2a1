//! Original destinations of redirected connections: kept with the accepted socket, for that
//! connection alone; and who may reach the outbound listener at all.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use reeve::datapath::SocketStorage as _;
use reeve_common::{Direction, Hook, PEER_TUNNEL, Reason, protocol::TCP};
use socket2::{Domain, Socket, Type};

use crate::{
    place::{disconnect, set_option},
    world::{MOMENT, PATIENCE, Scope, WORKLOAD, World, assert_refused, tcp_info},
};

/// A workload whose connections are redirected, and reeve's listeners in its namespace.
fn world() -> (World, [TcpListener; 2]) {
    let mut world = World::enrolled();
    world.peer(PEER_TUNNEL);
    world.allow(Direction::Egress, Scope::Protocol(TCP));
    world.listening();
    world.apply();
    let listeners = open_listeners(&world);
    (world, listeners)
}

fn open_listeners(world: &World) -> [TcpListener; 2] {
    let listeners = world.as_reeve(|netns| netns.outbound_listeners(15001).unwrap());
    let listeners: Vec<TcpListener> = listeners.into_iter().map(Into::into).collect();
    listeners.try_into().unwrap()
}

/// Accepts a connection, and gives the port that it was meant for.
fn accept(world: &World, listener: &TcpListener) -> (TcpStream, Option<u16>) {
    listener.set_nonblocking(false).unwrap();
    let timeout = libc::timeval {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_usec: 0,
    };
    // SAFETY: any bytes of a `timeval` are bytes.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const timeout).cast::<u8>(), size_of_val(&timeout))
    };
    set_option(listener, libc::SOL_SOCKET, libc::SO_RCVTIMEO, bytes);
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    let origin = world.datapath().origin(accepted.as_fd());
    if let Some(origin) = &origin {
        assert_eq!(origin.workload, WORKLOAD);
    }
    (accepted, origin.map(|origin| origin.port))
}

/// Connects to `to` from a port.
fn connect_from(port: u16, to: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
        SocketAddr::V6(_) => SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port),
    };
    socket.bind(&any.into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket)
}

fn write_setting(world: &World, name: &str, value: &str) {
    let path = format!("/proc/sys/net/ipv4/{name}");
    world
        .here
        .netns
        .run(|| std::fs::write(&path, value))
        .unwrap();
}

#[test]
fn a_connection_that_is_reset_before_it_is_accepted_keeps_its_own_origin() {
    let (world, listeners) = world();
    for cookies in ["1", "2"] {
        write_setting(&world, "tcp_syncookies", cookies);
        for (listener, at) in [
            (&listeners[0], world.there.port4(0)),
            (&listeners[1], world.there.port6(0)),
        ] {
            // Nobody accepts yet, and each connection has the port of the one before.
            let last = world.as_workload(|| {
                for port in 80..90 {
                    let to = SocketAddr::new(at.ip(), port);
                    let mut client = connect_from(45_000, to).unwrap();
                    client.write_all(&port.to_be_bytes()).unwrap();
                    client.set_linger(Some(Duration::ZERO)).unwrap();
                }
                let mut client = connect_from(45_000, SocketAddr::new(at.ip(), 90)).unwrap();
                client.write_all(&90_u16.to_be_bytes()).unwrap();
                client
            });
            for port in 80..=90 {
                let (mut accepted, meant) = accept(&world, listener);
                assert_eq!(meant, Some(port), "syncookies {cookies}, {at}");
                let mut said = [0; 2];
                match accepted.read_exact(&mut said) {
                    Ok(()) => assert_eq!(u16::from_be_bytes(said), port),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
                }
            }
            drop(last);
        }
    }
}

#[test]
fn fast_open_does_not_overtake_the_origin() {
    /// `TCPI_OPT_SYN_DATA` of `linux/tcp.h`, and where the options lie in `tcp_info`.
    const SYN_DATA: u8 = 32;
    const OPTIONS: usize = 5;
    let (world, listeners) = world();
    // Both sides, every listener, and no cookie asked for.
    write_setting(&world, "tcp_fastopen", "1543");
    for (listener, to) in [
        (&listeners[0], world.there.port4(80)),
        (&listeners[1], world.there.port6(80)),
    ] {
        // Listeners of before the setting have no queue for it.
        set_option(
            listener,
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            &64_i32.to_ne_bytes(),
        );
        for _ in 0..20 {
            let _client = world.as_workload(|| {
                let client = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                client
                    .send_to_with_flags(b"early", &to.into(), libc::MSG_FASTOPEN)
                    .unwrap();
                client
            });
            let (mut accepted, meant) = accept(&world, listener);
            assert_eq!(meant, Some(80), "{to}");
            let mut said = [0; 5];
            accepted.read_exact(&mut said).unwrap();
            assert_eq!(&said, b"early");
            let info = tcp_info(&accepted);
            assert_ne!(info[OPTIONS] & SYN_DATA, 0, "it came with the SYN");
        }
    }
}

#[test]
fn a_client_that_has_closed_before_its_connection_is_accepted_is_served() {
    let (world, listeners) = world();
    for cookies in ["1", "2"] {
        write_setting(&world, "tcp_syncookies", cookies);
        for (listener, to) in [
            (&listeners[0], world.there.port4(80)),
            (&listeners[1], world.there.port6(80)),
        ] {
            world.as_workload(|| {
                let mut client = TcpStream::connect(to).unwrap();
                client.write_all(b"hello").unwrap();
            });
            let (mut accepted, meant) = accept(&world, listener);
            assert_eq!(meant, Some(80));
            let mut said = Vec::new();
            accepted.read_to_end(&mut said).unwrap();
            assert_eq!(said, b"hello");
        }
    }
}

#[test]
fn no_stranger_connects_to_the_outbound_listener() {
    let (mut world, listeners) = world();
    for to in [
        "127.0.0.1:15001",
        "127.9.9.9:15001",
        "0.0.0.0:15001",
        "[::1]:15001",
        "[::]:15001",
        "[::ffff:127.0.0.1]:15001",
    ] {
        let to: SocketAddr = to.parse().unwrap();
        let connected = world
            .here
            .run(&world.stranger, || TcpStream::connect_timeout(&to, MOMENT));
        assert_refused(connected);
        world.verdict_event(Hook::Connect, false, Reason::ReservedPort);
    }
    for listener in listeners {
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    // Where reeve does not listen, a port is a port.
    let elsewhere = world.as_far_end(|| {
        let listener = TcpListener::bind("127.0.0.1:15001").unwrap();
        TcpStream::connect("127.0.0.1:15001").unwrap();
        listener
    });
    elsewhere.accept().unwrap();
}

#[test]
fn what_no_client_of_a_workload_has_opened_is_dropped_at_the_outbound_listener() {
    let mut world = World::enrolled();
    // The maps do not say yet that reeve listens.
    let listeners = open_listeners(&world);
    for to in ["127.0.0.1:15001", "[::1]:15001"] {
        let to: SocketAddr = to.parse().unwrap();
        let connected = world
            .here
            .run(&world.stranger, || TcpStream::connect_timeout(&to, MOMENT));
        assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
        let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoOrigin);
        assert_eq!(event.local_port, 15001);
    }
    // From beyond the wire, in a namespace that takes such packets for its own.
    write_setting(&world, "conf/wire/route_localnet", "1");
    world.there.ip(&[
        "rule add pref 10 lookup local".into(),
        "rule del pref 0".into(),
        "rule add pref 5 to 127.0.0.1 lookup 77".into(),
        "route add 127.0.0.1 via 10.0.0.1 dev wire table 77 onlink src 10.0.0.2".into(),
    ]);
    world
        .there
        .netns
        .run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1"))
        .unwrap();
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, 15001).into();
    let connected = world.as_far_end(|| connect_at(world.there.port4(0), to));
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
    let event = world.verdict_event(Hook::PacketIngress, false, Reason::NoOrigin);
    assert_eq!(event.remote, reeve::datapath::address(world.there.v4));
    // The listener's other addresses are refused to everybody.
    let to = world.here.port4(15001);
    let connected = world.as_far_end(|| connect_at(world.there.port4(0), to));
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
    world.verdict_event(Hook::PacketIngress, false, Reason::NoOrigin);
    world
        .datapath()
        .attach_namespace(&world.here.netns)
        .unwrap();
    let connected = world.as_far_end(|| connect_at(world.there.port4(0), to));
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    world.verdict_event(Hook::SocketLookup, false, Reason::ReservedPort);
    for listener in listeners {
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

fn connect_at(from: SocketAddr, to: SocketAddr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), MOMENT)
}

#[test]
fn what_a_daemon_never_accepted_is_nobodys_after_it() {
    let (mut world, listeners) = world();
    let to = world.there.port4(80);
    let clients: Vec<_> = (0..3)
        .map(|_| world.as_workload(|| TcpStream::connect(to).unwrap()))
        .collect();
    let ports: Vec<_> = clients
        .iter()
        .map(|client| client.local_addr().unwrap().port())
        .collect();
    drop((listeners, clients));
    world.stop();
    world.start().unwrap();
    let again = open_listeners(&world);
    // Even of one whom the program at `connect()` had let through.
    for (_, entry) in &mut world.state.namespaces {
        entry.flags = 0;
    }
    world.apply();
    for port in ports {
        let connected = world.here.run(&world.stranger, || {
            let to: SocketAddr = (Ipv4Addr::LOCALHOST, 15001).into();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
            socket.connect_timeout(&to.into(), MOMENT)
        });
        connected.unwrap_err();
        assert_eq!(again[0].accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

/// Runs on one processor only.
fn on_first_processor() {
    let mut set = nix::sched::CpuSet::new();
    set.set(0).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

#[test]
fn what_a_packet_leaves_at_reeves_listener_is_nothing_to_a_connection_elsewhere() {
    let mut world = World::enrolled();
    world.apply();
    let at: SocketAddr = "[::1]:8080".parse().unwrap();
    let from: SocketAddr = "[::1]:45678".parse().unwrap();
    let bound = |at: SocketAddr| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&at.into()).unwrap();
        socket
    };
    // A connection to reeve in another namespace, which reeve has closed and forgotten.
    let there = &world.there;
    let short = "/proc/sys/net/ipv4/tcp_fin_timeout";
    there.netns.run(|| std::fs::write(short, "1")).unwrap();
    let listener = there.run(&world.reeve, || {
        let listener = bound(at);
        listener.listen(8).unwrap();
        listener
    });
    let old = there.run(&world.stranger, || {
        let client = bound(from);
        client.connect(&at.into()).unwrap();
        client
    });
    drop(listener.accept().unwrap());
    let forgotten = std::time::Instant::now() + PATIENCE;
    let is_known = || {
        let list = || {
            std::process::Command::new("ss")
                .args(["-Htan", "state", "fin-wait-2", "src", "[::1]:8080"])
                .output()
        };
        !there.netns.run(list).unwrap().stdout.is_empty()
    };
    assert!(is_known(), "it can be seen");
    while is_known() {
        assert!(std::time::Instant::now() < forgotten);
        std::thread::sleep(Duration::from_millis(50));
    }
    // The same addresses in the workload's own.
    let (server, client) = world.as_workload(|| {
        let server = bound(SocketAddr::new(
            std::net::Ipv6Addr::UNSPECIFIED.into(),
            8080,
        ));
        server.listen(8).unwrap();
        (server, bound(from))
    });
    // A segment of the old connection arrives at the listener, and then the new one is accepted.
    there.run(&world.stranger, || {
        on_first_processor();
        let _ = (&old).write(b"x");
    });
    let accepted = world.as_workload(|| {
        on_first_processor();
        client.connect(&at.into()).unwrap();
        let (accepted, _) = server.accept().unwrap();
        drop((client, server));
        disconnect(&accepted);
        // The port that is then its own is the kernel's choice, so that nobody sees a `bind()`.
        accepted.listen(8).unwrap();
        accepted
    });
    let port = accepted.local_addr().unwrap().as_socket().unwrap().port();
    for to in [world.here.port4(port), world.here.port6(port)] {
        let connected = world.as_far_end(|| TcpStream::connect_timeout(&to, MOMENT));
        assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut, "{to}");
    }
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
}
