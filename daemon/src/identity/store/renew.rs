//! Fetching certificates, judging them, and putting them in force, for as long as there is the
//! identity.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::timeout};

use super::{
    Sources,
    configured::Configured,
    lock,
    outages::{Outages, SAY_AGAIN},
    passed::{self, PassedSource},
    slot::Slot,
};
use crate::identity::{
    CertificateSource, Material, ReloadCounts, ReloadError, ReloadResult, SourceError, SpiffeId,
    Svid, clock_steps, renewal::Renewal,
};

/// How long a source may take to answer. A source that issues over the network needs seconds.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is logged that a signer expires soon.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(24 * 3600);

/// What the store and the tasks of its identities share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) sources: Sources,
    /// Goes before the others while another daemon passes certificates.
    pub(super) passed: Arc<PassedSource>,
    pub(super) configured: Mutex<Configured>,
    /// By the names of the sources.
    pub(super) counts: Mutex<BTreeMap<String, ReloadCounts>>,
    pub(super) slots: ArcSwap<BTreeMap<SpiffeId, Arc<Slot>>>,
    pub(super) changes: watch::Sender<u64>,
    /// Of the wall clock.
    pub(super) steps: watch::Sender<()>,
    /// Of the newest certificate.
    pub(super) generation: AtomicU64,
    /// Ends of signers that were announced in the log, and when: identities mostly have the same.
    pub(super) announced: Mutex<BTreeMap<SystemTime, SystemTime>>,
    /// Of the sources.
    pub(super) outages: Mutex<Outages>,
}

/// From where an identity has its certificates now.
struct Giver {
    name: String,
    source: Option<Arc<dyn CertificateSource>>,
    /// For as long as somebody waits for it, a source that follows an agent does.
    news: Option<watch::Receiver<u64>>,
    is_passed: bool,
}

/// Has every identity look at the clock when it was set.
pub(super) async fn follow_clock(shared: Arc<Shared>) {
    let result = clock_steps::follow(|| {
        tracing::info!("the wall clock was set: certificates are looked at again");
        shared.steps.send_replace(());
        shared.changed();
    });
    if let Err(error) = result.await {
        tracing::warn!(%error, "steps of the wall clock are noticed within ten seconds only");
    }
}

/// Fetches one identity's certificate and renews it, until the identity is removed.
pub(super) async fn keep_fresh(shared: Arc<Shared>, slot: Arc<Slot>) {
    let mut passed = shared.passed.changes(&slot.id);
    let mut giver = shared.giver(&slot);
    let mut asked = slot.asked.subscribe();
    let mut steps = shared.steps.subscribe();
    let mut renewal = Renewal::new();
    let mut looked = SystemTime::now();
    loop {
        if giver.is_passed != shared.passed.gives(&slot.id) {
            giver = shared.giver(&slot);
        }
        // The wall clock at every turn: it may jump.
        let now = SystemTime::now();
        // Before what has expired is gone: who asks for it waits.
        slot.set_renewing(renewal.is_due(now));
        shared.drop_expired(&slot, now);
        shared.let_time_pass(&slot, looked, now);
        shared.announce(&slot, now);
        looked = now;
        if renewal.is_due(now) {
            let number = *asked.borrow_and_update();
            let result = shared.reload(&giver, &slot).await;
            let in_force = slot.svid.load_full().filter(|_| result.is_ok());
            renewal.attempted(in_force.as_deref(), SystemTime::now());
            shared.record(&slot, &giver, result, now, renewal.next());
            slot.answered.send_replace(number);
            slot.set_renewing(false);
        }
        let now = SystemTime::now();
        let sleep = slot.until_turn(now).min(renewal.sleep(now));
        tokio::select! {
            () = tokio::time::sleep(sleep) => {}
            () = changed(&mut giver.news) => renewal.hurry(),
            Ok(()) = passed.changed() => renewal.hurry(),
            Ok(()) = asked.changed() => renewal.hurry(),
            Ok(()) = steps.changed() => {}
        }
    }
}

/// What an attempt that failed means for the certificate that there was before it.
fn what_happens(slot: &Slot, error: &ReloadError) -> String {
    let svid = slot.svid.load();
    let valid = svid
        .as_ref()
        .filter(|svid| svid.is_valid_at(SystemTime::now()));
    match (valid, error) {
        (Some(_), ReloadError::Source(SourceError::Denied(_))) => {
            "the one in force is dropped at once, and connections are refused".to_owned()
        }
        (Some(svid), _) => format!(
            "the one in force stays so until it expires at {}",
            humantime::format_rfc3339_seconds(svid.not_after)
        ),
        (None, _) => "there is none in force, and connections are refused".to_owned(),
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

// === impl Shared ===

impl Shared {
    /// From where an identity has its certificates now: what another daemon passes goes before its source.
    fn giver(&self, slot: &Slot) -> Giver {
        if self.passed.gives(&slot.id) {
            return Giver {
                name: passed::NAME.to_owned(),
                source: Some(self.passed.clone()),
                // They are waited for in any case.
                news: None,
                is_passed: true,
            };
        }
        let source = self.sources.get(&slot.source).cloned();
        Giver {
            name: slot.source.clone(),
            news: source.as_ref().map(|source| source.changes(&slot.id)),
            source,
            is_passed: false,
        }
    }

    async fn reload(&self, giver: &Giver, slot: &Slot) -> Result<ReloadResult, ReloadError> {
        let source = giver.source.as_ref().ok_or_else(|| {
            SourceError::Unavailable(format!(
                "there is no source `{}` since reeve was started; sources change at a restart",
                slot.source
            ))
        })?;
        let fetch = timeout(FETCH_TIMEOUT, source.fetch(&slot.id));
        let material = fetch.await.map_err(|_| ReloadError::Timeout)?;
        let material = material.map_err(|error| match error {
            SourceError::Denied(denied) if slot.was_granted() => denied.after_a_grant().into(),
            error => error,
        })?;
        self.put_in_force(slot, &giver.name, material)
    }

    /// All or nothing: the bundles first, so that nobody presents a certificate before those that
    /// it was checked against are trusted here too.
    fn put_in_force(
        &self,
        slot: &Slot,
        source: &str,
        material: Material,
    ) -> Result<ReloadResult, ReloadError> {
        // Held, so that bundles that are configured meanwhile come after, and are not lost.
        let configured = lock(&self.configured);
        let next = configured.bundles(&material.bundles);
        let now = SystemTime::now();
        let mut svid = Svid::check(&slot.id, &material, &next, &slot.trust, now)?;
        lock(&slot.own).clone_from(&material.bundles);
        let trust_changed = slot.trust.replace(next);
        drop(configured);
        slot.keep(material);
        if trust_changed {
            self.changed();
        }
        if slot
            .svid
            .load()
            .as_ref()
            .is_some_and(|old| old.same_as(&svid))
        {
            if slot.judge_again(now) {
                self.changed();
            }
            return Ok(if trust_changed {
                ReloadResult::Accepted
            } else {
                ReloadResult::Unchanged
            });
        }
        svid.generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(
            spiffe_id = %slot.id,
            source,
            serial = svid.serial,
            generation = svid.generation,
            not_after = %humantime::format_rfc3339_seconds(svid.not_after),
            "certificate in force"
        );
        slot.replace(svid, now);
        self.changed();
        Ok(ReloadResult::Accepted)
    }

    /// Brings what an identity trusts up to date with what is configured. Returns whether anything
    /// is different now.
    pub(super) fn settle_trust(&self, slot: &Slot) -> bool {
        let configured = lock(&self.configured);
        let different = slot.trust.replace(configured.bundles(&lock(&slot.own)));
        drop(configured);
        if different {
            slot.judge_again(SystemTime::now());
        }
        different
    }

    fn record(
        &self,
        slot: &Slot,
        giver: &Giver,
        result: Result<ReloadResult, ReloadError>,
        attempted: SystemTime,
        next: SystemTime,
    ) {
        self.count(&giver.name, &result);
        let unreachable = match &result {
            Err(ReloadError::Source(SourceError::Unreachable(why))) => Some(why),
            _ => None,
        };
        match unreachable {
            Some(why) => self.say_unreachable(slot, why),
            None if giver.is_passed => {}
            None => self.say_reached(slot),
        }
        if let (Err(error), None) = (&result, unreachable) {
            self.say_failed(slot, giver, error, next);
        }
        let is_denied = matches!(&result, Err(ReloadError::Source(SourceError::Denied(_))));
        if is_denied {
            slot.retire();
        }
        let mut progress = lock(&slot.progress);
        progress.last_attempt = Some(attempted);
        progress.next_attempt = Some(next);
        progress.last_result = Some(*result.as_ref().unwrap_or(&ReloadResult::Rejected));
        if result.is_ok() {
            progress.last_success = Some(attempted);
        }
        progress.last_error = result.err();
        drop(progress);
        if is_denied {
            self.changed();
        }
    }

    /// Says in the log why an attempt failed: once, and again when the reason is another or after a long
    /// time.
    fn say_failed(&self, slot: &Slot, giver: &Giver, error: &ReloadError, next: SystemTime) {
        let now = Instant::now();
        let mut progress = lock(&slot.progress);
        let is_recent = |said: Instant| now.duration_since(said) < SAY_AGAIN;
        if progress.last_error.as_ref() == Some(error) && progress.said.is_some_and(is_recent) {
            return;
        }
        progress.said = Some(now);
        drop(progress);
        if let ReloadError::Source(SourceError::Pending(why)) = error {
            tracing::debug!(spiffe_id = %slot.id, source = giver.name, "{why}");
            return;
        }
        let pushes = giver.source.as_ref().is_some_and(|it| it.pushes());
        let next = (!pushes).then(|| humantime::format_rfc3339_seconds(next));
        tracing::warn!(
            spiffe_id = %slot.id,
            source = giver.name,
            reason = error.as_str(),
            next_attempt = next.map(tracing::field::display),
            "no new certificate, {}: {error}",
            what_happens(slot, error),
        );
    }

    /// Says in the log that a source cannot be reached, for all its identities.
    fn say_unreachable(&self, slot: &Slot, why: &str) {
        let mut outages = lock(&self.outages);
        if outages.failed(&slot.source, &slot.id, why, Instant::now()) {
            tracing::warn!(
                source = slot.source,
                identities = self.identities_of(&slot.source),
                reason = "unavailable",
                "the source cannot be reached, certificates in force stay so until they expire: {why}"
            );
        }
    }

    fn say_reached(&self, slot: &Slot) {
        let slots = self.slots.load();
        let is_there = |id: &SpiffeId| slots.get(id).is_some_and(|it| it.source == slot.source);
        let mut outages = lock(&self.outages);
        let over = outages.reached(&slot.source, &slot.id, is_there, Instant::now());
        if let Some(lasted) = over {
            tracing::info!(
                source = slot.source,
                identities = self.identities_of(&slot.source),
                seconds = lasted.as_secs(),
                "the source can be reached again"
            );
        }
    }

    fn identities_of(&self, source: &str) -> usize {
        let slots = self.slots.load();
        slots.values().filter(|slot| slot.source == source).count()
    }

    pub(super) fn slot(&self, id: SpiffeId, source: String) -> Slot {
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
            slot.judge_again(now);
            self.changed();
        }
    }

    /// Says in the log that a CA above a certificate expires soon: renewing the certificate does not
    /// help, and replacing a CA takes people and time.
    fn announce(&self, slot: &Slot, now: SystemTime) {
        let Some(svid) = slot
            .svid
            .load_full()
            .filter(|svid| svid.signer_expires_soon(now))
        else {
            return;
        };
        let end = svid.signer.not_after;
        let mut announced = lock(&self.announced);
        announced.retain(|end, _| *end >= now);
        let is_new = |last: &SystemTime| {
            now.duration_since(*last)
                .is_ok_and(|it| it < ANNOUNCE_EVERY)
        };
        if announced.get(&end).is_some_and(is_new) {
            return;
        }
        announced.insert(end, now);
        tracing::warn!(
            spiffe_id = %slot.id,
            source = slot.source,
            issuer = svid.issuer,
            signer_not_after = %humantime::format_rfc3339_seconds(end),
            "a CA above the certificate expires soon, and the certificate is refused from then on: \
             replace the CA (of the embedded one: `reeve ca rotate`)"
        );
    }

    /// An expired key is of no use but to a thief.
    fn drop_expired(&self, slot: &Slot, now: SystemTime) {
        let svid = slot.svid.load_full().filter(|svid| svid.not_after < now);
        if let Some(svid) = svid {
            let what = match svid.signer.not_after < now {
                true => "a CA above the certificate",
                false => "the certificate",
            };
            if self.passed.is_idle(&slot.id) {
                tracing::debug!(
                    spiffe_id = %slot.id,
                    "{what} has expired; no connection of this daemon uses it"
                );
            } else {
                tracing::error!(
                    spiffe_id = %slot.id,
                    "{what} has expired and there is no new one: connections are refused"
                );
            }
            slot.retire();
            self.changed();
        }
    }

    pub(super) fn changed(&self) {
        self.changes
            .send_modify(|number| *number = number.wrapping_add(1));
    }
}
