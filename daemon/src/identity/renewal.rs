//! When a certificate is renewed.

use std::time::{Duration, SystemTime};

use super::Svid;

/// Longest sleep: the wall clock is looked at this often, since it may jump and a timer does not
/// notice, nor does it run while the machine is suspended.
const TICK: Duration = Duration::from_secs(10);
/// Shortest sleep.
const SHORTEST: Duration = Duration::from_millis(100);
/// First wait after a failure; doubled at each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Part of what is left of the lifetime after which renewal begins, and over how much more of it the
/// nodes of a fleet that started together are spread. What is left, since a certificate is made to
/// begin before now for the sake of slow clocks.
const RENEW_AFTER: f64 = 0.5;
const SPREAD: f64 = 0.1;
/// A certificate with less than this left is not renewed more often for it.
const SOONEST_RENEWAL: Duration = Duration::from_secs(1);

/// One identity's schedule.
#[derive(Debug)]
pub(super) struct Renewal {
    next: SystemTime,
    /// When that was planned. A clock that is behind this has been set back: what is in force may
    /// not be valid yet, and the plan is for another time.
    planned: SystemTime,
    backoff: Duration,
}

impl Renewal {
    /// Due at once.
    pub(super) fn new() -> Self {
        Self {
            next: SystemTime::UNIX_EPOCH,
            planned: SystemTime::UNIX_EPOCH,
            backoff: FIRST_BACKOFF,
        }
    }

    /// When the source is asked next.
    pub(super) fn next(&self) -> SystemTime {
        self.next
    }

    pub(super) fn is_due(&self, now: SystemTime) -> bool {
        self.next <= now || now < self.planned
    }

    /// The source has something new.
    pub(super) fn hurry(&mut self) {
        self.next = SystemTime::UNIX_EPOCH;
    }

    /// How long to sleep at most before the clock is looked at again.
    pub(super) fn sleep(&self, now: SystemTime) -> Duration {
        if self.is_due(now) {
            return SHORTEST;
        }
        let left = self.next.duration_since(now).unwrap_or(Duration::ZERO);
        left.clamp(SHORTEST, TICK)
    }

    /// Plans the next attempt: where this one has succeeded, by the certificate in force after it.
    pub(super) fn attempted(&mut self, in_force: Option<&Svid>, now: SystemTime) {
        self.planned = now;
        match in_force {
            Some(svid) => {
                self.next = renew_at(svid.not_after, now, random_fraction());
                self.backoff = FIRST_BACKOFF;
            }
            None => {
                self.next = now + self.backoff.mul_f64(1.0 - 0.5 * random_fraction());
                self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
            }
        }
    }
}

fn renew_at(not_after: SystemTime, now: SystemTime, fraction: f64) -> SystemTime {
    let left = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    // A source that has nothing newer gives the same again, however near the end is.
    let left = left.max(SOONEST_RENEWAL);
    now + left.mul_f64(RENEW_AFTER + SPREAD * fraction)
}

/// From 0 to 1. Without randomness, which the operating system always has, nothing is spread.
pub(crate) fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        return 0.0;
    }
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use zeroize::Zeroizing;

    use super::*;
    use crate::identity::{Material, SpiffeId, TrustBundle, TrustStore, tests::certs::Authority};

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn renewal_begins_between_half_and_two_thirds_of_what_is_left() {
        let now = SystemTime::now();
        let hour = now + 60 * MINUTE;
        assert_eq!(renew_at(hour, now, 0.0), now + 30 * MINUTE);
        assert_eq!(renew_at(hour, now, 1.0), now + 36 * MINUTE);
        assert_eq!(renew_at(now - MINUTE, now, 0.0), now + SOONEST_RENEWAL / 2);
    }

    #[test]
    fn nodes_that_started_together_are_spread() {
        let (now, svid) = (SystemTime::now(), svid());
        let left = svid.not_after.duration_since(now).unwrap();
        for in_force in [None, Some(&svid)] {
            let next = || {
                let mut renewal = Renewal::new();
                renewal.attempted(in_force, now);
                renewal.next()
            };
            let first = next();
            assert!((0..8).any(|_| next() != first), "{in_force:?}");
            if in_force.is_some() {
                assert!(now + left / 2 <= first && first <= now + left * 2 / 3);
            }
        }
    }

    fn svid() -> Svid {
        let root = Authority::root("example.org");
        let id = SpiffeId::parse("spiffe://example.org/cart").unwrap();
        let issued = root.leaf(id.as_str());
        let authorities = vec![root.certificate()];
        let bundle = TrustBundle::new(id.trust_domain().clone(), authorities, Vec::new());
        let trust = Arc::new(TrustStore::new([bundle.unwrap()]));
        let material = Material {
            key: Zeroizing::new(issued.private_key()),
            chain: issued.chain,
            bundles: Vec::new(),
        };
        Svid::check(&id, &material, &trust.current(), &trust, SystemTime::now()).unwrap()
    }

    #[test]
    fn after_failures_it_waits_longer_each_time_and_not_too_long() {
        let now = SystemTime::now();
        let mut renewal = Renewal::new();
        assert!(renewal.is_due(now));
        let mut longest = FIRST_BACKOFF;
        for _ in 0..10 {
            renewal.attempted(None, now);
            let wait = renewal.next().duration_since(now).unwrap();
            assert!(
                wait >= longest / 2 && wait <= longest,
                "{wait:?} {longest:?}"
            );
            longest = (longest * 2).min(LONGEST_BACKOFF);
        }
        renewal.hurry();
        assert!(renewal.is_due(now));
    }

    #[test]
    fn the_clock_is_looked_at_often_however_far_away_renewal_is() {
        let now = SystemTime::now();
        let mut renewal = Renewal::new();
        renewal.next = now + 60 * MINUTE;
        assert_eq!(renewal.sleep(now), TICK);
        // The clock jumps.
        let later = now + 120 * MINUTE;
        assert!(renewal.is_due(later));
        assert_eq!(renewal.sleep(later), SHORTEST);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_renewal_due() {
        let now = SystemTime::now();
        let mut renewal = Renewal::new();
        renewal.attempted(None, now);
        let earlier = now - 60 * MINUTE;
        assert!(renewal.is_due(earlier));
        assert_eq!(renewal.sleep(earlier), SHORTEST);
        // Once, and then by the clock as it is now.
        renewal.attempted(None, earlier);
        assert!(!renewal.is_due(earlier));
    }
}
