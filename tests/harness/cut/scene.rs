//! Two nodes, and connections between them that live, or are tried, while the network is cut.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Patience;
use crate::{Daemon, Network, Node, Process, Reeve, Workload, wait};

/// Connections of each kind, half of them by IPv6.
const EACH: usize = 4;
/// What is said, and never in the clear.
pub(super) const TEXT: &str = "said across a network that is cut";

pub(super) const ECHO: u16 = 7001;
pub(super) const HASH: u16 = 7002;
const ANSWER: u16 = 7003;

const POLICY: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: between-them}
spec:
  workloads: {names: [client, server, beside]}
  ingress: [{from: [{serviceAccount: client}]}]
  egress: [{to: [{serviceAccount: server}, {serviceAccount: beside}]}]
";

pub(super) struct Scene {
    pub(super) client: Workload,
    pub(super) server: Workload,
    beside: Workload,
    pub(super) daemons: [Daemon; 2],
    pub(super) network: Network,
    _servers: Vec<Process>,
    _nodes: [Node; 2],
}

/// A connection that stands.
pub(super) struct Standing {
    pub(super) process: Process,
    /// It says something all the time.
    beats: bool,
}

/// A connection that is tried while nobody can be reached.
pub(super) struct Attempt {
    pub(super) process: Process,
    begun: Instant,
    pub(super) failed: Option<Duration>,
}

fn settings(node: &Node, patience: Patience) -> Reeve<'_> {
    let reeve = node.reeve().policy(POLICY);
    patience.configure(reeve.set("/log/level", json!("info")))
}

impl Scene {
    pub(super) fn new(patience: Patience) -> Self {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (one.pod("client"), two.pod("server"));
        let beside = two.pod("beside");
        let daemons = [
            settings(&one, patience)
                .enrol(&client)
                .peer(&server)
                .peer(&beside)
                .start(),
            settings(&two, patience)
                .enrol(&server)
                .enrol(&beside)
                .peer(&client)
                .start(),
        ];
        let serve = |at: &Workload, port: u16, mode: &str| {
            let words = ["serve", &format!("[::]:{port}"), "--mode", mode];
            let mut server = at.spawn_peer(words);
            server.wait_for("listening");
            server
        };
        let servers = vec![
            serve(&server, ECHO, "echo"),
            serve(&server, HASH, "hash"),
            serve(&beside, ANSWER, "answer"),
        ];
        Self {
            client,
            server,
            beside,
            daemons,
            network,
            _servers: servers,
            _nodes: [one, two],
        }
    }

    /// The server's addresses, as arguments.
    pub(super) fn to(&self, port: u16) -> [String; 2] {
        let addresses = self.server.addresses();
        [addresses.port4(port), addresses.port6(port)].map(|to| to.to_string())
    }

    /// Connections on which something is said all the time, and on which nothing is.
    pub(super) fn connections(&self) -> Vec<Standing> {
        let to = self.to(ECHO);
        let patience = ["--patience", "600"];
        let mut standing: Vec<_> = (0..EACH)
            .flat_map(|number| {
                let to = to[number % 2].as_str();
                let beats = ["heartbeat", to].into_iter().chain(patience);
                [(beats.collect::<Vec<_>>(), true), (vec!["hold", to], false)]
            })
            .map(|(words, beats)| Standing {
                process: self.client.spawn_peer(words),
                beats,
            })
            .collect();
        for one in &mut standing {
            let begun = if one.beats { "beat 2" } else { "holding" };
            one.process.wait_for(begun);
        }
        standing
    }

    /// Connections without end to somebody at the same node as the server.
    pub(super) fn probe_beside(&self) -> Process {
        let to = self.beside.addresses().port4(ANSWER).to_string();
        let mut probe = self.client.spawn_peer(["probe", &to, "--pause", "500"]);
        probe.wait_for("\"worked\":1");
        probe
    }

    /// Tunnels of one daemon between the client and the server: how many streams each has.
    pub(super) fn tunnels(&self, daemon: usize) -> Vec<u64> {
        let status = self.daemons[daemon].status();
        let tunnels = status["tunnels"]["tunnels"].as_array();
        let server = Value::from(self.server.spiffe_id("example.org"));
        let leads = |tunnel: &&Value| [&tunnel["peer"], &tunnel["local"]].contains(&&server);
        let streams = |tunnel: &Value| tunnel["streams"].as_u64();
        let tunnels = tunnels.into_iter().flatten().filter(leads);
        tunnels.filter_map(streams).collect()
    }
}

impl Standing {
    /// Whether it is still there, and carries something if it should.
    pub(super) fn goes_on(&mut self) -> Result<(), String> {
        let beats = |process: &Process| process.stdout().lines().count();
        let now = beats(&self.process);
        let beaten = wait::until(wait::SOON, || {
            (!self.beats || beats(&self.process) > now + 2).then_some(())
        });
        match self.process.ended() {
            None if beaten.is_some() => Ok(()),
            None => Err("nothing is carried any more".to_owned()),
            Some(_) => Err(self.process.stdout() + &self.process.stderr()),
        }
    }
}

impl Attempt {
    pub(super) fn start(scene: &Scene, number: usize) -> Self {
        let to = &scene.to(ECHO)[number % 2];
        let words = ["send", to, "--text", TEXT, "--patience", "600"];
        Self {
            process: scene.client.spawn_peer(words),
            begun: Instant::now(),
            failed: None,
        }
    }

    pub(super) fn look(&mut self) {
        if self.failed.is_none() && self.process.ended().is_some_and(|status| !status.success()) {
            self.failed = Some(self.begun.elapsed());
        }
    }
}
