//! A network that is cut between two daemons, for seconds and for minutes, and what becomes of the
//! connections across it.

mod scene;

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::scene::{Attempt, ECHO, HASH, Scene, TEXT};
use crate::{Daemon, Metrics, Process, Reeve, wait};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Between two attempts while the network is cut.
const EVERY: Duration = Duration::from_secs(2);
/// What a look, and a program that is started, may take on a busy machine.
const SLACK: Duration = Duration::from_secs(5);
/// Descriptors that come and go: sockets to applications are kept ready by what is used.
const FILES: usize = 24;

const CLOSED: &str = "reeve_connections_closed_total";
const FAILED: &str = "reeve_connections_failed_total";
const TIMEOUT: [(&str, &str); 1] = [("reason", "timeout")];

/// How long the network is cut, and what daemons wait for meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct CutPlan {
    /// For so long connections live on.
    pub short: Duration,
    /// For so long they do not.
    pub long: Duration,
    /// The daemons' time-outs.
    pub patience: Patience,
}

/// Time-outs of the daemons that matter here, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// `timeouts.ping`.
    pub ping: u64,
    /// `timeouts.pingAnswer`.
    pub ping_answer: u64,
    /// `timeouts.silent`.
    pub silent: u64,
    /// `timeouts.connect`.
    pub connect: u64,
    /// `timeouts.request`.
    pub request: u64,
    /// `timeouts.tunnelIdle`.
    pub tunnel_idle: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    /// Connections that lived through the short cut.
    pub lived_on: usize,
    /// Connections that stood when the long one began.
    pub stood: usize,
    /// After so long the first of them had ended for its application, and the last.
    pub ended: [Duration; 2],
    /// After so long no tunnel to the other was left at the client's node, and at the server's.
    pub tunnels: [Duration; 2],
    /// Attempts while it was cut, and how long the slowest took to fail.
    pub attempts: usize,
    /// See `attempts`.
    pub slowest: Duration,
    /// What they were counted as.
    pub reasons: Vec<String>,
    /// Connections to somebody whose network was not cut, in all.
    pub beside: u64,
    /// So long after the end of the long cut the first connection worked.
    pub mended: Duration,
    /// Whatever was not as promised, one sentence each.
    pub wrong: Vec<String>,
}

/// What one daemon had counted.
struct Counted {
    closed: f64,
    failed: f64,
}

// === impl Patience ===

impl Patience {
    /// What holds where nothing is configured.
    pub const DEFAULT: Self = Self {
        ping: 10,
        ping_answer: 20,
        silent: 900,
        connect: 10,
        request: 15,
        tunnel_idle: 60,
    };

    fn configure<'n>(&self, reeve: Reeve<'n>) -> Reeve<'n> {
        // What is shown by default is shown with the defaults.
        if *self == Self::DEFAULT {
            return reeve;
        }
        [
            ("ping", self.ping),
            ("pingAnswer", self.ping_answer),
            ("silent", self.silent),
            ("connect", self.connect),
            ("request", self.request),
            ("tunnelIdle", self.tunnel_idle),
        ]
        .into_iter()
        .fold(reeve, |reeve, (name, seconds)| {
            reeve.set(&format!("/timeouts/{name}"), json!(format!("{seconds}s")))
        })
    }

    /// A tunnel whose peer is silent has ended.
    fn of_tunnel(&self) -> Duration {
        Duration::from_secs((self.ping + self.ping_answer).max(self.silent))
    }

    /// A new connection has failed: its tunnel stands and nobody answers, or none can be opened.
    fn of_attempt(&self) -> Duration {
        Duration::from_secs(self.request.max(self.connect))
    }
}

// === impl Cut ===

impl Cut {
    /// Cuts a server's network from everybody else, for a short while and for a long one.
    #[must_use]
    pub fn run(plan: &CutPlan) -> Self {
        let scene = Scene::new(plan.patience);
        let mut cut = Self::default();
        let capture = scene.client.capture(&scene.network);
        let beside = scene.probe_beside();
        cut.briefly(&scene, plan.short);
        cut.for_long(&scene, plan);
        cut.beside(&beside);
        drop(beside);
        cut.nothing_is_left(&scene, plan.patience);
        let captured = capture.finish();
        let clear = captured.packets("(tcp and not port 15008) or udp");
        if !clear.is_empty() || captured.contains(TEXT) {
            cut.wrong(format!("it left as plaintext: {clear:?}"));
        }
        cut
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    /// All connections live through a cut of seconds, and nothing of a transfer is lost.
    fn briefly(&mut self, scene: &Scene, cut: Duration) {
        let mut connections = scene.connections();
        // Under way before and after, with a write each 100 ms.
        let bytes = ((cut.as_secs() + 4) * 10) << 16;
        let mut transfer = scene.client.spawn_peer([
            "send",
            &scene.to(HASH)[0],
            "--bytes",
            &bytes.to_string(),
            "--trickle",
            "100",
            "--patience",
            "600",
        ]);
        let all = connections.len() as u64 + 1;
        let stands = || (scene.tunnels(1).iter().sum::<u64>() == all).then_some(());
        if wait::until(wait::SOON, stands).is_none() {
            self.wrong("a transfer does not begin");
        }
        scene.server.cut(&scene.network);
        thread::sleep(cut);
        scene.server.mend(&scene.network);
        for connection in &mut connections {
            match connection.goes_on() {
                Ok(()) => self.lived_on += 1,
                Err(error) => self.wrong(format!("it did not live through {cut:?}: {error}")),
            }
        }
        let whole = |seen: Value| seen["received"]["head"] == seen["sent"]["sha256"];
        let ended = wait::until(cut * 4 + wait::SOON, || transfer.ended());
        let seen = serde_json::from_str(&transfer.stdout());
        if !ended.is_some_and(|status| status.success()) || !seen.is_ok_and(whole) {
            self.wrong(format!(
                "a transfer did not live through {cut:?}: {}",
                transfer.stderr()
            ));
        }
    }

    /// All connections end at both ends, new ones fail soon, and all is well afterwards.
    fn for_long(&mut self, scene: &Scene, plan: &CutPlan) {
        let patience = plan.patience;
        let mut connections = scene.connections();
        self.stood = connections.len();
        let files = scene.daemons.each_ref().map(Daemon::open_files);
        let before = Counted::of(scene);
        let begun = Instant::now();
        scene.server.cut(&scene.network);
        let mut ended = vec![None; connections.len()];
        let mut gone = [None; 2];
        let (mut attempts, mut next) = (Vec::new(), EVERY);
        while begun.elapsed() < plan.long {
            for (connection, ended) in connections.iter_mut().zip(&mut ended) {
                if ended.is_none() && connection.process.ended().is_some() {
                    *ended = Some(begun.elapsed());
                }
            }
            for (number, gone) in gone.iter_mut().enumerate() {
                if gone.is_none() && scene.tunnels(number).is_empty() {
                    *gone = Some(begun.elapsed());
                }
            }
            // The last one is to have failed when the network is back.
            let left = plan.long.saturating_sub(begun.elapsed());
            if begun.elapsed() >= next && left > patience.of_attempt() + SLACK {
                next += EVERY;
                attempts.push(Attempt::start(scene, attempts.len()));
            }
            attempts.iter_mut().for_each(Attempt::look);
            thread::sleep(LOOK);
        }
        self.have_ended(scene, patience, &ended, &gone, &before);
        self.attempts(patience, &attempts);
        self.counted(scene, &before);
        scene.server.mend(&scene.network);
        self.is_back(scene);
        let again = scene.connections();
        for (daemon, files) in scene.daemons.iter().zip(files) {
            let now = daemon.open_files();
            if now > files + FILES {
                self.wrong(format!("{now} descriptors are open, and {files} before"));
            }
        }
        drop(again);
    }

    /// What stood has ended for the applications and for both daemons, in time and for the reason
    /// that it was.
    fn have_ended(
        &mut self,
        scene: &Scene,
        patience: Patience,
        ended: &[Option<Duration>],
        gone: &[Option<Duration>; 2],
        before: &[Counted; 2],
    ) {
        let limit = patience.of_tunnel() + SLACK;
        for (what, after) in ended
            .iter()
            .map(|after| ("a connection", after))
            .chain(gone.iter().map(|after| ("a tunnel", after)))
        {
            if !after.is_some_and(|after| after <= limit) {
                self.wrong(format!("{what} had not ended after {limit:?}: {after:?}"));
            }
        }
        let known = || ended.iter().flatten().copied();
        self.ended = [known().min(), known().max()].map(Option::unwrap_or_default);
        self.tunnels = gone.map(Option::unwrap_or_default);
        for (daemon, before) in scene.daemons.iter().zip(before) {
            let closed = daemon.metrics().sum(CLOSED, &TIMEOUT) - before.closed;
            let stood = ended.len() as f64;
            if closed != stood {
                let reasons = daemon.metrics().series(CLOSED);
                self.wrong(format!(
                    "{closed} of {stood} connections were counted as ended by a time-out: {reasons:?}"
                ));
            }
            let logged = daemon.logged(&["connection closed", "\"reason\":\"timeout\""]);
            if logged.len() != ended.len() {
                self.wrong(format!(
                    "a time-out was logged for {} of {stood}",
                    logged.len()
                ));
            }
        }
    }

    /// Who tried meanwhile has failed, and soon.
    fn attempts(&mut self, patience: Patience, attempts: &[Attempt]) {
        let limit = patience.of_attempt() + SLACK;
        self.attempts = attempts.len();
        for attempt in attempts {
            match attempt.failed {
                Some(after) if after <= limit && attempt.process.stdout().is_empty() => {
                    self.slowest = self.slowest.max(after);
                }
                after => self.wrong(format!(
                    "an attempt had not failed after {limit:?}: {after:?}, {}",
                    attempt.process.stderr()
                )),
            }
        }
    }

    /// Each of them is counted and logged, for a reason that says what was wrong.
    fn counted(&mut self, scene: &Scene, before: &[Counted; 2]) {
        let [one, _] = &scene.daemons;
        let metrics = one.metrics();
        let failed = metrics.sum(FAILED, &[]) - before[0].failed;
        let attempts = self.attempts as f64;
        if failed != attempts {
            self.wrong(format!("{failed} of {attempts} attempts were counted"));
        }
        // Nobody answered in a tunnel that stood, or the other could not be reached for one.
        let mut named = 0.0;
        for reason in ["timeout", "peer_unreachable"] {
            let number = metrics.sum(FAILED, &[("reason", reason)]);
            named += number;
            self.reasons.push(format!("{number} {reason}"));
            let logged = one.logged(&["connection refused", reason]).len();
            if number > 0.0 && logged == 0 {
                self.wrong(format!("{reason} is not logged"));
            }
        }
        if named != attempts {
            let reasons = metrics.series(FAILED);
            self.wrong(format!("attempts failed for other reasons: {reasons:?}"));
        }
    }

    /// The network is mended: connections work again, by both families.
    fn is_back(&mut self, scene: &Scene) {
        let begun = Instant::now();
        for to in scene.to(ECHO) {
            let said = wait::until(wait::SOON, || {
                let words = ["send", &to, "--text", TEXT, "--patience", "3"];
                let output = scene.client.peer(words);
                let whole = output.status.success() && output.stdout.contains(TEXT);
                whole.then_some(())
            });
            if said.is_none() {
                self.wrong(format!("{to} is not reached again within {:?}", wait::SOON));
            }
            if self.mended.is_zero() {
                self.mended = begun.elapsed();
            }
        }
    }

    /// Nobody else has noticed anything.
    fn beside(&mut self, probe: &Process) {
        let printed = probe.stdout();
        let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let last = whole.lines().last().unwrap_or("{}");
        let seen: Value = serde_json::from_str(last).unwrap_or_default();
        self.beside = seen["worked"].as_u64().unwrap_or_default();
        if self.beside == 0 || seen["failed"] != json!({}) {
            self.wrong(format!("somebody beside was not served: {seen}"));
        }
    }

    /// Once nobody talks any more, everything is let go.
    fn nothing_is_left(&mut self, scene: &Scene, patience: Patience) {
        let limit = Duration::from_secs(patience.tunnel_idle) + wait::SOON;
        for (number, daemon) in scene.daemons.iter().enumerate() {
            let open = |metrics: &Metrics| {
                ["reeve_streams_open", "reeve_tunnels_open"].map(|name| metrics.sum(name, &[]))
            };
            let none = || (open(&daemon.metrics()) == [0.0; 2]).then_some(());
            if wait::until(limit, none).is_none() {
                let [streams, tunnels] = open(&daemon.metrics());
                self.wrong(format!(
                    "daemon {number} still has {streams} streams and {tunnels} tunnels"
                ));
            }
        }
    }
}

// === impl Counted ===

impl Counted {
    fn of(scene: &Scene) -> [Self; 2] {
        scene.daemons.each_ref().map(|daemon| {
            let metrics = daemon.metrics();
            Self {
                closed: metrics.sum(CLOSED, &TIMEOUT),
                failed: metrics.sum(FAILED, &[]),
            }
        })
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |duration: &Duration| format!("{:.1} s", duration.as_secs_f64());
        writeln!(f, "cut briefly: {} connections lived on", self.lived_on)?;
        writeln!(
            f,
            "cut for long: {} connections ended after {} to {}; the last tunnel after {} at the \
             client's node, {} at the server's",
            self.stood,
            seconds(&self.ended[0]),
            seconds(&self.ended[1]),
            seconds(&self.tunnels[0]),
            seconds(&self.tunnels[1]),
        )?;
        writeln!(
            f,
            "{} attempts meanwhile, the slowest failed after {}; {}",
            self.attempts,
            seconds(&self.slowest),
            self.reasons.join(", ")
        )?;
        writeln!(
            f,
            "mended: the first connection worked after {}",
            seconds(&self.mended)
        )?;
        writeln!(
            f,
            "beside: {} connections to somebody whose network was not cut",
            self.beside
        )
    }
}
