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
    BundleStatus, CertificateSource, CryptoPolicy, Holders, IdentityStatus, Material, ReloadCounts,
    ReloadError, ReloadResult, RevocationList, SourceError, SpiffeId, Svid, TrustBundle,
    TrustBundles, TrustDomain, TrustStore, renewal::Renewal, status::CertificateStatus,
};

/// How long a source may take to answer. A source that issues over the network needs seconds.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Looked at so long after a certificate or list has expired.
const TURN_SLACK: Duration = Duration::from_millis(10);

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
}

#[derive(Debug)]
struct Shared {
    sources: Sources,
    configured: Mutex<Configured>,
    /// By the names of the sources.
    counts: Mutex<BTreeMap<String, ReloadCounts>>,
    slots: ArcSwap<BTreeMap<SpiffeId, Arc<Slot>>>,
    changes: watch::Sender<u64>,
    /// Of the newest certificate.
    generation: AtomicU64,
}

/// What is trusted besides what sources bring.
#[derive(Debug)]
struct Configured {
    policy: Arc<CryptoPolicy>,
    /// From files that the configuration names.
    files: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    /// From elsewhere, for other trust domains.
    fetched: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    lists: RevocationLists,
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
    /// Number of the times that somebody has asked for an attempt at once, and of those that were
    /// followed by one.
    asked: watch::Sender<u64>,
    answered: watch::Sender<u64>,
}

/// How fetching goes.
#[derive(Clone, Debug, Default)]
struct Progress {
    next_attempt: Option<SystemTime>,
    last_attempt: Option<SystemTime>,
    last_success: Option<SystemTime>,
    last_result: Option<ReloadResult>,
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
                counts: Mutex::new(
                    sources
                        .keys()
                        .map(|name| (name.clone(), ReloadCounts::default()))
                        .collect(),
                ),
                sources,
                configured: Mutex::new(Configured::new(policy)),
                slots: ArcSwap::default(),
                changes: watch::Sender::new(0),
                generation: AtomicU64::new(0),
            }),
            tasks: Mutex::default(),
            holders: Holders::default(),
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

    /// Replaces the bundles of these trust domains that come from neither a source nor a file of
    /// the configuration, all at once. Others stay.
    pub fn replace_bundles(&self, bundles: &[Arc<TrustBundle>]) {
        let mut configured = lock(&self.shared.configured);
        configured.fetched.extend(by_domain(bundles));
        drop(configured);
        self.settle_trust();
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
            IdentityStatus {
                remarks: source.map_or_else(Vec::new, |source| source.remarks(&slot.id)),
                ..slot.status()
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
        add(&lock(&self.shared.configured).bundles(&[]));
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
    let mut asked = slot.asked.subscribe();
    let mut renewal = Renewal::new();
    let mut looked = SystemTime::now();
    loop {
        // The wall clock at every turn: it may jump.
        let now = SystemTime::now();
        shared.drop_expired(&slot, now);
        shared.let_time_pass(&slot, looked, now);
        looked = now;
        if renewal.is_due(now) {
            let number = *asked.borrow_and_update();
            let result = shared.reload(source.as_deref(), &slot).await;
            let in_force = slot.svid.load_full().filter(|_| result.is_ok());
            renewal.attempted(in_force.as_deref(), SystemTime::now());
            shared.record(&slot, result, now, renewal.next());
            slot.answered.send_replace(number);
        }
        let now = SystemTime::now();
        let sleep = slot.until_turn(now).min(renewal.sleep(now));
        tokio::select! {
            () = tokio::time::sleep(sleep) => {}
            () = changed(&mut news) => renewal.hurry(),
            Ok(()) = asked.changed() => renewal.hurry(),
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
    ) -> Result<ReloadResult, ReloadError> {
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
    fn put_in_force(&self, slot: &Slot, material: &Material) -> Result<ReloadResult, ReloadError> {
        // Held, so that bundles that are configured meanwhile come after, and are not lost.
        let configured = lock(&self.configured);
        let next = configured.bundles(&material.bundles);
        let now = SystemTime::now();
        let mut svid = Svid::check(&slot.id, material, &next, &slot.trust, now)?;
        lock(&slot.own).clone_from(&material.bundles);
        let trust_changed = slot.trust.replace(next);
        drop(configured);
        if trust_changed {
            self.changed();
        }
        if slot
            .svid
            .load()
            .as_ref()
            .is_some_and(|old| old.same_as(&svid))
        {
            return Ok(if trust_changed {
                ReloadResult::Accepted
            } else {
                ReloadResult::Unchanged
            });
        }
        svid.generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(
            spiffe_id = %slot.id,
            source = slot.source,
            serial = svid.serial,
            generation = svid.generation,
            not_after = %humantime::format_rfc3339_seconds(svid.not_after),
            "certificate in force"
        );
        slot.svid.store(Some(Arc::new(svid)));
        self.changed();
        Ok(ReloadResult::Accepted)
    }

    /// Brings what an identity trusts up to date with what is configured. Returns whether anything
    /// is different now.
    fn settle_trust(&self, slot: &Slot) -> bool {
        let configured = lock(&self.configured);
        slot.trust.replace(configured.bundles(&lock(&slot.own)))
    }

    fn record(
        &self,
        slot: &Slot,
        result: Result<ReloadResult, ReloadError>,
        attempted: SystemTime,
        next: SystemTime,
    ) {
        let mut progress = lock(&slot.progress);
        progress.last_attempt = Some(attempted);
        progress.next_attempt = Some(next);
        progress.last_result = Some(*result.as_ref().unwrap_or(&ReloadResult::Rejected));
        self.count(&slot.source, &result);
        match result {
            Ok(_) => {
                progress.last_success = Some(attempted);
                progress.last_error = None;
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
        Slot::new(id, source, lock(&self.configured).policy.clone())
    }

    fn count(&self, source: &str, result: &Result<ReloadResult, ReloadError>) {
        let mut counts = lock(&self.counts);
        let counts = counts.entry(source.to_owned()).or_default();
        match result {
            Ok(ReloadResult::Unchanged) => counts.unchanged += 1,
            Ok(_) => counts.accepted += 1,
            Err(error) => *counts.rejected.entry(error.as_str()).or_default() += 1,
        }
    }

    /// Has everybody judge again where an authority or a revocation list has expired meanwhile, or
    /// an authority has become valid.
    fn let_time_pass(&self, slot: &Slot, looked: SystemTime, now: SystemTime) {
        let bundles = slot.trust.current();
        let (earlier, later) = (looked.min(now), looked.max(now));
        let mut turns = bundles.values().flat_map(|bundle| bundle.turns());
        if turns.any(|turn| earlier <= turn && turn < later) {
            slot.trust.renew();
            self.changed();
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

fn by_domain(
    bundles: &[Arc<TrustBundle>],
) -> impl Iterator<Item = (TrustDomain, Arc<TrustBundle>)> {
    bundles
        .iter()
        .map(|bundle| (bundle.trust_domain().clone(), bundle.clone()))
}

// === impl Configured ===

impl Configured {
    fn new(policy: Arc<CryptoPolicy>) -> Self {
        Self {
            policy,
            files: BTreeMap::new(),
            fetched: BTreeMap::new(),
            lists: RevocationLists::new(),
        }
    }

    /// What an identity trusts that has these bundles of its own. A file says more than what is
    /// fetched, and that more than a source; revocation lists come in addition.
    fn bundles(&self, own: &[Arc<TrustBundle>]) -> TrustBundles {
        let mut bundles = TrustBundles::with_policy(self.policy.clone());
        bundles.extend(by_domain(own));
        for (domain, bundle) in self.fetched.iter().chain(&self.files) {
            bundles.insert(domain.clone(), bundle.clone());
        }
        for (domain, lists) in &self.lists {
            if let Some(bundle) = bundles.get_mut(domain) {
                *bundle = Arc::new(bundle.with_lists(lists));
            }
        }
        bundles
    }
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
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
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
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
        }
    }

    /// Time until its bundles begin to say something else by themselves.
    fn until_turn(&self, now: SystemTime) -> Duration {
        let bundles = self.trust.current();
        let turns = bundles.values().flat_map(|bundle| bundle.turns());
        let next = turns.filter_map(|turn| turn.duration_since(now).ok()).min();
        // Times in certificates are whole seconds: the one that is over counts.
        next.map_or(Duration::MAX, |left| left + TURN_SLACK)
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
            last_result: progress.last_result,
            last_error: progress.last_error,
            remarks: Vec::new(),
        }
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
