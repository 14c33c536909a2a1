//! What is done now and then while nothing changes: the slots of idle flows are given back.

use std::time::{Duration, Instant};

use tokio::task::block_in_place;

use super::{Control, reconcile::describe, revoke::monotonic_nanoseconds};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(60);

/// What was found when it was last looked.
#[derive(Debug)]
pub(super) struct Housekeeping {
    next: Instant,
}

// === impl Housekeeping ===

impl Housekeeping {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now(),
        }
    }
}

// === impl Control ===

impl Control {
    /// Does what is due. Asked every few seconds.
    pub(super) fn keep_house(&mut self) {
        if self.succession.frozen || Instant::now() < self.housekeeping.next {
            return;
        }
        self.housekeeping.next = Instant::now() + EVERY;
        let datapath = &self.daemon.datapath;
        let forgotten = block_in_place(|| datapath.forget_idle_flows(monotonic_nanoseconds()));
        if let Err(error) = forgotten {
            tracing::warn!(
                error = describe(&error),
                "the slots of idle flows cannot be given back"
            );
        }
    }
}
