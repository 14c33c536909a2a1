//! Plaintext into a workload is refused, whoever sends it, unless a policy lets the address in;
//! what is none of reeve's business is left alone.

use harness::Node;

use crate::arrange::{PORT, Pair, TCP, denials, fails_fast, is_denied, of, say, serve};

#[test]
fn an_intruder_without_identity_is_refused_at_once() {
    let (pair, _one, two) = Pair::started();
    let echo = serve(&pair.server, PORT, &[]);
    let capture = pair.server.capture(&pair.network);
    // On the network, on the client's node and beside the server.
    let three = Node::new(&pair.network, "three");
    let intruders = [
        three.pod("intruder"),
        pair.one.pod("intruder"),
        pair.two.pod("intruder"),
    ];
    for intruder in &intruders {
        for to in [
            pair.server.addresses().port4(PORT),
            pair.server.addresses().port6(PORT),
        ] {
            fails_fast(intruder, to, "Connection refused");
        }
    }
    // The other node's host has no more rights than anybody.
    fails_fast(
        pair.one.host(),
        pair.server.addresses().port4(PORT),
        "Connection refused",
    );
    assert!(!echo.stdout().contains("accepted"));
    assert!(!capture.finish().contains("let me in"));
    assert!(denials(&two, "ingress", "no_policy") >= 7.0);
    two.wait_for_log(&[
        "connection refused",
        "no_policy",
        &intruders[0].addresses().v4.to_string(),
    ]);
}

#[test]
fn the_address_of_a_workload_that_may_call_opens_nothing_to_plaintext() {
    let pair = Pair::new();
    // The client's node has no daemon: what it sends comes from the right address, in plaintext.
    let two = pair.allowing_at_two().start();
    let echo = serve(&pair.server, PORT, &[]);
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        fails_fast(&pair.client, to, "Connection refused");
    }
    assert!(!echo.stdout().contains("accepted"));
    assert!(denials(&two, "ingress", "plaintext_refused") >= 2.0);
}

#[test]
fn a_service_without_a_namespace_of_its_own_is_closed_to_plaintext_too() {
    let pair = Pair::new();
    let service = pair.two.service("service");
    let two = pair.two.reeve().enrol(&service).start();
    let echo = serve(&service, PORT, &[]);
    let stranger = pair.one.pod("stranger");
    for to in [
        service.addresses().port4(PORT),
        service.addresses().port6(PORT),
    ] {
        let refused = stranger.peer([
            "send",
            &to.to_string(),
            "--text",
            "let me in",
            "--patience",
            "2",
        ]);
        refused.fails();
    }
    assert!(!echo.stdout().contains("accepted"));
    assert!(denials(&two, "ingress", "no_policy") >= 2.0);
}

#[test]
fn a_policy_lets_addresses_in_and_out_without_identity() {
    let pair = Pair::new();
    let guest = pair.one.pod("guest");
    let there = guest.addresses();
    let policy = |workload| {
        of(workload)
            .hears_address(there.v4, TCP)
            .hears_address(there.v6, TCP)
            .calls_address(there.v4, TCP)
            .text()
    };
    let two = pair
        .two
        .reeve()
        .enrol(&pair.server)
        .policy(&policy(&pair.server))
        .start();
    let _echoes = [
        serve(&pair.server, PORT, &[]),
        serve(&pair.server, 8081, &[]),
        serve(&guest, PORT, &[]),
        serve(&guest, 8081, &[]),
    ];
    let server = pair.server.addresses();
    say(&guest, server.port4(PORT), "by IPv4");
    say(&guest, server.port6(PORT), "by IPv6");
    fails_fast(&guest, server.port4(8081), "Connection refused");
    fails_fast(&pair.client, server.port4(PORT), "Connection refused");

    say(&pair.server, there.port4(PORT), "out again");
    is_denied(&pair.server, there.port6(PORT));
    is_denied(&pair.server, there.port4(8081));

    let plaintext = [
        ("transport", "plaintext"),
        ("direction", "ingress"),
        ("destination", "server"),
    ];
    two.wait_for_metric("reeve_connections_closed_total", &plaintext, 2.0);
    let plaintext = [
        ("transport", "plaintext"),
        ("direction", "egress"),
        ("source", "server"),
    ];
    two.wait_for_metric("reeve_connections_closed_total", &plaintext, 1.0);
}

#[test]
fn the_nodes_own_addresses_reach_every_workload_of_the_node() {
    let (pair, _one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    say(
        pair.two.host(),
        pair.server.addresses().port4(PORT),
        "a probe",
    );
    say(
        pair.two.host(),
        pair.server.addresses().port6(PORT),
        "a probe by IPv6",
    );
    let by_node = [
        ("transport", "plaintext"),
        ("direction", "ingress"),
        ("destination", "server"),
    ];
    two.wait_for_metric("reeve_connections_opened_total", &by_node, 2.0);
}

#[test]
fn a_workload_reaches_itself() {
    let (pair, _one, _two) = Pair::started();
    let _echo = serve(&pair.client, PORT, &[]);
    let own = pair.client.addresses();
    for to in [
        "127.0.0.1:8080".parse().unwrap(),
        "[::1]:8080".parse().unwrap(),
        own.port4(PORT),
        own.port6(PORT),
    ] {
        say(&pair.client, to, "to myself");
    }
    pair.client.peer(["ping", "127.0.0.1"]).ok();
    pair.client.peer(["ping", &own.v6.to_string()]).ok();
}

#[test]
fn who_is_not_enrolled_notices_nothing() {
    let (pair, one, two) = Pair::started();
    let (here, there) = (pair.one.pod("here"), pair.two.pod("there"));
    let _servers = [serve(&there, PORT, &[]), serve(pair.two.host(), PORT, &[])];
    let mut datagrams = there.spawn_peer(["udp-serve", "[::]:9000"]);
    datagrams.wait_for("listening");
    let capture = there.capture(&pair.network);
    for place in [&*here, pair.one.host()] {
        say(place, there.addresses().port4(PORT), "as it always was");
        say(place, pair.two.addresses().port6(PORT), "as it always was");
        place
            .peer(["udp-send", &there.addresses().port4(9000).to_string()])
            .ok();
        place.peer(["ping", &there.addresses().v6.to_string()]).ok();
    }
    assert!(capture.finish().contains("as it always was"));
    // reeve's ports are ports like others where no workload is.
    let mut free = there.spawn_peer(["serve", "0.0.0.0:15008"]);
    free.wait_for("listening");
    for daemon in [&one, &two] {
        assert_eq!(
            daemon.metrics().sum("reeve_connections_opened_total", &[]),
            0.0
        );
    }
}
