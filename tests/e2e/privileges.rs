//! Least privilege: what the threads of a running daemon may still do, as the kernel tells it.

use std::os::unix::process::ExitStatusExt;

use harness::{Daemon, Network, Node, Thread, eventually};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use serde_json::json;

use crate::arrange::{PORT, Pair, say, serve};

// Capabilities by their number in `capability.h`.
const DAC_READ_SEARCH: u64 = 1 << 2;
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;
const PERFMON: u64 = 1 << 38;
const BPF: u64 = 1 << 39;

/// What deciding and enforcing needs; SECURITY.md says why.
const NEEDED: u64 =
    DAC_READ_SEARCH | NET_BIND_SERVICE | NET_ADMIN | SYS_PTRACE | SYS_ADMIN | PERFMON | BPF;

/// Of both daemons.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `Seccomp:` of a thread whose system calls are filtered.
const FILTERED: &str = "2";

#[test]
fn who_reads_what_strangers_send_has_no_privilege_and_the_others_only_what_they_need() {
    let (pair, mut one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    // Each of these threads has done its work.
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        say(&pair.client, to, "with few privileges");
    }
    for daemon in [&one, &two] {
        has_no_surplus(daemon, &["tunnel-0", "http", "admin", "handover"]);
    }
    // What a daemon before says is read like what a stranger says.
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    let _old = one.take_over();
    assert_eq!(one.status()["predecessors"][0]["version"], VERSION);
    let threads = ["tunnel-0", "http", "admin", "handover", "predecessor"];
    has_no_surplus(&one, &threads);
}

/// Checks that these threads are there and have no privilege, and the others only what they need.
#[track_caller]
fn has_no_surplus(daemon: &Daemon, exposed: &[&str]) {
    let threads = daemon.threads();
    for name in exposed {
        let is_there = threads.iter().any(|thread| thread.name == *name);
        assert!(is_there, "{name} is not among {threads:?}");
    }
    let is_exposed = |thread: &&Thread| {
        exposed.contains(&thread.name.as_str()) || thread.name.starts_with("tunnel-")
    };
    let (exposed, others): (Vec<_>, Vec<_>) = threads.iter().partition(is_exposed);
    for thread in exposed {
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(thread.capabilities(set), 0, "{set} of {}", thread.name);
        }
        // Its own filter, besides the process's.
        let filtered = thread.status("Seccomp_filters");
        assert_eq!(filtered, filters(2), "{}", thread.name);
    }
    for thread in others {
        let needed = match thread.name.as_str() {
            "sockets" => SYS_ADMIN | NET_ADMIN,
            _ => NEEDED,
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let surplus = thread.capabilities(set) & !needed;
            assert_eq!(surplus, 0, "{set} of {}: {surplus:x}", thread.name);
        }
        let filtered = thread.status("Seccomp_filters");
        assert_eq!(filtered, filters(1), "{}", thread.name);
    }
    for thread in &threads {
        assert_eq!(thread.status("Seccomp"), FILTERED, "{}", thread.name);
        assert_eq!(thread.status("NoNewPrivs"), "1", "{}", thread.name);
    }
}

#[test]
fn a_daemon_that_crashes_leaves_no_core_dump() {
    // Whoever is started from here on may leave one.
    let (_, most) = getrlimit(Resource::RLIMIT_CORE).unwrap();
    setrlimit(Resource::RLIMIT_CORE, most, most).unwrap();
    let node = Node::new(&Network::new(), "one");
    let folder = node.folder().to_str().unwrap();
    let crash = format!("cd {folder}; kill -ABRT $$");
    let other = node.host().exec(["sh", "-c", &crash]);
    assert!(
        other.status.core_dumped(),
        "here nobody leaves any: {:?}",
        other.status
    );
    // A thread may abort, and a signal of the processor's ends all of them.
    for signal in [Signal::SIGABRT, Signal::SIGSEGV] {
        let mut daemon = node.reeve().start();
        let mut ended = None;
        eventually(&format!("{signal} ends it"), || {
            // The runtime takes the first for an overflow of a stack, and looks again.
            daemon.signal(signal);
            ended = daemon.ended();
            ended.is_some()
        });
        let ended = ended.unwrap();
        assert_eq!(ended.signal(), Some(signal as i32));
        assert!(!ended.core_dumped(), "{ended}");
    }
}

#[test]
fn nobody_looks_into_the_daemons_memory() {
    let node = Node::new(&Network::new(), "one");
    let daemon = node.reeve().start();
    let threads = daemon.threads();
    let exposed = threads.iter().find(|thread| thread.name == "tunnel-0");
    let exposed = exposed.unwrap().id;
    // The same user, without the capabilities to look into whatever it likes: it is let into what has
    // none either, unless that does not want it.
    let look = |process: u32, thread: u32| {
        let file = format!("/proc/{process}/task/{thread}/environ");
        let without = ["setpriv", "--bounding-set=-all", "cat", &file];
        node.host().exec(without)
    };
    let other = node
        .host()
        .spawn(["setpriv", "--bounding-set=-all", "sleep", "60"]);
    eventually("others are looked into", || {
        look(other.id(), other.id()).status.success()
    });
    let refused = look(daemon.id(), exposed).fails();
    assert!(refused.contains("Permission denied"), "{refused}");
}

#[test]
fn a_wall_that_is_switched_off_is_not_there() {
    let node = Node::new(&Network::new(), "one");
    let daemon = node
        .reeve()
        .set("/sandbox", json!({"seccomp": "off", "landlock": "off"}))
        .start();
    let filtered = |daemon: &Daemon| {
        let threads = daemon.threads();
        threads
            .iter()
            .any(|thread| thread.status("Seccomp_filters") != filters(0))
    };
    assert!(!filtered(&daemon));
}

/// A thread's number of filters that are the daemon's, besides those that the test itself runs under.
fn filters(own: u32) -> String {
    let here = Thread::all_of(std::process::id());
    let inherited: u32 = here[0].status("Seccomp_filters").parse().unwrap();
    (inherited + own).to_string()
}
