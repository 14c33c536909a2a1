//! The newest checked material of every identity, read by the tunnel without locks held.
//!
//! In: who needs a certificate and from which source, and what is trusted besides what sources
//! bring. Out: checked material. [`renew`] fetches, judges and puts in force, [`slot`] is one
//! identity, [`configured`] the trust besides, [`passed`] what another daemon passes instead of the
//! sources, [`outages`] what the log has of absent sources.

mod configured;
mod outages;
mod passed;
mod renew;
mod slot;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

pub use self::passed::Passed;
use self::{
    configured::{Configured, by_domain},
    passed::PassedSource,
    renew::{Shared, follow_clock, keep_fresh},
    slot::Slot,
};
use super::{
    BundleStatus, CertificateSource, CryptoPolicy, Holders, IdentityStatus, ReloadCounts,
    ReloadError, Remark, RevocationList, SourceError, SpiffeId, Svid, TrustBundle, TrustBundles,
    TrustDomain,
};

/// The sources by the names that the configuration gives them.
pub type Sources = BTreeMap<String, Arc<dyn CertificateSource>>;

/// Revocation lists by the trust domain that they are of.
pub type RevocationLists = BTreeMap<TrustDomain, Vec<Arc<RevocationList>>>;

/// Identities by SPIFFE ID: each one's certificate is fetched from the identity's source, checked
/// as a whole, and replaced as a whole, while the old one stays in force until then or until it
/// expires.
///
/// Each identity trusts by itself: the bundles that came with its own certificate, and those that
/// were configured, which count instead of what a source brings for the same trust domain.
#[derive(Debug)]
pub struct IdentityStore {
    shared: Arc<Shared>,
    /// One for each identity, which renews its certificate. Also taken to add and remove them.
    tasks: Mutex<BTreeMap<SpiffeId, JoinHandle<()>>>,
    holders: Holders,
    /// Follows the steps of the wall clock.
    clock: Mutex<Option<JoinHandle<()>>>,
}

/// For a renewal that is under way, of a certificate that has expired: connections wait for it. Well below the
/// time-out of a handshake.
const RENEWAL: Duration = Duration::from_secs(3);
/// Share of its lifetime that a certificate has left at the latest when it is renewed: where reeve
/// decides, and where others do, some of which renew at nine tenths.
const LEFT_BY_US: f64 = 0.4;
const LEFT_BY_OTHERS: f64 = 0.1;
/// How often is looked whether it has ended without a new certificate.
const RENEWAL_LOOK: Duration = Duration::from_millis(50);

// === impl IdentityStore ===

impl IdentityStore {
    /// A store without identities, until [`Self::ensure`] names some, with the default policy.
    #[must_use]
    pub fn new(sources: Sources) -> Self {
        Self::with_policy(sources, CryptoPolicy::shared_default())
    }

    /// The same for certificates, ours and our peers', that keep to a policy.
    #[must_use]
    pub fn with_policy(sources: Sources, policy: Arc<CryptoPolicy>) -> Self {
        Self {
            shared: Arc::new(Shared {
                counts: Mutex::new(
                    sources
                        .keys()
                        .map(|name| (name.clone(), ReloadCounts::default()))
                        .collect(),
                ),
                sources,
                passed: Arc::new(PassedSource::default()),
                configured: Mutex::new(Configured::new(policy)),
                slots: ArcSwap::default(),
                changes: watch::Sender::new(0),
                steps: watch::Sender::default(),
                generation: AtomicU64::new(0),
                announced: Mutex::default(),
                outages: Mutex::default(),
            }),
            tasks: Mutex::default(),
            holders: Holders::default(),
            clock: Mutex::default(),
        }
    }

    /// With these told who has which identity, for sources that have to know.
    #[must_use]
    pub fn telling(mut self, holders: Holders) -> Self {
        self.holders = holders;
        self
    }

    /// Who is told which workloads have an identity.
    #[must_use]
    pub fn holders(&self) -> &Holders {
        &self.holders
    }

    /// Makes these the identities that there are, each with the name of its source: fetches what is
    /// new, forgets what is gone. One that changes its source keeps what it has until the new
    /// source has given something. Comes back at once; [`Self::changes`] tells when certificates
    /// have arrived. Needs a tokio runtime, on which the renewing goes on.
    pub fn ensure(&self, wanted: &BTreeMap<SpiffeId, String>) {
        let follow = || tokio::spawn(follow_clock(self.shared.clone()));
        lock(&self.clock).get_or_insert_with(follow);
        let mut tasks = lock(&self.tasks);
        let before = self.shared.slots.load_full();
        let mut slots = BTreeMap::new();
        let mut new = Vec::new();
        for (id, source) in wanted {
            let old = before.get(id);
            let slot = match old.filter(|slot| slot.source == *source) {
                Some(kept) => kept.clone(),
                None => {
                    let slot = Arc::new(match old {
                        Some(old) => old.with_source(source),
                        None => self.shared.slot(id.clone(), source.clone()),
                    });
                    new.push(slot.clone());
                    slot
                }
            };
            slots.insert(id.clone(), slot);
        }
        tasks.retain(|id, task| {
            let kept = slots.get(id).zip(before.get(id));
            let keep = kept.is_some_and(|(now, before)| Arc::ptr_eq(now, before));
            if !keep {
                task.abort();
            }
            keep
        });
        if new.is_empty() && slots.len() == before.len() {
            return;
        }
        self.shared.passed.retain(|id| slots.contains_key(id));
        self.shared.slots.store(Arc::new(slots));
        for slot in new {
            self.shared.settle_trust(&slot);
            let id = slot.id.clone();
            tasks.insert(id, tokio::spawn(keep_fresh(self.shared.clone(), slot)));
        }
        self.shared.changed();
    }

    /// The newest material of `id`, if it has any that is valid now.
    #[must_use]
    pub fn current(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let svid = self.shared.slots.load().get(id)?.svid.load_full()?;
        svid.is_valid_at(SystemTime::now()).then_some(svid)
    }

    /// The same, once a renewal that is under way has ended. After a step of the clock, or when the
    /// machine wakes up, every certificate may have expired at once.
    pub async fn current_soon(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let deadline = Instant::now() + RENEWAL;
        let mut changes = self.changes();
        loop {
            let current = self.current(id);
            if current.is_some() || !self.is_renewing(id) || Instant::now() >= deadline {
                return current;
            }
            // Whether it was this identity's is seen above.
            let _ = timeout(RENEWAL_LOOK, changes.changed()).await;
        }
    }

    fn is_renewing(&self, id: &SpiffeId) -> bool {
        let slots = self.shared.slots.load();
        slots.get(id).is_some_and(|slot| slot.is_renewing())
    }

    /// The bundles by which `id` judges its peers now. The same value, by its address, for as long
    /// as nothing about them changes.
    #[must_use]
    pub fn trust_of(&self, id: &SpiffeId) -> Option<Arc<TrustBundles>> {
        Some(self.shared.slots.load().get(id)?.trust.current())
    }

    /// Wakes at every change of any identity or bundle; the number has no meaning but to differ.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Makes these the bundles that come from neither a source nor a file of the configuration.
    pub fn fetched_bundles(&self, bundles: &[Arc<TrustBundle>]) {
        let mut configured = lock(&self.shared.configured);
        configured.fetched = by_domain(bundles).collect();
        drop(configured);
        self.settle_trust();
    }

    /// The bundles in force that come from no source, with their revocation lists.
    #[must_use]
    pub fn configured_bundles(&self) -> TrustBundles {
        lock(&self.shared.configured).bundles(&[])
    }

    /// Makes these the bundles and revocation lists that the configuration names.
    pub fn configure_trust(&self, bundles: &[Arc<TrustBundle>], lists: RevocationLists) {
        let mut configured = lock(&self.shared.configured);
        configured.files = by_domain(bundles).collect();
        configured.lists = lists;
        drop(configured);
        self.settle_trust();
    }

    /// Asks the sources for something newer, for every identity, whenever they would be asked next.
    /// Comes back when all have been, or some have not after `patience`. Gives, for each identity
    /// that has nothing newer or the same again, why not.
    pub async fn reload(&self, patience: Duration) -> Vec<(SpiffeId, String)> {
        let slots = self.shared.slots.load_full();
        let mut waiting = Vec::new();
        for slot in slots.values() {
            let mut answered = slot.answered.subscribe();
            let mut number = 0;
            slot.asked.send_modify(|asked| {
                *asked += 1;
                number = *asked;
            });
            waiting.push(async move { answered.wait_for(|done| *done >= number).await.is_ok() });
        }
        let all = futures_util::future::join_all(waiting);
        let in_time = timeout(patience, all).await.is_ok();
        let refused = |slot: &Arc<Slot>| {
            if !in_time && *slot.answered.borrow() < *slot.asked.borrow() {
                return Some((
                    slot.id.clone(),
                    "the source has not answered yet".to_owned(),
                ));
            }
            let error = lock(&slot.progress).last_error.clone()?;
            Some((slot.id.clone(), error.to_string()))
        };
        slots.values().filter_map(refused).collect()
    }

    /// What this daemon passes of `id` to another one; none where there is nothing to say now.
    #[must_use]
    pub fn pass(&self, id: &SpiffeId) -> Option<Passed> {
        let slots = self.shared.slots.load();
        let Some(slot) = slots.get(id) else {
            return Some(Passed::Unknown);
        };
        if let Some(material) = slot.material.load_full() {
            return Some(Passed::Material(material));
        }
        match &lock(&slot.progress).last_error {
            Some(ReloadError::Source(SourceError::Denied(denied))) => {
                Some(Passed::Denied(denied.clone()))
            }
            _ => None,
        }
    }

    /// Another daemon passes certificates from now on, and sources are not asked; or none does any more,
    /// and they are. What is in force stays so. Returns whether that is news.
    pub fn expect_passed(&self, expected: bool) -> bool {
        self.shared.passed.activate(expected)
    }

    /// Whether another daemon passes certificates.
    #[must_use]
    pub fn expects_passed(&self) -> bool {
        self.shared.passed.is_active()
    }

    /// Takes what another daemon passes of `id`. It is checked as if it came from the identity's source.
    pub fn take_passed(&self, id: &SpiffeId, passed: Passed) {
        self.shared.passed.take(id, passed);
    }

    /// Notes which identities connections use, and forgets what was passed of all others.
    pub fn keep_passed(&self, used: &BTreeSet<SpiffeId>) {
        self.shared.passed.keep(used);
    }

    /// How the attempts at each source have ended.
    #[must_use]
    pub fn reload_counts(&self) -> BTreeMap<String, ReloadCounts> {
        lock(&self.shared.counts).clone()
    }

    fn settle_trust(&self) {
        let slots = self.shared.slots.load();
        // Every slot: the first that differs must not keep the others from being looked at.
        let different = slots.values().filter(|slot| self.shared.settle_trust(slot));
        if different.count() > 0 {
            self.shared.changed();
        }
    }

    /// Every identity and how it stands, by SPIFFE ID.
    #[must_use]
    pub fn status(&self) -> Vec<IdentityStatus> {
        let slots = self.shared.slots.load();
        let status = |slot: &Arc<Slot>| {
            let source = self.shared.sources.get(&slot.source);
            let mut remarks = source.map_or_else(Vec::new, |source| source.remarks(&slot.id));
            let svid = slot.svid.load();
            if svid
                .as_ref()
                .is_some_and(|svid| svid.signer_expires_soon(SystemTime::now()))
            {
                remarks.push(Remark::SignerExpires);
            }
            let issues = source.is_some_and(|source| source.issues());
            let status = slot.status(if issues { LEFT_BY_US } else { LEFT_BY_OTHERS });
            let pushes = source.is_some_and(|source| source.pushes());
            IdentityStatus {
                remarks,
                next_attempt: status.next_attempt.filter(|_| !pushes),
                refused_bundles: source
                    .map_or_else(Vec::new, |source| source.refused_bundles(&slot.id)),
                ..status
            }
        };
        slots.values().map(status).collect()
    }

    /// The bundles in force by trust domain, each once, however many identities trust it.
    #[must_use]
    pub fn bundles(&self) -> Vec<BundleStatus> {
        let mut found: BTreeMap<_, Vec<Arc<TrustBundle>>> = BTreeMap::new();
        let mut add = |bundles: &TrustBundles| {
            for (domain, bundle) in bundles.iter() {
                let found = found.entry(domain.clone()).or_default();
                if !found.iter().any(|other| other.same_as(bundle)) {
                    found.push(bundle.clone());
                }
            }
        };
        add(&self.configured_bundles());
        let slots = self.shared.slots.load();
        slots.values().for_each(|slot| add(&slot.trust.current()));
        let found = found.into_values().flatten();
        found.map(|bundle| bundle.as_ref().into()).collect()
    }
}

impl Drop for IdentityStore {
    fn drop(&mut self) {
        for task in lock(&self.tasks).values() {
            task.abort();
        }
        if let Some(clock) = &*lock(&self.clock) {
            clock.abort();
        }
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
