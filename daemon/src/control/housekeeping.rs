//! What is done now and then while nothing changes: the slots of idle flows are given back, and
//! rules that reeve cannot see through are warned of.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::task::block_in_place;

use super::{Control, reconcile::describe};
use crate::datapath::monotonic_nanoseconds;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(60);

/// What was found when it was last looked.
#[derive(Debug)]
pub(super) struct Housekeeping {
    next: Instant,
    /// Chains that were warned of, by the namespace's cookie.
    chains: BTreeMap<u64, Vec<String>>,
}

// === impl Housekeeping ===

impl Housekeeping {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now(),
            chains: BTreeMap::new(),
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
        self.look_for_translations();
    }

    /// Warns of rules that hide from whom an arriving packet is.
    fn look_for_translations(&mut self) {
        let view = self.daemon.view.load_full();
        let mut found = BTreeMap::new();
        for running in &view.discovery.workloads {
            let Some(netns) = running.netns.as_ref().filter(|_| running.owns_netns) else {
                continue;
            };
            let name = &running.workload.name;
            let chains = match block_in_place(|| self.daemon.datapath.source_translations(netns)) {
                Ok(chains) => chains,
                Err(error) => {
                    tracing::debug!(
                        workload = %name,
                        error = describe(&error),
                        "cannot look for rules that translate sources"
                    );
                    continue;
                }
            };
            if !chains.is_empty() && self.housekeeping.chains.get(&netns.cookie) != Some(&chains) {
                tracing::warn!(
                    workload = %name,
                    chains = chains.join(", "),
                    "NAT rules in the workload's namespace change the source address of what \
                     arrives: reeve judges by the changed address. Remove the rules, or take \
                     CAP_NET_ADMIN from whoever made them"
                );
            }
            found.insert(netns.cookie, chains);
        }
        self.housekeeping.chains = found;
    }
}
