//! What comes and goes all the while: short connections, denied ones, transfers and datagrams.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{ANSWER, DENIED, HASH, UDP, scene::Scene};
use crate::{Process, rotated_pair::transferred};

/// Bytes of one of the transfers that follow each other.
const TRANSFER: u64 = 16 << 20;
/// For a transfer to end.
const PATIENCE: Duration = Duration::from_secs(300);

/// Connections one after another, whose failures are told from each other by their time.
pub(super) struct Short {
    process: Process,
    pub(super) worked: u64,
    failed: BTreeMap<String, u64>,
}

/// What came of transfers, or of datagrams.
#[derive(Default)]
pub(super) struct Tried {
    pub(super) worked: u64,
    /// During a cut.
    pub(super) excused: u64,
    /// At which moments, and how.
    pub(super) wrong: Vec<(Instant, String)>,
}

impl Short {
    /// By plain TCP, and through reeve.
    pub(super) fn start(scene: &Scene) -> [Self; 2] {
        scene.ends().map(|ends| {
            Self::new(
                ends.client
                    .spawn_peer(["probe", &ends.to(ANSWER, 0), "--pause", "5"]),
            )
        })
    }

    /// To a port that the policies do not allow.
    pub(super) fn denied(scene: &Scene) -> Self {
        let [_, ends] = scene.ends();
        let words = ["probe", &ends.to(DENIED, 0), "--pause", "50"];
        Self::new(ends.client.spawn_peer(words))
    }

    fn new(process: Process) -> Self {
        Self {
            process,
            worked: 0,
            failed: BTreeMap::new(),
        }
    }

    /// Those that have failed since the last look: how, and how many.
    pub(super) fn look(&mut self) -> Vec<(String, u64)> {
        let last = self.process.last_line().unwrap_or_default();
        let Ok(seen) = serde_json::from_str::<Value>(&last) else {
            return Vec::new();
        };
        self.worked = seen["worked"].as_u64().unwrap_or_default();
        let mut new = Vec::new();
        for (error, number) in seen["failed"].as_object().into_iter().flatten() {
            let number = number.as_u64().unwrap_or_default();
            let known = self.failed.entry(error.clone()).or_default();
            if number > *known {
                new.push((error.clone(), number - *known));
                *known = number;
            }
        }
        new
    }

    pub(super) fn failed(&self) -> u64 {
        self.failed.values().sum()
    }
}

impl Tried {
    fn note(&mut self, scene: &Scene, begun: Instant, result: Result<(), String>) {
        match result {
            Ok(()) => self.worked += 1,
            Err(_) if scene.weather.excuses(begun) => self.excused += 1,
            Err(error) => self.wrong.push((Instant::now(), error)),
        }
    }
}

pub(super) fn transfers(scene: &Scene, until: Instant) -> Tried {
    let mut tried = Tried::default();
    let [_, ends] = scene.ends();
    while Instant::now() < until {
        let begun = Instant::now();
        let bytes = TRANSFER.to_string();
        let words = ["send", &ends.to(HASH, 0), "--bytes", &bytes];
        let result = transferred(ends.client.spawn_peer(words), PATIENCE);
        tried.note(scene, begun, result);
        thread::sleep(Duration::from_millis(200));
    }
    tried
}

pub(super) fn datagrams(scene: &Scene, until: Instant) -> Tried {
    let mut tried = Tried::default();
    let [_, ends] = scene.ends();
    while Instant::now() < until {
        for family in 0..2 {
            let begun = Instant::now();
            let to = ends.to(UDP, family);
            let output = ends.client.peer(["udp-send", &to, "--patience", "10000"]);
            let result = match output.status.success() {
                true => Ok(()),
                false => Err(format!("a datagram was lost: {}", output.stderr.trim())),
            };
            tried.note(scene, begun, result);
        }
        thread::sleep(Duration::from_millis(200));
    }
    tried
}
