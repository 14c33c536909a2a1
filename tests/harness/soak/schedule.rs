//! What happens when in a soak. Everything scales with the length of the run.

use std::{fmt, time::Duration};

/// Of one round, and at most that many rounds: each leaves an old daemon at each node, and
/// `limits.predecessors` is 16 at most.
const SHORTEST_ROUND: Duration = Duration::from_secs(45);
const MOST_ROUNDS: u64 = 12;
/// By so many times the length of a cut, leaves are valid for longer that meet it.
const LONGER: u32 = 3;
/// By which the clock is stepped, see [`Event::Clock`].
const STEP: Duration = Duration::from_secs(3600);

/// One thing that is done to the two nodes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// Every leaf is replaced by one that is valid for so long from now on.
    Renewal(Duration),
    /// A policy comes or goes.
    Policy,
    /// Another daemon takes over at this node.
    Upgrade(usize),
    /// The wire of both servers is cut.
    Cut,
    /// It is mended.
    Mend,
    /// The second node's wall clock is set to this offset from the machine's.
    Clock(&'static str),
    /// A step of the root's replacement, with the words of `reeve ca rotate`.
    Root(&'static [&'static str]),
    /// Who issues leaves is away: the next renewal is left out.
    Away,
}

/// What happens, without its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    /// Another daemon took over.
    Upgrade,
    /// The wire was cut.
    Cut,
    /// It was mended.
    Mend,
    /// A wall clock was stepped by an hour.
    Clock,
    /// A step of the root's replacement.
    Root,
    /// A renewal was left out.
    Away,
    /// Every leaf was replaced.
    Renewal,
    /// A policy came or went.
    Policy,
}

/// A run's plan.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// In the order of their times since the beginning.
    pub(super) events: Vec<(Duration, Event)>,
    /// How long each cut lasts.
    pub(super) cut: Duration,
    /// Pause of a connection that is idle.
    pub(super) idle: Duration,
    /// For how long a leaf is valid where nothing needs more.
    pub(super) leaf: Duration,
}

/// A time in which leaves are valid for longer: no tunnel outlives its certificates.
struct Stretch {
    from: Duration,
    to: Duration,
    longer: Duration,
}

// === impl Schedule ===

impl Schedule {
    pub(super) fn of(duration: Duration) -> Self {
        let rounds = (duration.as_secs() / SHORTEST_ROUND.as_secs()).clamp(1, MOST_ROUNDS);
        let rounds = u32::try_from(rounds).expect("they are few");
        let length = duration / rounds;
        // A minute's leaves in a round of five minutes, renewed three times a minute.
        let renewal = (length / 15).clamp(Duration::from_secs(10), Duration::from_secs(20));
        let mut schedule = Self {
            events: Vec::new(),
            cut: length / 10,
            idle: length / 2,
            leaf: renewal * 3,
        };
        // For every tunnel to be proven by leaves that are valid for longer. Where the server was not
        // renewed yet, the client asks again after a sixteenth of what is left, and after twice as much.
        let longest = schedule.leaf + schedule.cut * LONGER;
        let ahead = longest / 8 + Duration::from_secs(3);
        let (mut stretches, mut away) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            let at = |part: f64| length * round + length.mul_f64(part);
            schedule.add(at(0.04), Event::Upgrade(0));
            schedule.add(at(0.14), Event::Upgrade(1));
            if round % 2 == 0 {
                schedule.add(at(0.26), Event::Cut);
                schedule.add(at(0.36), Event::Mend);
                // What was sent into a cut is sent again after as long once more.
                stretches.push(Stretch {
                    from: at(0.26).saturating_sub(ahead),
                    to: at(0.47),
                    longer: schedule.cut * LONGER,
                });
            }
            for (part, offset) in [(0.50, "+1h"), (0.54, "+0"), (0.58, "-1h"), (0.62, "+0")] {
                schedule.add(at(part), Event::Clock(offset));
            }
            stretches.push(Stretch {
                from: at(0.50).saturating_sub(ahead),
                to: at(0.64),
                longer: STEP,
            });
            if round == rounds / 2 {
                schedule.add(at(0.70), Event::Root(&[]));
                schedule.add(at(0.76), Event::Root(&["--switch"]));
                schedule.add(at(0.92), Event::Root(&["--finish"]));
            } else {
                schedule.add(at(0.70), Event::Away);
                away.push(at(0.70)..at(0.70) + renewal);
            }
        }
        let regular = (1..)
            .map(|number| renewal * number)
            .take_while(|at| *at < duration)
            .filter(|at| !away.iter().any(|away| away.contains(at)));
        let turns = stretches.iter().flat_map(|it| [it.from, it.to]);
        let mut renewals: Vec<_> = regular.chain(turns).collect();
        // Each step of the root is followed by leaves, and a bundle, of that step.
        renewals.extend(
            schedule
                .events
                .iter()
                .filter(|(_, event)| matches!(event, Event::Root(_)))
                .map(|(at, _)| *at),
        );
        for at in renewals {
            let longer = stretches
                .iter()
                .filter(|stretch| (stretch.from..stretch.to).contains(&at))
                .map(|stretch| stretch.longer);
            let longer = longer.max().unwrap_or_default();
            schedule.add(at, Event::Renewal(schedule.leaf + longer));
        }
        let policies = (0..)
            .map(|number| renewal * number + renewal / 2)
            .take_while(|at| *at < duration);
        policies.for_each(|at| schedule.add(at, Event::Policy));
        // Stable: a renewal stays behind its step of the root.
        schedule.events.sort_by_key(|(at, _)| *at);
        schedule
    }

    fn add(&mut self, at: Duration, event: Event) {
        self.events.push((at, event));
    }
}

// === impl Event ===

impl Event {
    pub(super) fn happening(self) -> Happening {
        match self {
            Self::Renewal(_) => Happening::Renewal,
            Self::Policy => Happening::Policy,
            Self::Upgrade(_) => Happening::Upgrade,
            Self::Cut => Happening::Cut,
            Self::Mend => Happening::Mend,
            Self::Clock(_) => Happening::Clock,
            Self::Root(_) => Happening::Root,
            Self::Away => Happening::Away,
        }
    }
}

// === impl Happening ===

impl Happening {
    /// Whether it happens so often that something else is the likelier cause of what follows.
    pub(super) fn is_frequent(self) -> bool {
        matches!(self, Self::Renewal | Self::Policy)
    }
}

impl fmt::Display for Happening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Upgrade => "upgrade of a node",
            Self::Cut => "cut of the wire",
            Self::Mend => "end of a cut",
            Self::Clock => "step of a clock by 1 h",
            Self::Root => "step of a root's replacement",
            Self::Away => "issuer away for a renewal",
            Self::Renewal => "renewal of the leaves",
            Self::Policy => "change of policy",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_everything_at_least_once_and_an_hour_has_it_at_its_pace() {
        let count = |seconds, what| {
            let schedule = Schedule::of(Duration::from_secs(seconds));
            let happenings = schedule.events.iter().map(|(_, event)| event.happening());
            happenings.filter(|happening| *happening == what).count()
        };
        let short = [
            (Happening::Upgrade, 2),
            (Happening::Cut, 1),
            (Happening::Mend, 1),
            (Happening::Clock, 4),
            (Happening::Root, 3),
        ];
        for (what, times) in short {
            assert_eq!(count(48, what), times, "{what}");
        }
        let hour = [
            (Happening::Upgrade, 24),
            (Happening::Cut, 6),
            (Happening::Root, 3),
            (Happening::Away, 11),
        ];
        for (what, times) in hour {
            assert_eq!(count(3600, what), times, "{what}");
        }
        assert!(count(3600, Happening::Renewal) >= 60);
        // No more old daemons than a node may have.
        assert_eq!(count(10 * 3600, Happening::Upgrade), 24);
    }

    #[test]
    fn leaves_are_valid_until_the_next_ones_at_every_moment() {
        for seconds in [48, 300, 900, 3600] {
            let schedule = Schedule::of(Duration::from_secs(seconds));
            let mut until = schedule.leaf;
            for (at, event) in &schedule.events {
                assert!(*at + Duration::from_secs(2) < until, "{seconds}: {at:?}");
                if let Event::Renewal(valid) = event {
                    until = *at + *valid;
                }
            }
        }
    }
}
