//! The newest checked material of every identity, read by the tunnel without locks held.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use super::{
    BundleStatus, CertificateSource, IdentityStatus, Material, ReloadError, SourceError, SpiffeId,
    Svid, TrustBundle, TrustStore, bundle::overlaid, renewal::Renewal, status::CertificateStatus,
};

/// How long a source may take to answer. A source that issues over the network needs seconds.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Identities by SPIFFE ID: each one's certificate is fetched from the source, checked as a whole,
/// and replaced as a whole, while the old one stays in force until then or until it expires.
#[derive(Debug)]
pub struct IdentityStore {
    shared: Arc<Shared>,
    /// One for each identity, which renews its certificate. Also taken to add and remove them.
    tasks: Mutex<BTreeMap<SpiffeId, JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    source: Arc<dyn CertificateSource>,
    trust: Arc<TrustStore>,
    slots: ArcSwap<BTreeMap<SpiffeId, Arc<Slot>>>,
    changes: watch::Sender<u64>,
    /// Of the newest certificate.
    generation: AtomicU64,
}

/// One identity. A change to it touches no other.
#[derive(Debug)]
struct Slot {
    id: SpiffeId,
    svid: ArcSwapOption<Svid>,
    progress: Mutex<Progress>,
}

/// How fetching goes.
#[derive(Debug, Default)]
struct Progress {
    next_attempt: Option<SystemTime>,
    last_attempt: Option<SystemTime>,
    last_success: Option<SystemTime>,
    last_error: Option<ReloadError>,
}

// === impl IdentityStore ===

impl IdentityStore {
    /// A store without identities, until [`Self::ensure`] names some.
    #[must_use]
    pub fn new(source: Arc<dyn CertificateSource>, trust: Arc<TrustStore>) -> Self {
        Self {
            shared: Arc::new(Shared {
                source,
                trust,
                slots: ArcSwap::default(),
                changes: watch::Sender::new(0),
                generation: AtomicU64::new(0),
            }),
            tasks: Mutex::default(),
        }
    }

    /// Makes these the identities that there are: fetches what is new, forgets what is gone. Comes
    /// back at once; [`Self::changes`] tells when certificates have arrived. Needs a tokio runtime,
    /// on which the renewing goes on.
    pub fn ensure(&self, ids: &[SpiffeId]) {
        let wanted: BTreeSet<&SpiffeId> = ids.iter().collect();
        let mut tasks = lock(&self.tasks);
        let mut slots = BTreeMap::clone(&self.shared.slots.load());
        tasks.retain(|id, task| {
            let keep = wanted.contains(id);
            if !keep {
                task.abort();
                slots.remove(id);
            }
            keep
        });
        let mut new = Vec::new();
        for id in wanted {
            if !slots.contains_key(id) {
                let slot = Arc::new(Slot::new(id.clone()));
                slots.insert(id.clone(), slot.clone());
                new.push(slot);
            }
        }
        self.shared.slots.store(Arc::new(slots));
        for slot in new {
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

    /// Wakes at every change of any identity or bundle; the number has no meaning but to differ.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Replaces the bundles of these trust domains, all at once. Others stay.
    pub fn replace_bundles(&self, bundles: &[Arc<TrustBundle>]) {
        if self.shared.trust.replace(bundles) {
            self.shared.changed();
        }
    }

    /// The trust bundles in force.
    #[must_use]
    pub fn trust(&self) -> &Arc<TrustStore> {
        &self.shared.trust
    }

    /// Every identity and how it stands, by SPIFFE ID.
    #[must_use]
    pub fn status(&self) -> Vec<IdentityStatus> {
        let source = self.shared.source.name();
        let slots = self.shared.slots.load();
        slots.values().map(|slot| slot.status(source)).collect()
    }

    /// Every trust domain's bundle, by name.
    #[must_use]
    pub fn bundles(&self) -> Vec<BundleStatus> {
        let bundles = self.shared.trust.current();
        bundles
            .values()
            .map(|bundle| bundle.as_ref().into())
            .collect()
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
    let mut news = shared.source.changes(&slot.id);
    let mut renewal = Renewal::new();
    loop {
        let now = SystemTime::now();
        shared.drop_expired(&slot, now);
        if renewal.is_due(now) {
            let result = shared.reload(&slot).await;
            renewal.attempted(&result, slot.svid.load().as_deref(), SystemTime::now());
            shared.record(&slot, result, now, renewal.next());
        }
        tokio::select! {
            () = tokio::time::sleep(renewal.sleep(SystemTime::now())) => {}
            // A source that is gone wakes nobody; what it gave before is renewed in vain, and said.
            Ok(()) = news.changed() => renewal.hurry(),
        }
    }
}

impl Shared {
    async fn reload(&self, slot: &Slot) -> Result<Option<Arc<Svid>>, ReloadError> {
        let fetch = timeout(FETCH_TIMEOUT, self.source.fetch(&slot.id));
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
        let current = self.trust.current();
        let next = overlaid(&current, &material.bundles);
        let bundles = next.as_ref().unwrap_or(&current);
        let now = SystemTime::now();
        let mut svid = Svid::check(&slot.id, material, bundles, &self.trust, now)?;
        if self.trust.replace(&material.bundles) {
            self.changed();
        }
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
                    source = self.source.name(),
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

// === impl Slot ===

impl Slot {
    fn new(id: SpiffeId) -> Self {
        Self {
            id,
            svid: ArcSwapOption::empty(),
            progress: Mutex::default(),
        }
    }

    fn status(&self, source: &'static str) -> IdentityStatus {
        let progress = lock(&self.progress);
        let svid = self.svid.load();
        let svid = svid
            .as_ref()
            .filter(|svid| svid.is_valid_at(SystemTime::now()));
        IdentityStatus {
            spiffe_id: self.id.clone(),
            source,
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
            last_error: progress.last_error.clone(),
        }
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
