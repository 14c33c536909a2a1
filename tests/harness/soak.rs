//! Mixed traffic between two daemons for as long as it is wanted, and what they hold meanwhile.

use std::{
    fmt, fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    Daemon, Metrics, Process,
    rotated_pair::{RotatedPair, transferred},
    wait,
};

/// Between two rotations of every certificate, and as long before the next change of a policy.
const EVERY: Duration = Duration::from_secs(4);
/// Bytes of one of the transfers that follow each other.
const TRANSFER: u64 = 16 << 20;
/// Bytes per second of the one transfer that lasts all the while: 64 KiB every 100 ms.
const TRICKLE: u64 = (64 << 10) * 10;
/// Connections that say something now and then.
const IDLE: usize = 10;
/// For what was begun to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Share of a run in which pools, caches and the allocator may still fill.
const WARM_UP: f64 = 0.2;

const ANSWER: u16 = 7001;
const HASH: u16 = 7002;
const ECHO: u16 = 7003;
const UDP: u16 = 7004;
const DENIED: u16 = 7999;

const POLICY: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: between-the-two}
spec:
  workloads: {names: [client, server]}
  ingress: [{from: [{serviceAccount: client}], ports: [{port: 7001, endPort: 7003}, {protocol: UDP, port: 7004}]}]
  egress: [{to: [{serviceAccount: server}], ports: [{port: 7001, endPort: 7003}, {protocol: UDP, port: 7004}]}]
";

/// What came of a soak.
#[derive(Clone, Debug, Default)]
pub struct Soak {
    /// What the daemons held, time after time.
    pub samples: Vec<Sample>,
    /// Short connections that worked.
    pub connections: u64,
    /// Attempts that were denied, as they should be.
    pub denied: u64,
    /// Transfers whose contents arrived whole.
    pub transfers: u64,
    /// Datagrams that were answered.
    pub datagrams: u64,
    /// Times that every certificate was replaced.
    pub rotations: u64,
    /// Times that the policies changed.
    pub changes: u64,
    /// Whatever went wrong, one sentence each.
    pub wrong: Vec<String>,
    /// What the daemons say of it: how connections and tunnels ended, and their warnings. Empty where
    /// nothing went wrong.
    pub said: String,
}

/// What both daemons held at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the beginning.
    pub at: Duration,
    /// Bytes of resident memory.
    pub resident: f64,
    /// File descriptors.
    pub files: f64,
    /// Entries of the kernel's maps, without those that stay until they are pushed out.
    pub entries: f64,
    /// Tunnels.
    pub tunnels: f64,
    /// Connections in them.
    pub streams: f64,
}

/// How one figure went over a run.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// What it is.
    pub name: &'static str,
    /// Of the first third, once warm: the median, of map entries the largest.
    pub first: f64,
    /// The same of the last third.
    pub last: f64,
    /// Largest of all.
    pub most: f64,
    /// By how much it grows in an hour, by least squares.
    pub per_hour: f64,
    /// What the last third may have more than the first.
    pub allowed: f64,
}

// === impl Soak ===

impl Soak {
    /// Carries short connections, transfers, silent connections, datagrams and denied attempts
    /// between two daemons, while certificates and policies change.
    #[must_use]
    pub fn run(duration: Duration) -> Self {
        let scene = Scene::new(duration);
        let mut soak = Self::default();
        let mut traffic = Traffic::start(&scene, duration);
        let started = Instant::now();
        thread::scope(|scope| {
            let wrong = scope.spawn(|| scene.transfers(started + duration));
            let datagrams = scope.spawn(|| scene.datagrams(started + duration));
            let mut next = EVERY;
            while started.elapsed() < duration {
                soak.samples.push(scene.sample(started.elapsed()));
                if started.elapsed() >= next {
                    scene.pair.rotate();
                    scene.change_policy(soak.changes.is_multiple_of(2));
                    soak.rotations += 1;
                    soak.changes += 1;
                    next += EVERY;
                }
                // Some hundred samples of a run, and at least one a second.
                let pause = (duration / 500).max(Duration::from_millis(200));
                thread::sleep(pause.min(Duration::from_secs(1)));
            }
            let (transfers, mut failed) = wrong.join().expect("transfers can be tried");
            soak.transfers = transfers;
            soak.wrong.append(&mut failed);
            let (answered, mut failed) = datagrams.join().expect("datagrams can be tried");
            soak.datagrams = answered;
            soak.wrong.append(&mut failed);
        });
        traffic.end(&mut soak);
        soak.check();
        if !soak.wrong.is_empty() {
            soak.said = scene.pair.daemons.iter().map(testimony).collect();
        }
        soak
    }

    /// How each figure went.
    #[must_use]
    pub fn courses(&self) -> Vec<Course> {
        const MIB: f64 = (1 << 20) as f64;
        // Allowed: what the figure moves by itself, for what goes on at the moment differs.
        let course =
            |name, figure: fn(&Sample) -> f64, of: fn(&[f64]) -> f64, share: f64, slack| {
                let warm = (self.samples.len() as f64 * WARM_UP) as usize;
                let samples = self.samples.get(warm..).unwrap_or_default();
                let values: Vec<_> = samples.iter().map(figure).collect();
                let third = values.len() / 3;
                let first = of(&values[..third]);
                Course {
                    name,
                    first,
                    last: of(&values[values.len() - third..]),
                    most: largest(&values),
                    per_hour: slope(samples.iter().map(|s| s.at.as_secs_f64()), &values) * 3600.0,
                    allowed: first * share + slack,
                }
            };
        vec![
            course("resident bytes", |s| s.resident, median, 0.05, 4.0 * MIB),
            course("descriptors", |s| s.files, median, 0.1, 16.0),
            // A policy comes and goes with its entries: between these two levels a median tells nothing.
            course("map entries", |s| s.entries, largest, 0.05, 16.0),
            course("tunnels", |s| s.tunnels, median, 0.1, 8.0),
            course("streams", |s| s.streams, median, 0.1, 8.0),
        ]
    }

    fn check(&mut self) {
        for course in self.courses() {
            if course.last > course.first + course.allowed {
                self.wrong.push(format!("it grows: {course}"));
            }
        }
    }
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} connections, {} transfers, {} datagrams, {} denied attempts; {} rotations and {} \
             changes of policy; {} samples",
            self.connections,
            self.transfers,
            self.datagrams,
            self.denied,
            self.rotations,
            self.changes,
            self.samples.len()
        )?;
        for course in self.courses() {
            writeln!(f, "{course}")?;
        }
        f.write_str(&self.said)
    }
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:.0} in the first third, {:.0} in the last ({:.0} more are allowed), {:.0} at \
             most, {:+.0} an hour",
            self.name, self.first, self.last, self.allowed, self.most, self.per_hour
        )
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// How a daemon's connections and tunnels ended, and what it warned of.
fn testimony(daemon: &Daemon) -> String {
    const ENDS: [&str; 4] = [
        "reeve_connections_closed_total",
        "reeve_connections_failed_total",
        "reeve_tunnels_closed_total",
        "reeve_tls_handshakes_total",
    ];
    let metrics = daemon.get("/metrics").unwrap_or_default();
    let ends: String = metrics
        .lines()
        .filter(|line| ENDS.iter().any(|name| line.starts_with(name)))
        .map(|line| format!("{line}\n"))
        .collect();
    format!("{}:\n{ends}{}", daemon.config().display(), daemon.log())
}

/// Slope of the line that fits best.
fn slope(at: impl Iterator<Item = f64> + Clone, values: &[f64]) -> f64 {
    let number = values.len().max(1) as f64;
    let (mean_at, mean) = (
        at.clone().sum::<f64>() / number,
        values.iter().sum::<f64>() / number,
    );
    let (mut together, mut alone) = (0.0, 0.0);
    for (at, value) in at.zip(values) {
        together += (at - mean_at) * (value - mean);
        alone += (at - mean_at).powi(2);
    }
    if alone == 0.0 { 0.0 } else { together / alone }
}

// === The scene ===

struct Scene {
    pair: RotatedPair,
    _servers: Vec<Process>,
}

impl Scene {
    fn new(duration: Duration) -> Self {
        // A connection ends with its tunnel's certificates, and some are to last.
        let lifetime = format!("{}s", duration.as_secs() * 2 + 3600);
        let pair = RotatedPair::start(POLICY, &lifetime, |reeve| {
            reeve
                .set("/log/level", json!("warn"))
                // So that a short run sees each of these as well.
                .set("/timeouts/drain", json!("3s"))
                .set("/timeouts/tunnelIdle", json!("3s"))
        });
        let mut servers = vec![
            pair.serve(ANSWER, "answer"),
            pair.serve(HASH, "hash"),
            pair.serve(ECHO, "echo"),
        ];
        let mut udp = pair
            .server
            .spawn_peer(["udp-serve", &format!("[::]:{UDP}")]);
        udp.wait_for("listening");
        servers.push(udp);
        Self {
            pair,
            _servers: servers,
        }
    }

    /// Adds a policy that changes nothing for what is carried, or takes it away.
    fn change_policy(&self, adds: bool) {
        const ANOTHER: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: another}
spec:
  workloads: {names: [client, server]}
  egress: [{to: [{cidr: 192.0.2.0/24}], ports: [{port: 1, endPort: 999}]}]
";
        for daemon in &self.pair.daemons {
            let file = daemon.policies().join("another.yaml");
            let changed = if adds {
                fs::write(&file, ANOTHER)
            } else {
                fs::remove_file(&file)
            };
            changed.expect("policies can be changed");
        }
    }

    fn sample(&self, at: Duration) -> Sample {
        let metrics = self.pair.daemons.each_ref().map(Daemon::metrics);
        let sum = |name| metrics.iter().map(|m| m.sum(name, &[])).sum::<f64>();
        // What these hold stays until they are full and what is newer pushes it out.
        let passing = ["FLOWS", "ONWARD"].map(|map| [("map", map)]);
        let entries = |m: &Metrics| {
            let passing = passing.iter().map(|map| m.sum("reeve_map_entries", map));
            m.sum("reeve_map_entries", &[]) - passing.sum::<f64>()
        };
        Sample {
            at,
            resident: sum("process_resident_memory_bytes"),
            files: sum("process_open_fds"),
            entries: metrics.iter().map(entries).sum(),
            tunnels: sum("reeve_tunnels_open"),
            streams: sum("reeve_streams_open"),
        }
    }

    fn transfers(&self, until: Instant) -> (u64, Vec<String>) {
        let (mut whole, mut wrong) = (0, Vec::new());
        while Instant::now() < until {
            let bytes = TRANSFER.to_string();
            let words = ["send", &self.pair.to(HASH), "--bytes", &bytes];
            match transferred(self.pair.client.spawn_peer(words), PATIENCE) {
                Ok(()) => whole += 1,
                Err(error) => wrong.push(error),
            }
            thread::sleep(Duration::from_millis(200));
        }
        (whole, wrong)
    }

    fn datagrams(&self, until: Instant) -> (u64, Vec<String>) {
        let (mut answered, mut wrong) = (0, Vec::new());
        let to = [
            self.pair.to(UDP),
            self.pair.server.addresses().port6(UDP).to_string(),
        ];
        while Instant::now() < until {
            for to in &to {
                let words = ["udp-send", to, "--patience", "10000"];
                let output = self.pair.client.peer(words);
                if output.status.success() {
                    answered += 1;
                } else {
                    wrong.push(format!("a datagram was lost: {}", output.stderr));
                }
            }
            thread::sleep(Duration::from_millis(200));
        }
        (answered, wrong)
    }
}

// === Traffic ===

/// What goes on all the while.
struct Traffic {
    connections: Process,
    denied: Process,
    idle: Vec<Process>,
    lasting: Process,
    /// For the lasting transfer to end: its pauses are longer than asked for on a machine that does
    /// much else.
    patience: Duration,
}

impl Traffic {
    fn start(scene: &Scene, duration: Duration) -> Self {
        let client = &scene.pair.client;
        let probe =
            |port, pause| client.spawn_peer(["probe", &scene.pair.to(port), "--pause", pause]);
        let mut idle: Vec<_> = (0..IDLE)
            .map(|_| client.spawn_peer(["heartbeat", &scene.pair.to(ECHO), "--every", "5000"]))
            .collect();
        idle.iter_mut().for_each(|one| {
            one.wait_for("beat 1");
        });
        let bytes = (TRICKLE * duration.as_secs()).to_string();
        let to = scene.pair.to(HASH);
        let words = ["send", &to, "--bytes", &bytes, "--trickle", "100"];
        let patience = duration / 2 + PATIENCE * 2;
        // The answer comes when all is sent.
        let silence = (duration + patience).as_secs().to_string();
        Self {
            connections: probe(ANSWER, "5"),
            denied: probe(DENIED, "50"),
            idle,
            lasting: client.spawn_peer(words.into_iter().chain(["--patience", &silence])),
            patience,
        }
    }

    fn end(&mut self, soak: &mut Soak) {
        for one in &mut self.idle {
            if one.ended().is_some() {
                soak.wrong
                    .push(format!("a silent connection failed: {}", one.stderr()));
            }
        }
        let ended = wait::until(self.patience, || self.lasting.ended());
        let seen = serde_json::from_str::<Value>(&self.lasting.stdout()).unwrap_or_default();
        let whole = seen["received"]["head"] == seen["sent"]["sha256"];
        if !(ended.is_some_and(|status| status.success()) && whole && seen.is_object()) {
            let said = self.lasting.stderr();
            soak.wrong
                .push(format!("the lasting transfer failed: {said}"));
        }
        let (worked, failed) = probed(&self.connections);
        soak.connections = worked;
        soak.wrong.extend(
            failed
                .iter()
                .map(|(error, number)| format!("{number} connections failed: {error}")),
        );
        let (worked, denied) = probed(&self.denied);
        if worked > 0 {
            soak.wrong
                .push(format!("{worked} connections were not denied"));
        }
        for (error, number) in denied {
            if error.contains("not permitted") {
                soak.denied += number;
            } else {
                soak.wrong
                    .push(format!("{number} were denied otherwise: {error}"));
            }
        }
    }
}

/// Connections of a probe that worked, and those that did not.
fn probed(probe: &Process) -> (u64, Vec<(String, u64)>) {
    let printed = probe.stdout();
    let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().last().unwrap_or("{}");
    let seen: Value = serde_json::from_str(last).unwrap_or_default();
    let failed = seen["failed"].as_object().into_iter().flatten();
    let failed = failed.map(|(error, number)| (error.clone(), number.as_u64().unwrap_or(0)));
    (seen["worked"].as_u64().unwrap_or(0), failed.collect())
}
