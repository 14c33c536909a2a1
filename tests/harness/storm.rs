//! Certificates in files that are written anew again and again, and what is carried meanwhile.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Daemon, FileIssuer, Process,
    rotated_pair::{RotatedPair, transferred},
};

/// Between two rotations of every certificate.
const EVERY: Duration = Duration::from_secs(1);
/// Of each certificate.
const LIFETIME: &str = "1h";
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

// === impl Storm ===

impl Storm {
    /// Carries thousands of connections, transfers one after the other, and one that lasts, between
    /// two daemons whose workloads' certificates are replaced every second.
    #[must_use]
    pub fn run(duration: Duration) -> Self {
        let (pair, daemons) = RotatedPair::start(POLICY, FileIssuer::new, LIFETIME, |_, reeve| {
            reeve.set("/log/level", json!("info"))
        });
        let _servers = [pair.serve(ANSWER, "answer"), pair.serve(HASH, "hash")];
        let mut storm = Self::default();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let rotations = scope.spawn(|| {
                let mut rotations = 0;
                while !done.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    pair.rotate(LIFETIME);
                    rotations += 1;
                    thread::sleep(EVERY.saturating_sub(started.elapsed()));
                }
                rotations
            });
            storm.carry(&pair, duration);
            done.store(true, Ordering::Relaxed);
            storm.rotations = rotations.join().expect("certificates can be written");
        });
        for daemon in &daemons {
            storm.count(daemon);
        }
        storm
    }

    fn carry(&mut self, pair: &RotatedPair, duration: Duration) {
        let end = Instant::now() + duration;
        let client = &pair.client;
        let to = |port| pair.to(port);
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
        match transferred(transfer, patience) {
            Ok(()) => self.transfers += 1,
            Err(error) => self.wrong.push(error),
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
