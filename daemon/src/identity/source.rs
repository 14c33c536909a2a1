//! Where certificates come from: the trait that every source implements.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::{BundleError, SpiffeId, TrustBundle};

/// A source of certificates: the embedded CA, files, the SPIFFE Workload API.
///
/// A source hands over whole sets and judges nothing: [`IdentityStore`](super::IdentityStore)
/// checks each set before it is used, keeps the old one when it is bad, and knows when to ask again.
pub trait CertificateSource: Send + Sync + fmt::Debug {
    /// Name in status and logs.
    fn name(&self) -> &'static str;

    /// The newest set for `id`. A source that issues makes a new one at each call; one that only
    /// passes on gives what it has.
    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>>;

    /// Changes when there may be something new for `id` before anybody asks. The number has no
    /// meaning but to differ.
    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64>;

    /// Whether it issues a new certificate at each call, so that reeve alone decides when to renew.
    fn issues(&self) -> bool {
        false
    }

    /// Whether it tells by itself when there is something new, and gives the same again until then: asking
    /// it renews nothing.
    fn pushes(&self) -> bool {
        false
    }

    /// The trust bundles that came with the newest answer for `id` and cannot be used.
    fn refused_bundles(&self, _id: &SpiffeId) -> Vec<RefusedBundle> {
        Vec::new()
    }

    /// What an operator should know of where `id`'s certificate comes from, though nothing fails.
    fn remarks(&self, _id: &SpiffeId) -> Vec<Remark> {
        Vec::new()
    }
}

/// What an operator should know of an identity whose source does not fail: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remark {
    /// The files cannot be watched, and are looked at twice a second.
    Polled,
    /// A file is mounted by itself, as a `subPath` is: it will never change.
    MountedFile,
    /// A file is a systemd credential, which changes only when the unit is restarted.
    SystemdCredential,
    /// A CA above the certificate expires soon, and the certificate with it.
    SignerExpires,
}

/// One identity's certificate as a source gives it: unchecked, and always the whole set.
#[derive(Debug)]
pub struct Material {
    /// The workload's certificate, then the intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key, wiped from memory once it is used.
    pub key: Zeroizing<PrivateKeyDer<'static>>,
    /// Bundles that come with it, put in force together with it, for this identity. Where several
    /// identities have the same bundle, a source gives the same value: it is kept once.
    pub bundles: Vec<Arc<TrustBundle>>,
}

/// A trust bundle that a source gave and that is not used: everybody of the trust domain is denied.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedBundle {
    /// Whose, as the source names it.
    pub trust_domain: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Why a source has nothing to give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The source answers, and gives no certificate: what was given before must not be used any longer.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The source was asked a moment ago: what was given before is good until it expires.
    #[error("{0}")]
    Pending(&'static str),
    /// The source cannot be reached, for none of its identities: what was given before is good until it
    /// expires.
    #[error("the source cannot be reached: {0}")]
    Unreachable(String),
    /// The source failed: what was given before is good until it expires.
    #[error("the source failed: {0}")]
    Unavailable(String),
    /// What the source gives cannot be read: what was given before is good until it expires.
    #[error("{0}")]
    Unreadable(String),
    /// A trust bundle that came along cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Why a source that answers gives no certificate for an identity. The text says who was asked for, what
/// the source said, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The source has not given one since reeve was started.
    #[error("the source has never granted the identity: {0}")]
    NeverGranted(String),
    /// The source gave one before.
    #[error("the source has withdrawn the identity: {0}")]
    Withdrawn(String),
    /// The source does not let reeve ask on behalf of workloads.
    #[error("reeve is not a delegate: {0}")]
    NotDelegate(String),
    /// There is nobody to ask for.
    #[error("no process of a workload with this identity runs")]
    NoProcess,
}

// === impl Material ===

impl Material {
    pub(super) fn copied(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: Zeroizing::new(self.key.clone_key()),
            bundles: self.bundles.clone(),
        }
    }

    /// Whether both have the same certificates, which have the same key then, and the same bundles.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        let bundles = || self.bundles.iter().zip(&other.bundles);
        self.chain == other.chain
            && self.bundles.len() == other.bundles.len()
            && bundles().all(|(one, other)| one.same_as(other))
    }
}

// === impl Denied ===

impl Denied {
    /// By the name of its kind and its text. One of a kind that is not known is a withdrawal.
    #[must_use]
    pub fn named(kind: &str, why: String) -> Self {
        match kind {
            "never_granted" => Self::NeverGranted(why),
            "not_a_delegate" => Self::NotDelegate(why),
            "no_process" => Self::NoProcess,
            _ => Self::Withdrawn(why),
        }
    }

    /// What the source said; empty where it need not say anything.
    #[must_use]
    pub fn why(&self) -> &str {
        match self {
            Self::NeverGranted(why) | Self::Withdrawn(why) | Self::NotDelegate(why) => why,
            Self::NoProcess => "",
        }
    }

    /// The same of an identity that the source has given a certificate for before.
    pub(super) fn after_a_grant(self) -> Self {
        match self {
            Self::NeverGranted(why) => Self::Withdrawn(why),
            other => other,
        }
    }

    /// Name of the kind of denial in metrics and status.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::NeverGranted(_) => "never_granted",
            Self::Withdrawn(_) => "withdrawn",
            Self::NotDelegate(_) => "not_a_delegate",
            Self::NoProcess => "no_process",
        }
    }
}

// === impl Remark ===

impl Remark {
    /// Every remark.
    pub const ALL: [Self; 4] = [
        Self::Polled,
        Self::MountedFile,
        Self::SystemdCredential,
        Self::SignerExpires,
    ];

    /// Name in metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Polled => "polled",
            Self::MountedFile => "mounted_file",
            Self::SystemdCredential => "systemd_credential",
            Self::SignerExpires => "signer_expires",
        }
    }
}
