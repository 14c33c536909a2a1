//! How long to wait before somebody who did not answer is asked again.

use std::time::Duration;

/// After the first failure. Doubled at each further one.
const FIRST: Duration = Duration::from_millis(500);
/// At most: whoever is back should not stay unnoticed.
const LONGEST: Duration = Duration::from_secs(30);

/// The wait that comes next.
#[derive(Debug)]
pub(in crate::identity) struct Backoff(Duration);

impl Backoff {
    pub(in crate::identity) fn new() -> Self {
        Self(FIRST)
    }

    /// There was an answer.
    pub(in crate::identity) fn reset(&mut self) {
        self.0 = FIRST;
    }

    /// How long to wait now: between half and all of it, so that those who failed together do not
    /// come back together.
    pub(in crate::identity) fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(LONGEST);
        wait.mul_f64(1.0 - 0.5 * super::random_fraction())
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
