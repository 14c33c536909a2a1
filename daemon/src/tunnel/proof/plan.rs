//! When a client has a tunnel proven again.

use std::{
    cell::Cell,
    time::{Duration, SystemTime},
};

use crate::identity::random_fraction;

/// Part of what is left after which a proof is asked for, and over how much more of it tunnels that
/// were opened together are spread.
const ASK_AFTER: f64 = 0.5;
const SPREAD: f64 = 0.1;
/// Part of what is left, as a divisor, after which is asked again where the first proof has changed
/// nothing: the server has not renewed its certificate yet, say. Doubled at each further one.
const ASK_AGAIN: u32 = 16;
/// Shortest and longest wait before that second time.
const SOONEST_AGAIN: Duration = Duration::from_millis(500);
const LATEST_AGAIN: Duration = Duration::from_secs(60);

/// One tunnel's schedule.
#[derive(Debug)]
pub(in crate::tunnel) struct Plan {
    due: Cell<SystemTime>,
    /// When that was planned: a clock that is behind this has been set back.
    planned: Cell<SystemTime>,
    /// The end of the tunnel for which it was planned.
    end: Cell<Option<SystemTime>>,
    /// Proofs that were asked for since, and have not changed that end.
    asked: Cell<u32>,
    /// One is wanted whatever the plan says.
    hurry: Cell<bool>,
    /// Proofs that have failed since the last one that has not.
    failed: Cell<u32>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            due: Cell::new(SystemTime::UNIX_EPOCH),
            planned: Cell::new(SystemTime::UNIX_EPOCH),
            end: Cell::new(None),
            asked: Cell::new(0),
            hurry: Cell::new(false),
            failed: Cell::new(0),
        }
    }
}

impl Plan {
    /// Whether a tunnel that ends at `end` is to be proven now; after `age` it is in any case.
    pub(in crate::tunnel) fn is_due(
        &self,
        end: SystemTime,
        now: SystemTime,
        age: Duration,
    ) -> bool {
        if self.end.get() != Some(end) || now < self.planned.get() {
            let left = left(end, now).mul_f64(ASK_AFTER + SPREAD * random_fraction());
            self.end.set(Some(end));
            self.asked.set(0);
            self.next(left.min(age), now);
        }
        self.hurry.get() || self.due.get() <= now
    }

    /// It is due, whatever its end, and whatever has failed before.
    pub(in crate::tunnel) fn hurry(&self) {
        self.hurry.set(true);
        self.failed.set(0);
    }

    /// A proof has come to its end.
    pub(in crate::tunnel) fn ended(&self, well: bool) {
        let failed = if well {
            0
        } else {
            self.failed.get().saturating_add(1)
        };
        self.failed.set(failed);
    }

    /// From one proof to the next at least: longer with each that fails, however often the server wants
    /// one, and never so long that there is no other before the end.
    pub(in crate::tunnel) fn pause(&self, now: SystemTime) -> Duration {
        let left = self.end.get().map_or(Duration::ZERO, |end| left(end, now));
        let longest = LATEST_AGAIN.min(left / 2).max(SOONEST_AGAIN);
        SOONEST_AGAIN
            .saturating_mul(1 << self.failed.get().min(16))
            .min(longest)
    }

    /// A proof is asked for: the next is due later each time, unless the end changes.
    pub(in crate::tunnel) fn asked(&self, now: SystemTime, age: Duration) {
        self.hurry.set(false);
        let left = self.end.get().map_or(Duration::ZERO, |end| left(end, now));
        let first = (left / ASK_AGAIN).clamp(SOONEST_AGAIN, LATEST_AGAIN);
        let asked = self.asked.get();
        self.asked.set(asked.saturating_add(1));
        let wait = first
            .saturating_mul(1 << asked.min(16))
            .min((left / 2).max(SOONEST_AGAIN));
        let wait = wait.min(age).mul_f64(1.0 - SPREAD * random_fraction());
        self.next(wait, now);
    }

    fn next(&self, wait: Duration, now: SystemTime) {
        self.planned.set(now);
        self.due.set(now + wait);
    }
}

fn left(end: SystemTime, now: SystemTime) -> Duration {
    end.duration_since(now).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// How long after `now` the plan is due.
    fn wait(plan: &Plan, now: SystemTime) -> Duration {
        plan.due.get().duration_since(now).unwrap_or_default()
    }

    #[test]
    fn a_proof_is_due_at_half_of_what_is_left_with_some_spread() {
        let now = SystemTime::now();
        let waits = (0..8).map(|_| {
            let plan = Plan::default();
            assert!(!plan.is_due(now + HOUR, now, 24 * HOUR));
            assert!(!plan.is_due(
                now + HOUR,
                now + HOUR / 2 - Duration::from_secs(1),
                24 * HOUR
            ));
            assert!(plan.is_due(now + HOUR, now + HOUR * 6 / 10, 24 * HOUR));
            wait(&plan, now)
        });
        let waits: Vec<_> = waits.collect();
        assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
    }

    #[test]
    fn what_was_asked_in_vain_is_asked_at_growing_intervals_and_in_time() {
        let (mut now, end) = (SystemTime::now(), SystemTime::now() + HOUR);
        let plan = Plan::default();
        assert!(!plan.is_due(end, now, 24 * HOUR));
        now += HOUR * 6 / 10;
        let (mut waits, mut asked) = (Vec::new(), 0);
        while now < end {
            assert!(plan.is_due(end, now, 24 * HOUR));
            plan.asked(now, 24 * HOUR);
            asked += 1;
            waits.push(wait(&plan, now));
            now = plan.due.get();
        }
        assert!(waits[..3].is_sorted(), "{waits:?}");
        assert!(asked < 25, "{waits:?}");
        let last = waits.last().unwrap();
        assert!(*last <= SOONEST_AGAIN, "{waits:?}");
    }

    #[test]
    fn a_new_end_or_a_clock_that_was_set_back_makes_a_new_plan() {
        let now = SystemTime::now();
        let plan = Plan::default();
        assert!(!plan.is_due(now + HOUR, now, 24 * HOUR));
        plan.hurry();
        assert!(plan.is_due(now + HOUR, now, 24 * HOUR));
        plan.asked(now, 24 * HOUR);
        assert!(!plan.is_due(now + HOUR, now, 24 * HOUR));
        assert!(!plan.is_due(now + 2 * HOUR, now, 24 * HOUR));
        assert!(wait(&plan, now) >= HOUR);
        assert!(!plan.is_due(now + 2 * HOUR, now - HOUR, 24 * HOUR));
        assert!(wait(&plan, now - HOUR) >= HOUR * 3 / 2);
    }

    #[test]
    fn the_pause_grows_while_proofs_fail_and_leaves_time_for_another() {
        let (now, end) = (SystemTime::now(), SystemTime::now() + HOUR);
        let plan = Plan::default();
        assert!(!plan.is_due(end, now, 24 * HOUR));
        let pauses = (0..12).map(|_| {
            let pause = plan.pause(now);
            plan.ended(false);
            pause.as_millis()
        });
        let pauses: Vec<_> = pauses.collect();
        assert_eq!(pauses[..4], [500, 1000, 2000, 4000]);
        assert_eq!(pauses[11], 60_000);
        assert_eq!(plan.pause(end - Duration::from_secs(10)).as_secs(), 5);
        assert_eq!(plan.pause(end), SOONEST_AGAIN);
        plan.hurry();
        assert_eq!(plan.pause(now), SOONEST_AGAIN);
        plan.ended(false);
        plan.ended(true);
        assert_eq!(plan.pause(now), SOONEST_AGAIN);
    }

    #[test]
    fn age_alone_makes_a_proof_due() {
        let now = SystemTime::now();
        let plan = Plan::default();
        assert!(!plan.is_due(now + 24 * HOUR, now, HOUR));
        assert_eq!(wait(&plan, now), HOUR);
    }
}
