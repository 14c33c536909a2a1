//! IPsec in transport mode: what leaves is encrypted before the hook sees it, and judged as what its
//! socket is connected to. Kernels without ESP have nothing to judge.

use std::{
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
};

use reeve_common::{
    Direction, Hook, Reason,
    protocol::{ESP, TCP, UDP},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    place::Place,
    world::{PATIENCE, Scope, World, assert_refused},
};

const KEY: &str = "0x0102030405060708090a0b0c0d0e0f1011121314";

/// Runs `ip xfrm` in a place.
fn xfrm(place: &Place, words: &[&str]) -> bool {
    let run = || {
        Command::new("ip")
            .arg("xfrm")
            .args(words)
            .stderr(Stdio::null())
            .status()
    };
    place.netns.run(run).unwrap().success()
}

/// Has both places encrypt what goes between them. False: this kernel has no ESP.
fn encrypt(world: &World) -> bool {
    let (here, there) = (&world.here, &world.there);
    let pairs = [
        (here, here.v4, there.v4),
        (there, there.v4, here.v4),
        (here, here.v6, there.v6),
        (there, there.v6, here.v6),
    ];
    for (number, (sender, from, to)) in pairs.into_iter().enumerate() {
        let (from, to, spi) = (from.to_string(), to.to_string(), (256 + number).to_string());
        let mut state = vec!["state", "add", "src", &from, "dst", &to, "proto", "esp"];
        state.extend(["spi", &spi, "mode", "transport"]);
        state.extend(["aead", "rfc4106(gcm(aes))", KEY, "128"]);
        if !(xfrm(here, &state) && xfrm(there, &state)) {
            return false;
        }
        let mut policy = vec!["policy", "add", "src", &from, "dst", &to, "dir", "out"];
        policy.extend(["tmpl", "src", &from, "dst", &to]);
        policy.extend(["proto", "esp", "mode", "transport"]);
        assert!(xfrm(sender, &policy));
    }
    true
}

#[test]
fn what_a_connected_socket_sends_encrypted_is_judged_as_what_it_is() {
    let mut world = World::enrolled();
    if !encrypt(&world) {
        eprintln!("this kernel has no ESP");
        return;
    }
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let listener = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    for to in [world.there.port4(53), world.there.port6(53)] {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = world.as_workload(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket.send(b"x").unwrap();
            socket
        });
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let (_, from) = server.recv_from(&mut [0]).unwrap();
        world.as_far_end(|| server.send_to(b"y", from)).unwrap();
        socket.recv(&mut [0]).unwrap();
        let web = SocketAddr::new(to.ip(), 80);
        let _client = world.as_workload(|| TcpStream::connect_timeout(&web, PATIENCE).unwrap());
        listener.accept().unwrap();
        let other = SocketAddr::new(to.ip(), 54);
        world.as_workload(|| socket.connect(other)).unwrap();
        assert_refused(socket.send(b"x"));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!((event.protocol, event.remote_port), (UDP, 54));
    }
    world.state.tables.verdicts.clear();
    world.apply();
    for to in [world.there.port4(53), world.there.port6(53)] {
        // Connected before the policy changed, so that its packets alone can tell.
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = world.as_workload(|| UdpSocket::bind(any).unwrap());
        world
            .here
            .run(&world.stranger, || socket.connect(to).unwrap());
        assert_refused(socket.send(b"x"));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!((event.protocol, event.remote_port), (UDP, 53));
    }
}

#[test]
fn what_no_socket_tells_of_an_encrypted_packet_is_a_matter_of_policy() {
    let mut world = World::enrolled();
    if !encrypt(&world) {
        eprintln!("this kernel has no ESP");
        return;
    }
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(UDP, 53));
    world.apply();
    let server = world.as_far_end(|| UdpSocket::bind("[::]:53").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let send = |world: &World, to: SocketAddr| {
        world.as_workload(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any).unwrap().send_to(b"x", to)
        })
    };
    let both = [world.there.port4(53), world.there.port6(53)];
    for to in both {
        assert_refused(send(&world, to));
        let event = world.verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!(event.protocol, ESP);
    }
    // By hand, it is ESP and nothing else.
    let raw = world.as_workload(|| {
        let protocol = Protocol::from(i32::from(ESP));
        Socket::new(Domain::IPV4, Type::RAW, Some(protocol)).unwrap()
    });
    let to = world.there.port4(0);
    assert_refused(world.as_workload(|| raw.send_to(&[7; 40], &to.into())));
    world.allow(Direction::Egress, Scope::Protocol(ESP));
    world.apply();
    for to in both {
        send(&world, to).unwrap();
        server.recv(&mut [0]).unwrap();
    }
}
