//! Waiting with an end.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long something may take that should happen at once, on a machine that does much else.
pub const SOON: Duration = Duration::from_secs(20);

/// How long a daemon's start may take: in a virtual machine without hardware for it, the kernel's
/// verifier alone needs most of a minute beside other work.
pub(crate) const START: Duration = Duration::from_secs(90);

pub(crate) const PAUSE: Duration = Duration::from_millis(5);

/// Waits until this is so, for at most [`SOON`].
#[track_caller]
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    assert!(
        until(SOON, || so().then_some(())).is_some(),
        "not within {SOON:?}: {what}"
    );
}

/// Fails the test if this ceases to be so within a time.
#[track_caller]
pub fn holds_for(time: Duration, what: &str, mut so: impl FnMut() -> bool) {
    assert!(
        until(time, || (!so()).then_some(())).is_none(),
        "no longer so: {what}"
    );
}

/// Asks until there is an answer, for at most `patience`.
pub(crate) fn until<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(PAUSE);
    }
}
