//! How far a daemon has come that lets its connections end, and who is told of it.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{
    daemon::{Daemon, View},
    passing,
};
use crate::{
    handover::{Before, Draining, Left, LeftOf, Rest, Word},
    identity::IdentityStore,
    telemetry::UNKNOWN,
};

/// How often others are told.
const TELL: Duration = Duration::from_secs(1);
/// How often there may be a line in the log, in times of [`TELL`].
const LOG: u32 = 10;
/// How often there is one though nothing has changed, in times of [`TELL`].
const LOG_AGAIN: u32 = 3600;
/// Workloads that are named.
const MOST_WORKLOADS: usize = 10;
/// Daemons that are told of, this one and those before it: one message holds them.
const MOST_DAEMONS: usize = 17;
/// Unread news of old daemons; one that says more waits.
const NEWS: usize = 16;
/// For an old daemon to come to the one that serves now.
pub(super) const MOVE: Duration = Duration::from_secs(5);

/// Since when connections end by themselves, and when they are ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drain {
    since: Instant,
    /// None where that is left to the connections.
    pub(super) until: Option<Instant>,
}

impl Daemon {
    /// Connections end by themselves from now on, and are ended at `until`, if that is some time.
    pub(super) fn drain_until(&self, until: Option<Instant>) {
        let mut view = View::clone(&self.view.load());
        let since = view.draining.map_or_else(Instant::now, |drain| drain.since);
        view.draining = Some(Drain { since, until });
        self.view.store(Arc::new(view));
    }

    /// What is left, where this daemon lets its connections end.
    pub(super) fn draining(&self) -> Option<Draining> {
        let Drain { since, until } = self.view.load().draining?;
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
            started: self.started_at,
            seconds: since.elapsed().as_secs(),
            left: Some(Left {
                connections,
                workloads,
                seconds: until
                    .map(|until| until.saturating_duration_since(Instant::now()).as_secs()),
            }),
            certificates: Some(self.used_certificates()),
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
pub(super) async fn tell(daemon: &Daemon, others: impl Fn(Rest)) {
    let mut turns = interval(TELL);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut turn = 0;
    let mut logged = (0, None);
    loop {
        turns.tick().await;
        let Some(draining) = daemon.draining() else {
            continue;
        };
        if let Some(left) = draining.left.as_ref().filter(|_| turn % LOG == 0) {
            let now = Some(left.connections);
            if logged.1 != now || left.seconds.is_some() || turn - logged.0 >= LOG_AGAIN {
                tracing::info!("draining: {left}");
                logged = (turn, now);
            }
        }
        turn += 1;
        let before = daemon.predecessors.load();
        let all = std::iter::once(draining).chain(before.iter().cloned());
        let used = daemon.used();
        daemon.identities.keep_passed(&used);
        others(Rest {
            left: all.take(MOST_DAEMONS).collect(),
            used,
        });
    }
}

/// The old daemons that this one hears. One that was taken over from a moment ago tells of those before
/// it as well, until they have moved here.
#[derive(Debug)]
pub(super) struct Predecessors {
    heard: BTreeMap<u64, Heard>,
    /// Those that are about to move here, and whom nobody tells of meanwhile.
    moving: Vec<(Id, Instant)>,
    /// Number of the next one.
    next: u64,
    news: mpsc::Receiver<News>,
    teller: mpsc::Sender<News>,
}

/// Process and start of a daemon.
type Id = (u32, u64);

/// Of one of them, by its number: what is left of it and of those before it, or that it has ended.
pub(super) type News = (u64, Option<Vec<Draining>>);

#[derive(Debug)]
struct Heard {
    before: Before,
    left: Vec<Draining>,
}

// === impl Predecessors ===

impl Predecessors {
    pub(super) fn new() -> Self {
        let (teller, news) = mpsc::channel(NEWS);
        Self {
            heard: BTreeMap::new(),
            moving: Vec::new(),
            next: 0,
            news,
            teller,
        }
    }

    /// Hears one more, and passes certificates to it. Needs a tokio runtime.
    pub(super) fn add(&mut self, before: Before, identities: Arc<IdentityStore>) {
        let passing = passing::pass(identities, before.heard.used.clone(), before.passer());
        tokio::spawn(passing);
        let number = self.next;
        self.next += 1;
        let mut left = before.heard.left.clone();
        let teller = self.teller.clone();
        tokio::spawn(async move {
            while left.changed().await.is_ok() {
                let now = left.borrow_and_update().clone();
                if teller.send((number, Some(now))).await.is_err() {
                    return;
                }
            }
            // Nobody to tell means that this daemon is ending.
            let _ = teller.send((number, None)).await;
        });
        let left = before.heard.left.borrow().clone();
        self.heard.insert(number, Heard { before, left });
    }

    /// Tells all of them what to do.
    pub(super) fn tell(&self, word: Word) {
        for heard in self.heard.values() {
            heard.before.tell(word);
        }
    }

    /// Tells all of them which cgroups are those of the daemon that serves, or is about to.
    pub(super) fn tell_of(&self, cgroups: &[(u64, u32)]) {
        for heard in self.heard.values() {
            heard.before.tell_of(cgroups);
        }
    }

    pub(super) fn are_gone(&self) -> bool {
        let moves = |(_, since): &(Id, Instant)| since.elapsed() < MOVE;
        self.heard.is_empty() && !self.moving.iter().any(moves)
    }

    /// Waits for news.
    pub(super) async fn news(&mut self) -> Option<News> {
        self.news.recv().await
    }

    /// Notes what one has said. True where it has ended, and none is left.
    pub(super) fn note(&mut self, (number, news): News) -> bool {
        let Some(left) = news else {
            let ended = self.heard.remove(&number);
            let told_of = ended
                .into_iter()
                .flat_map(|ended| ended.left.into_iter().skip(1));
            let now = Instant::now();
            self.moving.retain(|(_, since)| since.elapsed() < MOVE);
            self.moving.extend(told_of.map(|daemon| (id(&daemon), now)));
            return self.are_gone();
        };
        if let Some(first) = left.first().map(id) {
            self.moving.retain(|(moving, _)| *moving != first);
        }
        if let Some(heard) = self.heard.get_mut(&number) {
            heard.left = left;
        }
        false
    }

    /// All that are known, the one that was taken over from last at first.
    pub(super) fn all(&self) -> Vec<Draining> {
        let heard = || self.heard.values().map(|heard| &heard.left[..]);
        // What one says of itself is newer than what others say of it.
        let own = heard().filter_map(|left| left.first());
        let others = heard().flat_map(|left| left.iter().skip(1));
        let mut seen = HashSet::new();
        let mut all: Vec<_> = own
            .chain(others)
            .filter(|daemon| seen.insert(id(daemon)))
            .cloned()
            .collect();
        all.sort_by_key(|daemon| daemon.seconds);
        all
    }

    /// Ends those that have not ended though they were told to.
    pub(super) fn kill(&self) {
        for heard in self.heard.values() {
            let daemon = heard.left.first().map(ToString::to_string);
            tracing::warn!(
                daemon,
                "an old daemon does not end when it is told to: it is killed"
            );
            if let Err(error) = heard.before.kill() {
                tracing::error!(%error, daemon, "an old daemon cannot be killed");
            }
        }
    }
}

pub(super) fn id(daemon: &Draining) -> Id {
    (daemon.process, daemon.started)
}
