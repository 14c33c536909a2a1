//! Things end and begin again: workloads, daemons in good order, daemons that are killed. What
//! is denied stays denied, and what needs a tunnel never leaves without one.

use std::time::{Duration, Instant};

use harness::{Network, Node, Place, Process, Programs, SOON, Workload, eventually};
use nix::sys::signal::Signal;

use crate::arrange::{
    PORT, Pair, TCP, fails_fast, is_denied, of, quickly, say, send, serve, start_sending, tcp,
};

#[test]
fn a_workload_that_restarts_is_followed() {
    let (mut pair, _one, _two) = Pair::started();
    let echo = serve(&pair.server, PORT, &[]);
    let addresses = pair.server.addresses();
    say(&pair.client, addresses.port4(PORT), "before");

    // Another cgroup of the same name, another namespace, the same addresses.
    drop(echo);
    let network = pair.network.clone();
    std::mem::replace(&mut pair.server, pair.two.pod("placeholder")).end(&network);
    pair.server = pair.two.pod_at("server", addresses);
    let _echo = serve(&pair.server, PORT, &[]);
    eventually("the new server is reached", || {
        arrives(&pair.client, &pair.server)
    });
    fails_fast(
        &pair.two.pod("stranger"),
        addresses.port4(PORT),
        "Connection refused",
    );

    // The client too.
    let addresses = pair.client.addresses();
    std::mem::replace(&mut pair.client, pair.one.pod("placeholder")).end(&network);
    pair.client = pair.one.pod_at("client", addresses);
    eventually("the new client reaches it", || {
        arrives(&pair.client, &pair.server)
    });
    is_denied(&pair.client, pair.server.addresses().port4(8081));
}

#[test]
fn a_workload_that_comes_back_with_other_addresses_is_followed() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, mut server) = (node.pod("client"), node.pod("server"));
    let _daemon = node
        .reeve()
        .enrol(&client)
        .enrol(&server)
        .policy(&of(&client).calls(&server, TCP).text())
        .policy(&of(&server).hears(&client, TCP).text())
        .start();
    let old = server.addresses();
    server.end(&network);
    server = node.pod("server");
    assert_ne!(server.addresses(), old);
    let _echo = serve(&server, PORT, &[]);
    eventually("the server is reached where it is now", || {
        arrives(&client, &server)
    });
    is_denied(&client, old.port4(PORT));
    fails_fast(
        &node.pod("stranger"),
        server.addresses().port4(PORT),
        "Connection refused",
    );
}

#[test]
fn a_daemon_that_is_started_again_takes_over_what_it_finds() {
    let pair = Pair::new();
    let guest = pair.two.pod("guest");
    let port = tcp(8081);
    let mut one = pair
        .at_one()
        .policy(
            &of(&pair.client)
                .calls(&pair.server, TCP)
                .calls_address(guest.addresses().v4, port)
                .text(),
        )
        .start();
    let _two = pair.allowing_at_two().start();
    let _servers = [serve(&pair.server, PORT, &[]), serve(&guest, 8081, &[])];
    let mut plaintext = beat(&pair.client, &guest, 8081);

    let stopped = one.stop();
    assert!(stopped.status.success(), "{}", stopped.stderr);
    goes_on(&mut plaintext);
    is_denied(&pair.client, pair.server.addresses().port4(8081));
    cannot_reach(&pair.client, &pair.server);
    one.start_again();
    one.wait_until_ready();
    goes_on(&mut plaintext);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "back again",
    );
    is_denied(&pair.client, pair.server.addresses().port4(8081));
}

#[test]
fn a_killed_daemon_leaves_everything_closed() {
    let pair = Pair::new();
    let guest = pair.two.pod("guest");
    let port = tcp(8081);
    let mut one = pair
        .at_one()
        .policy(
            &of(&pair.client)
                .calls(&pair.server, TCP)
                .calls_address(guest.addresses().v4, port)
                .text(),
        )
        .start();
    let mut two = pair.allowing_at_two().start();
    let _servers = [serve(&pair.server, PORT, &[]), serve(&guest, 8081, &[])];
    let mut plaintext = beat(&pair.client, &guest, 8081);
    let mut tunnelled = beat(&pair.client, &pair.server, PORT);
    let capture = pair.server.capture(&pair.network);

    one.kill();
    eventually("a tunnelled connection ends with its daemon", || {
        tunnelled.ended().is_some()
    });
    for _ in 0..3 {
        cannot_reach(&pair.client, &pair.server);
    }
    is_denied(&pair.client, pair.server.addresses().port4(8081));
    say(
        &pair.client,
        guest.addresses().port4(8081),
        "this needs no daemon",
    );
    goes_on(&mut plaintext);

    two.kill();
    let stranger = pair.two.pod("stranger");
    fails_fast(
        &stranger,
        pair.server.addresses().port4(PORT),
        "Connection refused",
    );
    let captured = capture.finish();
    assert!(!captured.contains("let me in"), "it left as plaintext");
    let from_client = format!(
        "tcp dst port {PORT} and src host {}",
        pair.client.addresses().v4
    );
    assert!(captured.packets(&from_client).is_empty());

    for daemon in [&mut one, &mut two] {
        daemon.start_again();
        daemon.wait_until_ready();
    }
    goes_on(&mut plaintext);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "back again",
    );
}

#[test]
fn a_daemon_that_is_asked_to_stop_lets_connections_end_and_takes_no_new_ones() {
    for client_side in [true, false] {
        let (pair, mut one, mut two) = Pair::started();
        let _server = serve(&pair.server, PORT, &[]);
        let to = pair.server.addresses().port4(PORT);
        // About four seconds.
        let running = start_sending(&pair.client, to, &["--bytes", "5242880", "--trickle", "50"]);
        let stopping = if client_side { &mut one } else { &mut two };
        stopping.wait_for_metric("reeve_streams_open", &[], 1.0);
        stopping.signal(Signal::SIGTERM);
        eventually("it says that it is not ready", || !stopping.is_ready());
        quickly(|| send(&pair.client, to, &["--text", "too late"]).fails());
        let seen = running.wait(SOON).json();
        assert_eq!(seen["sent"]["bytes"], 5 << 20);
        assert_eq!(seen["sent"]["sha256"], seen["received"]["sha256"]);
        let stopped = stopping.stop();
        assert!(
            stopped.status.success(),
            "{}{}",
            stopped.stdout,
            stopped.stderr
        );
    }
}

#[test]
fn a_second_request_to_stop_waits_for_nobody() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let mut endless = beat(&pair.client, &pair.server, PORT);
    one.signal(Signal::SIGTERM);
    eventually("it drains", || !one.is_ready());
    goes_on(&mut endless);
    // Whoever asks why it is still there is told.
    assert_eq!(one.metrics().sum("reeve_draining", &[]), 1.0);
    let left = one.status()["draining"].clone();
    assert_eq!(left["connections"], 1, "{left}");
    assert_eq!(left["workloads"][0]["workload"], "client", "{left}");
    let line = "connections left: 1 (client 1), for at most ";
    let page = one.command(["status"]).ok();
    assert!(page.contains(&format!("shutting down: {line}")), "{page}");
    one.wait_for_log(&[&format!("draining: {line}")]);
    let asked = Instant::now();
    one.stop();
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "it took {:?}",
        asked.elapsed()
    );
    eventually("the connection is closed", || endless.ended().is_some());
}

#[test]
fn detaching_leaves_the_node_as_if_reeve_had_never_been() {
    let (pair, mut one, mut two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let stranger = pair.two.pod("stranger");
    let to = pair.server.addresses().port4(PORT);
    // Not while it runs: it would go on without a kernel side.
    let config = one.config().to_str().unwrap();
    let reeve = Programs::get().reeve.to_str().unwrap();
    let refused = pair.one.host().exec([reeve, "detach", "--config", config]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("stop it first"),
        "{}",
        refused.stderr
    );
    assert!(one.is_ready());
    let rules = |of: &Place| {
        let [v4, v6] = ["-4", "-6"].map(|family| of.exec(["ip", family, "rule"]).ok());
        v4 + &v6
    };
    assert_eq!(rules(&pair.client).matches("fwmark 0x539").count(), 2);

    one.stop();
    two.stop();
    fails_fast(&stranger, to, "Connection refused");
    let removed = one.detach().ok();
    for what in [
        "/VERDICTS",
        "/link_reeve_connect4",
        "/netns_",
        "routing of marked packets",
    ] {
        assert!(removed.contains(what), "{what}\nis not in\n{removed}");
    }
    two.detach().ok();
    say(&stranger, to, "open again");
    say(&pair.client, to, "open again");
    for (node, workload) in [(&pair.one, &pair.client), (&pair.two, &pair.server)] {
        assert!(!node.pins().exists(), "{}", node.pins().display());
        assert!(!rules(workload).contains("fwmark"), "{}", rules(workload));
    }
    assert!(one.detach().ok().contains("nothing of reeve is left"));
}

fn arrives(client: &Workload, server: &Workload) -> bool {
    let to = server.addresses().port4(PORT);
    let sent = send(client, to, &["--text", "are you there?", "--patience", "2"]);
    sent.status.success()
}

/// A connection that needs a tunnel fails, and at once.
fn cannot_reach(client: &Workload, server: &Workload) {
    for to in [
        server.addresses().port4(PORT),
        server.addresses().port6(PORT),
    ] {
        quickly(|| send(client, to, &["--text", "let me in"]).fails());
    }
}

/// A connection that lives until it is broken.
fn beat(client: &Workload, server: &Workload, port: u16) -> Process {
    let to = server.addresses().port4(port).to_string();
    let mut heart = client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    heart
}

fn goes_on(heart: &mut Process) {
    let beats = |heart: &Process| heart.stdout().lines().count();
    let now = beats(heart);
    eventually("the connection goes on", || beats(heart) > now + 2);
    assert!(heart.ended().is_none());
}
