//! Least privilege: what the threads of a running daemon may still do, as the kernel tells it.

use std::fs;

use harness::{Daemon, Network, Node, Thread};
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

/// `Seccomp:` of a thread whose system calls are filtered.
const FILTERED: &str = "2";

#[test]
fn who_reads_what_strangers_send_has_no_privilege_and_the_others_only_what_they_need() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    // Each of these threads has done its work.
    for to in [
        pair.server.addresses().port4(PORT),
        pair.server.addresses().port6(PORT),
    ] {
        say(&pair.client, to, "with few privileges");
    }
    for daemon in [&one, &two] {
        let threads = daemon.threads();
        let exposed =
            |thread: &&Thread| thread.name.starts_with("tunnel-") || thread.name == "http";
        let (exposed, others): (Vec<_>, Vec<_>) = threads.iter().partition(exposed);
        assert!(exposed.len() >= 2, "{threads:?}");
        for thread in exposed {
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(thread.capabilities(set), 0, "{set} of {}", thread.name);
            }
            // Its own filter, besides the process's.
            assert_eq!(
                thread.status("Seccomp_filters"),
                filters(2),
                "{}",
                thread.name
            );
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
            assert_eq!(
                thread.status("Seccomp_filters"),
                filters(1),
                "{}",
                thread.name
            );
        }
        for thread in &threads {
            assert_eq!(thread.status("Seccomp"), FILTERED, "{}", thread.name);
            assert_eq!(thread.status("NoNewPrivs"), "1", "{}", thread.name);
        }
    }
}

#[test]
fn nobody_finds_a_key_in_a_core_dump() {
    let node = Node::new(&Network::new(), "one");
    let daemon = node.reeve().start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .unwrap();
    let values: Vec<_> = core.split_whitespace().take(2).collect();
    assert_eq!(values, ["0", "0"]);
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
