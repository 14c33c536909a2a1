//! Between two daemons whose kernel maps have different layouts: both have programs of their own, and what
//! either refuses is refused.

use std::time::Duration;

use tokio::{task::block_in_place, time::sleep};

use super::{Control, reconcile::describe, succession::Reported};

/// For what waits in the listeners' queues to be accepted by a daemon that alone knows what it was meant
/// for.
const ACCEPT: Duration = Duration::from_millis(100);
impl Control {
    /// Has the maps know these cgroups of a daemon that serves, or is about to, for reeve's. Nothing where
    /// the maps are that daemon's.
    pub(super) async fn know_next(&mut self, cgroups: &[(u64, u32)]) {
        if !self.succession.beside {
            return;
        }
        let known = &mut self.succession.next_cgroups;
        let new: Vec<_> = cgroups.iter().filter(|new| !known.contains(new)).collect();
        if new.is_empty() {
            return;
        }
        known.extend(new);
        self.reconcile().await;
    }

    /// Leaves sending connections to reeve to the next daemon's programs, and accepts what waits.
    pub(super) async fn step_aside(&mut self) {
        self.succession.events.send_replace(Reported::Refusals);
        if let Err(error) = block_in_place(|| self.daemon.datapath.step_aside()) {
            tracing::error!(
                "the kernel's side is not left to the next daemon as it should be: {}",
                describe(&error)
            );
        }
        sleep(ACCEPT).await;
    }

    /// Removes what this daemon's programs and maps were for.
    pub(super) fn retire(&self) {
        match block_in_place(|| self.daemon.datapath.retire()) {
            Ok(()) => tracing::info!("the next daemon's programs judge alone from now on"),
            Err(error) => tracing::error!(
                "what is pinned cannot be removed, and goes on refusing until the next daemon does: {}",
                describe(&error)
            ),
        }
    }

    /// Removes what daemons have left in the kernel that were killed.
    pub(super) fn sweep(&self) {
        // Nothing that judges alone is removed.
        let serves = !self.succession.frozen && !self.succession.is_taking_over();
        if !serves || !self.is_enforced {
            return;
        }
        match block_in_place(|| self.daemon.datapath.sweep()) {
            Ok(removed) => {
                for folder in removed {
                    tracing::warn!(
                        pins = %folder.display(),
                        "what a daemon had pinned that is not there any more is removed"
                    );
                }
            }
            Err(error) => tracing::error!(
                "what another daemon has pinned cannot be removed, and goes on refusing: {}",
                describe(&error)
            ),
        }
    }
}
