//! Reeve's ports in a namespace in which it does not listen yet. The programs refuse them to
//! everybody else from now on; who listens there from before is closed.

use std::sync::Arc;

use reeve_common::WORKLOAD_IS_REEVE;
use tokio::task::block_in_place;

use super::{Control, desired, reconcile::describe};
use crate::datapath::{KernelState, netns::Netns};

impl Control {
    /// Closes whatever of others listens on reeve's ports, and says whose it was. `state` is what
    /// the kernel enforces.
    pub(super) fn clear_ports<'a>(
        &self,
        namespaces: impl Iterator<Item = &'a Arc<Netns>>,
        state: &KernelState,
    ) {
        block_in_place(|| {
            // The whole tree is read, and mostly nobody needs it.
            let mut owners = None;
            let mut is_foreign = |cgroup: u64| {
                let owners = owners.get_or_insert_with(|| desired::owners(&self.cgroups, state));
                let owner = owners.get(&cgroup);
                owner.is_none_or(|owner| owner.flags & WORKLOAD_IS_REEVE == 0)
            };
            for netns in namespaces {
                self.clear_ports_of(netns, &mut is_foreign);
            }
        });
    }

    fn clear_ports_of(&self, netns: &Netns, mut is_foreign: impl FnMut(u64) -> bool) {
        let datapath = &self.daemon.datapath;
        match datapath.close_listeners(netns, &mut is_foreign) {
            Ok(closed) => {
                for listener in closed {
                    tracing::warn!(
                        address = %listener.local,
                        cgroup = self.cgroups.find(listener.cgroup),
                        user = listener.user,
                        namespace = netns.inode,
                        "a listener on one of reeve's ports was closed: it was here before reeve"
                    );
                }
            }
            Err(error) => tracing::warn!(
                error = describe(&error),
                "whoever listens on reeve's ports cannot be closed; nothing of a tunnel gets there"
            ),
        }
    }
}
