//! TCP between workloads: what the policies of both ends allow is carried inside TLS, and looks
//! to both applications as if they were connected directly; what one of them does not is refused.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use harness::{Captured, Network, Node, Process, Workload, eventually};
use serde_json::json;

use crate::arrange::{
    PORT, Pair, TCP, answers, denials, fails_fast, is_denied, mapped, of, say, send, serve, tcp,
};

const SECRET: &str = "nobody else needs to know";

#[test]
fn two_nodes_connect_by_ipv4_and_ipv6_and_only_tls_is_on_the_wire() {
    let (pair, one, two) = Pair::started();
    let echo = serve(&pair.server, PORT, &[]);
    let capture = pair.server.capture(&pair.network);
    for (to, from) in [
        (
            pair.server.addresses().port4(PORT),
            IpAddr::from(pair.client.addresses().v4),
        ),
        (
            pair.server.addresses().port6(PORT),
            pair.client.addresses().v6.into(),
        ),
        (
            mapped(pair.server.addresses().port4(PORT)),
            pair.client.addresses().v4.into(),
        ),
    ] {
        say(&pair.client, to, SECRET);
        assert_eq!(
            client_that_arrived(&echo),
            from,
            "who {to} believes to talk to"
        );
    }
    only_tls_passed(&capture.finish());

    let through_tunnel = [
        ("transport", "tunnel"),
        ("source", "client"),
        ("destination", "server"),
    ];
    for daemon in [&one, &two] {
        daemon.wait_for_metric("reeve_connections_closed_total", &through_tunnel, 3.0);
        let ids =
            ["client", "server"].map(|name| format!("spiffe://example.org/ns/default/sa/{name}"));
        daemon.wait_for_log(&["connection closed", &ids[0], &ids[1]]);
    }
}

#[test]
fn two_pods_of_one_node_connect_and_only_tls_is_on_the_wire() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.pod("client"), node.pod("server"));
    let _daemon = node
        .reeve()
        .enrol(&client)
        .enrol(&server)
        .policy(&of(&client).calls(&server, TCP).text())
        .policy(&of(&server).hears(&client, TCP).text())
        .start();
    let echo = serve(&server, PORT, &[]);
    let capture = server.capture(&network);
    for (to, from) in [
        (
            server.addresses().port4(PORT),
            IpAddr::from(client.addresses().v4),
        ),
        (server.addresses().port6(PORT), client.addresses().v6.into()),
    ] {
        say(&client, to, SECRET);
        assert_eq!(client_that_arrived(&echo), from);
    }
    is_denied(&server, client.addresses().port4(PORT));
    only_tls_passed(&capture.finish());
}

#[test]
fn services_that_share_a_hosts_addresses_are_told_apart() {
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let (cashier, visitor) = (one.service("cashier"), one.service("visitor"));
    let (shop, safe) = (two.service("shop"), two.service("safe"));
    let (shop_port, safe_port) = (8080, 8081);
    let ports = |port: u16| json!({"ports": [port]});
    let peer_ports = |port: u16| json!({"ports": [port], "tunnel": true});
    let _daemons = [
        one.reeve()
            .enrol_with(&cashier, ports(9000))
            .enrol_with(&visitor, ports(9001))
            .peer_with(&shop, peer_ports(shop_port))
            .peer_with(&safe, peer_ports(safe_port))
            .policy(
                &of(&cashier)
                    .calls(&shop, tcp(shop_port))
                    .calls(&safe, tcp(safe_port))
                    .text(),
            )
            .policy(
                &of(&visitor)
                    .calls(&shop, tcp(shop_port))
                    .calls(&safe, tcp(safe_port))
                    .text(),
            )
            .start(),
        two.reeve()
            .enrol_with(&shop, ports(shop_port))
            .enrol_with(&safe, ports(safe_port))
            .peer_with(&cashier, peer_ports(9000))
            .peer_with(&visitor, peer_ports(9001))
            .policy(
                &of(&shop)
                    .calls(&safe, tcp(safe_port))
                    .hears(&visitor, tcp(shop_port))
                    .text(),
            )
            .policy(
                &of(&safe)
                    .hears(&cashier, tcp(safe_port))
                    .hears(&shop, tcp(safe_port))
                    .text(),
            )
            .start(),
    ];
    let capture = shop.capture(&network);
    let _servers = [serve(&shop, shop_port, &[]), serve(&safe, safe_port, &[])];
    for at in [IpAddr::from(two.addresses().v4), two.addresses().v6.into()] {
        let (to_shop, to_safe) = (
            SocketAddr::new(at, shop_port),
            SocketAddr::new(at, safe_port),
        );
        say(&visitor, to_shop, SECRET);
        say(&cashier, to_safe, SECRET);
        // From the same address as the cashier: what counts is who it is.
        is_reset(&visitor, to_safe);
        is_reset(&cashier, to_shop);
        // Within one namespace.
        say(&shop, to_safe, SECRET);
        is_denied(&safe, to_shop);
    }
    only_tls_passed(&capture.finish());
}

#[test]
fn what_no_egress_policy_allows_fails_at_connect_and_sends_nothing() {
    let (pair, one, _two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let _other = serve(&pair.server, 8081, &[]);
    let capture = pair.client.capture(&pair.network);
    let host = pair.two.addresses();
    for to in [
        pair.server.addresses().port4(8081),
        pair.server.addresses().port6(8081),
        mapped(pair.server.addresses().port4(8081)),
        host.port4(PORT),
        host.port6(PORT),
        "192.0.2.1:80".parse().unwrap(),
        "[2001:db8::1]:80".parse().unwrap(),
    ] {
        is_denied(&pair.client, to);
    }
    assert!(capture.finish().packets("tcp").is_empty());
    assert_eq!(denials(&one, "egress", "no_policy"), 7.0);
}

#[test]
fn what_no_ingress_policy_allows_is_refused_at_the_far_end_and_reset_here() {
    let pair = Pair::new();
    let one = pair
        .at_one()
        .policy(
            &of(&pair.client)
                .calls(&pair.server, TCP)
                .calls(&pair.server, tcp(8081))
                .text(),
        )
        .start();
    let two = pair
        .at_two()
        .policy(&of(&pair.server).hears(&pair.client, tcp(8081)).text())
        .start();
    let echo = serve(&pair.server, PORT, &[]);
    let _other = serve(&pair.server, 8081, &[]);
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        is_reset(&pair.client, to);
    }
    assert!(
        !echo.stdout().contains("accepted"),
        "the server was disturbed"
    );
    say(
        &pair.client,
        pair.server.addresses().port4(8081),
        "this port is allowed",
    );

    assert_eq!(denials(&two, "ingress", "no_policy"), 2.0);
    two.wait_for_log(&["connection refused", "no_policy", "sa/client", "sa/server"]);
    one.wait_for_log(&[
        "connection refused",
        "peer_denied",
        "sa/client",
        "sa/server",
    ]);
}

#[test]
fn a_server_that_does_not_listen_shows_as_a_reset() {
    let (pair, one, two) = Pair::started();
    is_reset(&pair.client, pair.server.addresses().port4(PORT));
    let reason = |reason| [("reason", reason), ("transport", "tunnel")];
    one.wait_for_metric(
        "reeve_connections_failed_total",
        &reason("peer_failed"),
        1.0,
    );
    two.wait_for_metric(
        "reeve_connections_failed_total",
        &reason("application_unreachable"),
        1.0,
    );

    let _echo = serve(&pair.server, PORT, &[]);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "and then it does",
    );
}

#[test]
fn a_far_end_that_is_down_fails_at_connect_from_the_second_connection_on() {
    let (pair, one, mut two) = Pair::started();
    let try_it = |to: SocketAddr| send(&pair.client, to, &["--text", "hello"]).fails();
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        is_reset(&pair.client, to);
        eventually("connect() says that nobody listens", || {
            try_it(to).contains("Connection refused")
        });
    }
    let labels = [
        ("verdict", "deny"),
        ("direction", "egress"),
        ("reason", "peer_failed"),
    ];
    one.wait_for_metric("reeve_verdicts_total", &labels, 2.0);
    let plaintext = [("reason", "peer_failed"), ("transport", "plaintext")];
    let counted = one
        .metrics()
        .sum("reeve_connections_failed_total", &plaintext);
    assert_eq!(counted, 0.0, "they were meant for a tunnel");

    // It is found as soon as it is there, and then nothing fails any more.
    let _echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    eventually("one has tried", || answers(&pair.client, to));
    for number in 0..10 {
        say(&pair.client, to, &number.to_string());
    }

    // The same for a node whose reeve is not there.
    two.kill();
    eventually("connect() says that nobody is there", || {
        try_it(to).contains("Connection refused")
    });
}

#[test]
fn many_connections_share_one_tunnel_between_two_identities() {
    let (pair, one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let flood = [
        "flood",
        &pair.server.addresses().port4(PORT).to_string(),
        "--connections",
        "50",
    ];
    pair.client.peer(flood).ok();
    for (daemon, role) in [(&one, "client"), (&two, "server")] {
        let handshakes = daemon.metrics().sum(
            "reeve_tls_handshakes_total",
            &[("role", role), ("result", "ok")],
        );
        assert!(
            (1.0..=8.0).contains(&handshakes),
            "{role}: {handshakes} handshakes"
        );
    }
}

/// The address of the client that a server has accepted last.
fn client_that_arrived(server: &Process) -> IpAddr {
    let mut found = None;
    eventually("the server has accepted", || {
        let said = server.stdout();
        found = said
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("accepted ")?.parse().ok());
        found.is_some()
    });
    let found: SocketAddr = found.unwrap();
    found.ip().to_canonical()
}

fn is_reset(client: &Workload, to: SocketAddr) {
    fails_fast(client, to, "Connection reset by peer");
}

fn only_tls_passed(captured: &Captured) {
    assert!(
        !captured.contains(SECRET),
        "the text was to be read on the wire"
    );
    let beside = captured.packets("tcp and not port 15008");
    assert!(beside.is_empty(), "not in a tunnel: {beside:#?}");
    // Every byte with data is a TLS record: first a handshake (22), then application data (23).
    let starts = |kind: &str| {
        captured.packets(&format!(
            "tcp port 15008 and ip and tcp[((tcp[12] & 0xf0) >> 2)] = {kind}"
        ))
    };
    assert!(!starts("22").is_empty(), "no handshake");
    assert!(!starts("23").is_empty(), "no application data");
}

#[test]
fn what_stays_on_a_node_is_not_paced() {
    // What is in force by default must not decide. Namespaces are given only what the host lets
    // everybody use.
    let allowed = fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
    let another = allowed.split_whitespace().find(|name| *name != "reno");
    let another = another.expect("the kernel offers another congestion control than reno");
    let pair = Pair::new();
    for place in [&*pair.client, &*pair.server] {
        place.sysctl("ipv4/tcp_congestion_control", another);
    }
    let (_one, _two) = (
        pair.allowing_at_one().start(),
        pair.allowing_at_two().start(),
    );
    let _open = hold_one_connection(&pair);
    for (place, port) in [(&pair.client, 15001), (&pair.server, PORT)] {
        assert_eq!(congestion_controls(place, port), ["reno", "reno"]);
    }
}

#[test]
fn tunnels_have_the_congestion_control_that_the_configuration_names() {
    for (at_one, at_two) in [("cubic", "reno"), ("reno", "cubic")] {
        let pair = Pair::new();
        for place in [&*pair.client, &*pair.server] {
            place.sysctl("ipv4/tcp_congestion_control", "reno");
        }
        let start = |reeve: harness::Reeve<'_>, expected: &str| match expected {
            // The default.
            "cubic" => reeve.start(),
            _ => reeve
                .set("/tunnel/congestionControl", json!("host"))
                .start(),
        };
        let _one = start(pair.allowing_at_one(), at_one);
        let _two = start(pair.allowing_at_two(), at_two);
        let _open = hold_one_connection(&pair);
        assert_eq!(congestion_controls(&pair.client, 15008), [at_one]);
        assert_eq!(congestion_controls(&pair.server, 15008), [at_two]);
    }
}

/// Until it is dropped.
fn hold_one_connection(pair: &Pair) -> (Process, Process) {
    let echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut open = pair
        .client
        .spawn_peer(["flood", &to, "--connections", "1", "--hold", "60"]);
    open.wait_for("open");
    (echo, open)
}

/// What the kernel says of the ends that are in the workload's namespace, of connections from or to
/// this port.
fn congestion_controls(workload: &Workload, port: u16) -> Vec<String> {
    let ends = format!("( sport = :{port} or dport = :{port} )");
    let said = workload
        .exec(["ss", "-tin", "state", "established", &ends])
        .ok();
    ["reno", "cubic", "bbr"]
        .into_iter()
        .flat_map(|name| {
            let ends = said.matches(&format!("{name} wscale")).count();
            std::iter::repeat_n(name.to_owned(), ends)
        })
        .collect()
}
