//! reeve with a real SPIRE: its server, its agents, and what they do that a test's own agent may not.
//!
//! `cargo xtask peers` builds SPIRE and runs these tests, which `cargo xtask test` leaves out.

mod federation;
mod grants;
mod load;

use std::{
    thread,
    time::{Duration, Instant},
};

use harness::{
    Daemon, Node, Process, Reeve, Workload,
    certs::Authority,
    spire::{Agent, Entry, Server, Settings, reeve_itself},
};
use serde_json::{Value, json};

use crate::{
    agents::certificate,
    arrange::{Pair, TRUST_DOMAIN},
    opposite::{CLIENT, SERVER},
};

/// The identity under which reeve asks for workloads.
const REEVE: &str = "spiffe://example.org/reeve";
/// User of the processes that entries describe. A workload's first process is root's.
const WORKER: &str = "33";
/// Of certificates that are not replaced during a test.
const AN_HOUR: &str = "1h";

/// A client and a server on two nodes, each of which has an agent of one SPIRE.
struct Spired {
    agents: [Agent; 2],
    spire: Server,
    workers: Vec<Process>,
    _control: Node,
    pair: Pair,
}

// === impl Spired ===

impl Spired {
    /// Agents that know nobody, with certificates of this lifetime.
    fn new(lifetime: &str) -> Self {
        Self::with_upstream(lifetime, None)
    }

    /// The same with an authority above the server's.
    fn with_upstream(lifetime: &str, upstream: Option<&Authority>) -> Self {
        let pair = Pair::new();
        let control = Node::new(&pair.network, "control");
        let settings = Settings {
            trust_domain: TRUST_DOMAIN,
            lifetime,
            upstream,
        };
        let spire = Server::start(&control, &settings);
        let agents = [&pair.one, &pair.two].map(|node| Agent::start(node, &spire, &[REEVE]));
        Self {
            agents,
            spire,
            workers: Vec::new(),
            _control: control,
            pair,
        }
    }

    /// Lets reeve ask for workloads at both nodes.
    fn let_reeve_ask(&self) {
        let selectors = reeve_itself();
        let selectors = selectors.each_ref().map(String::as_str);
        let entry = entry(REEVE, &selectors);
        for agent in &self.agents {
            self.spire.grant(agent, &entry);
        }
    }

    /// Has an entry for the workers of each workload. Gives the entries.
    fn grant_to_workers(&self) -> [String; 2] {
        let user = format!("unix:uid:{WORKER}");
        let grant = |agent, id| self.spire.grant(agent, &entry(id, &[&user]));
        [
            grant(&self.agents[0], CLIENT),
            grant(&self.agents[1], SERVER),
        ]
    }

    /// Starts a worker in each workload.
    fn start_workers(&mut self) {
        let workloads = [&self.pair.client, &self.pair.server];
        self.workers.extend(workloads.map(worker));
    }

    /// Lets reeve ask, and has workers with entries in both workloads.
    fn grant_all(&mut self) {
        self.let_reeve_ask();
        self.grant_to_workers();
        self.start_workers();
    }

    /// Settings of both daemons, by which the client may call the server.
    fn daemons(&self, source: impl Fn(&Agent) -> Value) -> [Reeve<'_>; 2] {
        let [one, two] = self.agents.each_ref().map(source);
        [
            self.pair.allowing_at_one().set("/certificates", one),
            self.pair.allowing_at_two().set("/certificates", two),
        ]
    }
}

fn entry<'a>(id: &'a str, selectors: &'a [&'a str]) -> Entry<'a> {
    Entry {
        id,
        selectors,
        federates_with: &[],
    }
}

/// A process of a workload that is not root's, as below a master that gives up its rights.
fn worker(workload: &Workload) -> Process {
    let words = ["setpriv", "--reuid", WORKER, "--clear-groups"];
    workload.spawn(words.into_iter().chain(["sleep", "infinity"]))
}

/// The source `delegatedIdentity` of an agent.
fn delegated(agent: &Agent) -> Value {
    json!({"sources": [{"delegatedIdentity": {"socket": agent.admin_socket()}}]})
}

/// Waits for what SPIRE or reeve does in its own time.
#[track_caller]
fn within(seconds: u64, what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !so() {
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Whether an identity has a certificate in force.
fn has_certificate(daemon: &Daemon, id: &str) -> bool {
    certificate(daemon, id)["serial"] != Value::Null
}

/// Serial numbers of the client's and the server's certificates.
fn serials(daemons: &[Daemon; 2]) -> [Value; 2] {
    let serial = |daemon, id| certificate(daemon, id)["serial"].clone();
    [serial(&daemons[0], CLIENT), serial(&daemons[1], SERVER)]
}
