//! No way round, with real processes: a workload that shares the host's network, sockets that it
//! inherits, and processes that leave its cgroup. What single sockets try is in
//! `daemon/tests/datapath`.

use std::{fs, sync::Arc};

use harness::{eventually, holds_for};

use crate::arrange::{PORT, Pair, TCP, denials, is_denied, of, send, serve};

/// For a packet that is dropped without an answer.
const IN_VAIN: [&str; 4] = ["--patience", "1", "--text", "let me in"];

#[test]
fn a_workload_in_the_hosts_network_is_guarded_in_both_directions() {
    let pair = Pair::new();
    let web = pair.one.service("web");
    let one = pair.one.reeve().enrol(&web).start();
    let stranger = pair.two.pod("stranger");
    let _echo = serve(&stranger, PORT, &[]);
    let guarded = serve(&web, PORT, &[]);
    for to in [
        stranger.addresses().port4(PORT),
        stranger.addresses().port6(PORT),
    ] {
        is_denied(&web, to);
        // The rest of the host is free.
        send(pair.one.host(), to, &["--text", "hello"]).ok();
    }
    let host = pair.one.addresses();
    for to in [host.port4(PORT), host.port6(PORT)] {
        send(&stranger, to, &IN_VAIN).fails();
    }
    assert!(!guarded.stdout().contains("accepted"));
    assert!(denials(&one, "ingress", "no_policy") >= 2.0);
    // What shares a host's network shares its loopback.
    let loopback = format!("127.0.0.1:{PORT}");
    send(pair.one.host(), loopback, &["--text", "hello"]).ok();
}

#[test]
fn a_listener_that_is_inherited_serves_nobody_whom_no_policy_allows() {
    let pair = Pair::new();
    let web = pair.one.service("web");
    let stranger = pair.two.pod("stranger");
    let friend = pair.two.pod("friend");
    let policy = of(&web).hears_address(friend.addresses().v4, TCP);
    let one = pair.one.reeve().enrol(&web).policy(&policy.text()).start();
    // As a service manager hands over a socket that it has listened on itself.
    let cgroup = web.cgroup().path().to_str().unwrap().to_owned();
    let inherited = serve(pair.one.host(), PORT, &["--join", &cgroup]);
    let to = pair.one.addresses().port4(PORT);
    send(&stranger, to, &IN_VAIN).fails();
    // What it answers is refused, or what comes behind.
    let refused = ["ingress", "egress"].map(|direction| denials(&one, direction, "no_policy"));
    assert!(refused.iter().sum::<f64>() >= 1.0, "{refused:?}");
    send(&friend, to, &["--text", "hello"]).ok();
    assert!(inherited.stdout().contains("accepted"));
}

#[test]
fn who_leaves_its_cgroup_takes_no_connection_along() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let _echo = serve(&stranger, PORT, &[]);
    let to = stranger.addresses().port4(PORT);
    let policy = of(&pair.client).calls_address(stranger.addresses().v4, TCP);
    let one = pair.at_one().policy(&policy.text()).start();
    let nobody = Arc::new(pair.one.cgroup().child("nobody"));
    let mut connections = ["heartbeat", "hold"].map(|how| {
        let mut process = pair.client.spawn_peer([how, &to.to_string()]);
        process.wait_for(if how == "hold" { "holding" } else { "beat 3" });
        fs::write(nobody.path().join("cgroup.procs"), process.id().to_string()).unwrap();
        process
    });
    // It still may, and goes on.
    let before = connections[0].stdout();
    eventually("the connection goes on", || {
        connections[0].stdout() != before
    });
    fs::write(one.policies().join("0.yaml"), of(&pair.client).text()).unwrap();
    for connection in &mut connections {
        eventually("it has ended", || connection.ended().is_some());
    }
    // In the workload's own network, what is made outside of its cgroup reaches nobody either.
    let outside = pair.client.with_cgroup(nobody);
    send(&outside, to, &IN_VAIN).fails();
    holds_for(
        std::time::Duration::from_millis(300),
        "nothing was let through",
        || {
            outside
                .peer(["udp-send", &to.to_string(), "--patience", "50"])
                .fails();
            true
        },
    );
}
