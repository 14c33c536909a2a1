//! Bundles of other trust domains, fetched from their SPIFFE bundle endpoints and kept up to date
//! (SPIFFE Federation).
//!
//! In: the endpoints of the configuration. Out: bundles for the identity store, one for each trust
//! domain and never merged. [`endpoint`] says where a bundle is and who has to be there, [`fetch`]
//! gets it, on a [`thread`] of its own, [`document`] reads it, [`follow`] asks again and again, and
//! [`kept`] brings the last good one over a restart.
//!
//! What cannot be fetched or is refused leaves the bundle before in force: it says no less than it
//! did, and its certificates expire by themselves.

mod document;
mod endpoint;
mod error;
mod fetch;
mod follow;
mod kept;
mod thread;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use tokio::{task::JoinHandle, time::timeout};

use self::{
    follow::{Followed, follow},
    thread::Fetcher,
};
use super::{
    BundleError, IdentityStore, PemError, ReloadCounts, ReloadResult, TrustBundle, TrustDomain,
    hex, pem_file,
};
use crate::privileges::Confinement;

pub use document::{BundleDocument, DocumentError, KeyProblem};
pub use endpoint::{BundleEndpoint, EndpointProfile, EndpointUrl};
pub use error::EndpointError;

/// Follows bundle endpoints, and gives their bundles to the identity store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Federation(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identities: Arc<IdentityStore>,
    /// Where bundles are kept.
    folder: PathBuf,
    fetcher: Fetcher,
    endpoints: Mutex<BTreeMap<TrustDomain, Endpoint>>,
}

#[derive(Debug)]
struct Endpoint {
    followed: Arc<Followed>,
    task: JoinHandle<()>,
}

/// A bundle that an operator gives.
#[derive(Clone, Debug)]
struct Given {
    bundle: Arc<TrustBundle>,
    /// Of the file, to tell when there is another one.
    digest: String,
}

/// Why a file with a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleFileError {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// It is neither PEM nor a bundle document.
    #[error("it has no certificate: {0}; expected PEM, or a SPIFFE bundle document")]
    Pem(PemError),
    /// It is a bundle document that cannot be used.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// A certificate in it may not sign.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// How an endpoint is.
#[derive(Clone, Debug)]
pub struct EndpointStatus {
    /// Whose bundle it serves.
    pub trust_domain: TrustDomain,
    /// Where it is.
    pub url: String,
    /// `https_web` or `https_spiffe`.
    pub profile: &'static str,
    /// Where the bundle in force is from; none where there is none, which denies everybody of the
    /// trust domain.
    pub origin: Option<BundleOrigin>,
    /// Sequence number of the bundle in force, where its publisher gives it one.
    pub sequence: Option<u64>,
    /// When the endpoint is asked next.
    pub next_attempt: Option<SystemTime>,
    /// When it was last asked.
    pub last_attempt: Option<SystemTime>,
    /// When it last gave a bundle that could be used, before a restart as well.
    pub last_success: Option<SystemTime>,
    /// How the last attempt ended; none before the first.
    pub last_result: Option<ReloadResult>,
    /// Why the last attempt failed; none where it did not.
    pub last_error: Option<EndpointError>,
    /// How the attempts have ended since the daemon began.
    pub counts: ReloadCounts,
}

/// Where a bundle in force is from: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleOrigin {
    /// Fetched since the daemon began.
    Fetched,
    /// Fetched before the daemon was started.
    Kept,
    /// Given by the operator to begin with.
    Bootstrap,
}

/// The bundle in a file, in PEM or as a SPIFFE bundle document.
///
/// # Errors
/// When the file cannot be read, or is no bundle that can be used.
pub fn read_bundle(domain: &TrustDomain, path: &Path) -> Result<TrustBundle, BundleFileError> {
    parse_bundle(domain, &std::fs::read(path)?)
}

fn parse_bundle(domain: &TrustDomain, text: &[u8]) -> Result<TrustBundle, BundleFileError> {
    if text.trim_ascii_start().first() == Some(&b'{') {
        return Ok(BundleDocument::parse(text)?.bundle(domain.clone())?);
    }
    let certificates = pem_file::certificates(text).map_err(BundleFileError::Pem)?;
    Ok(TrustBundle::new(domain.clone(), certificates, Vec::new())?)
}

// === impl Federation ===

impl Federation {
    /// Follows no endpoint yet. Bundles are kept in `folder`; who talks to endpoints is confined.
    #[must_use]
    pub fn new(identities: Arc<IdentityStore>, folder: PathBuf, confinement: Confinement) -> Self {
        Self(Arc::new(Inner {
            identities,
            folder,
            fetcher: Fetcher::new(confinement),
            endpoints: Mutex::default(),
        }))
    }

    /// Makes these the endpoints that are followed. What is known already of their bundles is in
    /// force when this returns; of trust domains that are gone, none is. Needs a tokio runtime.
    ///
    /// # Errors
    /// The first `bootstrap` file that cannot be used, and whose; nothing is changed then.
    pub fn follow(
        &self,
        endpoints: &[BundleEndpoint],
    ) -> Result<(), (TrustDomain, PathBuf, BundleFileError)> {
        let mut wanted = BTreeMap::new();
        for endpoint in endpoints {
            let given = endpoint
                .given()
                .map_err(|(path, error)| (endpoint.trust_domain.clone(), path, error))?;
            wanted.insert(endpoint.trust_domain.clone(), (endpoint, given));
        }
        let mut followed = lock(&self.0.endpoints);
        followed.retain(|domain, known| {
            let same = wanted
                .get(domain)
                .is_some_and(|(endpoint, given)| known.followed.is(endpoint, given.as_ref()));
            if !same {
                known.task.abort();
            }
            same
        });
        kept::forget_others(&self.0.folder, |domain| wanted.contains_key(domain));
        let mut new = Vec::new();
        for (domain, (endpoint, given)) in wanted {
            if !followed.contains_key(&domain) {
                let endpoint = Followed::new(endpoint.clone(), given, &self.0.folder);
                new.push((domain, Arc::new(endpoint)));
            }
        }
        for (domain, endpoint) in new {
            let task = tokio::spawn(follow(Arc::downgrade(&self.0), endpoint.clone()));
            let followed_now = Endpoint {
                followed: endpoint,
                task,
            };
            followed.insert(domain, followed_now);
        }
        self.0.put_in_force(&followed);
        Ok(())
    }

    /// Asks every endpoint now. Comes back when all have answered, or some have not after
    /// `patience`. Gives, for each that has nothing that can be used, why not.
    pub async fn refresh(&self, patience: Duration) -> Vec<(TrustDomain, String)> {
        let followed: Vec<Arc<Followed>> = {
            let endpoints = lock(&self.0.endpoints);
            endpoints.values().map(|it| it.followed.clone()).collect()
        };
        let asked = followed.iter().map(|endpoint| endpoint.ask());
        // Those that have not answered say so.
        let _ = timeout(patience, futures_util::future::join_all(asked)).await;
        let refused =
            |endpoint: &Arc<Followed>| Some((endpoint.trust_domain().clone(), endpoint.refusal()?));
        followed.iter().filter_map(refused).collect()
    }

    /// Every endpoint that is followed, by trust domain.
    #[must_use]
    pub fn status(&self) -> Vec<EndpointStatus> {
        let endpoints = lock(&self.0.endpoints);
        endpoints.values().map(|it| it.followed.status()).collect()
    }
}

// === impl Inner ===

impl Inner {
    /// Gives the bundles of all endpoints to the identity store.
    fn put_in_force(&self, endpoints: &BTreeMap<TrustDomain, Endpoint>) {
        let bundles = endpoints.values().filter_map(|it| it.followed.bundle());
        let bundles: Vec<_> = bundles.collect();
        self.identities.fetched_bundles(&bundles);
    }

    /// One of them has changed.
    fn changed(&self) {
        self.put_in_force(&lock(&self.endpoints));
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for endpoint in lock(&self.endpoints).values() {
            endpoint.task.abort();
        }
    }
}

// === impl BundleEndpoint ===

impl BundleEndpoint {
    /// The bundle to begin with.
    fn given(&self) -> Result<Option<Given>, (PathBuf, BundleFileError)> {
        let EndpointProfile::Spiffe {
            id,
            bootstrap: Some(path),
        } = &self.profile
        else {
            return Ok(None);
        };
        let failed = |error| (path.clone(), error);
        let text = std::fs::read(path).map_err(|error| failed(error.into()))?;
        let bundle = parse_bundle(id.trust_domain(), &text).map_err(failed)?;
        Ok(Some(Given {
            bundle: Arc::new(bundle),
            digest: hex(digest(&SHA256, &text).as_ref()),
        }))
    }
}

// === impl BundleOrigin ===

impl BundleOrigin {
    /// Name in status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fetched => "fetched",
            Self::Kept => "kept",
            Self::Bootstrap => "bootstrap",
        }
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
