//! Mixed traffic between two daemons for as long as it is wanted, while everything is done to them that
//! a node lives through, and what they hold meanwhile. Plain TCP goes beside: what it keeps, reeve keeps.

mod course;
mod lasting;
mod scene;
mod schedule;
mod traffic;

use std::{
    collections::BTreeMap,
    fmt, thread,
    time::{Duration, Instant},
};

use serde_json::Value;

pub use self::{
    course::{Course, Sample},
    lasting::Kind,
    schedule::Happening,
};
use self::{
    lasting::{FIRST, NEXT, Twins},
    scene::{Old, Scene},
    schedule::{Event, Schedule},
    traffic::{Short, Tried},
};
use crate::{Daemon, wait};

const ANSWER: u16 = 7001;
const HASH: u16 = 7002;
const ECHO: u16 = 7003;
const UDP: u16 = 7004;
const DENIED: u16 = 7999;

/// For an old daemon to end after its last connection.
const LEAVES: Duration = Duration::from_secs(30);
/// Of the sentences about what went wrong: who reads more than these learns nothing more.
const MOST_WRONG: usize = 100;

/// What came of a soak.
#[derive(Clone, Debug, Default)]
pub struct Soak {
    /// What the daemons held, time after time.
    pub samples: Vec<Sample>,
    /// Short connections that worked.
    pub connections: u64,
    /// Those of plain TCP, and how many of them failed.
    pub plain: [u64; 2],
    /// Attempts that were denied, as they should be.
    pub denied: u64,
    /// Transfers whose contents arrived whole.
    pub transfers: u64,
    /// Datagrams that were answered.
    pub datagrams: u64,
    /// What failed during a cut: short connections, transfers and datagrams.
    pub excused: u64,
    /// How long after the end of each cut a short connection worked: plain TCP, and reeve.
    pub recovered: [Vec<Duration>; 2],
    /// What was done to the nodes.
    pub happened: BTreeMap<Happening, Tally>,
    /// Long connections of each kind, and how many were kept until the end: plain TCP, and reeve.
    pub long: BTreeMap<Kind, Tally>,
    /// Old daemons that had left by themselves before the end, and that left with their last connection.
    pub left: [usize; 2],
    /// Whatever went wrong, one sentence each.
    pub wrong: Vec<String>,
    /// What the daemons say of it: how connections and tunnels ended, and their warnings. Empty where
    /// nothing went wrong.
    pub said: String,
}

/// What was counted of one thing; arrays are of plain TCP and of reeve.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// How often it was.
    pub times: usize,
    /// Long connections that it met, over all times.
    pub met: [usize; 2],
    /// Those that did not outlive it.
    pub lost: [usize; 2],
}

/// The times of a run.
struct Times {
    begun: Instant,
    duration: Duration,
    idle: Duration,
    cut: Duration,
}

/// A run under way.
struct Running<'s> {
    scene: &'s Scene,
    times: Times,
    schedule: std::iter::Peekable<std::vec::IntoIter<(Duration, Event)>>,
    daemons: &'s mut [Daemon; 2],
    old: Vec<Old>,
    long: Vec<Twins>,
    short: [Short; 2],
    denied: Short,
    /// When the leaves expire that are in force.
    leaves_until: Duration,
    /// Since the end of the last cut, and what had worked by then.
    recovering: [Option<(Instant, u64)>; 2],
    /// What was done last, the newest at the end.
    recent: Vec<(Duration, Happening)>,
    soak: Soak,
}

// === impl Soak ===

impl Soak {
    /// Carries long and short connections, transfers, datagrams and denied attempts between two daemons,
    /// while nodes are upgraded, the wire is cut, a clock steps, and leaves, roots and policies change.
    #[must_use]
    pub fn run(duration: Duration) -> Self {
        let schedule = Schedule::of(duration);
        let (scene, mut daemons) = Scene::new(schedule.leaf);
        let times = Times {
            begun: Instant::now(),
            duration,
            idle: schedule.idle,
            cut: schedule.cut,
        };
        let end = times.begun + duration;
        scene.renew(schedule.leaf);
        thread::scope(|scope| {
            let transfers = scope.spawn(|| traffic::transfers(&scene, end));
            let datagrams = scope.spawn(|| traffic::datagrams(&scene, end));
            let mut running = Running {
                scene: &scene,
                times,
                schedule: schedule.events.into_iter().peekable(),
                daemons: &mut daemons,
                old: Vec::new(),
                long: Vec::new(),
                short: Short::start(&scene),
                denied: Short::denied(&scene),
                leaves_until: schedule.leaf,
                recovering: [None; 2],
                recent: Vec::new(),
                soak: Self::default(),
            };
            running.open(&FIRST);
            running.go_on();
            let transfers = transfers.join().expect("transfers can be tried");
            let datagrams = datagrams.join().expect("datagrams can be tried");
            running.soak.transfers = transfers.worked;
            running.soak.datagrams = datagrams.worked;
            for tried in [transfers, datagrams] {
                running.tried(tried);
            }
            running.finish()
        })
    }

    /// How each figure went.
    #[must_use]
    pub fn courses(&self) -> Vec<Course> {
        course::courses(&self.samples)
    }

    /// How often something happened.
    #[must_use]
    pub fn times(&self, happening: Happening) -> usize {
        self.happened.get(&happening).map_or(0, |tally| tally.times)
    }
}

// === impl Running ===

impl Running<'_> {
    /// Until the end of the run.
    fn go_on(&mut self) {
        // Some hundred samples of a run, and at least one a second.
        let pause = (self.times.duration / 500).max(Duration::from_millis(200));
        let pause = pause.min(Duration::from_secs(1));
        let mut next = Duration::ZERO;
        while self.times.elapsed() < self.times.duration {
            while let Some((at, event)) = self.schedule.peek().copied()
                && at <= self.times.elapsed()
            {
                self.schedule.next();
                // What the last event has ended is its own.
                self.look();
                self.happens(event);
            }
            if self.times.elapsed() >= next {
                self.look();
                self.soak.left[0] += self.forget();
                let at = self.times.elapsed();
                let sample = scene::sample(at, &*self.daemons, &self.old);
                self.soak.samples.push(sample);
                next = self.times.elapsed() + pause;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn happens(&mut self, event: Event) {
        let happening = event.happening();
        let tally = self.soak.happened.entry(happening).or_default();
        tally.times += 1;
        for twins in &self.long {
            for (met, kept) in tally.met.iter_mut().zip(twins.kept()) {
                *met += usize::from(kept);
            }
        }
        let times = tally.times;
        self.recent.push((self.times.elapsed(), happening));
        match event {
            Event::Renewal(valid) => self.renew(valid),
            Event::Policy => scene::change_policy(&*self.daemons, times % 2 == 1),
            Event::Upgrade(node) => self.upgrade(node),
            Event::Cut => self.scene.cut(),
            Event::Mend => {
                self.scene.mend();
                let worked = self.short.each_ref().map(|short| short.worked);
                self.recovering = worked.map(|worked| Some((Instant::now(), worked)));
            }
            Event::Clock(offset) => self.scene.clock.set(offset),
            Event::Root(step) => self.scene.pair.issuer.rotate(step),
            Event::Away => {}
        }
    }

    fn renew(&mut self, valid: Duration) {
        let until = self.times.elapsed() + valid;
        self.scene.renew(valid);
        let late = self.times.elapsed().saturating_sub(self.leaves_until);
        if !late.is_zero() {
            self.wrong(format!(
                "leaves were replaced {late:?} after they had expired: this machine does too much else \
                 for the run to tell anything of the connections that ended"
            ));
        }
        self.leaves_until = until;
    }

    fn upgrade(&mut self, node: usize) {
        let daemon = &mut self.daemons[node];
        let process = daemon.start_taking_over();
        // Its log does not say so: it has warnings alone.
        let serves = || {
            let said = daemon.command(["status", "--json"]);
            let status: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
            (status["process"] == daemon.id()).then_some(())
        };
        if wait::until(wait::SOON, serves).is_none() {
            let log = daemon.log();
            self.wrong(format!("no daemon took over at node {node}: {log}"));
        }
        self.old.push(Old { process, node });
        self.open(&NEXT);
    }

    fn open(&mut self, kinds: &[(Kind, usize)]) {
        let first = self.long.len();
        for &(kind, number) in kinds {
            for number in 0..number {
                let twins = Twins::open(kind, number, self.scene.ends(), &self.times);
                self.long.push(twins);
            }
        }
        let begun = || {
            let mut new = self.long[first..].iter();
            new.all(Twins::have_begun).then_some(())
        };
        // Those that do not begin end with an error that is seen then.
        let _ = wait::until(wait::SOON, begun);
    }

    /// Looks at everything that may have failed since the last time.
    fn look(&mut self) {
        let ended: Vec<_> = self
            .long
            .iter_mut()
            .map(|twins| (twins.kind, twins.look()))
            .collect();
        for (number, (kind, ended)) in ended.into_iter().enumerate() {
            self.ended(number, kind, ended);
        }
        let failed = self.short.each_mut().map(Short::look);
        let [_, of_reeve] = failed;
        let excused = self.scene.weather.excuses(Instant::now());
        for (error, number) in of_reeve {
            if excused {
                self.soak.excused += number;
            } else {
                self.wrong(format!("{number} short connections failed: {error}"));
            }
        }
        for (error, number) in self.denied.look() {
            if error.contains("not permitted") {
                self.soak.denied += number;
            } else {
                self.wrong(format!("{number} attempts were denied otherwise: {error}"));
            }
        }
        let sides = self.short.iter().zip(&mut self.recovering);
        for ((short, recovering), recovered) in sides.zip(&mut self.soak.recovered) {
            if let Some((since, worked)) = *recovering
                && short.worked > worked
            {
                recovered.push(since.elapsed());
                *recovering = None;
            }
        }
    }

    /// Forgets old daemons that have ended. Their connections are told already.
    fn forget(&mut self) -> usize {
        let before = self.old.len();
        self.old.retain_mut(|old| old.process.ended().is_none());
        before - self.old.len()
    }

    /// Tells of long connections that have ended before their time.
    fn ended(&mut self, number: usize, kind: Kind, ended: [Option<String>; 2]) {
        let cause = self.cause();
        for (side, error) in ended.into_iter().enumerate() {
            let Some(error) = error else { continue };
            if let Some(cause) = cause {
                let tally = self.soak.happened.entry(cause).or_default();
                tally.lost[side] += 1;
            }
            let [plain, _] = self.long[number].kept();
            let whose = ["of plain TCP", "through reeve"][side];
            let what =
                format!("a long connection {whose} ({kind}, number {number}) ended: {error}");
            if side == 1 && plain {
                self.wrong(what);
            } else {
                eprintln!("{}", self.stamped(&what));
            }
        }
    }

    /// What has ended connections that end now, as far as can be told from the time.
    fn cause(&self) -> Option<Happening> {
        let rare = self.recent.iter().rev().find(|it| !it.1.is_frequent());
        let now = self.times.elapsed();
        match rare {
            Some((at, happening)) if now < *at + self.times.duration / 40 + self.times.cut => {
                Some(*happening)
            }
            _ => self.recent.last().map(|(_, happening)| *happening),
        }
    }

    fn tried(&mut self, tried: Tried) {
        self.soak.excused += tried.excused;
        for (at, error) in tried.wrong {
            let at = at.saturating_duration_since(self.times.begun);
            let what = format!("{:.1} s: {error}", at.as_secs_f64());
            self.wrong(what);
        }
    }

    fn wrong(&mut self, what: impl AsRef<str>) {
        // Where the environment asks for it, programs print more than their error.
        let what = what.as_ref().split("Stack backtrace").next();
        let what = self.stamped(what.unwrap_or_default().trim());
        eprintln!("{what}");
        if self.soak.wrong.len() < MOST_WRONG {
            self.soak.wrong.push(what);
        }
    }

    /// When it is, and what was done shortly before.
    fn stamped(&self, what: &str) -> String {
        let now = self.times.elapsed();
        let before: Vec<_> = self
            .recent
            .iter()
            .rev()
            .take(4)
            .map(|(at, happening)| {
                let ago = now.saturating_sub(*at).as_secs_f64();
                format!("{happening} {ago:.1} s ago")
            })
            .collect();
        format!(
            "[{:.1} s] {what} ({})",
            now.as_secs_f64(),
            before.join(", ")
        )
    }

    /// All that lasts closes now, and old daemons leave with it.
    fn finish(mut self) -> Soak {
        let patience = self.times.patience();
        let late: Vec<_> = self
            .long
            .iter_mut()
            .map(|twins| (twins.kind, twins.finish(patience)))
            .collect();
        for (number, (kind, ended)) in late.into_iter().enumerate() {
            self.ended(number, kind, ended);
        }
        self.look();
        for twins in &self.long {
            let tally = self.soak.long.entry(twins.kind).or_default();
            tally.times += 1;
            for ((met, lost), kept) in tally.met.iter_mut().zip(&mut tally.lost).zip(twins.kept()) {
                *met += 1;
                *lost += usize::from(!kept);
            }
        }
        let gone = wait::until(LEAVES, || {
            self.forget();
            self.old.is_empty().then_some(())
        });
        self.soak.left[1] =
            self.soak.times(Happening::Upgrade) - self.soak.left[0] - self.old.len();
        if gone.is_none() {
            let nodes: Vec<_> = self.old.iter().map(|old| old.node).collect();
            self.wrong(format!(
                "old daemons have not left {LEAVES:?} after their last connection, at nodes {nodes:?}"
            ));
        }
        let [plain, reeve] = &self.short;
        self.soak.plain = [plain.worked, plain.failed()];
        self.soak.connections = reeve.worked;
        if self.denied.worked > 0 {
            let worked = self.denied.worked;
            self.wrong(format!("{worked} connections were not denied"));
        }
        let cuts = self.soak.times(Happening::Mend);
        if self.soak.recovered[1].len() < cuts {
            self.wrong("no short connection worked after a cut, until the next one");
        }
        for course in self.soak.courses() {
            if course.grows() {
                self.wrong(format!("it grows: {course}"));
            }
        }
        if !self.soak.wrong.is_empty() {
            self.soak.said = self.daemons.iter().map(testimony).collect();
            for old in &self.old {
                self.soak.said += &old.process.stderr();
            }
        }
        self.soak
    }
}

// === impl Times ===

impl Times {
    fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    fn left(&self) -> Duration {
        self.duration.saturating_sub(self.elapsed())
    }

    /// For an answer: what was sent into a cut is sent again after as long once more.
    fn patience(&self) -> Duration {
        self.cut * 4 + Duration::from_secs(60)
    }
}

// === Report ===

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [plain, failed] = self.plain;
        writeln!(
            f,
            "{} short connections ({plain} of plain TCP beside, {failed} failed), {} transfers, {} \
             datagrams, {} denied attempts; {} failed during a cut; {} samples",
            self.connections,
            self.transfers,
            self.datagrams,
            self.denied,
            self.excused,
            self.samples.len()
        )?;
        let of = |tally: &Tally, side: usize| {
            let met = tally.met[side];
            format!("{} of {met}", met.saturating_sub(tally.lost[side]))
        };
        writeln!(
            f,
            "\ndone                        times   kept by plain TCP       kept by reeve"
        )?;
        for (happening, tally) in &self.happened {
            let (plain, reeve) = (of(tally, 0), of(tally, 1));
            writeln!(f, "{happening:28}{:5}{plain:>20}{reeve:>20}", tally.times)?;
        }
        writeln!(
            f,
            "\nlong connections            opened  kept by plain TCP       kept by reeve"
        )?;
        for (kind, tally) in &self.long {
            let (plain, reeve) = (of(tally, 0), of(tally, 1));
            writeln!(f, "{kind:28}{:5}{plain:>20}{reeve:>20}", tally.times)?;
        }
        let most = |of: &[Duration]| of.iter().max().map_or(0.0, Duration::as_secs_f64);
        let [plain, reeve] = self.recovered.each_ref().map(|of| most(of));
        writeln!(
            f,
            "\na short connection worked at most {plain:.1} s after a cut by plain TCP, {reeve:.1} s \
             through reeve; old daemons: {} left before the end, {} with their last connection at it",
            self.left[0], self.left[1]
        )?;
        writeln!(f, "\n{}", Course::HEAD)?;
        for course in self.courses() {
            writeln!(f, "{course}")?;
        }
        f.write_str(&self.said)
    }
}

/// How a daemon's connections and tunnels ended, and what it warned of.
fn testimony(daemon: &Daemon) -> String {
    const TOLD: [&str; 6] = [
        "reeve_connections_closed_total",
        "reeve_connections_failed_total",
        "reeve_tunnels_closed_total",
        "reeve_tls_handshakes_total",
        "reeve_tunnel_proofs_total",
        "reeve_map_entries",
    ];
    let metrics = daemon.get("/metrics").unwrap_or_default();
    let told: String = metrics
        .lines()
        .filter(|line| TOLD.iter().any(|name| line.starts_with(name)))
        .map(|line| format!("{line}\n"))
        .collect();
    format!("{}:\n{told}{}", daemon.config().display(), daemon.log())
}
