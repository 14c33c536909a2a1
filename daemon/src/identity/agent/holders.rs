//! Who has which identity on this node now: told by whoever knows the workloads, read by sources
//! that ask an agent on a workload's behalf.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use crate::identity::SpiffeId;

/// The workloads that have an identity, as an agent can be told of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// Their cgroups, as paths in the file system; none where none of them is there.
    pub cgroups: Vec<PathBuf>,
    /// What an agent shall know them by instead of by a process; empty where by a process.
    pub selectors: Vec<Selector>,
}

/// One of the facts by which SPIRE tells workloads apart, as in `k8s:ns:shop`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// What kind of fact, as in `k8s`.
    pub kind: String,
    /// The fact, as in `ns:shop`.
    pub value: String,
}

/// Everybody, by identity. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Holders(Arc<watch::Sender<BTreeMap<SpiffeId, Holder>>>);

// === impl Holders ===

impl Holders {
    /// Replaces everybody. Wakes those who wait for somebody that has changed.
    pub fn replace(&self, holders: BTreeMap<SpiffeId, Holder>) {
        self.0.send_if_modified(|current| {
            let changed = *current != holders;
            *current = holders;
            changed
        });
    }

    /// Whoever has `id` now; nobody is a holder without cgroups.
    pub(super) fn holder(&self, id: &SpiffeId) -> Holder {
        self.0.borrow().get(id).cloned().unwrap_or_default()
    }

    /// Comes back when it is no longer `seen` who has `id`.
    pub(super) async fn changed_from(&self, id: &SpiffeId, seen: &Holder) {
        let mut changes = self.0.subscribe();
        // It ends only with the sender, which is ours.
        let _ = changes
            .wait_for(|holders| holders.get(id).unwrap_or(&Holder::default()) != seen)
            .await;
    }
}

// === impl Selector ===

impl Selector {
    /// Reads `kind:value`; neither may be empty.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, value) = text.split_once(':')?;
        (!kind.is_empty() && !value.is_empty()).then(|| Self {
            kind: kind.to_owned(),
            value: value.to_owned(),
        })
    }
}
