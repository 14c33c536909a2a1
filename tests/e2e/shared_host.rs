//! Workloads that share a host's network: each speaks from its own address, and hears what is meant
//! for it.

use std::net::{IpAddr, SocketAddr};

use harness::{Network, Node, Workload};
use serde_json::json;

use crate::arrange::{PORT, TCP, fails_fast, of, say, send, serve};

/// Adds addresses to a host, the last of which its kernel would choose only when asked for.
fn with_addresses(node: &Node, addresses: [IpAddr; 2]) {
    for address in addresses {
        let (prefix, more) = match address {
            IpAddr::V4(_) => (16, ["noprefixroute"].as_slice()),
            IpAddr::V6(_) => (64, ["nodad", "noprefixroute"].as_slice()),
        };
        let address = format!("{address}/{prefix}");
        let words = ["ip", "address", "add", &address, "dev", "eth0"];
        node.host().exec([words.as_slice(), more].concat()).ok();
    }
}

#[test]
fn the_address_that_a_client_has_bound_tells_it_from_others_with_its_identity() {
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let (good, bad) = (one.service("good"), one.service("bad"));
    let server = two.pod("server");
    // What the kernel would choose for either.
    let of_good = one.addresses().both();
    let of_bad: [IpAddr; 2] = ["10.77.200.1", "fd00:77::c801"].map(|ip| ip.parse().unwrap());
    with_addresses(&one, of_bad);
    let as_shared = |addresses: [IpAddr; 2]| json!({"serviceAccount": "shared", "addresses": addresses, "tunnel": true});
    let enrolled =
        |addresses: [IpAddr; 2]| json!({"serviceAccount": "shared", "addresses": addresses});
    let daemon = one
        .reeve()
        .enrol_with(&good, enrolled(of_good))
        .enrol_with(&bad, enrolled(of_bad))
        .peer(&server)
        .policy(&of(&good).calls(&server, TCP).text())
        .policy(&of(&bad).calls(&server, TCP).text())
        .start();
    let far = two
        .reeve()
        .enrol(&server)
        .peer_with(&good, as_shared(of_good))
        .peer_with(&bad, as_shared(of_bad))
        .policy(&hears_good())
        .start();
    let echo = serve(&server, PORT, &[]);
    let server = [
        server.addresses().port4(PORT),
        server.addresses().port6(PORT),
    ];
    for ((to, of_good), of_bad) in server.into_iter().zip(of_good).zip(of_bad) {
        // A tunnel for one must not carry the other.
        for _ in 0..2 {
            say(&good, to, "by whatever address");
            say_from(&good, of_good, to);
            is_reset(&bad, None, to);
            is_reset(&bad, Some(of_bad), to);
            // An address of the other's is worth nothing.
            is_reset(&bad, Some(of_good), to);
        }
        let arrived = echo.stdout();
        let arrived = arrived.lines().rev();
        let mut arrived = arrived.filter_map(|line| line.strip_prefix("accepted "));
        let client: SocketAddr = arrived.next().unwrap().parse().unwrap();
        assert_eq!(client.ip().to_canonical(), of_good);
    }
    let forged = [("reason", "forged_source"), ("transport", "tunnel")];
    daemon.wait_for_metric("reeve_connections_failed_total", &forged, 4.0);
    let refused = [("reason", "no_policy"), ("transport", "tunnel")];
    far.wait_for_metric("reeve_connections_failed_total", &refused, 8.0);
    for (from, code) in [("good", 0), ("bad", 1)] {
        let port = PORT.to_string();
        let words = ["explain", "--from", from, "--to", "server", "--port", &port];
        assert_eq!(far.command(words).status.code(), Some(code), "{from}");
    }
}

#[test]
fn a_service_without_declared_addresses_speaks_from_none_that_another_of_its_identity_declares() {
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let (good, bad) = (one.service("good"), one.service("bad"));
    let server = two.pod("server");
    let of_good = one.addresses().both();
    let nobodys: [IpAddr; 2] = ["10.77.200.1", "fd00:77::c801"].map(|ip| ip.parse().unwrap());
    with_addresses(&one, nobodys);
    let shared = json!({"serviceAccount": "shared"});
    let daemon = one
        .reeve()
        .enrol_with(
            &good,
            json!({"serviceAccount": "shared", "addresses": of_good}),
        )
        .enrol_with(&bad, shared)
        .peer(&server)
        .policy(&of(&good).calls(&server, TCP).text())
        .policy(&of(&bad).calls(&server, TCP).text())
        .start();
    let as_good = json!({"serviceAccount": "shared", "addresses": of_good, "tunnel": true});
    let far = two
        .reeve()
        .enrol(&server)
        .peer_with(&good, as_good)
        .policy(&hears_good())
        .start();
    let echo = serve(&server, PORT, &[]);
    let to = [
        server.addresses().port4(PORT),
        server.addresses().port6(PORT),
    ];
    for ((to, of_good), nobodys) in to.into_iter().zip(of_good).zip(nobodys) {
        say(&good, to, "from its own address");
        // Neither where it is the kernel's choice nor where it is bound.
        is_reset(&bad, None, to);
        is_reset(&bad, Some(of_good), to);
        // From one that is nobody's it gets as far as to the peer, which takes it for nobody. That
        // may be the kernel's choice, too.
        is_reset(&bad, Some(nobodys), to);
    }
    let accepted = |line: &&str| line.starts_with("accepted ");
    assert_eq!(echo.stdout().lines().filter(accepted).count(), 2);
    let forged = [("reason", "forged_source"), ("transport", "tunnel")];
    daemon.wait_for_metric("reeve_connections_failed_total", &forged, 3.0);
    daemon.wait_for_log(&["another workload of this identity declares"]);
    let refused = [("reason", "no_policy"), ("transport", "tunnel")];
    far.wait_for_metric("reeve_connections_failed_total", &refused, 2.0);
}

#[track_caller]
fn say_from(client: &Workload, from: IpAddr, to: SocketAddr) {
    let from = SocketAddr::new(from, 0).to_string();
    send(client, to, &["--text", "from here", "--from", &from]).ok();
}

#[track_caller]
fn is_reset(client: &Workload, from: Option<IpAddr>, to: SocketAddr) {
    let how = "Connection reset by peer";
    let Some(from) = from else {
        return fails_fast(client, to, how);
    };
    let from = SocketAddr::new(from, 0).to_string();
    let said = send(client, to, &["--text", "let me in", "--from", &from]).fails();
    assert!(said.contains(how), "{said}");
}

#[test]
fn what_is_meant_for_a_service_ends_at_no_other() {
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let client = one.pod("client");
    let (shop, safe) = (two.service("shop"), two.service("safe"));
    let _near = one
        .reeve()
        .enrol(&client)
        .peer_with(&shop, json!({"ports": [PORT], "tunnel": true}))
        .policy(&of(&client).calls(&shop, TCP).text())
        .start();
    let far = two
        .reeve()
        .enrol_with(&shop, json!({"ports": [PORT]}))
        .enrol_with(&safe, json!({"ports": [PORT + 1]}))
        .peer(&client)
        .policy(&of(&shop).hears(&client, TCP).text())
        .start();
    for to in [two.addresses().port4(PORT), two.addresses().port6(PORT)] {
        // The shop is closed, and the safe has taken its port.
        let thief = serve(&safe, PORT, &[]);
        fails_fast(&client, to, "Connection reset by peer");
        assert!(!thief.stdout().contains("accepted"));
        drop(thief);
        let open = serve(&shop, PORT, &[]);
        say(&client, to, "for the shop");
        drop(open);
    }
    let wrong = [("reason", "wrong_listener"), ("transport", "tunnel")];
    far.wait_for_metric("reeve_connections_failed_total", &wrong, 2.0);
}

/// The server hears the one service and not the other, which has the same identity.
fn hears_good() -> String {
    json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": "hears-good"},
        "spec": {
            "workloads": {"names": ["server"]},
            "ingress": [{"from": [{"namespace": "default", "labels": {"app": "good"}}]}],
        },
    })
    .to_string()
}
