//! Faults, made for real: what happens is what docs/faults.md says.

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use harness::{Cut, CutPlan, Daemon, Network, Node, Patience, Process, Workload, eventually};
use serde_json::json;

use crate::arrange::{
    PORT, Pair, Probe, TCP, is_denied, of, quickly, say, send, serve, start_sending,
};

/// Where tunnels are opened, by default.
const TUNNEL_PORT: u16 = 15008;

// === floods ===

#[test]
fn a_flood_of_one_workload_leaves_room_for_the_others() {
    let pair = Pair::new();
    let other = pair.one.pod("other");
    let one = pair
        .allowing_at_one()
        .enrol(&other)
        .policy(&of(&other).calls(&pair.server, TCP).text())
        .set("/limits/connectionsPerWorkload", json!(20))
        .start();
    let hears = of(&pair.server).hears(&pair.client, TCP).hears(&other, TCP);
    let _two = pair.at_two().peer(&other).policy(&hears.text()).start();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let flood = |connections: &str| {
        let to = to.to_string();
        let words = ["flood", &to, "--connections", connections, "--hold", "120"];
        pair.client.spawn_peer(words)
    };
    let mut held = flood("20");
    held.wait_for("open 20");
    // One more is refused at once, and counted.
    quickly(|| send(&pair.client, to, &["--text", "one too many"]).fails());
    let refused = [("reason", "limit"), ("source", "client")];
    one.wait_for_metric("reeve_connections_failed_total", &refused, 1.0);
    for _ in 0..5 {
        say(&other, to, "there is room for me");
    }
    // And when some go, others come.
    drop(held);
    eventually("there is room again", || {
        send(&pair.client, to, &["--text", "again"])
            .status
            .success()
    });
}

#[test]
fn peers_that_stay_silent_keep_no_other_workload_from_opening_tunnels() {
    const HANDSHAKES: usize = 4;
    const PATIENCE: Duration = Duration::from_secs(12);
    let pair = Pair::new();
    let (other, silent) = (pair.one.pod("other"), pair.two.pod("silent"));
    // Each address of a network takes connections and says nothing.
    let here = ["ip", "route", "add", "local", "10.78.0.0/24", "dev", "lo"];
    silent.exec(here).ok();
    let via = silent.addresses().v4.to_string();
    let there = ["ip", "route", "add", "10.78.0.0/24", "via", &via];
    pair.client.exec(there).ok();
    let hold = serve(&silent, TUNNEL_PORT, &["--mode", "hold"]);
    let calls = of(&pair.client)
        .calls(&pair.server, TCP)
        .calls(&silent, TCP);
    let one = pair
        .at_one()
        .policy(&calls.text())
        .peer_with(
            &silent,
            json!({"addresses": ["10.78.0.0/24"], "tunnel": true}),
        )
        .enrol(&other)
        .policy(&of(&other).calls(&pair.server, TCP).text())
        .set("/limits/handshakes", json!(HANDSHAKES))
        .set(
            "/timeouts/handshake",
            json!(format!("{}s", PATIENCE.as_secs())),
        )
        .start();
    let hears = of(&pair.server).hears(&pair.client, TCP).hears(&other, TCP);
    let _two = pair.at_two().peer(&other).policy(&hears.text()).start();
    let _server = serve(&pair.server, PORT, &[]);
    let waiting: Vec<_> = (1..=4 * HANDSHAKES)
        .map(|host| {
            let to = format!("10.78.0.{host}:{PORT}");
            start_sending(&pair.client, to, &["--text", "anybody?"])
        })
        .collect();
    let accepted = |line: &&str| line.starts_with("accepted ");
    eventually("all of them wait", || {
        hold.stdout().lines().filter(accepted).count() == waiting.len()
    });
    let begun = Instant::now();
    say(
        &other,
        pair.server.addresses().port4(PORT),
        "for me there is room",
    );
    let taken = begun.elapsed();
    assert!(taken < PATIENCE / 2, "it waited: {taken:?}");
    // Of the others, those for which there was none are told apart.
    let beyond = [("role", "client"), ("reason", "limit")];
    let least = (2 * HANDSHAKES) as f64;
    one.wait_for_metric("reeve_tls_handshakes_total", &beyond, least);
    one.wait_for_log(&["no tunnel", "share of `limits.handshakes`", "limit"]);
    let share = [("limit", "handshakesPerWorkload")];
    one.wait_for_metric("reeve_limit_refusals_total", &share, 1.0);
}

#[test]
fn a_workload_that_makes_thousands_of_cgroups_takes_little_of_the_daemons_time() {
    const CGROUPS: usize = 3000;
    const WATCHED: Duration = Duration::from_secs(10);
    let node = Node::new(&Network::new(), "one");
    let crowd = node.pod("crowd");
    let process = crowd.spawn(["sleep", "600"]);
    let daemon = node.reeve().enrol(&crowd).start();
    for number in 0..CGROUPS {
        fs::create_dir(crowd.cgroup().path().join(number.to_string())).unwrap();
    }
    // What is made and removed wakes the daemon again and again; else it looks once a second.
    let folder = crowd.cgroup().path().display().to_string();
    let script = format!("while :; do mkdir {folder}/new; sleep 0.02; rmdir {folder}/new; done");
    let mut makes = Some(crowd.spawn(["sh", "-c", &script]));
    let used = || processor_time(&daemon, "workloads");
    for (what, most) in [("others come and go", 0.2), ("nothing changes", 0.1)] {
        thread::sleep(Duration::from_secs(4));
        let before = used();
        thread::sleep(WATCHED);
        let part = (used() - before).as_secs_f64() / WATCHED.as_secs_f64();
        let percent = part * 100.0;
        println!("{CGROUPS} empty cgroups take {percent:.1} % of a processor while {what}");
        assert!(part < most, "{what}: {part}");
        makes = None;
    }
    drop(makes);
    // A process in one of them is seen all the same.
    let last = crowd.cgroup().child("last");
    let place = crowd.with_cgroup(std::sync::Arc::new(last));
    drop(process);
    let _moved = place.spawn(["sleep", "600"]);
    eventually("it is found", || {
        daemon.status()["workloads"][0]["state"] == "running"
    });
}

/// What a thread of the daemon has used.
fn processor_time(daemon: &Daemon, thread: &str) -> Duration {
    let threads = daemon.threads();
    let thread = threads.iter().find(|one| one.name == thread).unwrap();
    let file = format!("/proc/{}/task/{}/schedstat", daemon.id(), thread.id);
    let text = fs::read_to_string(file).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_daemon_without_file_descriptors_left_recovers() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let mut before = beat(&pair.client, to);
    let now = one.open_files();
    limit_files(&one, now + 10);
    let mut flood = pair.client.spawn_peer([
        "flood",
        &to.to_string(),
        "--connections",
        "200",
        "--hold",
        "120",
    ]);
    one.wait_for_log(&["limit on open files"]);
    // What is open goes on, and what is denied stays so.
    goes_on(&mut before);
    is_denied(&pair.client, pair.server.addresses().port4(9999));
    let _ = flood.ended();
    drop(flood);
    limit_files(&one, 1_000);
    eventually("it serves again", || {
        send(&pair.client, to, &["--text", "again", "--patience", "3"])
            .status
            .success()
    });
    eventually("metrics say how many there are", || {
        one.metrics().sum("process_max_fds", &[]) == 1_000.0
    });
    assert!(one.metrics().sum("process_open_fds", &[]) > 10.0);
}

// === the network and the peer ===

#[test]
fn a_network_that_is_cut_breaks_nothing_for_seconds_and_ends_connections_for_long() {
    // `cargo xtask faults` does the same with the time-outs that hold by default.
    let cut = Cut::run(&CutPlan {
        short: Duration::from_secs(2),
        long: Duration::from_secs(25),
        patience: Patience {
            ping: 2,
            ping_answer: 8,
            silent: 10,
            connect: 3,
            request: 3,
            tunnel_idle: 2,
        },
    });
    println!("{cut}");
    assert_eq!(cut.wrong, [""; 0], "{cut}");
    // All of it was seen indeed.
    assert!(cut.lived_on >= 8 && cut.stood >= 8, "{cut}");
    assert!(cut.ended[0] >= Duration::from_secs(3), "{cut}");
    assert!(cut.attempts >= 5, "{cut}");
}

#[test]
fn a_peer_that_is_killed_mid_stream_is_noticed_at_once_and_found_again() {
    let (pair, one, mut two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let mut heart = beat(&pair.client, to);
    two.kill();
    eventually("the connection has ended", || heart.ended().is_some());
    quickly(|| send(&pair.client, to, &["--text", "nobody there"]).fails());
    eventually("nothing is held", || {
        one.metrics().sum("reeve_streams_open", &[]) == 0.0
            && one.metrics().sum("reeve_tunnels_open", &[]) == 0.0
    });
    two.start_again();
    two.wait_until_ready();
    eventually("it is found again", || {
        send(&pair.client, to, &["--text", "again", "--patience", "3"])
            .status
            .success()
    });
}

// === the node ===

#[test]
fn pins_that_are_removed_are_made_again_and_nothing_is_open_meanwhile() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses();
    let allowed = Probe::start(&pair.client, to.port4(PORT), &[]);
    let denied = Probe::start(&pair.client, to.port4(9999), &[]);
    fs::remove_dir_all(pair.one.pins()).unwrap();
    one.wait_for_log(&["is pinned again"]);
    allowed.goes_on(100);
    denied.goes_on(100);
    allowed.all_worked();
    drop(allowed);
    // They are what the next daemon adopts.
    one.kill();
    denied.goes_on(100);
    one.start_again();
    one.wait_until_ready();
    denied.goes_on(100);
    denied.all_failed("not permitted");
}

/// Sets how many files a daemon may have open.
fn limit_files(daemon: &Daemon, most: usize) {
    let status = Command::new("prlimit")
        .arg(format!("--pid={}", daemon.id()))
        .arg(format!("--nofile={most}:"))
        .status();
    assert!(status.unwrap().success());
}

fn beat(client: &Workload, to: SocketAddr) -> Process {
    let mut heart = client.spawn_peer(["heartbeat", &to.to_string(), "--patience", "60"]);
    heart.wait_for("beat 2");
    heart
}

fn goes_on(heart: &mut Process) {
    let beats = |heart: &Process| heart.stdout().lines().count();
    let now = beats(heart);
    eventually("the connection goes on", || beats(heart) > now + 2);
    assert!(heart.ended().is_none());
}
