//! Certificates in files that are written anew again and again, and what is carried meanwhile.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{Daemon, Network, Node, Place, Process, Programs, Workload};

/// Between two rotations of every certificate.
const EVERY: Duration = Duration::from_secs(1);
/// Bytes of one of the transfers that follow each other.
const TRANSFER: u64 = 16 << 20;
/// Connections at the same time, besides transfers.
const THREADS: &str = "4";
/// Bytes per second of the one transfer that lasts all the while: 64 KiB every 20 ms.
const TRICKLE: u64 = (64 << 10) * 50;
/// For what was begun to end.
const PATIENCE: Duration = Duration::from_secs(60);

const ANSWER: u16 = 7001;
const HASH: u16 = 7002;

const POLICY: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: between-the-two}
spec:
  workloads: {names: [client, server]}
  ingress: [{from: [{serviceAccount: client}]}]
  egress: [{to: [{serviceAccount: server}]}]
";

/// A CA of the `reeve` command, which writes certificates to folders.
#[derive(Debug)]
pub struct FileIssuer {
    ca: PathBuf,
}

/// What came of a storm.
#[derive(Clone, Debug, Default)]
pub struct Storm {
    /// Times that every certificate was replaced.
    pub rotations: u64,
    /// Certificates that the daemons have put in force.
    pub accepted: u64,
    /// Connections that carried a byte there and one back.
    pub connections: u64,
    /// Those that did not.
    pub failed: u64,
    /// Transfers whose contents arrived whole.
    pub transfers: u64,
    /// What went wrong besides, one sentence each.
    pub wrong: Vec<String>,
}

// === impl FileIssuer ===

impl FileIssuer {
    /// Makes a CA for `example.org` in a folder that is not there yet.
    #[must_use]
    pub fn new(ca: PathBuf) -> Self {
        let folder = ca.to_str().expect("a path is text");
        reeve([
            "ca",
            "init",
            "--trust-domain",
            "example.org",
            "--dir",
            folder,
        ]);
        Self { ca }
    }

    /// Writes `svid.pem`, `svid.key` and `bundle.pem`, one after the other.
    pub fn issue(&self, id: &str, out: &Path) {
        self.issue_for(id, out, "1h");
    }

    /// The same with another lifetime.
    pub fn issue_for(&self, id: &str, out: &Path, lifetime: &str) {
        let (ca, out) = (self.ca.to_str(), out.to_str());
        let (ca, out) = (ca.expect("a path is text"), out.expect("a path is text"));
        reeve([
            "ca",
            "issue",
            "--dir",
            ca,
            "--id",
            id,
            "--out",
            out,
            "--lifetime",
            lifetime,
        ]);
    }

    /// The source of a configuration that reads what this writes, a folder below `base` for each
    /// service account.
    #[must_use]
    pub fn source(base: &Path) -> Value {
        json!({"files": {
            "folder": base.join("{serviceAccount}"),
            "certificate": "svid.pem",
            "key": "svid.key",
            "bundle": "bundle.pem",
        }})
    }
}

fn reeve<const N: usize>(words: [&str; N]) {
    let output = Command::new(&Programs::get().reeve).args(words).output();
    let output = output.expect("`reeve` can be run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`reeve {words:?}`: {error}");
}

// === impl Storm ===

impl Storm {
    /// Carries thousands of connections, transfers one after the other, and one that lasts, between
    /// two daemons whose workloads' certificates are replaced every second.
    #[must_use]
    pub fn run(duration: Duration) -> Self {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (one.pod("client"), two.pod("server"));
        let base = one.folder().join("certificates");
        let issuer = FileIssuer::new(one.folder().join("issuer"));
        let write = || {
            for workload in [&client, &server] {
                let id = workload.spiffe_id("example.org");
                issuer.issue(&id, &base.join(workload.name()));
            }
        };
        write();
        let daemon = |node: &Node, own: &Workload, other: &Workload| {
            node.reeve()
                .set("/certificates/sources", json!([FileIssuer::source(&base)]))
                .set("/log/level", json!("info"))
                .enrol(own)
                .peer(other)
                .policy(POLICY)
                .start()
        };
        let daemons = [
            daemon(&one, &client, &server),
            daemon(&two, &server, &client),
        ];
        for place in [&*client, &*server] {
            place.sysctl("ipv4/tcp_tw_reuse", "1");
            place.sysctl("ipv4/ip_local_port_range", "16384 65535");
        }
        let _servers = [
            serve(&server, ANSWER, "answer"),
            serve(&server, HASH, "hash"),
        ];
        let mut storm = Self::default();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let rotations = scope.spawn(|| {
                let mut rotations = 0;
                while !done.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    write();
                    rotations += 1;
                    thread::sleep(EVERY.saturating_sub(started.elapsed()));
                }
                rotations
            });
            storm.carry(&client, &server, duration);
            done.store(true, Ordering::Relaxed);
            storm.rotations = rotations.join().expect("certificates can be written");
        });
        for daemon in &daemons {
            storm.count(daemon);
        }
        storm
    }

    fn carry(&mut self, client: &Workload, server: &Workload, duration: Duration) {
        let end = Instant::now() + duration;
        let to = |port| server.addresses().port4(port).to_string();
        let seconds = duration.as_secs().to_string();
        let connections = client.spawn_peer([
            "connect-rate",
            &to(ANSWER),
            "--threads",
            THREADS,
            "--seconds",
            &seconds,
        ]);
        let lasting = (TRICKLE * duration.as_secs()).to_string();
        let lasting =
            client.spawn_peer(["send", &to(HASH), "--bytes", &lasting, "--trickle", "20"]);
        while Instant::now() < end {
            let bytes = TRANSFER.to_string();
            let transfer = client.spawn_peer(["send", &to(HASH), "--bytes", &bytes]);
            self.transferred(transfer, PATIENCE);
        }
        // Each write takes its time besides the pause, on a machine that does much else.
        self.transferred(lasting, duration * 4 + PATIENCE);
        let result = connections.wait(PATIENCE).json();
        self.connections = result["connections"].as_u64().unwrap_or_default();
        self.failed = result["failed"].as_u64().unwrap_or(u64::MAX);
    }

    fn transferred(&mut self, transfer: Process, patience: Duration) {
        let output = transfer.wait(patience);
        if !output.status.success() {
            self.wrong
                .push(format!("a transfer failed: {}", output.stderr));
            return;
        }
        let seen = output.json();
        if seen["received"]["head"] == seen["sent"]["sha256"] {
            self.transfers += 1;
        } else {
            self.wrong.push(format!("a transfer was not whole: {seen}"));
        }
    }

    fn count(&mut self, daemon: &Daemon) {
        let metrics = daemon.metrics();
        let accepted = [("result", "accepted")];
        self.accepted += metrics.sum("reeve_certificate_reloads_total", &accepted) as u64;
        let failed = [("result", "failed")];
        let count = metrics.sum("reeve_tls_handshakes_total", &failed);
        if count > 0.0 {
            self.wrong.push(format!("{count} handshakes failed"));
        }
        for failed in metrics.series("reeve_connections_failed_total") {
            self.wrong.push(format!("connections failed: {failed}"));
        }
    }
}

fn serve(place: &Place, port: u16, mode: &str) -> Process {
    let mut server = place.spawn_peer(["serve", &format!("[::]:{port}"), "--mode", mode]);
    server.wait_for("listening");
    server
}
