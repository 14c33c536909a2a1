//! What no tunnel carries: UDP and ICMP get their verdicts in the kernel, at the call or at the
//! packet, and replies pass.

use std::net::SocketAddr;

use harness::{Daemon, Output, Place, Process};
use serde_json::Value;

use crate::arrange::{ICMP, PORT, Pair, UDP, denials, of, quickly};

#[test]
fn an_allowed_datagram_arrives_and_its_reply_comes_back() {
    let (pair, one, two) = allowing();
    let echo = serve_udp(&pair.server);
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        for how in [&[][..], &["--connect"]] {
            let said = send_udp(&pair.client, to, how).ok();
            assert_eq!(said.trim(), format!("{to} hello"));
        }
    }
    assert_eq!(echo.stdout().matches("datagram of 5").count(), 4);
    for (daemon, direction) in [(&one, "egress"), (&two, "ingress")] {
        let verdicts = [
            ("direction", direction),
            ("verdict", "allow"),
            ("reason", "not_tunnelled"),
        ];
        assert_eq!(daemon.metrics().sum("reeve_verdicts_total", &verdicts), 4.0);
        daemon.wait_for_log(&["connection allowed", "udp", "not_tunnelled"]);
    }
}

#[test]
fn what_egress_does_not_allow_fails_at_the_call() {
    let pair = Pair::new();
    let one = pair.at_one().start();
    let _two = pair
        .at_two()
        .policy(&of(&pair.server).hears(&pair.client, UDP).text())
        .start();
    let echo = serve_udp(&pair.server);
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        for how in [&[][..], &["--connect"]] {
            let error = quickly(|| send_udp(&pair.client, to, how).fails());
            assert!(error.contains("Operation not permitted"), "{error}");
        }
    }
    assert!(!echo.stdout().contains("datagram"));
    assert_eq!(denials(&one, "egress", "no_policy"), 4.0);
}

#[test]
fn what_ingress_does_not_allow_never_arrives() {
    let pair = Pair::new();
    let _one = pair
        .at_one()
        .policy(&of(&pair.client).calls(&pair.server, UDP).text())
        .start();
    let two = pair.at_two().start();
    let echo = serve_udp(&pair.server);
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        send_udp(&pair.client, to, &["--patience", "300"]).fails();
    }
    assert!(!echo.stdout().contains("datagram"));
    assert_eq!(denials(&two, "ingress", "no_policy"), 2.0);
}

#[test]
fn a_reply_may_go_where_the_workload_may_not_call() {
    let (pair, _one, two) = allowing();
    let _echo = serve_udp(&pair.server);
    let back = serve_udp(&pair.client);
    send_udp(&pair.client, pair.server.addresses().port4(PORT), &[]).ok();
    // The server may answer the client, and not address it.
    let error = send_udp(&pair.server, pair.client.addresses().port4(PORT), &[]).fails();
    assert!(error.contains("Operation not permitted"), "{error}");
    assert!(!back.stdout().contains("datagram"));
    assert_eq!(denials(&two, "egress", "no_policy"), 1.0);
}

#[test]
fn ping_passes_where_icmp_is_allowed_and_only_there() {
    let (pair, one, two) = allowing();
    let (client, server) = (pair.client.addresses(), pair.server.addresses());
    for to in server.both() {
        pair.client.peer(["ping", &to.to_string()]).ok();
    }
    for to in client.both() {
        pair.server
            .peer(["ping", &to.to_string(), "--patience", "300"])
            .fails();
    }
    assert!(denials(&two, "egress", "no_policy") >= 2.0);
    // The host may be pinged by nobody, and it may ping everybody: it is where probes come from.
    pair.client
        .peer([
            "ping",
            &pair.one.addresses().v4.to_string(),
            "--patience",
            "300",
        ])
        .fails();
    assert!(denials(&one, "egress", "no_policy") >= 1.0);
    for to in client.both() {
        pair.one.host().peer(["ping", &to.to_string()]).ok();
    }
}

#[test]
fn a_stranger_reaches_no_workload_by_udp() {
    let (pair, _one, two) = allowing();
    let stranger = pair.one.pod("stranger");
    let echo = serve_udp(&pair.server);
    for to in pair.server.addresses().both() {
        send_udp(&stranger, SocketAddr::new(to, PORT), &["--patience", "300"]).fails();
    }
    assert!(!echo.stdout().contains("datagram"));
    assert_eq!(denials(&two, "ingress", "no_policy"), 2.0);
}

#[test]
fn a_stranger_gets_no_answer_to_a_ping() {
    let pair = Pair::new();
    // It is the kernel that answers, with sockets of its own at the root of all cgroups: only
    // there, where a daemon attaches if it is not told otherwise, are they seen.
    let two = pair
        .at_two()
        .policy(&of(&pair.server).hears(&pair.client, ICMP).text())
        .set("/node/cgroupRoot", Value::Null)
        .start();
    let stranger = pair.one.pod("stranger");
    for to in pair.server.addresses().both() {
        let to = to.to_string();
        pair.client.peer(["ping", &to]).ok();
        pair.two.host().peer(["ping", &to]).ok();
        stranger.peer(["ping", &to, "--patience", "300"]).fails();
    }
    assert!(denials(&two, "ingress", "no_policy") >= 2.0);
}

/// The client may send UDP to the server and ping it, and the server lets it.
fn allowing() -> (Pair, Daemon, Daemon) {
    let pair = Pair::new();
    let client = of(&pair.client)
        .calls(&pair.server, UDP)
        .calls(&pair.server, ICMP);
    let server = of(&pair.server)
        .hears(&pair.client, UDP)
        .hears(&pair.client, ICMP);
    let one = pair.at_one().policy(&client.text()).start();
    let two = pair.at_two().policy(&server.text()).start();
    (pair, one, two)
}

fn serve_udp(place: &Place) -> Process {
    let mut echo = place.spawn_peer(["udp-serve", &format!("[::]:{PORT}")]);
    echo.wait_for("listening");
    echo
}

fn send_udp(place: &Place, to: SocketAddr, options: &[&str]) -> Output {
    place.peer([&["udp-send", &to.to_string()], options].concat())
}
