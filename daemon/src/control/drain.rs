//! How far a daemon has come that lets its connections end, and who is told of it.

use std::{
    fmt::Write,
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use super::daemon::{Daemon, View};
use crate::{
    handover::{Before, Draining, Left, LeftOf, Word},
    telemetry::UNKNOWN,
};

/// How often others are told.
const TELL: Duration = Duration::from_secs(1);
/// How often there is a line in the log, in times of [`TELL`].
const LOG: u32 = 10;
/// Workloads that are named.
const MOST_WORKLOADS: usize = 10;
/// Daemons that are told of, this one and those before it: one message holds them.
const MOST_DAEMONS: usize = 8;

impl Daemon {
    /// Connections end by themselves from now on, for at most `patience`.
    pub(super) fn begin_draining(&self, patience: Duration) {
        let mut view = View::clone(&self.view.load());
        view.draining = Some(Instant::now() + patience);
        self.view.store(Arc::new(view));
    }

    /// What is left, where this daemon lets its connections end.
    pub(super) fn draining(&self) -> Option<Draining> {
        let until = self.view.load().draining?;
        let (connections, by_workload) = self.tunnels.connections();
        let snapshot = self.snapshot.load();
        let mut workloads: Vec<_> = by_workload
            .into_iter()
            .map(|(id, connections)| LeftOf {
                workload: snapshot
                    .workload(id)
                    .map_or(UNKNOWN, |running| &running.workload.name)
                    .to_owned(),
                connections,
            })
            .collect();
        workloads.sort_by(|one, other| {
            let by_name = || one.workload.cmp(&other.workload);
            let most_first = other.connections.cmp(&one.connections);
            most_first.then_with(by_name)
        });
        workloads.truncate(MOST_WORKLOADS);
        Some(Draining {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            left: Some(Left {
                connections,
                workloads,
                seconds: until.saturating_duration_since(Instant::now()).as_secs(),
            }),
        })
    }

    /// How it is, in one line.
    pub(super) fn in_a_line(&self) -> String {
        let mut line = match (self.draining(), &self.readiness().missing[..]) {
            (
                Some(Draining {
                    left: Some(left), ..
                }),
                _,
            ) => format!("draining: {left}"),
            (_, []) => "ready".to_owned(),
            (_, missing) => format!("not ready: {}", missing.join("; ")),
        };
        for predecessor in &**self.predecessors.load() {
            // Writing to a string does not fail.
            let _ = write!(line, "; a daemon before still drains: {predecessor}");
        }
        line
    }
}

/// Tells `others` of this daemon's drain, and of those before it, for as long as the future is
/// polled; and the log, now and then.
pub(super) async fn tell(daemon: &Daemon, others: impl Fn(Vec<Draining>)) {
    let mut turns = interval(TELL);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut turn = 0;
    loop {
        turns.tick().await;
        let Some(draining) = daemon.draining() else {
            continue;
        };
        if let Some(left) = draining.left.as_ref().filter(|_| turn % LOG == 0) {
            tracing::info!("draining: {left}");
        }
        turn += 1;
        let before = daemon.predecessors.load();
        let all = std::iter::once(draining).chain(before.iter().cloned());
        others(all.take(MOST_DAEMONS).collect());
    }
}

/// The daemon from which this one took over, as it says itself how much is left of it.
#[derive(Debug, Default)]
pub(super) struct Predecessor(Option<Before>);

// === impl Predecessor ===

impl Predecessor {
    pub(super) fn new(before: Before) -> Self {
        Self(Some(before))
    }

    /// Tells it what to do, if there is one.
    pub(super) fn tell(&self, word: Word) {
        if let Some(before) = &self.0 {
            before.tell(word);
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.0.is_none()
    }

    /// Waits for news: what is left of it and of those before it, or that it has ended. Waits for
    /// ever where there is none.
    pub(super) async fn news(&mut self) -> Option<Vec<Draining>> {
        let Some(Before { left, .. }) = &mut self.0 else {
            return pending().await;
        };
        match left.changed().await {
            Ok(()) => Some(left.borrow_and_update().clone()),
            Err(_) => {
                self.0 = None;
                None
            }
        }
    }
}
