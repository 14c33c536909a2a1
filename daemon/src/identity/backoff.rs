//! How long to wait before an agent is asked again.

use std::time::Duration;

/// After the first failure. Doubled at each further one.
const FIRST: Duration = Duration::from_millis(500);
/// At most: an agent that is back should not stay unnoticed.
const LONGEST: Duration = Duration::from_secs(30);

/// The wait that comes next.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// The agent has answered.
    pub(super) fn reset(&mut self) {
        self.0 = FIRST;
    }

    /// How long to wait now: between half and all of it, so that those who failed together do not
    /// come back together.
    pub(super) fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(LONGEST);
        wait.mul_f64(1.0 - 0.5 * crate::identity::random_fraction())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_begin_anew_after_an_answer() {
        let mut backoff = Backoff::new();
        let mut longest = FIRST;
        for _ in 0..10 {
            let wait = backoff.next();
            assert!(wait >= longest / 2 && wait <= longest, "{wait:?}");
            longest = (longest * 2).min(LONGEST);
        }
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
