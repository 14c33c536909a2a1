//! Certificates that another daemon passes: the source of a daemon that has handed over, for as long
//! as the daemon that serves passes what it has.
//!
//! What is passed is material like that of any other source, and is judged like it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::watch;

use super::lock;
use crate::identity::{CertificateSource, Denied, Material, SourceError, SpiffeId, TrustBundle};

/// Name of this source in logs.
pub(super) const NAME: &str = "passed";
const NOTHING_YET: &str = "the daemon that serves has passed no certificate of this identity";

/// What one daemon passes to another of an identity.
#[derive(Clone, Debug)]
pub enum Passed {
    /// What its certificate in force was made from.
    Material(Arc<Material>),
    /// Its source denies the identity: what was given before must not be used any longer.
    Denied(Denied),
    /// It does not look after this identity.
    Unknown,
}

/// What was passed, by identity.
#[derive(Debug, Default)]
pub(super) struct PassedSource(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Another daemon passes certificates.
    active: bool,
    /// The identities that connections use.
    used: BTreeSet<SpiffeId>,
    identities: BTreeMap<SpiffeId, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    passed: Option<Passed>,
    news: watch::Sender<u64>,
}

// === impl PassedSource ===

impl PassedSource {
    /// Another daemon passes certificates from now on, or none does any more: then its keys are
    /// forgotten. Returns whether that is news.
    pub(super) fn activate(&self, active: bool) -> bool {
        let mut state = lock(&self.0);
        if state.active == active {
            return false;
        }
        state.active = active;
        for entry in state.identities.values_mut() {
            entry.set(None);
        }
        true
    }

    pub(super) fn is_active(&self) -> bool {
        lock(&self.0).active
    }

    /// Whether it is this source that `id` has its certificates from.
    pub(super) fn gives(&self, id: &SpiffeId) -> bool {
        let state = lock(&self.0);
        let passed = state.identities.get(id).map(|entry| &entry.passed);
        state.active && !matches!(passed, Some(Some(Passed::Unknown)))
    }

    /// Whether nothing is passed of `id` because no connection uses the identity.
    pub(super) fn is_idle(&self, id: &SpiffeId) -> bool {
        let state = lock(&self.0);
        state.active && !state.used.contains(id)
    }

    /// Takes what was passed of `id`. Where no daemon is known to pass anything, it counts for nothing.
    pub(super) fn take(&self, id: &SpiffeId, passed: Passed) {
        let mut state = lock(&self.0);
        if !state.active {
            return;
        }
        let passed = match passed {
            Passed::Material(material) => Passed::Material(state.with_known_bundles(material)),
            other => other,
        };
        let entry = state.identities.entry(id.clone()).or_default();
        entry.set(Some(passed));
    }

    /// Notes which identities connections use, and forgets the keys of all others.
    pub(super) fn keep(&self, used: &BTreeSet<SpiffeId>) {
        let mut state = lock(&self.0);
        for (id, entry) in &mut state.identities {
            if entry.passed.is_some() && !used.contains(id) {
                entry.set(None);
            }
        }
        state.used.clone_from(used);
    }

    /// Forgets the identities that there are not any more.
    pub(super) fn retain(&self, is_there: impl Fn(&SpiffeId) -> bool) {
        lock(&self.0).identities.retain(|id, _| is_there(id));
    }
}

impl CertificateSource for PassedSource {
    fn name(&self) -> &'static str {
        NAME
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        let state = lock(&self.0);
        let passed = state.identities.get(id).and_then(|it| it.passed.as_ref());
        let result = match passed {
            Some(Passed::Material(material)) => Ok(material.copied()),
            Some(Passed::Denied(denied)) => Err(denied.clone().into()),
            Some(Passed::Unknown) | None => Err(SourceError::Pending(NOTHING_YET)),
        };
        std::future::ready(result).boxed()
    }

    /// Also when another source is to be asked, or not any more.
    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        let mut state = lock(&self.0);
        let entry = state.identities.entry(id.clone()).or_default();
        entry.news.subscribe()
    }

    fn pushes(&self) -> bool {
        true
    }
}

// === impl State ===

impl State {
    /// The same, with bundles that several identities have kept once.
    fn with_known_bundles(&self, material: Arc<Material>) -> Arc<Material> {
        let known = |bundle: &Arc<TrustBundle>| {
            let entries = self.identities.values();
            let passed = entries.filter_map(|entry| match &entry.passed {
                Some(Passed::Material(material)) => Some(&material.bundles),
                _ => None,
            });
            let same = passed.flatten().find(|other| other.same_as(bundle));
            same.unwrap_or(bundle).clone()
        };
        Arc::new(Material {
            bundles: material.bundles.iter().map(known).collect(),
            ..material.copied()
        })
    }
}

// === impl Entry ===

impl Entry {
    fn set(&mut self, passed: Option<Passed>) {
        self.passed = passed;
        self.news
            .send_modify(|number| *number = number.wrapping_add(1));
    }
}
