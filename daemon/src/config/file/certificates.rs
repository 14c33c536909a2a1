//! What is written of certificates: sources, trust, and the cryptography that is accepted.

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

use super::PathText;
use crate::{
    identity::{
        CipherSuite, CryptoProfile, EndpointUrl, KeyExchangeGroup, KeyType, LARGEST_RSA_KEY,
        PathPattern, SMALLEST_RSA_KEY, Selector, SpiffeId, TrustDomain,
    },
    yaml::{
        Located,
        values::{Name, duration, number, positive_duration},
    },
};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawCertificates {
    #[serde(default)]
    pub(in crate::config) sources: Vec<Located<RawSource>>,
    #[serde(default)]
    pub(in crate::config) trust_bundles: BTreeMap<TrustDomain, PathText>,
    #[serde(default)]
    pub(in crate::config) revocation_lists: BTreeMap<TrustDomain, Vec<PathText>>,
    #[serde(default)]
    pub(in crate::config) bundle_endpoints: Vec<Located<RawBundleEndpoint>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawBundleEndpoint {
    pub(in crate::config) trust_domain: Option<Located<TrustDomain>>,
    pub(in crate::config) url: Option<UrlText>,
    pub(in crate::config) profile: Option<RawProfile>,
    pub(in crate::config) authorities: Option<PathText>,
    pub(in crate::config) spiffe_id: Option<SpiffeId>,
    pub(in crate::config) bootstrap: Option<PathText>,
}

/// The profiles of bundle endpoints, by the names that the standard gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::config) enum RawProfile {
    HttpsWeb,
    HttpsSpiffe,
}

/// URL of a bundle endpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::config) struct UrlText(pub(in crate::config) EndpointUrl);

/// Exactly one of the kinds is there.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawSource {
    pub(in crate::config) name: Option<Name>,
    pub(in crate::config) embedded: Option<RawEmbeddedCa>,
    pub(in crate::config) files: Option<Located<RawFiles>>,
    pub(in crate::config) workload_api: Option<Located<RawWorkloadApi>>,
    pub(in crate::config) delegated_identity: Option<Located<RawDelegatedIdentity>>,
    pub(in crate::config) broker: Option<Located<RawBroker>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawFiles {
    pub(in crate::config) folder: Option<Pattern>,
    pub(in crate::config) certificate: Option<Pattern>,
    pub(in crate::config) key: Option<Pattern>,
    #[serde(default = "default_bundle")]
    pub(in crate::config) bundle: Option<Pattern>,
    pub(in crate::config) revocation_lists: Option<Pattern>,
}

/// A path with parts of an identity in it.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::config) struct Pattern(pub(in crate::config) PathPattern);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawEmbeddedCa {
    pub(in crate::config) ca_dir: Option<PathText>,
    #[serde(default)]
    pub(in crate::config) leaf_lifetime: Option<LeafLifetime>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawTls {
    #[serde(default)]
    pub(in crate::config) profile: CryptoProfile,
    pub(in crate::config) key_types: Option<Located<Vec<KeyType>>>,
    pub(in crate::config) min_rsa_bits: Option<RsaBits>,
    pub(in crate::config) max_lifetime: Option<MaxLifetime>,
    pub(in crate::config) groups: Option<Located<Vec<KeyExchangeGroup>>>,
    pub(in crate::config) cipher_suites: Option<Located<Vec<CipherSuite>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawWorkloadApi {
    pub(in crate::config) socket: Option<PathText>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawDelegatedIdentity {
    pub(in crate::config) socket: Option<PathText>,
    #[serde(default)]
    pub(in crate::config) selectors: BTreeMap<String, Vec<SelectorText>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::config) struct RawBroker {
    pub(in crate::config) socket: Option<PathText>,
    pub(in crate::config) agent: Option<SpiffeId>,
    pub(in crate::config) identity: Option<SpiffeId>,
    pub(in crate::config) workload_api: Option<PathText>,
}

/// One of SPIRE's selectors, as in `k8s:ns:shop`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::config) struct SelectorText(pub(in crate::config) Selector);

/// Least size of an RSA key.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(in crate::config) struct RsaBits(
    #[serde(
        deserialize_with = "number::<_, _, { SMALLEST_RSA_KEY as u64 }, { LARGEST_RSA_KEY as u64 }>"
    )]
    pub(in crate::config) u32,
);

/// Longest lifetime of a workload's certificate.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(in crate::config) struct MaxLifetime(
    #[serde(deserialize_with = "positive_duration")] pub(in crate::config) Duration,
);

/// Lifetime of a leaf certificate.
#[derive(Clone, Copy, Debug)]
pub(in crate::config) struct LeafLifetime(pub(in crate::config) Duration);

/// Bounds of a leaf's lifetime: time to renew it, and no longer than a day, since nothing revokes
/// it before.
const LEAF_LIFETIME: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(24 * 3600);

// `Option` with a default of its own: the field can be switched off with `null`.
fn default_bundle() -> Option<Pattern> {
    Pattern::try_from("ca.crt".to_owned()).ok()
}

// === impl SelectorText ===

impl TryFrom<String> for SelectorText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Selector::parse(&text).map(Self).ok_or_else(|| {
            format!("`{text}` is no selector; write `TYPE:VALUE`, as in `k8s:ns:shop`")
        })
    }
}

// === impl LeafLifetime ===

impl<'de> Deserialize<'de> for LeafLifetime {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let lifetime = duration(deserializer)?;
        if LEAF_LIFETIME.contains(&lifetime) {
            return Ok(Self(lifetime));
        }
        Err(serde::de::Error::custom(format!(
            "found {}; expected a lifetime from {} to {}",
            humantime::format_duration(lifetime),
            humantime::format_duration(*LEAF_LIFETIME.start()),
            humantime::format_duration(*LEAF_LIFETIME.end()),
        )))
    }
}

// === impl TryFrom ===

impl TryFrom<String> for UrlText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        EndpointUrl::parse(&text).map(Self)
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        PathPattern::parse(&text).map(Self)
    }
}
