//! What there is to say about certificates: for the admin socket and the metrics.

use std::{collections::BTreeMap, time::SystemTime};

use serde::{Serialize, Serializer};

use super::{RefusedBundle, ReloadError, Remark, SpiffeId, TrustBundle, TrustDomain, Validity};

/// One identity that the node is to have a certificate for.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityStatus {
    /// Who.
    pub spiffe_id: SpiffeId,
    /// Name that the configuration gives to the source.
    pub source: String,
    /// The certificate in force; none until there is one, or when it has expired.
    pub certificate: Option<CertificateStatus>,
    /// The newest certificate that there has been, also when it has expired or was withdrawn.
    pub newest: Option<CertificateStatus>,
    /// Share of its lifetime that a certificate has left when its successor usually arrives: as it was
    /// the last time, and before that what is usual for the kind of source.
    pub renewal_left: f64,
    /// When the source is asked next; none of a source that pushes.
    #[serde(serialize_with = "rfc3339")]
    pub next_attempt: Option<SystemTime>,
    /// When the source was last asked.
    #[serde(serialize_with = "rfc3339")]
    pub last_attempt: Option<SystemTime>,
    /// When that last gave a certificate that could be used.
    #[serde(serialize_with = "rfc3339")]
    pub last_success: Option<SystemTime>,
    /// How the last attempt ended; none before the first.
    pub last_result: Option<ReloadResult>,
    /// Why the last attempt failed; none where it did not.
    #[serde(serialize_with = "text")]
    pub last_error: Option<ReloadError>,
    /// What an operator should know of the source.
    pub remarks: Vec<Remark>,
    /// Trust bundles that came with the newest certificate and are not used.
    pub refused_bundles: Vec<RefusedBundle>,
}

/// How an attempt to get something newer has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ReloadResult {
    /// Something new is in force.
    Accepted,
    /// The source has given the same again.
    Unchanged,
    /// There was nothing, or it was refused. What was in force before is dropped where the source denies
    /// it, and stays so until it expires otherwise.
    Rejected,
}

/// How the attempts at one source have ended since the daemon began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReloadCounts {
    /// Something new is in force.
    pub accepted: u64,
    /// The same again.
    pub unchanged: u64,
    /// Nothing, or refused: by the name of the reason ([`ReloadError::as_str`]).
    pub rejected: BTreeMap<&'static str, u64>,
}

/// A certificate in force.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// Serial number, lower case hexadecimal.
    pub serial: String,
    /// Distinguished name of the issuer.
    pub issuer: String,
    /// Start of validity.
    #[serde(serialize_with = "rfc3339_sure")]
    pub not_before: SystemTime,
    /// When the first certificate of its chain expires, the authority that vouches for it included.
    #[serde(serialize_with = "rfc3339_sure")]
    pub not_after: SystemTime,
    /// The signer of the chain, the authority included, that expires first.
    pub signer: Validity,
    /// Counts the certificates of all identities since the daemon began.
    pub generation: u64,
}

/// One trust domain's bundle.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BundleStatus {
    /// Whose.
    pub trust_domain: TrustDomain,
    /// Signing certificates in it; with none, the trust domain is revoked.
    pub certificates: usize,
    /// When the first of them expires.
    #[serde(serialize_with = "rfc3339")]
    pub earliest_not_after: Option<SystemTime>,
    /// Validity of the one that expires last: a successor has a later end.
    pub newest: Option<Validity>,
    /// Whether revocation is checked: there is at least one revocation list.
    pub revocation_checked: bool,
    /// When the first revocation list expires.
    #[serde(serialize_with = "rfc3339")]
    pub next_update: Option<SystemTime>,
    /// When that list was issued.
    #[serde(serialize_with = "rfc3339")]
    pub this_update: Option<SystemTime>,
}

impl From<&TrustBundle> for BundleStatus {
    fn from(bundle: &TrustBundle) -> Self {
        Self {
            trust_domain: bundle.trust_domain().clone(),
            certificates: bundle.certificates().len(),
            earliest_not_after: bundle.earliest_not_after(),
            newest: bundle.newest(),
            revocation_checked: bundle.revocation_lists() > 0,
            next_update: bundle.next_update(),
            this_update: bundle.this_update(),
        }
    }
}

// === impl ReloadCounts ===

impl ReloadCounts {
    /// Each result's name with its count.
    pub(crate) fn by_result(&self) -> [(&'static str, u64); 3] {
        [
            (ReloadResult::Accepted.as_str(), self.accepted),
            (ReloadResult::Unchanged.as_str(), self.unchanged),
            (
                ReloadResult::Rejected.as_str(),
                self.rejected.values().sum(),
            ),
        ]
    }
}

// === impl ReloadResult ===

impl ReloadResult {
    /// Name in metrics and status.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Unchanged => "unchanged",
            Self::Rejected => "rejected",
        }
    }
}

fn rfc3339_sure<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

#[expect(clippy::ref_option, reason = "serde gives a reference to the field")]
fn rfc3339<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339_sure(time, serializer),
        None => serializer.serialize_none(),
    }
}

#[expect(clippy::ref_option, reason = "serde gives a reference to the field")]
fn text<S: Serializer>(error: &Option<ReloadError>, serializer: S) -> Result<S::Ok, S::Error> {
    match error {
        Some(error) => serializer.collect_str(error),
        None => serializer.serialize_none(),
    }
}
