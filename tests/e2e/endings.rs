//! What comes to its end, in good order or not: bytes that were said before arrive, and of a workload
//! that has ended nothing is kept.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use harness::{SOON, Workload, eventually};
use nix::sys::signal::Signal;

use crate::arrange::{PORT, Pair, say, send, serve, start_sending};

/// What a namespace may outlive its pod by: the default of `timeouts.tunnelIdle` is a minute.
const SOON_GONE: Duration = Duration::from_secs(15);

fn both(workload: &Workload) -> [SocketAddr; 2] {
    let addresses = workload.addresses();
    [addresses.port4(PORT), addresses.port6(PORT)]
}

// === bytes before an end ===

#[test]
fn an_answer_arrives_though_the_server_hears_no_more_and_resets() {
    let (pair, _one, _two) = Pair::started();
    let options = ["--mode", "refuse", "--bytes", "50000"];
    let _server = serve(&pair.server, PORT, &options);
    for to in both(&pair.server) {
        let mut resets = 0;
        for _ in 0..10 {
            let upload = ["--bytes", "4000000", "--until-reset"];
            let seen = send(&pair.client, to, &upload).json();
            assert_eq!(seen["received"]["bytes"], 50_000, "{to}");
            // Where the server had nothing unread when it closed, an end in good order comes first.
            resets += u32::from(seen["reset"] == true);
        }
        assert!(resets > 0, "{to}: the reset is told as well");
    }
}

#[test]
fn what_a_client_has_said_before_it_resets_arrives() {
    let (pair, _one, _two) = Pair::started();
    let mut server = serve(&pair.server, PORT, &["--mode", "hash", "--slow", "20"]);
    for to in both(&pair.server) {
        // The connection stands by then, and what is said fits into the kernel: it throws away what
        // it has not sent.
        let seen = ["--pause", "500", "--bytes", "50000", "--reset"];
        let sent = send(&pair.client, to, &seen).json();
        let hash = sent["sent"]["sha256"].as_str().unwrap();
        server.wait_for(&format!("50000 {hash}"));
        let line = server.stdout();
        let line = line.lines().find(|line| line.contains(hash)).unwrap();
        assert!(line.starts_with("broken"), "{line}");
    }
}

#[test]
fn a_server_that_answers_and_exits_loses_nothing_though_its_cgroup_goes_with_it() {
    let (pair, _one, _two) = Pair::started();
    let bytes = 3_000_000;
    let options = ["--mode", "once", "--bytes", &bytes.to_string()];
    let mut server = serve(&pair.server, PORT, &options);
    let late = ["--text", "x", "--keep-open", "--read-later", "4000"];
    let client = start_sending(&pair.client, pair.server.addresses().port4(PORT), &late);
    eventually("the server has answered", || server.ended().is_some());
    let is_there = pair.server.let_go(&pair.network);
    let seen = client.wait(SOON).json();
    assert_eq!(seen["received"]["bytes"], bytes);
    is_soon_gone(is_there);
}

#[test]
fn a_client_that_says_everything_and_exits_loses_nothing_though_its_cgroup_goes_with_it() {
    let (pair, _one, _two) = Pair::started();
    let mut server = serve(&pair.server, PORT, &["--mode", "hash", "--slow", "60"]);
    let to = pair.server.addresses().port6(PORT);
    let seen = send(&pair.client, to, &["--leave", "--bytes", "3000000"]).json();
    let is_there = pair.client.let_go(&pair.network);
    let hash = seen["sent"]["sha256"].as_str().unwrap();
    server.wait_for(&format!("3000000 {hash}"));
    assert!(server.stdout().contains("served"));
    is_soon_gone(is_there);
}

// === what is held for a workload ===

#[test]
fn the_namespace_of_a_client_goes_with_it_though_it_had_a_tunnel() {
    let (pair, _one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    say(&pair.client, pair.server.addresses().port4(PORT), "hello");
    is_soon_gone(pair.client.let_go(&pair.network));
}

#[test]
fn the_namespace_of_a_server_goes_with_it_though_peers_had_tunnels() {
    let (pair, _one, _two) = Pair::started();
    let server = serve(&pair.server, PORT, &[]);
    say(&pair.client, pair.server.addresses().port6(PORT), "hello");
    drop(server);
    is_soon_gone(pair.server.let_go(&pair.network));
}

#[test]
fn the_namespaces_of_workloads_that_are_killed_go_with_their_connections() {
    for client_ends in [true, false] {
        let (pair, _one, _two) = Pair::started();
        let _server = serve(&pair.server, PORT, &[]);
        let to = pair.server.addresses().port4(PORT).to_string();
        let mut held = pair.client.spawn_peer(["hold", &to]);
        held.wait_for("holding");
        if client_ends {
            is_soon_gone(pair.client.let_go(&pair.network));
        } else {
            is_soon_gone(pair.server.let_go(&pair.network));
            held.wait_for("ended");
        }
    }
}

#[track_caller]
fn is_soon_gone(is_there: impl Fn() -> bool) {
    let started = Instant::now();
    eventually("the namespace is gone", || !is_there());
    let taken = started.elapsed();
    assert!(taken < SOON_GONE, "it took {taken:?}");
}

#[test]
fn a_connection_that_was_reset_before_reeve_looked_is_told() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT).to_string();
    let refused = || {
        one.metrics()
            .sum("reeve_connections_failed_total", &[("reason", "reset")])
    };
    assert_eq!(refused(), 0.0);
    one.signal(Signal::SIGSTOP);
    for _ in 0..5 {
        pair.client.peer(["send", &to, "--reset"]).ok();
    }
    one.signal(Signal::SIGCONT);
    eventually("each is told", || refused() == 5.0);
}
