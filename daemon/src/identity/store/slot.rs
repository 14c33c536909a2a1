//! One identity of a store.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::lock;
use crate::identity::{
    CryptoPolicy, IdentityStatus, Material, ReloadError, ReloadResult, SpiffeId, Svid, TrustBundle,
    TrustStore, status::CertificateStatus,
};

/// Looked at so long after a certificate or list has expired.
const TURN_SLACK: Duration = Duration::from_millis(10);

/// One identity. A change to it touches no other.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) id: SpiffeId,
    /// Name of its source.
    pub(super) source: String,
    pub(super) svid: ArcSwapOption<Svid>,
    /// What that was made from, for a daemon to which it is passed.
    pub(super) material: ArcSwapOption<Material>,
    /// The last one, once it has expired or was withdrawn.
    former: Mutex<Option<CertificateStatus>>,
    /// What its verifiers read.
    pub(super) trust: Arc<TrustStore>,
    /// The bundles that came with the newest certificate.
    pub(super) own: Mutex<Vec<Arc<TrustBundle>>>,
    pub(super) progress: Mutex<Progress>,
    /// Number of the times that somebody has asked for an attempt at once, and of those that were
    /// followed by one.
    pub(super) asked: watch::Sender<u64>,
    pub(super) answered: watch::Sender<u64>,
    renewing: AtomicBool,
    /// Whether this source has given a certificate that was put in force.
    granted: AtomicBool,
}

/// How fetching goes.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) next_attempt: Option<SystemTime>,
    pub(super) last_attempt: Option<SystemTime>,
    pub(super) last_success: Option<SystemTime>,
    pub(super) last_result: Option<ReloadResult>,
    pub(super) last_error: Option<ReloadError>,
    /// When the log last had it.
    pub(super) said: Option<Instant>,
    /// Share of its lifetime that the certificate before had left when it was replaced.
    pub(super) renewal_left: Option<f64>,
}

// === impl Slot ===

impl Slot {
    pub(super) fn new(id: SpiffeId, source: String, policy: Arc<CryptoPolicy>) -> Self {
        Self {
            id,
            source,
            svid: ArcSwapOption::empty(),
            material: ArcSwapOption::empty(),
            former: Mutex::default(),
            trust: Arc::new(TrustStore::with_policy(policy, [])),
            own: Mutex::default(),
            progress: Mutex::default(),
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
            renewing: AtomicBool::new(false),
            granted: AtomicBool::new(false),
        }
    }

    /// The same identity, with the same material, from another source.
    pub(super) fn with_source(&self, source: &str) -> Self {
        Self {
            id: self.id.clone(),
            source: source.to_owned(),
            svid: ArcSwapOption::new(self.svid.load_full()),
            material: ArcSwapOption::new(self.material.load_full()),
            former: Mutex::new(lock(&self.former).clone()),
            // The material's verifiers read this very store.
            trust: self.trust.clone(),
            own: Mutex::new(lock(&self.own).clone()),
            progress: Mutex::new(lock(&self.progress).clone()),
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
            renewing: AtomicBool::new(false),
            granted: AtomicBool::new(false),
        }
    }

    /// Whether its source is being asked for a certificate, or will be at once, since that in force has
    /// expired this moment.
    pub(super) fn is_renewing(&self) -> bool {
        let svid = self.svid.load();
        let expired = |svid: &Arc<Svid>| svid.not_after < SystemTime::now();
        self.renewing.load(Ordering::Relaxed) || svid.as_ref().is_some_and(expired)
    }

    /// The source is being asked, or not any more.
    pub(super) fn set_renewing(&self, renewing: bool) {
        self.renewing.store(renewing, Ordering::Relaxed);
    }

    /// Whether its source has given a certificate before.
    pub(super) fn was_granted(&self) -> bool {
        self.granted.load(Ordering::Relaxed)
    }

    /// Time until its certificate expires, or its bundles begin to say something else by themselves.
    pub(super) fn until_turn(&self, now: SystemTime) -> Duration {
        let bundles = self.trust.current();
        let turns = bundles.values().flat_map(|bundle| bundle.turns());
        let end = self.svid.load().as_ref().map(|svid| svid.not_after);
        let turns = turns.chain(end);
        let next = turns.filter_map(|turn| turn.duration_since(now).ok()).min();
        // Up to its end, a certificate counts.
        next.map_or(Duration::MAX, |left| left + TURN_SLACK)
    }

    /// Looks again for how long the certificate is good, where the bundles have changed or time has
    /// changed what they mean. Returns whether that is another time now.
    pub(super) fn judge_again(&self, now: SystemTime) -> bool {
        let Some(svid) = self.svid.load_full() else {
            return false;
        };
        let Some(judged) = svid.judged_again(&self.trust.current(), now) else {
            return false;
        };
        // Unless there is a newer one already.
        let before = self.svid.compare_and_swap(&svid, Some(Arc::new(judged)));
        before
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, &svid))
    }

    /// Forgets the key of a certificate that counts no more, and keeps what was known of it.
    pub(super) fn retire(&self) {
        self.material.store(None);
        if let Some(svid) = self.svid.swap(None) {
            *lock(&self.former) = Some(described(&svid));
        }
    }

    /// Keeps what a certificate was made from. It stays the same value, by its address, for as long as it
    /// says the same.
    pub(super) fn keep(&self, material: Material) {
        let before = self.material.load();
        if before.as_ref().is_none_or(|it| !it.same_as(&material)) {
            self.material.store(Some(Arc::new(material)));
        }
    }

    /// Takes this certificate in the place of the one before.
    pub(super) fn replace(&self, svid: Svid, now: SystemTime) {
        self.granted.store(true, Ordering::Relaxed);
        if let Some(before) = self.svid.swap(Some(Arc::new(svid))) {
            let lifetime = before.not_after.duration_since(before.not_before);
            let left = before.not_after.duration_since(now).unwrap_or_default();
            let lifetime = lifetime.unwrap_or_default().as_secs_f64();
            if !left.is_zero() && lifetime > 0.0 {
                lock(&self.progress).renewal_left = Some(left.as_secs_f64() / lifetime);
            }
        }
    }

    /// `usual` is the share of a certificate's lifetime that is left at its renewal, where none was seen.
    pub(super) fn status(&self, usual: f64) -> IdentityStatus {
        let progress = lock(&self.progress).clone();
        let newest = self.svid.load_full();
        let valid = |svid: &&Arc<Svid>| svid.is_valid_at(SystemTime::now());
        let certificate = newest.as_ref().filter(valid).map(|svid| described(svid));
        let newest = newest.map(|svid| described(&svid));
        IdentityStatus {
            spiffe_id: self.id.clone(),
            source: self.source.clone(),
            certificate,
            newest: newest.or_else(|| lock(&self.former).clone()),
            renewal_left: progress.renewal_left.unwrap_or(usual),
            next_attempt: progress.next_attempt,
            last_attempt: progress.last_attempt,
            last_success: progress.last_success,
            last_result: progress.last_result,
            last_error: progress.last_error,
            remarks: Vec::new(),
            refused_bundles: Vec::new(),
        }
    }
}

fn described(svid: &Svid) -> CertificateStatus {
    CertificateStatus {
        serial: svid.serial.clone(),
        issuer: svid.issuer.clone(),
        not_before: svid.not_before,
        not_after: svid.not_after,
        signer: svid.signer,
        generation: svid.generation,
    }
}
