//! A large node: 250 workloads, 10,000 identities at 100,000 addresses, 10,000 rules. How long it
//! takes to load and to change, what it takes of memory, and what a `sendmsg()` costs there and on
//! a node with 10 rules.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::{Daemon, Network, Node, Process, Workload};
use serde_json::{Value, json};

use super::{measure::number, memory::resident, report::Report, scene::processor_seconds};

/// How large a node is.
#[derive(Clone, Copy, Debug)]
struct Size {
    workloads: u32,
    peers: u32,
    /// Of each peer: half of them IPv4, half IPv6.
    addresses: u32,
    /// Of each workload.
    rules: u32,
}

const LARGE: Size = Size {
    workloads: 250,
    peers: 10_000,
    addresses: 10,
    rules: 40,
};
const SMALL: Size = Size {
    workloads: 1,
    peers: 10,
    addresses: 2,
    rules: 10,
};

/// Changes of one policy file that are timed.
const CHANGES: usize = 11;
/// Calls of `sendmsg()` in one sample, and samples of each node and family.
const CALLS: u32 = 100_000;
const SAMPLES: u32 = 7;
/// For a daemon to load everything.
const PATIENCE: Duration = Duration::from_secs(300);
/// For memory to become what it stays at.
const SETTLE: Duration = Duration::from_secs(3);
/// Port that the first rule of each workload allows.
const PORT: u32 = 1000;
/// Port that only a changed policy allows.
const CHANGED_PORT: u32 = 999;

/// Loads, changes and asks.
pub(crate) fn measure(rounds: u32, report: &mut Report) {
    let network = Network::new();
    let few = Loaded::new(&network, "small", SMALL);
    let many = Loaded::new(&network, "large", LARGE);
    many.tell(report);
    for round in 0..rounds * SAMPLES {
        // Turn and turn about, and both families.
        let mut nodes = [("few", &few), ("many", &many)];
        if round % 2 == 1 {
            nodes.reverse();
        }
        for (name, node) in nodes {
            let samples: Vec<f64> = node.allowed().map(|to| node.connect(&to)).into();
            let both = samples.iter().sum::<f64>() / samples.len() as f64;
            report.add_rules("scale_connect_ns", name, both);
        }
    }
    many.change(report);
}

/// A node whose daemon has loaded everything.
struct Loaded {
    size: Size,
    daemon: Daemon,
    /// Seconds until the daemon enforced its policies, and until it was ready.
    enforced: f64,
    ready: f64,
    workloads: Vec<Workload>,
    _node: Node,
}

impl Loaded {
    fn new(network: &Network, name: &str, size: Size) -> Self {
        let node = Node::new(network, name);
        eprintln!("{name}: making {} workloads", size.workloads);
        let workloads: Vec<_> = (0..size.workloads)
            .map(|number| node.pod(&format!("w{number}")))
            .collect();
        let enrolled = workloads.iter().map(
            |workload| json!({"name": workload.name(), "cgroup": workload.cgroup().below_mount()}),
        );
        let reeve = node
            .reeve()
            .set("/workloads", enrolled.collect())
            .set(
                "/peers",
                (0..size.peers).map(|peer| size.peer(peer)).collect(),
            )
            .set("/log/level", json!("info"));
        let folder = node.folder().join("policies");
        for workload in 0..size.workloads {
            write(&folder, workload, &size.policy(workload, PORT));
        }
        let first = &workloads[0];
        // Without a route there is no `sendmsg()`.
        for family in ["-4", "-6"] {
            first
                .exec(["ip", family, "route", "add", "default", "dev", "eth0"])
                .ok();
        }
        let refused = turn(first, &size.address(0, CHANGED_PORT, 0), false);
        eprintln!("{name}: loading");
        let (started, started_at) = (Instant::now(), now());
        let mut daemon = reeve.start_unready();
        while !daemon.is_ready() {
            assert!(daemon.ended().is_none(), "it ended: {}", daemon.log());
            assert!(started.elapsed() < PATIENCE, "not ready: {}", daemon.log());
            thread::sleep(Duration::from_millis(50));
        }
        let ready = started.elapsed().as_secs_f64();
        Self {
            size,
            enforced: turned_at(refused) - started_at,
            ready,
            daemon,
            workloads,
            _node: node,
        }
    }

    /// Times and memory.
    fn tell(&self, report: &mut Report) {
        thread::sleep(SETTLE);
        report.note("scale_start_to_enforced_s", self.enforced);
        report.note("scale_start_to_ready_s", self.ready);
        report.note("scale_resident_mb", resident(self.daemon.id()) / 1e6);
        report.note("scale_maps_mb", maps(self.daemon.id()) / 1e6);
        let metrics = self.daemon.metrics();
        for map in ["PEERS", "VERDICTS"] {
            let entries = metrics.sum("reeve_map_entries", &[("map", map)]);
            report.note(&format!("scale_{}_entries", map.to_lowercase()), entries);
        }
        let before = processor_seconds(self.daemon.id());
        thread::sleep(Duration::from_secs(10));
        let idle = processor_seconds(self.daemon.id()) - before;
        report.note("scale_idle_cpu_percent", idle * 10.0);
    }

    /// An allowed destination of each family.
    fn allowed(&self) -> [String; 2] {
        let last = self.size.addresses - 1;
        [
            self.size.address(0, PORT, 0),
            self.size.address(0, PORT, last),
        ]
    }

    /// Nanoseconds of one `sendmsg()`.
    fn connect(&self, to: &str) -> f64 {
        let calls = CALLS.to_string();
        let asked = self.workloads[0].peer(["send-calls", to, "--calls", &calls]);
        number(&asked.json()["nanoseconds"])
    }

    /// One policy file changes, again and again; each time a verdict turns.
    fn change(&self, report: &mut Report) {
        let to = self.size.address(0, CHANGED_PORT, 0);
        let mut times = Vec::new();
        let before = processor_seconds(self.daemon.id());
        for change in 0..CHANGES {
            let allows = change % 2 == 0;
            let turned = turn(&self.workloads[0], &to, allows);
            let port = if allows { CHANGED_PORT } else { PORT };
            let text = self.size.policy(0, port);
            let started = now();
            write(self.daemon.policies(), 0, &text);
            times.push((turned_at(turned) - started) * 1000.0);
            // What follows the kernel's change is over before the next.
            thread::sleep(SETTLE);
        }
        let processor = processor_seconds(self.daemon.id()) - before;
        times.sort_by(f64::total_cmp);
        report.note("scale_change_to_kernel_ms_p50", times[CHANGES / 2]);
        report.note("scale_change_to_kernel_ms_max", times[CHANGES - 1]);
        report.note(
            "scale_cpu_ms_per_change",
            processor * 1000.0 / CHANGES as f64,
        );
        let resident = resident(self.daemon.id()) / 1e6;
        report.note("scale_resident_after_changes_mb", resident);
    }
}

impl Size {
    fn peer(self, peer: u32) -> Value {
        let addresses: Vec<_> = (0..self.addresses).map(|at| self.ip(peer, at)).collect();
        json!({
            "name": format!("p{peer}"),
            "namespace": "shop",
            "serviceAccount": format!("p{peer}"),
            "labels": {"app": format!("app-{}", peer / 10)},
            "addresses": addresses,
            "tunnel": true,
        })
    }

    fn ip(self, peer: u32, at: u32) -> String {
        let number = peer * self.addresses + at;
        if at < self.addresses / 2 {
            let [_, high, middle, low] = number.to_be_bytes();
            format!("10.{}.{middle}.{low}", 128 + high)
        } else {
            format!("fd00:88::{:x}:{:x}", number >> 16, number & 0xffff)
        }
    }

    fn address(self, peer: u32, port: u32, at: u32) -> String {
        let ip = self.ip(peer, at);
        if ip.contains(':') {
            format!("[{ip}]:{port}")
        } else {
            format!("{ip}:{port}")
        }
    }

    /// The policy of one workload. Of ten rules, seven name an identity, two a label that ten peers
    /// have, and one a network; half of them are for what goes out. The first is for `first_port`.
    fn policy(self, workload: u32, first_port: u32) -> String {
        let mut lists = BTreeMap::from([("egress", Vec::new()), ("ingress", Vec::new())]);
        for rule in 0..self.rules {
            let number = workload * self.rules + rule;
            let peer = number % self.peers;
            let far_end = match rule % 10 {
                7 | 8 => {
                    json!({"namespace": "shop", "labels": {"app": format!("app-{}", peer / 10)}})
                }
                9 => {
                    let [_, high, low, _] = (number << 8).to_be_bytes();
                    json!({"cidr": format!("172.{}.{low}.0/24", 16 + high)})
                }
                _ => json!({"identity": format!("spiffe://example.org/ns/shop/sa/p{peer}")}),
            };
            let (direction, peers) = [("egress", "to"), ("ingress", "from")][rule as usize % 2];
            let port = if rule == 0 { first_port } else { PORT + rule };
            let ports =
                json!([{"protocol": "UDP", "port": port}, {"port": port, "endPort": port + 3}]);
            if let Some(rules) = lists.get_mut(direction) {
                rules.push(json!({peers: [far_end], "ports": ports}));
            }
        }
        let policy = json!({
            "apiVersion": "reeve.dev/v1alpha1",
            "kind": "ConnectionPolicy",
            "metadata": {"name": format!("w{workload}")},
            "spec": {
                "workloads": {"names": [format!("w{workload}")]},
                "egress": lists["egress"],
                "ingress": lists["ingress"],
            },
        });
        // JSON is YAML.
        format!("{policy:#}\n")
    }
}

/// Puts a policy file in place as a whole.
fn write(folder: &Path, workload: u32, text: &str) {
    let file = folder.join(format!("w{workload}.yaml"));
    let new = file.with_extension("new");
    let result = fs::write(&new, text).and_then(|()| fs::rename(&new, &file));
    assert!(result.is_ok(), "writing {}: {result:?}", file.display());
}

/// Asks for a connection until its verdict turns.
fn turn(workload: &Workload, to: &str, until_allowed: bool) -> Process {
    let wanted = until_allowed.to_string();
    let mut process = workload.spawn_peer(["send-calls", to, "--until-allowed", &wanted]);
    process.wait_for("asking");
    process
}

fn turned_at(process: Process) -> f64 {
    let said = process.wait(PATIENCE).ok();
    let at = said
        .lines()
        .find_map(|line| line.strip_prefix("turned at "));
    at.and_then(|at| at.parse::<f64>().ok())
        .map_or(f64::NAN, |at| at / 1e6)
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(f64::NAN, |now| now.as_secs_f64())
}

/// Memory that the kernel counts for the maps which a process has open, each once, in bytes.
fn maps(process: u32) -> f64 {
    let folder = PathBuf::from(format!("/proc/{process}/fdinfo"));
    let mut by_map: BTreeMap<String, f64> = BTreeMap::new();
    for file in fs::read_dir(folder).into_iter().flatten().flatten() {
        let text = fs::read_to_string(file.path()).unwrap_or_default();
        let field = |name: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
        };
        if let (Some(map), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            by_map.insert(map, bytes.parse().unwrap_or(f64::NAN));
        }
    }
    by_map.values().sum()
}
