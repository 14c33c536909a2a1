//! Passing certificates to the daemons before, whose tunnels are proven again with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::sleep};

use super::daemon::Daemon;
use crate::{
    handover::{DrainingCertificates, Passer},
    identity::{Denied, IdentityStore, Material, Passed, SpiffeId, Svid},
};

/// Before what could not be passed is tried again: an old daemon reads once a second.
const PAUSE: Duration = Duration::from_millis(250);

/// What an old daemon was passed of an identity.
enum Told {
    /// Its key is not kept for this.
    Material(Weak<Material>),
    Denied(Denied),
    Unknown,
}

/// Passes to an old daemon what there is of the identities that it uses, and whatever comes, until it
/// has ended.
pub(super) async fn pass(
    identities: Arc<IdentityStore>,
    mut used: watch::Receiver<BTreeSet<SpiffeId>>,
    passer: Passer,
) {
    let mut told: BTreeMap<SpiffeId, Told> = BTreeMap::new();
    let mut changes = identities.changes();
    loop {
        changes.mark_unchanged();
        let wanted = used.borrow_and_update().clone();
        told.retain(|id, _| wanted.contains(id));
        let mut has_room = true;
        for id in wanted {
            let Some(passed) = identities.pass(&id) else {
                continue;
            };
            if told.get(&id).is_some_and(|told| told.is(&passed)) {
                continue;
            }
            match passer.pass(&id, &passed) {
                Ok(()) => {
                    tracing::debug!(spiffe_id = %id, "a certificate is passed to a daemon before");
                    told.insert(id, passed.into());
                }
                Err(error) => {
                    has_room = false;
                    if error.kind() == io::ErrorKind::WouldBlock {
                        break;
                    }
                    tracing::debug!(%error, spiffe_id = %id, "nothing is passed to a daemon before");
                }
            }
        }
        tokio::select! {
            // The daemon before has ended, or this one is ending.
            changed = used.changed() => if changed.is_err() { return },
            changed = changes.changed() => if changed.is_err() { return },
            () = sleep(PAUSE), if !has_room => {}
        }
    }
}

// === impl Told ===

impl Told {
    fn is(&self, passed: &Passed) -> bool {
        match (self, passed) {
            (Self::Material(told), Passed::Material(now)) => {
                std::ptr::eq(told.as_ptr(), Arc::as_ptr(now))
            }
            (Self::Denied(told), Passed::Denied(now)) => told == now,
            (Self::Unknown, Passed::Unknown) => true,
            _ => false,
        }
    }
}

impl From<Passed> for Told {
    fn from(passed: Passed) -> Self {
        match passed {
            Passed::Material(material) => Self::Material(Arc::downgrade(&material)),
            Passed::Denied(denied) => Self::Denied(denied),
            Passed::Unknown => Self::Unknown,
        }
    }
}

impl Daemon {
    /// The identities that connections use.
    pub(super) fn used(&self) -> BTreeSet<SpiffeId> {
        let (_, by_workload) = self.tunnels.connections();
        let snapshot = self.snapshot.load();
        let known = by_workload.into_iter();
        let known = known.filter_map(|(id, _)| snapshot.workload(id));
        known
            .map(|running| running.workload.attributes.spiffe_id.clone())
            .collect()
    }

    /// What there is to say of their certificates.
    pub(super) fn used_certificates(&self) -> DrainingCertificates {
        let used = self.used();
        let now = SystemTime::now();
        let valid: Vec<_> = used
            .iter()
            .filter_map(|id| self.identities.current(id))
            .collect();
        let left = |svid: &Arc<Svid>| svid.not_after.duration_since(now).unwrap_or_default();
        DrainingCertificates {
            passed: self.identities.expects_passed(),
            identities: used.len(),
            missing: used.len() - valid.len(),
            seconds_left: valid.iter().map(left).min().map(|left| left.as_secs()),
        }
    }
}
