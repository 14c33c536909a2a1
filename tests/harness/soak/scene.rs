//! Two nodes with their daemons, and beside them a pair that no daemon knows.

use std::{
    cell::Cell,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    ANSWER, ECHO, HASH, UDP,
    course::{Held, Sample},
};
use crate::{
    Daemon, FileIssuer, Metrics, Node, Process, WallClock, Workload,
    rotated_pair::{RotatedPair, serve},
};

/// Who issues is that far behind, so that a certificate is valid for a clock that is behind as well.
const BEHIND: Duration = Duration::from_secs(2 * 3600);
/// In addition to a cut's own length, until which attempts may still fail that began in it.
const GRACE: Duration = Duration::from_secs(15);

const POLICY: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: between-the-two}
spec:
  workloads: {names: [client, server]}
  ingress: [{from: [{serviceAccount: client}], ports: [{port: 7001, endPort: 7003}, {protocol: UDP, port: 7004}]}]
  egress: [{to: [{serviceAccount: server}], ports: [{port: 7001, endPort: 7003}, {protocol: UDP, port: 7004}]}]
";

/// Who calls, and who is called.
#[derive(Clone, Copy)]
pub(super) struct Ends<'s> {
    pub(super) client: &'s Workload,
    pub(super) server: &'s Workload,
}

pub(super) struct Scene {
    pub(super) pair: RotatedPair,
    plain: [Workload; 2],
    pub(super) weather: Weather,
    pub(super) clock: WallClock,
    _servers: Vec<Process>,
    _plain_nodes: [Node; 2],
}

/// A daemon from which another one has taken over.
pub(super) struct Old {
    pub(super) process: Process,
    pub(super) node: usize,
}

/// When the wire was cut.
#[derive(Default)]
pub(super) struct Weather {
    cuts: Mutex<Vec<Wire>>,
}

struct Wire {
    cut: Instant,
    mended: Option<Instant>,
}

// === impl Scene ===

impl Scene {
    /// The leaves are valid for so long at first.
    pub(super) fn new(leaf: Duration) -> (Self, [Daemon; 2]) {
        let clock = Cell::new(None);
        let issuer = |folder| {
            let behind = format!("-{}s", BEHIND.as_secs());
            FileIssuer::behind(folder, &behind)
        };
        // The daemons start one after the other.
        let first = leaf + Duration::from_secs(120);
        let (pair, daemons) =
            RotatedPair::start(POLICY, issuer, &lifetime(first), |number, reeve| {
                let reeve = reeve
                    .set("/log/level", json!("warn"))
                    // So that a short run sees each of these as well.
                    .set("/timeouts/drain", json!("3s"))
                    .set("/timeouts/tunnelIdle", json!("3s"))
                    .set("/limits/predecessors", json!(16));
                if number == 0 {
                    return reeve;
                }
                let (reeve, its) = WallClock::of(reeve, "+0");
                clock.set(Some(its));
                reeve
            });
        let nodes = ["plain-one", "plain-two"].map(|name| Node::new(&pair.network, name));
        let plain = [nodes[0].pod("client"), nodes[1].pod("server")];
        let mut servers: Vec<_> = [&pair.server, &plain[1]]
            .into_iter()
            .flat_map(|at| {
                [(ANSWER, "answer"), (HASH, "hash"), (ECHO, "echo")]
                    .map(|(port, mode)| serve(at, port, mode))
            })
            .collect();
        let mut udp = pair
            .server
            .spawn_peer(["udp-serve", &format!("[::]:{UDP}")]);
        udp.wait_for("listening");
        servers.push(udp);
        let scene = Self {
            pair,
            plain,
            weather: Weather::default(),
            clock: clock.take().expect("the second daemon has a clock"),
            _servers: servers,
            _plain_nodes: nodes,
        };
        (scene, daemons)
    }

    /// The pair of plain TCP, and that of reeve.
    pub(super) fn ends(&self) -> [Ends<'_>; 2] {
        let [client, server] = &self.plain;
        let plain = Ends { client, server };
        let (client, server) = (&self.pair.client, &self.pair.server);
        [plain, Ends { client, server }]
    }

    /// Replaces every leaf by one that is valid for so long from now on.
    pub(super) fn renew(&self, valid: Duration) {
        self.pair.rotate(&lifetime(valid));
    }

    /// Cuts the wires of both servers.
    pub(super) fn cut(&self) {
        self.weather.cut();
        for ends in self.ends() {
            ends.server.cut(&self.pair.network);
        }
    }

    /// Mends them.
    pub(super) fn mend(&self) {
        for ends in self.ends() {
            ends.server.mend(&self.pair.network);
        }
        self.weather.mend();
    }
}

/// The lifetime for which `reeve ca` is to be asked, by a clock that is behind.
fn lifetime(valid: Duration) -> String {
    format!("{}s", (BEHIND + valid).as_secs())
}

/// Adds a policy that changes nothing for what is carried, or takes it away.
pub(super) fn change_policy(daemons: &[Daemon], adds: bool) {
    const ANOTHER: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: another}
spec:
  workloads: {names: [client, server]}
  egress: [{to: [{cidr: 192.0.2.0/24}], ports: [{port: 1, endPort: 999}]}]
";
    for daemon in daemons {
        let file = daemon.policies().join("another.yaml");
        let changed = if adds {
            fs::write(&file, ANOTHER)
        } else {
            fs::remove_file(&file)
        };
        changed.expect("policies can be changed");
    }
}

pub(super) fn sample(at: Duration, daemons: &[Daemon], old: &[Old]) -> Sample {
    let metrics: Vec<_> = daemons.iter().map(Daemon::metrics).collect();
    let sum = |name| metrics.iter().map(|m| m.sum(name, &[])).sum::<f64>();
    // What these hold stays until they are full and what is newer pushes it out.
    let passing = ["FLOWS", "ONWARD"].map(|map| [("map", map)]);
    let entries = |m: &Metrics| {
        let passing = passing.iter().map(|map| m.sum("reeve_map_entries", map));
        m.sum("reeve_map_entries", &[]) - passing.sum::<f64>()
    };
    Sample {
        at,
        serving: daemons.iter().map(|daemon| Held::of(daemon.id())).sum(),
        entries: metrics.iter().map(entries).sum(),
        tunnels: sum("reeve_tunnels_open"),
        streams: sum("reeve_streams_open"),
        predecessors: old.len() as f64,
        old: old.iter().map(|old| Held::of(old.process.id())).sum(),
    }
}

// === impl Ends ===

impl Ends<'_> {
    /// The server's address as an argument, of a family by a number.
    pub(super) fn to(&self, port: u16, number: usize) -> String {
        let addresses = self.server.addresses();
        let to = match number % 2 {
            0 => addresses.port4(port),
            _ => addresses.port6(port),
        };
        to.to_string()
    }
}

// === impl Weather ===

impl Weather {
    fn cut(&self) {
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.push(Wire {
            cut: Instant::now(),
            mended: None,
        });
    }

    fn mend(&self) {
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = cuts.last_mut() {
            last.mended = Some(Instant::now());
        }
    }

    /// Whether a failure now, of what began at that moment, may be that of a cut.
    pub(super) fn excuses(&self, begun: Instant) -> bool {
        let cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.iter().any(|wire| match wire.mended {
            None => true,
            // What TCP sends again waits for as long once more.
            Some(mended) => begun <= mended + (mended - wire.cut) + GRACE,
        })
    }
}
