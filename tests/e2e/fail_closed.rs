//! Without a daemon, and while one goes and the next one comes: what was denied stays denied, what
//! was allowed in plaintext goes on, and there is no moment of anything else.

use std::sync::Arc;

use harness::Cgroup;
use serde_json::json;

use crate::arrange::{
    PORT, Pair, Probe, TCP, fails_fast, is_denied, of, quickly, say, send, serve, tcp,
};

#[test]
fn a_restart_is_no_open_moment_and_no_closed_one() {
    let pair = Pair::new();
    let guest = pair.two.pod("guest");
    let mut one = pair
        .at_one()
        .policy(
            &of(&pair.client)
                .calls(&pair.server, TCP)
                .calls_address(guest.addresses().v4, tcp(8081))
                .calls_address(guest.addresses().v6, tcp(8081))
                .hears_address(guest.addresses().v4, tcp(8083))
                .text(),
        )
        .start();
    let answer = ["--mode", "answer"];
    let _servers = [
        serve(&guest, 8081, &answer),
        serve(&guest, 8082, &answer),
        serve(&pair.client, 8083, &answer),
        serve(&pair.client, 8084, &answer),
    ];
    let (there, here) = (guest.addresses(), pair.client.addresses());
    let allowed = [
        Probe::start(&pair.client, there.port4(8081), &[]),
        Probe::start(&pair.client, there.port6(8081), &[]),
        Probe::start(&guest, here.port4(8083), &[]),
    ];
    let denied = [
        (
            Probe::start(&pair.client, there.port4(8082), &[]),
            "not permitted",
        ),
        (
            Probe::start(&pair.client, there.port6(8082), &[]),
            "not permitted",
        ),
        (Probe::start(&guest, here.port4(8084), &[]), "refused"),
    ];
    let all_go_on = || {
        allowed.iter().for_each(|probe| probe.goes_on(20));
        denied.iter().for_each(|(probe, _)| probe.goes_on(20));
    };
    for _ in 0..2 {
        one.kill();
        all_go_on();
        one.start_again();
        one.wait_until_ready();
        all_go_on();
        one.stop();
        all_go_on();
        one.start_again();
        one.wait_until_ready();
        all_go_on();
    }
    allowed.iter().for_each(Probe::all_worked);
    for (probe, how) in &denied {
        probe.all_failed(how);
    }
}

#[test]
fn another_order_of_workloads_is_no_closed_moment_after_a_restart() {
    let pair = Pair::new();
    let (guest, other) = (pair.two.pod("guest"), pair.one.pod("other"));
    let policy = of(&pair.client)
        .calls_address(guest.addresses().v4, tcp(8081))
        .text();
    let reeve = || pair.one.reeve().peer(&pair.server);
    let mut one = reeve()
        .enrol(&pair.client)
        .enrol(&other)
        .policy(&policy)
        .start();
    let _server = serve(&guest, 8081, &["--mode", "answer"]);
    let to = guest.addresses().port4(8081);
    let allowed = Probe::start(&pair.client, to, &[]);
    let denied = Probe::start(&other, to, &[]);
    one.kill();
    // The numbers that the kernel's maps have for the two would change hands.
    reeve().enrol(&other).enrol(&pair.client).write();
    one.start_again();
    one.wait_until_ready();
    allowed.goes_on(50);
    denied.goes_on(50);
    denied.all_failed("not permitted");
    allowed.all_worked();
}

#[test]
fn the_id_of_a_workload_that_is_gone_never_comes_to_be_anothers() {
    let pair = Pair::new();
    let (guest, gone, newcomer) = (
        pair.two.pod("guest"),
        pair.one.pod("gone"),
        pair.one.pod("newcomer"),
    );
    let reeve = || pair.one.reeve().enrol(&pair.client);
    let hears = |workload| of(workload).hears_address(guest.addresses().v4, TCP).text();
    let mut one = reeve().enrol(&gone).policy(&hears(&gone)).start();
    let ids = |one: &harness::Daemon| {
        let status = one.status();
        let workloads = status["workloads"].as_array().unwrap().iter();
        let id = |workload: &serde_json::Value| {
            let name = workload["name"].as_str().unwrap().to_owned();
            (name, workload["id"].as_u64().unwrap())
        };
        workloads
            .map(id)
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    let _server = serve(&gone, PORT, &[]);
    let to = gone.addresses().port4(PORT);
    say(&guest, to, "it is allowed");
    let mut heart = guest.spawn_peer(["heartbeat", &to.to_string(), "--every", "20"]);
    heart.wait_for("beat 2");
    let first = ids(&one);

    // Its processes run on, with all that they have opened.
    let policies = one.policies().to_owned();
    for file in std::fs::read_dir(&policies).unwrap().flatten() {
        std::fs::remove_file(file.path()).unwrap();
    }
    reeve().write();
    one.command(["reload"]).ok();
    harness::eventually("what was open has ended", || heart.ended().is_some());
    reeve().enrol(&newcomer).policy(&hears(&newcomer)).write();
    one.command(["reload"]).ok();
    let second = ids(&one);
    assert_eq!(second["client"], first["client"]);
    assert!(second["newcomer"] > first["gone"], "{first:?}, {second:?}");
    let _other = serve(&newcomer, PORT, &[]);
    say(
        &guest,
        newcomer.addresses().port4(PORT),
        "it is allowed now",
    );
    assert!(!crate::arrange::answers(&guest, to));

    // Neither after a restart nor after a takeover.
    one.stop();
    one.start_again();
    one.wait_until_ready();
    assert_eq!(ids(&one), second);
    drop(one.take_over());
    one.wait_until_ready();
    assert_eq!(ids(&one), second);
    assert!(!crate::arrange::answers(&guest, to));
    reeve().enrol(&gone).enrol(&newcomer).write();
    one.command(["reload"]).ok();
    let third = ids(&one);
    assert_eq!(third["newcomer"], second["newcomer"]);
    assert!(third["gone"] > second["newcomer"], "{second:?}, {third:?}");
}

#[test]
fn what_is_born_below_an_enforced_parent_is_denied_whoever_is_there_to_see_it() {
    let pair = Pair::new();
    let guest = pair.two.pod("guest");
    let pods = pair.one.cgroup().child("pods");
    let born = |name: &str| pair.one.host().with_cgroup(Arc::new(pods.child(name)));
    let mut one = pair
        .allowing_at_one()
        .set("/enforcedParents", json!([pods.below_mount()]))
        .start();
    let _server = serve(&guest, PORT, &[]);
    let to = guest.addresses();
    let denied = |place: &harness::Place| {
        is_denied(place, to.port4(PORT));
        is_denied(place, to.port6(PORT));
        let datagram = place.peer(["udp-send", &to.port4(9000).to_string()]);
        assert!(datagram.fails().contains("not permitted"));
    };
    denied(&born("while-it-runs"));
    one.kill();
    denied(&born("while-it-is-killed"));
    let deep = Arc::new(pods.child("a-slice"));
    let deeper = Cgroup::child(&deep, "a-pod");
    denied(&pair.one.host().with_cgroup(Arc::new(deeper)));
    one.start_again();
    one.wait_until_ready();
    one.stop();
    denied(&born("while-it-is-stopped"));
    one.start_again();
    one.wait_until_ready();
    denied(&born("after-all"));
    // Who is elsewhere on the node is nobody's business.
    say(pair.one.host(), to.port4(PORT), "not below it");
}

#[test]
fn a_tunnelled_connection_fails_at_once_while_no_daemon_runs_and_never_leaks() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses();
    let capture = pair.server.capture(&pair.network);
    let hammers = [
        Probe::start(&pair.client, to.port4(PORT), &[]),
        Probe::start(&pair.client, to.port6(PORT), &[]),
    ];
    hammers.iter().for_each(|probe| probe.goes_on(20));
    for round in 0..2 {
        if round == 0 {
            one.kill();
        } else {
            one.stop();
        }
        quickly(|| send(&pair.client, to.port4(PORT), &["--text", "let me in"]).fails());
        hammers.iter().for_each(|probe| probe.goes_on(50));
        one.start_again();
        one.wait_until_ready();
        say_eventually(&hammers);
    }
    drop(hammers);
    let captured = capture.finish();
    for address in [
        pair.client.addresses().v4.to_string(),
        pair.client.addresses().v6.to_string(),
    ] {
        let plaintext = format!("tcp dst port {PORT} and src host {address}");
        assert_eq!(captured.packets(&plaintext), Vec::<String>::new());
    }
}

/// Waits until the connections work again.
fn say_eventually(hammers: &[Probe]) {
    for hammer in hammers {
        let now = hammer.worked();
        harness::eventually("connections work again", || hammer.worked() > now);
    }
}

#[test]
fn a_stranger_is_refused_by_a_workload_whose_daemon_is_gone() {
    let (pair, _one, mut two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let stranger = pair.two.pod("stranger");
    let to = pair.server.addresses();
    two.kill();
    fails_fast(&stranger, to.port4(PORT), "Connection refused");
    fails_fast(&stranger, to.port6(PORT), "Connection refused");
}
