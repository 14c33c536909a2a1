//! Long connections, each of them twice: through reeve, and by plain TCP between an unenrolled pair on
//! the same bridge.

use std::{fmt, time::Duration};

use serde_json::Value;

use super::{ECHO, HASH, scene::Ends};
use crate::{Process, wait};

/// What a long connection does until the end of the run. All close their sending half then, and read
/// to the other's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Says a few bytes each second, and compares their echo.
    Beats,
    /// Says a few bytes now and then, and compares their echo.
    Idle,
    /// Sends 64 KiB ten times a second and compares their echo.
    Bulk,
    /// Sends 64 KiB ten times a second; the answer to the half-close is a checksum of it all.
    Sends,
}

/// How many of which kind there are at the beginning.
pub(super) const FIRST: [(Kind, usize); 4] = [
    (Kind::Beats, 4),
    (Kind::Idle, 8),
    (Kind::Bulk, 1),
    (Kind::Sends, 1),
];
/// How many are opened after each upgrade, so that every daemon holds some.
pub(super) const NEXT: [(Kind, usize); 2] = [(Kind::Beats, 2), (Kind::Idle, 2)];

/// A connection by plain TCP, and its twin through reeve.
pub(super) struct Twins {
    pub(super) kind: Kind,
    /// Of plain TCP, and of reeve.
    sides: [Side; 2],
}

struct Side {
    process: Process,
    /// Why it ended before its time.
    broken: Option<String>,
    done: bool,
}

impl Twins {
    /// Opens both. `number` chooses the address family.
    pub(super) fn open(
        kind: Kind,
        number: usize,
        ends: [Ends<'_>; 2],
        times: &super::Times,
    ) -> Self {
        let lifetime = times.left().as_secs().to_string();
        let patience = times.patience().as_secs().to_string();
        let idle = times.idle.as_millis().to_string();
        let sides = ends.map(|ends| {
            let port = if kind == Kind::Sends { HASH } else { ECHO };
            let to = ends.to(port, number);
            let words: &[&str] = match kind {
                Kind::Beats => &["heartbeat", &to, "--every", "1000"],
                Kind::Idle => &["heartbeat", &to, "--every", &idle],
                Kind::Bulk => &["heartbeat", &to, "--every", "100", "--bytes", "65536"],
                Kind::Sends => &["send", &to, "--trickle", "100"],
            };
            // The sender reads nothing until it has sent everything.
            let silence = (times.left() + times.patience()).as_secs().to_string();
            let patience = match kind {
                Kind::Sends => &silence,
                _ => &patience,
            };
            let always = ["--for", &lifetime, "--patience", patience];
            Side {
                process: ends.client.spawn_peer(words.iter().copied().chain(always)),
                broken: None,
                done: false,
            }
        });
        Self { kind, sides }
    }

    /// Whether both have carried something.
    pub(super) fn have_begun(&self) -> bool {
        let begun = |side: &Side| side.process.last_line().is_some();
        self.kind == Kind::Sends || self.sides.iter().all(begun)
    }

    /// Looks at both. Gives which have ended before their time since the last look, and why.
    pub(super) fn look(&mut self) -> [Option<String>; 2] {
        let kind = self.kind;
        self.sides.each_mut().map(|side| {
            if side.done || side.broken.is_some() {
                return None;
            }
            let status = side.process.ended()?;
            match status.success() && side.is_whole(kind) {
                true => side.done = true,
                false => side.broken = Some(side.said()),
            }
            side.broken.clone()
        })
    }

    /// Waits until both have ended by themselves.
    pub(super) fn finish(&mut self, patience: Duration) -> [Option<String>; 2] {
        let mut ended = [None, None];
        let all = wait::until(patience, || {
            for (ended, now) in ended.iter_mut().zip(self.look()) {
                *ended = ended.take().or(now);
            }
            let over = |side: &Side| side.done || side.broken.is_some();
            self.sides.iter().all(over).then_some(())
        });
        if all.is_none() {
            for (side, ended) in self.sides.iter_mut().zip(&mut ended) {
                if !side.done && side.broken.is_none() {
                    let last = side.process.last_line();
                    let hangs = format!("it has not ended within {patience:?} after: {last:?}");
                    side.broken = Some(hangs.clone());
                    *ended = Some(hangs);
                }
            }
        }
        ended
    }

    /// Whether each of the two has not ended before its time.
    pub(super) fn kept(&self) -> [bool; 2] {
        self.sides.each_ref().map(|side| side.broken.is_none())
    }
}

impl Side {
    fn is_whole(&self, kind: Kind) -> bool {
        let said = self.process.stdout();
        if kind != Kind::Sends {
            return self.process.last_line().as_deref() == Some("closed");
        }
        let seen: Value = serde_json::from_str(&said).unwrap_or_default();
        seen.is_object() && seen["received"]["head"] == seen["sent"]["sha256"]
    }

    fn said(&self) -> String {
        let last = self.process.last_line().unwrap_or_default();
        let error = self.process.stderr();
        let error = error.split("Stack backtrace").next().unwrap_or_default();
        let error = error.trim().replace('\n', " ");
        format!("{error} (after: {last})")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Beats => "beats each second",
            Self::Idle => "idle but for a word",
            Self::Bulk => "0.6 MB/s there and back",
            Self::Sends => "0.6 MB/s, then half-closed",
        })
    }
}
