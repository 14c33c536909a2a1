//! One endpoint: asked again and again, and what it gave last.

use std::{
    path::Path,
    sync::{Arc, Mutex, Weak},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use super::{
    BundleEndpoint, BundleOrigin, EndpointError, EndpointProfile, EndpointStatus, Given, Inner,
    fetch::{Fetched, Question, Server},
    kept, lock,
};
use crate::identity::{
    ReloadCounts, ReloadResult, TrustBundle, TrustDomain, TrustStore, backoff::Backoff,
    random_fraction,
};

/// How often an endpoint is asked that does not say (SPIFFE Federation, section 4.1).
const USUAL_REFRESH: Duration = Duration::from_secs(300);
/// However often an endpoint wants to be asked, it is asked no more often, nor less: a withdrawn
/// key is to go within the hour.
const SOONEST_REFRESH: Duration = Duration::from_secs(5);
const LATEST_REFRESH: Duration = Duration::from_secs(3600);
/// Part of the interval over which the nodes of a fleet are spread.
const SPREAD: f64 = 0.1;

/// An endpoint and what is known of it.
#[derive(Debug)]
pub(super) struct Followed {
    endpoint: BundleEndpoint,
    given: Option<Given>,
    state: Mutex<State>,
    /// Number of the times that somebody has asked for an attempt at once, and of those that were
    /// followed by one.
    asked: watch::Sender<u64>,
    answered: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    held: Option<Held>,
    next_attempt: Option<SystemTime>,
    last_attempt: Option<SystemTime>,
    last_success: Option<SystemTime>,
    last_result: Option<ReloadResult>,
    last_error: Option<EndpointError>,
    counts: ReloadCounts,
}

/// The bundle in force.
#[derive(Clone, Debug)]
struct Held {
    bundle: Arc<TrustBundle>,
    origin: BundleOrigin,
    sequence: Option<u64>,
    /// Whether the sequence number is one of the URL that is asked now.
    same_url: bool,
    refresh: Duration,
}

/// Asks an endpoint for as long as it is followed.
pub(super) async fn follow(federation: Weak<Inner>, followed: Arc<Followed>) {
    let mut asked = followed.asked.subscribe();
    let mut backoff = Backoff::new();
    loop {
        let number = *asked.borrow_and_update();
        let Some(inner) = federation.upgrade() else {
            return;
        };
        let attempted = SystemTime::now();
        let result = followed.refresh(&inner).await;
        if result == Ok(ReloadResult::Accepted) {
            inner.changed();
        }
        drop(inner);
        let wait = followed.record(result, attempted, &mut backoff);
        followed.answered.send_replace(number);
        tokio::select! {
            () = sleep(wait) => {}
            // Whoever asks has the endpoint, which is why the channel is open.
            _ = asked.changed() => {}
        }
    }
}

// === impl Followed ===

impl Followed {
    /// With the bundle that was kept, or the one to begin with.
    pub(super) fn new(endpoint: BundleEndpoint, given: Option<Given>, folder: &Path) -> Self {
        let digest = given.as_ref().map(|given| given.digest.as_str());
        let mut state = State::default();
        if let Some(kept) = kept::read(folder, &endpoint, digest) {
            state.held = Some(Held::new(&kept.fetched, BundleOrigin::Kept, kept.same_url));
            state.last_success = Some(kept.at);
        } else if endpoint.is_self_serving()
            && let Some(given) = &given
        {
            state.held = Some(Held {
                bundle: given.bundle.clone(),
                origin: BundleOrigin::Bootstrap,
                sequence: None,
                same_url: false,
                refresh: USUAL_REFRESH,
            });
        }
        Self {
            endpoint,
            given,
            state: Mutex::new(state),
            asked: watch::Sender::default(),
            answered: watch::Sender::default(),
        }
    }

    pub(super) fn trust_domain(&self) -> &TrustDomain {
        &self.endpoint.trust_domain
    }

    /// Whether it is this endpoint, with this bundle to begin with.
    pub(super) fn is(&self, endpoint: &BundleEndpoint, given: Option<&Given>) -> bool {
        let digest = |given: &Given| given.digest.clone();
        self.endpoint == *endpoint && self.given.as_ref().map(digest) == given.map(digest)
    }

    /// The bundle in force.
    pub(super) fn bundle(&self) -> Option<Arc<TrustBundle>> {
        lock(&self.state).held.as_ref().map(|it| it.bundle.clone())
    }

    /// Has it asked at once, and waits until it was.
    pub(super) async fn ask(&self) {
        let mut answered = self.answered.subscribe();
        let mut number = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            number = *asked;
        });
        // The sender lives as long as this does.
        let _ = answered.wait_for(|done| *done >= number).await;
    }

    /// Why there is nothing new, though somebody has asked.
    pub(super) fn refusal(&self) -> Option<String> {
        if *self.answered.borrow() < *self.asked.borrow() {
            return Some("it has not answered yet".to_owned());
        }
        let state = lock(&self.state);
        state.last_error.as_ref().map(ToString::to_string)
    }

    async fn refresh(&self, inner: &Inner) -> Result<ReloadResult, EndpointError> {
        let fetched = inner.fetcher.fetch(self.question(inner)?).await?;
        let held = lock(&self.state).held.clone();
        let same = |held: &Held| held.bundle.same_as(&fetched.bundle);
        let unchanged = held.as_ref().is_some_and(same);
        if let Some(held) = &held {
            self.compare(held, &fetched)?;
        }
        if fetched.bundle.is_empty() {
            tracing::warn!(
                trust_domain = %self.trust_domain(),
                "the endpoint's bundle is empty: the trust domain revokes everybody"
            );
        }
        let now = Held::new(&fetched, BundleOrigin::Fetched, true);
        let is_kept = held.is_some_and(|held| {
            unchanged && held.origin == BundleOrigin::Fetched && held.sequence == now.sequence
        });
        lock(&self.state).held = Some(now);
        if !is_kept {
            self.keep(inner, fetched.text).await;
        }
        Ok(match unchanged {
            true => ReloadResult::Unchanged,
            false => ReloadResult::Accepted,
        })
    }

    fn question(&self, inner: &Inner) -> Result<Question, EndpointError> {
        let configured = inner.identities.configured_bundles();
        let policy = configured.policy().clone();
        let server = match &self.endpoint.profile {
            EndpointProfile::Web { authorities } => Server::Named(authorities.clone()),
            EndpointProfile::Spiffe { id, .. } => {
                let domain = id.trust_domain();
                // The newest there is: a configured file, what was fetched, and only then what
                // there was to begin with.
                let bundle = configured.get(domain).cloned();
                let given = || self.given.as_ref().map(|given| given.bundle.clone());
                let bundle = bundle
                    .or_else(given)
                    .ok_or_else(|| EndpointError::NoBundle(domain.clone()))?;
                let trust = TrustStore::of(policy.clone(), bundle);
                Server::Identity(id.clone(), Arc::new(trust))
            }
        };
        Ok(Question {
            trust_domain: self.trust_domain().clone(),
            url: self.endpoint.url.clone(),
            server,
            provider: policy.provider().clone(),
        })
    }

    /// Refuses what is older than what there is.
    fn compare(&self, held: &Held, fetched: &Fetched) -> Result<(), EndpointError> {
        let (Some(before), Some(new)) = (held.sequence, fetched.document.sequence) else {
            return Ok(());
        };
        if !held.same_url {
            return Ok(());
        }
        if new < before {
            return Err(EndpointError::SequenceWentBack { held: before, new });
        }
        if new == before && !held.bundle.same_as(&fetched.bundle) {
            tracing::warn!(
                trust_domain = %self.trust_domain(),
                sequence = new,
                "the endpoint's bundle has changed without another sequence number"
            );
        }
        Ok(())
    }

    async fn keep(&self, inner: &Inner, document: String) {
        let (folder, endpoint) = (inner.folder.clone(), self.endpoint.clone());
        let digest = self.given.as_ref().map(|given| given.digest.clone());
        let written = spawn_blocking(move || {
            let now = SystemTime::now();
            kept::write(&folder, &endpoint, digest.as_deref(), &document, now)
        });
        let failed = match written.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(
            trust_domain = %self.trust_domain(),
            folder = %inner.folder.display(),
            "the bundle is in force, and cannot be kept for the next start: {failed}"
        );
    }

    /// Notes how an attempt has ended. Returns the time until the next one.
    fn record(
        &self,
        result: Result<ReloadResult, EndpointError>,
        attempted: SystemTime,
        backoff: &mut Backoff,
    ) -> Duration {
        let mut state = lock(&self.state);
        state.last_attempt = Some(attempted);
        state.last_result = Some(*result.as_ref().unwrap_or(&ReloadResult::Rejected));
        let domain = self.trust_domain();
        match result {
            Ok(result) => {
                backoff.reset();
                state.last_success = Some(attempted);
                state.last_error = None;
                if result == ReloadResult::Unchanged {
                    state.counts.unchanged += 1;
                } else {
                    state.counts.accepted += 1;
                    let held = state.held.as_ref();
                    tracing::info!(
                        trust_domain = %domain,
                        url = %self.endpoint.url,
                        certificates = held.map(|held| held.bundle.certificates().len()),
                        sequence = held.and_then(|held| held.sequence),
                        "trust bundle of a bundle endpoint in force"
                    );
                }
            }
            Err(error) => {
                *state.counts.rejected.entry(error.as_str()).or_default() += 1;
                let held = match state.held {
                    Some(_) => "the one before stays in force",
                    None => "there is none yet, and everybody of the trust domain is refused",
                };
                tracing::warn!(
                    trust_domain = %domain,
                    url = %self.endpoint.url,
                    reason = error.as_str(),
                    "no trust bundle from a bundle endpoint, {held}: {error}"
                );
                state.last_error = Some(error);
            }
        }
        // Failures are no reason to ask more often than usual (section 6.2), but for the first
        // bundle.
        let wait = match (&state.held, &state.last_error) {
            (None, Some(_)) => backoff.next(),
            (None, None) => USUAL_REFRESH,
            (Some(held), _) => held.refresh.mul_f64(1.0 - SPREAD * random_fraction()),
        };
        state.next_attempt = Some(SystemTime::now() + wait);
        wait
    }

    pub(super) fn status(&self) -> EndpointStatus {
        let state = lock(&self.state);
        let held = state.held.as_ref();
        EndpointStatus {
            trust_domain: self.trust_domain().clone(),
            url: self.endpoint.url.as_str().to_owned(),
            profile: self.endpoint.profile.as_str(),
            origin: held.map(|held| held.origin),
            sequence: held.and_then(|held| held.sequence),
            next_attempt: state.next_attempt,
            last_attempt: state.last_attempt,
            last_success: state.last_success,
            last_result: state.last_result,
            last_error: state.last_error.clone(),
            counts: state.counts.clone(),
        }
    }
}

// === impl Held ===

impl Held {
    fn new(fetched: &Fetched, origin: BundleOrigin, same_url: bool) -> Self {
        let hint = fetched.document.refresh_hint.unwrap_or(USUAL_REFRESH);
        Self {
            bundle: fetched.bundle.clone(),
            origin,
            sequence: fetched.document.sequence,
            same_url,
            refresh: hint.clamp(SOONEST_REFRESH, LATEST_REFRESH),
        }
    }
}
