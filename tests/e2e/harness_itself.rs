//! What every other test relies on: the harness's own promises.

use std::time::Duration;

use harness::{Network, Nginx, Node, SOON, eventually};

#[test]
fn workloads_of_two_nodes_reach_each_other_by_both_protocols() {
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let (client, server) = (one.pod("client"), two.pod("server"));
    let mut echo = server.spawn_peer(["serve", "[::]:8080"]);
    echo.wait_for("listening");
    for to in [
        server.addresses().port4(8080),
        server.addresses().port6(8080),
    ] {
        let seen = client
            .peer(["send", &to.to_string(), "--bytes", "100000"])
            .json();
        assert_eq!(seen["sent"]["sha256"], seen["received"]["sha256"]);
        assert_eq!(seen["remote"], to.to_string());
    }
}

#[test]
fn a_process_is_in_its_workloads_cgroup() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("workload");
    let said = workload.exec(["cat", "/proc/self/cgroup"]).ok();
    assert!(said.contains(&workload.cgroup().below_mount()), "{said}");
}

#[test]
fn a_server_ends_with_its_workload() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("workload");
    let mut server = workload.spawn_peer(["serve", "127.0.0.1:80"]);
    server.wait_for("listening");
    let cgroup = workload.cgroup().path().to_owned();
    drop((workload, node));
    eventually("the server has ended", || server.ended().is_some());
    assert!(!cgroup.exists());
}

#[test]
fn a_capture_sees_what_passes_the_wire() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.pod("client"), node.pod("server"));
    let mut echo = server.spawn_peer(["serve", "0.0.0.0:80"]);
    echo.wait_for("listening");
    let capture = server.capture(&network);
    let to = server.addresses().port4(80).to_string();
    client
        .peer(["send", &to, "--text", "nobody else needs to know"])
        .ok();
    let captured = capture.finish();
    assert!(captured.contains("nobody else needs to know"));
    assert!(!captured.packets("tcp dst port 80").is_empty());
    assert!(captured.packets("tcp dst port 81").is_empty());
}

#[test]
fn nginx_tells_who_asked() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.pod("client"), node.pod("server"));
    let nginx = Nginx::start(&server, 80, "say \"hello\"");
    let answer = client.exec(["curl", "--silent", &server.url(80, "/")]).ok();
    assert_eq!(answer, "say \"hello\"");
    let from = client.addresses().v4.to_string();
    eventually("nginx has logged it", || {
        nginx.requests().iter().any(|line| line.starts_with(&from))
    });
}

#[test]
fn services_of_a_node_share_its_addresses() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.service("client"), node.service("server"));
    assert_eq!(server.addresses(), node.addresses());
    let mut echo = server.spawn_peer(["serve", "127.0.0.1:80"]);
    echo.wait_for("listening");
    client
        .peer(["send", "127.0.0.1:80", "--text", "hello"])
        .ok();
}

#[test]
fn the_programs_speak_what_they_are_asked_to() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.pod("client"), node.pod("server"));
    let at = |port: u16| server.addresses().port4(port).to_string();
    let mut servers = [
        server.spawn_peer(["serve", "0.0.0.0:1", "--mode", "hash"]),
        server.spawn_peer(["serve", "0.0.0.0:2", "--mode", "source", "--bytes", "1000"]),
        server.spawn_peer(["serve", "0.0.0.0:3", "--mode", "answer"]),
        server.spawn_peer(["serve", "0.0.0.0:4"]),
        server.spawn_peer(["udp-serve", "0.0.0.0:5"]),
    ];
    for server in &mut servers {
        server.wait_for("listening");
    }

    let hashed = client.peer(["send", &at(1), "--bytes", "1000000"]).json();
    assert_eq!(hashed["received"]["head"], hashed["sent"]["sha256"]);

    let sourced = client.peer(["send", &at(2)]).json();
    assert_eq!(sourced["received"]["bytes"], 1000);

    let rate = client
        .peer(["connect-rate", &at(3), "--seconds", "0.2"])
        .json();
    assert_eq!(rate["failed"], 0);

    let timed = client.peer(["send", &at(1), "--for", "1", "--trickle", "10"]);
    let timed = timed.json();
    assert!(timed["sent"]["bytes"].as_u64() > Some(64 << 10), "{timed}");
    assert_eq!(timed["received"]["head"], timed["sent"]["sha256"]);

    let flood = ["flood", &at(4), "--connections", "500", "--again"];
    let flood = client.peer(flood).ok();
    assert!(flood.ends_with("open still 500\n"), "{flood}");

    // Whatever is said comes back, and the end after it.
    for bytes in ["8", "1003", "65536"] {
        let words = ["heartbeat", &at(4), "--for", "1", "--bytes", bytes];
        let beats = client.peer(words).ok();
        assert!(beats.ends_with("closed\n"), "{beats}");
        assert!(beats.lines().count() > 5, "{beats}");
    }

    let datagrams = at(5);
    for connected in [&[][..], &["--connect"]] {
        let words = [&["udp-send", &datagrams, "--text", "hi"], connected].concat();
        assert!(client.peer(words).ok().ends_with(" hi\n"));
    }

    let capture = server.capture(&network);
    for protocol in ["tcp", "udp", "icmp"] {
        client.peer(["raw", &at(9), "--protocol", protocol]).ok();
    }
    let captured = capture.finish();
    for filter in [
        "tcp port 9",
        "udp port 9",
        "icmp[icmptype] = icmp-echoreply",
    ] {
        assert!(!captured.packets(filter).is_empty(), "{filter}");
    }
}

#[test]
fn nothing_is_left_of_a_test_process_that_was_killed() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("workload");
    // A test process of its own, as this one is still needed: the same program, asked for the
    // test below only.
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
    let mut process = workload.spawn([
        "env",
        "REEVE_HOLD=1",
        program,
        "--exact",
        "--nocapture",
        HOLDING,
    ]);
    process.wait_for("holding ");
    let said = process.stdout();
    let cgroup = said
        .split("holding ")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap();
    assert!(std::path::Path::new(cgroup).exists());
    drop(process);
    eventually("its cgroup is gone", || {
        !std::path::Path::new(cgroup).exists()
    });
}

const HOLDING: &str = "harness_itself::holds_a_node_where_asked_to";

#[test]
fn holds_a_node_where_asked_to() {
    if std::env::var_os("REEVE_HOLD").is_none() {
        return;
    }
    let node = Node::new(&Network::new(), "node");
    let server = node.pod("server");
    let mut process = server.spawn_peer(["serve", "127.0.0.1:80"]);
    process.wait_for("listening");
    println!("holding {}", server.cgroup().path().display());
    std::thread::sleep(SOON + Duration::from_secs(60));
}
