//! The newest checked material of every identity, read by the tunnel without locks held.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use super::{
    BundleStatus, CertificateSource, CryptoPolicy, IdentityStatus, Material, ReloadError,
    SourceError, SpiffeId, Svid, TrustBundle, TrustBundles, TrustStore, renewal::Renewal,
    status::CertificateStatus,
};

/// How long a source may take to answer. A source that issues over the network needs seconds.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// The sources by the names that the configuration gives them.
pub type Sources = BTreeMap<String, Arc<dyn CertificateSource>>;

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
}

#[derive(Debug)]
struct Shared {
    sources: Sources,
    /// The bundles that no source brings.
    configured: Mutex<TrustBundles>,
    slots: ArcSwap<BTreeMap<SpiffeId, Arc<Slot>>>,
    changes: watch::Sender<u64>,
    /// Of the newest certificate.
    generation: AtomicU64,
}

/// One identity. A change to it touches no other.
#[derive(Debug)]
struct Slot {
    id: SpiffeId,
    /// Name of its source.
    source: String,
    svid: ArcSwapOption<Svid>,
    /// What its verifiers read.
    trust: Arc<TrustStore>,
    /// The bundles that came with the newest certificate.
    own: Mutex<Vec<Arc<TrustBundle>>>,
    progress: Mutex<Progress>,
}

/// How fetching goes.
#[derive(Clone, Debug, Default)]
struct Progress {
    next_attempt: Option<SystemTime>,
    last_attempt: Option<SystemTime>,
    last_success: Option<SystemTime>,
    last_error: Option<ReloadError>,
}

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
                sources,
                configured: Mutex::new(TrustBundles::with_policy(policy)),
                slots: ArcSwap::default(),
                changes: watch::Sender::new(0),
                generation: AtomicU64::new(0),
            }),
            tasks: Mutex::default(),
        }
    }

    /// Makes these the identities that there are, each with the name of its source: fetches what is
    /// new, forgets what is gone. One that changes its source keeps what it has until the new
    /// source has given something. Comes back at once; [`Self::changes`] tells when certificates
    /// have arrived. Needs a tokio runtime, on which the renewing goes on.
    pub fn ensure(&self, wanted: &BTreeMap<SpiffeId, String>) {
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

    /// Replaces the configured bundles of these trust domains, all at once. Others stay.
    pub fn replace_bundles(&self, bundles: &[Arc<TrustBundle>]) {
        let by_domain = |bundle: &Arc<TrustBundle>| (bundle.trust_domain().clone(), bundle.clone());
        lock(&self.shared.configured).extend(bundles.iter().map(by_domain));
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
        slots.values().map(|slot| slot.status()).collect()
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
        add(&lock(&self.shared.configured));
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
    }
}

// === impl Shared ===

/// Fetches one identity's certificate and renews it, until the identity is removed.
async fn keep_fresh(shared: Arc<Shared>, slot: Arc<Slot>) {
    let source = shared.sources.get(&slot.source).cloned();
    let mut news = source.as_ref().map(|source| source.changes(&slot.id));
    let mut renewal = Renewal::new();
    loop {
        let now = SystemTime::now();
        shared.drop_expired(&slot, now);
        if renewal.is_due(now) {
            let result = shared.reload(source.as_deref(), &slot).await;
            renewal.attempted(&result, slot.svid.load().as_deref(), SystemTime::now());
            shared.record(&slot, result, now, renewal.next());
        }
        tokio::select! {
            () = tokio::time::sleep(renewal.sleep(SystemTime::now())) => {}
            () = changed(&mut news) => renewal.hurry(),
        }
    }
}

/// Waits until the source may have something new. A source that is gone, or never was, wakes
/// nobody: what it gave before is renewed in vain, and that is said.
async fn changed(news: &mut Option<watch::Receiver<u64>>) {
    if let Some(news) = news
        && news.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

impl Shared {
    async fn reload(
        &self,
        source: Option<&dyn CertificateSource>,
        slot: &Slot,
    ) -> Result<Option<Arc<Svid>>, ReloadError> {
        let source = source.ok_or_else(|| {
            SourceError::Unavailable(format!(
                "there is no source `{}` since reeve was started; sources change at a restart",
                slot.source
            ))
        })?;
        let fetch = timeout(FETCH_TIMEOUT, source.fetch(&slot.id));
        let material = fetch.await.map_err(|_| ReloadError::Timeout)??;
        self.put_in_force(slot, &material)
    }

    /// All or nothing: the bundles first, so that nobody presents a certificate before those that
    /// it was checked against are trusted here too.
    fn put_in_force(
        &self,
        slot: &Slot,
        material: &Material,
    ) -> Result<Option<Arc<Svid>>, ReloadError> {
        // Held, so that bundles that are configured meanwhile come after, and are not lost.
        let configured = lock(&self.configured);
        let next = effective(&configured, &material.bundles);
        let now = SystemTime::now();
        let mut svid = Svid::check(&slot.id, material, &next, &slot.trust, now)?;
        lock(&slot.own).clone_from(&material.bundles);
        if slot.trust.replace(next) {
            self.changed();
        }
        drop(configured);
        if slot
            .svid
            .load()
            .as_ref()
            .is_some_and(|old| old.same_as(&svid))
        {
            return Ok(None);
        }
        svid.generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Some(Arc::new(svid)))
    }

    /// Brings what an identity trusts up to date with what is configured. Returns whether anything
    /// is different now.
    fn settle_trust(&self, slot: &Slot) -> bool {
        let configured = lock(&self.configured);
        slot.trust.replace(effective(&configured, &lock(&slot.own)))
    }

    fn record(
        &self,
        slot: &Slot,
        result: Result<Option<Arc<Svid>>, ReloadError>,
        attempted: SystemTime,
        next: SystemTime,
    ) {
        let mut progress = lock(&slot.progress);
        progress.last_attempt = Some(attempted);
        progress.next_attempt = Some(next);
        match result {
            Ok(svid) => {
                progress.last_success = Some(attempted);
                progress.last_error = None;
                if let Some(svid) = svid {
                    tracing::info!(
                        spiffe_id = %slot.id,
                        source = slot.source,
                        serial = svid.serial,
                        generation = svid.generation,
                        not_after = %humantime::format_rfc3339_seconds(svid.not_after),
                        "certificate in force"
                    );
                    slot.svid.store(Some(svid));
                    self.changed();
                }
            }
            Err(error) => {
                tracing::warn!(
                    spiffe_id = %slot.id,
                    source = slot.source,
                    reason = error.as_str(),
                    next_attempt = %humantime::format_rfc3339_seconds(next),
                    "no new certificate, the old one stays in force until it expires: {error}"
                );
                if error == ReloadError::Source(SourceError::Withdrawn) {
                    slot.svid.store(None);
                    self.changed();
                }
                progress.last_error = Some(error);
            }
        }
    }

    fn slot(&self, id: SpiffeId, source: String) -> Slot {
        Slot::new(id, source, lock(&self.configured).policy().clone())
    }

    /// An expired key is of no use but to a thief.
    fn drop_expired(&self, slot: &Slot, now: SystemTime) {
        let expired = |svid: &Arc<Svid>| svid.not_after < now;
        if slot.svid.load().as_ref().is_some_and(expired) {
            tracing::error!(
                spiffe_id = %slot.id,
                "the certificate has expired and there is no new one: connections are refused"
            );
            slot.svid.store(None);
            self.changed();
        }
    }

    fn changed(&self) {
        self.changes
            .send_modify(|number| *number = number.wrapping_add(1));
    }
}

/// What an identity trusts that has these bundles of its own.
fn effective(configured: &TrustBundles, own: &[Arc<TrustBundle>]) -> TrustBundles {
    let by_domain = |bundle: &Arc<TrustBundle>| (bundle.trust_domain().clone(), bundle.clone());
    let mut bundles = TrustBundles::with_policy(configured.policy().clone());
    bundles.extend(own.iter().map(by_domain));
    for (domain, bundle) in configured.iter() {
        bundles.insert(domain.clone(), bundle.clone());
    }
    bundles
}

// === impl Slot ===

impl Slot {
    fn new(id: SpiffeId, source: String, policy: Arc<CryptoPolicy>) -> Self {
        Self {
            id,
            source,
            svid: ArcSwapOption::empty(),
            trust: Arc::new(TrustStore::with_policy(policy, [])),
            own: Mutex::default(),
            progress: Mutex::default(),
        }
    }

    /// The same identity, with the same material, from another source.
    fn with_source(&self, source: &str) -> Self {
        Self {
            id: self.id.clone(),
            source: source.to_owned(),
            svid: ArcSwapOption::new(self.svid.load_full()),
            // The material's verifiers read this very store.
            trust: self.trust.clone(),
            own: Mutex::new(lock(&self.own).clone()),
            progress: Mutex::new(lock(&self.progress).clone()),
        }
    }

    fn status(&self) -> IdentityStatus {
        let progress = lock(&self.progress).clone();
        let svid = self.svid.load();
        let svid = svid
            .as_ref()
            .filter(|svid| svid.is_valid_at(SystemTime::now()));
        IdentityStatus {
            spiffe_id: self.id.clone(),
            source: self.source.clone(),
            certificate: svid.map(|svid| CertificateStatus {
                serial: svid.serial.clone(),
                issuer: svid.issuer.clone(),
                not_before: svid.not_before,
                not_after: svid.not_after,
                generation: svid.generation,
            }),
            next_attempt: progress.next_attempt,
            last_attempt: progress.last_attempt,
            last_success: progress.last_success,
            last_error: progress.last_error,
        }
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
