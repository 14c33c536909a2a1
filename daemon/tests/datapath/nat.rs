//! Network address translation in the namespace of a workload: it happens before packets are
//! judged on their way out, and before they are judged on their way in.

use std::{
    io::{Error, ErrorKind, Read, Result, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
};

use reeve_common::{
    Direction, Hook, NamespaceEntry, PeerEntry, Reason,
    protocol::{TCP, UDP},
};
use socket2::{Domain, Socket, Type};

use crate::{
    place::Place,
    world::{CLASS, MOMENT, PEER, Scope, World},
};

use reeve::datapath::address;

/// A workload that may open TCP to port 80 and UDP to port 53 of the far end, and serves port 8080
/// of both protocols to it; and a stranger beside the far end, at the other end of the wire.
struct Translating {
    world: World,
    stranger: [IpAddr; 2],
}

impl Translating {
    fn new() -> Self {
        let mut world = World::enrolled();
        let stranger = [
            IpAddr::from(Ipv4Addr::new(10, 0, 0, 3)),
            IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3)),
        ];
        world.there.ip(&[
            format!("addr add {}/24 dev wire", stranger[0]),
            format!("addr add {}/64 dev wire nodad", stranger[1]),
        ]);
        world.peer(0);
        world.allow(Direction::Egress, Scope::Port(TCP, 80));
        world.allow(Direction::Egress, Scope::Port(UDP, 53));
        world.allow(Direction::Ingress, Scope::Port(TCP, 8080));
        world.allow(Direction::Ingress, Scope::Port(UDP, 8080));
        world.apply();
        Self { world, stranger }
    }

    /// Makes the policies say of the stranger what they say of the far end.
    fn allow_stranger(&mut self) {
        self.know(self.stranger, CLASS);
    }

    fn know(&mut self, addresses: [IpAddr; 2], class: u32) {
        for ip in addresses {
            let entry = PeerEntry {
                class,
                peer: PEER + 1,
                flags: 0,
            };
            let peers = &mut self.world.state.tables.peers;
            peers.push((128, address(ip), entry));
        }
        self.world.apply();
    }

    /// The addresses of one family: the workload's, the far end's, the stranger's.
    fn families(&self) -> [(IpAddr, IpAddr, IpAddr); 2] {
        let (here, there) = (&self.world.here, &self.world.there);
        let [v4, v6] = self.stranger;
        [(here.v4, there.v4, v4), (here.v6, there.v6, v6)]
    }

    fn translate(&self, ip: IpAddr, rule: &str) {
        translate(&self.world.here, ip, rule);
    }

    fn listen(&self, at: impl Into<SocketAddr>) -> TcpListener {
        let at = at.into();
        self.world.as_far_end(|| TcpListener::bind(at).unwrap())
    }

    fn datagrams(&self, at: impl Into<SocketAddr>) -> UdpSocket {
        let at = at.into();
        self.world.as_far_end(|| udp(at))
    }
}

/// Adds a rule to the table of translations; the family is that of `ip`.
fn translate(place: &Place, ip: IpAddr, rule: &str) {
    let program = if ip.is_ipv4() {
        "iptables"
    } else {
        "ip6tables"
    };
    let command = || {
        let rule = ["-w", "-t", "nat", "-A"].into_iter().chain(rule.split(' '));
        Command::new(program).args(rule).output()
    };
    let output = place.netns.run(command).unwrap();
    assert!(output.status.success(), "{rule}: {output:?}");
}

/// An address with a port as iptables writes it.
fn at(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

fn udp(at: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(MOMENT)).unwrap();
    socket
}

fn any(ip: IpAddr) -> SocketAddr {
    if ip.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    }
}

/// Opens a connection under an address.
fn connect_from(from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), MOMENT)?;
    Ok(socket.into())
}

/// Whether two ends of a connection hear each other.
fn talk(client: &TcpStream, server: &TcpStream) -> Result<()> {
    for (mut from, mut to) in [(client, server), (server, client)] {
        to.set_read_timeout(Some(MOMENT))?;
        from.write_all(b"x")?;
        to.read_exact(&mut [0])?;
    }
    Ok(())
}

/// Opens a connection as the workload to where the listener is to be found, and talks.
fn reach(world: &World, to: SocketAddr, listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = world.as_workload(|| TcpStream::connect_timeout(&to, MOMENT))?;
    let (server, _) = listener.accept()?;
    talk(&client, &server)?;
    Ok((client, server))
}

/// Asks as the workload, with a socket that is connected and with one that is not.
fn ask(world: &World, to: SocketAddr, server: &UdpSocket) -> Result<()> {
    for connected in [true, false] {
        let client = world.as_workload(|| {
            let client = udp(any(to.ip()));
            if connected {
                client.connect(to)?;
                client.send(b"x")?;
            } else {
                client.send_to(b"x", to)?;
            }
            Ok::<_, Error>(client)
        })?;
        let (_, from) = server.recv_from(&mut [0])?;
        server.send_to(b"y", from)?;
        client.recv(&mut [0])?;
    }
    Ok(())
}

/// Whether the kernel runs the programs for a SYN-ACK of IPv6: since Linux 6.5
/// (`BPF_CGROUP_RUN_PROG_INET_EGRESS` compared the listener with the request before).
fn sees_syn_acks() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let mut next = || numbers.next().unwrap().unwrap();
    (next(), next()) >= (6, 5)
}

fn assert_silent<T: std::fmt::Debug>(result: Result<T>) {
    let kind = result.unwrap_err().kind();
    let silent = [
        ErrorKind::TimedOut,
        ErrorKind::WouldBlock,
        ErrorKind::PermissionDenied,
    ];
    assert!(silent.contains(&kind), "{kind:?}");
}

#[test]
fn a_connection_that_is_translated_reaches_nobody_whom_no_policy_allows() {
    let mut test = Translating::new();
    for (_, far, stranger) in test.families() {
        for (protocol, port) in [("tcp", 80), ("udp", 53)] {
            let to = at(stranger, port);
            let rule = format!("OUTPUT -p {protocol} -d {far} --dport {port} -j DNAT --to {to}");
            test.translate(far, &rule);
        }
        let listener = test.listen((stranger, 80));
        listener.set_nonblocking(true).unwrap();
        assert_silent(reach(&test.world, (far, 80).into(), &listener));
        let event = test
            .world
            .verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!((event.remote, event.remote_port), (address(stranger), 80));
        let server = test.datagrams((stranger, 53));
        assert_silent(ask(&test.world, (far, 53).into(), &server));
        let event = test
            .world
            .verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!((event.remote, event.remote_port), (address(stranger), 53));
    }
}

#[test]
fn a_connection_that_is_translated_goes_on_while_both_ends_are_allowed() {
    let mut test = Translating::new();
    test.allow_stranger();
    let mut open = Vec::new();
    for (_, far, stranger) in test.families() {
        for (protocol, port) in [("tcp", 80), ("udp", 53)] {
            let to = at(stranger, port);
            let rule = format!("OUTPUT -p {protocol} -d {far} --dport {port} -j DNAT --to {to}");
            test.translate(far, &rule);
        }
        let server = test.datagrams((stranger, 53));
        ask(&test.world, (far, 53).into(), &server).unwrap();
        let listener = test.listen((stranger, 80));
        open.push(reach(&test.world, (far, 80).into(), &listener).unwrap());
        let peer = open.last().unwrap().0.peer_addr().unwrap();
        assert_eq!(peer, (far, 80).into());
    }
    // Judged anew, to the same end.
    test.world.allow(Direction::Egress, Scope::Port(TCP, 81));
    test.world.apply();
    for (client, server) in &open {
        talk(client, server).unwrap();
    }
    // Where it really goes is allowed no longer.
    test.world
        .state
        .tables
        .peers
        .retain(|(_, ip, _)| !test.stranger.map(address).contains(ip));
    test.world.apply();
    for (client, server) in &open {
        assert_silent(talk(client, server));
    }
    // That is allowed again, and what was asked for is not.
    test.allow_stranger();
    let far = [test.world.there.v4, test.world.there.v6].map(address);
    test.world
        .state
        .tables
        .peers
        .retain(|(_, ip, _)| !far.contains(ip));
    test.world.apply();
    for (client, server) in &open {
        assert_silent(talk(client, server));
    }
}

#[test]
fn an_address_of_anothers_is_not_sent_under_by_translation() {
    let mut test = Translating::new();
    test.know(
        [
            Ipv4Addr::new(10, 0, 0, 9).into(),
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9).into(),
        ],
        CLASS,
    );
    for (_, far, _) in test.families() {
        let other = if far.is_ipv4() { "10.0.0.9" } else { "fd00::9" };
        let listener = test.listen((far, 80));
        listener.set_nonblocking(true).unwrap();
        test.translate(
            far,
            &format!("POSTROUTING -d {far} -p tcp -j SNAT --to {other}"),
        );
        test.translate(
            far,
            &format!("POSTROUTING -d {far} -p udp -j SNAT --to {other}"),
        );
        assert_silent(reach(&test.world, (far, 80).into(), &listener));
        test.world
            .verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
        let server = test.datagrams((far, 53));
        assert_silent(ask(&test.world, (far, 53).into(), &server));
        test.world
            .verdict_event(Hook::PacketEgress, false, Reason::ForgedSource);
    }
}

#[test]
fn a_connection_is_masqueraded_as_before() {
    let test = Translating::new();
    for (_, far, _) in test.families() {
        for protocol in ["tcp", "udp"] {
            let rule =
                format!("POSTROUTING -p {protocol} -d {far} -j MASQUERADE --to-ports 7000-7999");
            test.translate(far, &rule);
        }
        let listener = test.listen((far, 80));
        let (_, server) = reach(&test.world, (far, 80).into(), &listener).unwrap();
        assert!((7000..8000).contains(&server.peer_addr().unwrap().port()));
        let server = test.datagrams((far, 53));
        ask(&test.world, (far, 53).into(), &server).unwrap();
    }
}

#[test]
fn a_stranger_who_is_translated_into_an_allowed_client_gets_no_answer() {
    let mut test = Translating::new();
    for (here, far, stranger) in test.families() {
        for protocol in ["tcp", "udp"] {
            let rule = format!("INPUT -p {protocol} -s {stranger} -j SNAT --to {far}");
            test.translate(here, &rule);
        }
        let (listener, server) = test.world.as_workload(|| {
            let listener = TcpListener::bind((here, 8080)).unwrap();
            listener.set_nonblocking(true).unwrap();
            (listener, udp((here, 8080).into()))
        });
        let connect = |from| {
            test.world
                .as_far_end(|| connect_from(from, (here, 8080).into()))
        };
        if here.is_ipv4() || sees_syn_acks() {
            assert_silent(connect(stranger));
            assert_silent(listener.accept());
        } else {
            // The socket's first packet is the first that is seen, and refused: from then on the stranger
            // is heard no more.
            let client = connect(stranger).unwrap();
            let (accepted, _) = test.world.as_workload(|| listener.accept()).unwrap();
            accepted.set_nonblocking(false).unwrap();
            assert_silent(talk(&accepted, &client));
            assert_silent(talk(&client, &accepted));
        }
        let event = test
            .world
            .verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        assert_eq!(event.remote, address(stranger));
        assert_eq!(event.direction, Direction::Ingress as u8);
        assert_eq!(event.local_port, 8080);

        let client = test.datagrams((stranger, 0));
        client.send_to(b"x", (here, 8080)).unwrap();
        let (_, from) = server.recv_from(&mut [0]).unwrap();
        assert_eq!(from.ip(), far, "that is what its socket is shown");
        let _ = test.world.as_workload(|| server.send_to(b"y", from));
        assert_silent(client.recv(&mut [0]));
        test.world
            .verdict_event(Hook::PacketEgress, false, Reason::NoPolicy);
        // The one who is allowed is served.
        let connect = |from| {
            test.world
                .as_far_end(|| connect_from(from, (here, 8080).into()))
        };
        let client = connect(far).unwrap();
        let (accepted, _) = test.world.as_workload(|| listener.accept()).unwrap();
        accepted.set_nonblocking(false).unwrap();
        talk(&client, &accepted).unwrap();
    }
}

#[test]
fn a_port_that_is_published_by_translation_is_served() {
    let mut test = Translating::new();
    for (here, far, _) in test.families() {
        for protocol in ["tcp", "udp"] {
            let to = at(here, 8080);
            let rule = format!("PREROUTING -p {protocol} -d {here} --dport 8888 -j DNAT --to {to}");
            test.translate(here, &rule);
        }
        let (listener, server) = test.world.as_workload(|| {
            let listener = TcpListener::bind((here, 8080)).unwrap();
            (listener, udp((here, 8080).into()))
        });
        let connect = || {
            test.world
                .as_far_end(|| connect_from(far, (here, 8888).into()))
        };
        let client = connect().unwrap();
        let (accepted, _) = test.world.as_workload(|| listener.accept()).unwrap();
        talk(&client, &accepted).unwrap();
        let datagrams = test.datagrams((far, 0));
        datagrams.connect((here, 8888)).unwrap();
        datagrams.send(b"x").unwrap();
        let (_, from) = server.recv_from(&mut [0]).unwrap();
        test.world
            .as_workload(|| server.send_to(b"y", from))
            .unwrap();
        datagrams.recv(&mut [0]).unwrap();
        // Judged anew, and the workload speaks first.
        test.world.allow(Direction::Egress, Scope::Port(TCP, 81));
        test.world.apply();
        talk(&accepted, &client).unwrap();
    }
}

#[test]
fn what_is_redirected_to_the_workload_itself_stays_in_it() {
    let test = Translating::new();
    for (_, far, _) in test.families() {
        test.translate(far, "OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 9000");
        let localhost: IpAddr = if far.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        };
        let listener = test
            .world
            .as_workload(|| TcpListener::bind((localhost, 9000)).unwrap());
        let to = (far, 80).into();
        let client = test
            .world
            .as_workload(|| TcpStream::connect_timeout(&to, MOMENT))
            .unwrap();
        let (server, _) = test.world.as_workload(|| listener.accept()).unwrap();
        talk(&client, &server).unwrap();
        // What no policy allows is asked for in vain, wherever it would have gone.
        let to = (far, 81).into();
        let refused = test
            .world
            .as_workload(|| TcpStream::connect_timeout(&to, MOMENT));
        crate::world::assert_refused(refused);
    }
}

#[test]
fn a_resolver_of_the_namespaces_own_is_heard() {
    // As Docker does: port 53 is another port of the same address on the way there and back.
    let test = Translating::new();
    let resolver = IpAddr::from(Ipv4Addr::new(127, 0, 0, 11));
    for protocol in ["tcp", "udp"] {
        let to = at(resolver, 4053);
        let rule = format!("OUTPUT -p {protocol} -d {resolver} --dport 53 -j DNAT --to {to}");
        test.translate(resolver, &rule);
        let rule = format!("POSTROUTING -p {protocol} -s {resolver} --sport 4053 -j SNAT --to :53");
        test.translate(resolver, &rule);
    }
    let (listener, server) = test.world.as_workload(|| {
        let listener = TcpListener::bind((resolver, 4053)).unwrap();
        (listener, udp((resolver, 4053).into()))
    });
    let to = (resolver, 53).into();
    let client = test
        .world
        .as_workload(|| TcpStream::connect_timeout(&to, MOMENT))
        .unwrap();
    let (accepted, _) = test.world.as_workload(|| listener.accept()).unwrap();
    talk(&client, &accepted).unwrap();
    test.world
        .as_workload(|| ask(&test.world, to, &server))
        .unwrap();
}

#[test]
fn a_service_of_the_hosts_is_reached_at_the_address_that_stands_for_it() {
    // As kube-proxy does, for a workload in the host's namespace.
    let mut test = Translating::new();
    for (_, entry) in &mut test.world.state.namespaces {
        *entry = NamespaceEntry::default();
    }
    test.world.state.local_addresses.clear();
    let services = [
        IpAddr::from(Ipv4Addr::new(10, 96, 0, 10)),
        IpAddr::from(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 10)),
    ];
    test.world.here.ip(&[
        "route add 10.96.0.0/16 dev wire".into(),
        "route add fd96::/64 dev wire".into(),
    ]);
    test.know(services, CLASS);
    for (service, (_, far, _)) in services.into_iter().zip(test.families()) {
        for (protocol, port) in [("tcp", 80), ("udp", 53)] {
            let to = at(far, port);
            let rule =
                format!("OUTPUT -p {protocol} -d {service} --dport {port} -j DNAT --to {to}");
            test.translate(service, &rule);
        }
        let listener = test.listen((far, 80));
        let _open = reach(&test.world, (service, 80).into(), &listener).unwrap();
        let server = test.datagrams((far, 53));
        ask(&test.world, (service, 53).into(), &server).unwrap();
        // The same from a source port that is chosen anew.
        for protocol in ["tcp", "udp"] {
            let rule = format!("POSTROUTING -p {protocol} -d {far} -j MASQUERADE --random-fully");
            test.translate(service, &rule);
        }
        let _open = reach(&test.world, (service, 80).into(), &listener).unwrap();
        ask(&test.world, (service, 53).into(), &server).unwrap();
    }
}

#[test]
fn rules_that_give_what_arrives_another_source_are_found() {
    let test = Translating::new();
    let found = || {
        let datapath = test.world.datapath();
        datapath
            .source_translations(&test.world.here.netns)
            .unwrap()
    };
    let [(here, far, stranger), (here6, far6, stranger6)] = test.families();
    // Chains that are there, without a rule, and rules of other hooks, are not meant.
    test.translate(
        here,
        &format!("OUTPUT -p tcp -d {far} -j DNAT --to {stranger}"),
    );
    assert_eq!(found(), Vec::<String>::new());
    test.translate(here, &format!("INPUT -s {stranger} -j SNAT --to {far}"));
    assert_eq!(found(), ["nat INPUT"]);
    test.translate(here6, &format!("INPUT -s {stranger6} -j SNAT --to {far6}"));
    assert_eq!(found(), ["nat INPUT", "nat INPUT"]);
    let rule = format!("-w -t nat -A INPUT -s {stranger} -j SNAT --to {far}");
    let older = || {
        Command::new("iptables-legacy")
            .args(rule.split(' '))
            .output()
    };
    let output = test.world.here.netns.run(older).unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        found(),
        ["nat INPUT", "nat INPUT", "iptables-legacy nat INPUT"]
    );
}
