//! The configuration as it is written: what serde reads, before checks across fields.
//!
//! A field that has to be there is an `Option` here: its absence is one mistake among others.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde::Deserialize;

use reeve_common::protocol;

use super::{Limits, Log, Maps, Ports, Timeouts};
use crate::{
    identity::{
        CipherSuite, CryptoProfile, EndpointUrl, KeyExchangeGroup, KeyType, LARGEST_RSA_KEY,
        PathPattern, SMALLEST_RSA_KEY, Selector, SpiffeId, TrustDomain,
    },
    policy::Unselected,
    privileges::Confinement,
    workload::NamedPort,
    yaml::{
        Located,
        values::{Ip, Labels, Name, Network, Port, PortName, duration, number, positive_duration},
    },
};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawConfig {
    pub(super) trust_domain: Option<TrustDomain>,
    #[serde(default)]
    pub(super) node: RawNode,
    pub(super) state_dir: Option<PathText>,
    #[serde(default)]
    pub(super) workloads: Vec<Located<RawWorkload>>,
    #[serde(default)]
    pub(super) enforced_parents: Vec<Located<CgroupPath>>,
    #[serde(default)]
    pub(super) peers: Vec<Located<RawPeer>>,
    #[serde(default)]
    pub(super) namespaces: Vec<Located<RawNamespace>>,
    #[serde(default)]
    pub(super) policies: RawPolicies,
    #[serde(default)]
    pub(super) certificates: RawCertificates,
    #[serde(default)]
    pub(super) tls: Option<Located<RawTls>>,
    pub(super) ports: Option<Located<Ports>>,
    #[serde(default)]
    pub(super) limits: Limits,
    #[serde(default)]
    pub(super) timeouts: Timeouts,
    #[serde(default)]
    pub(super) maps: Maps,
    #[serde(default)]
    pub(super) sandbox: Confinement,
    #[serde(default)]
    pub(super) metrics: RawMetrics,
    #[serde(default)]
    pub(super) admin: RawAdmin,
    #[serde(default)]
    pub(super) log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawNode {
    pub(super) name: Option<Name>,
    #[serde(default)]
    pub(super) addresses: Vec<Ip>,
    pub(super) cgroup_root: Option<PathText>,
    pub(super) bpffs: Option<PathText>,
    pub(super) proc: Option<PathText>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawWorkload {
    pub(super) name: Option<Located<Name>>,
    pub(super) namespace: Option<Name>,
    pub(super) service_account: Option<Name>,
    #[serde(default)]
    pub(super) labels: Labels,
    pub(super) spiffe_id: Option<Located<SpiffeId>>,
    pub(super) cgroup: Option<Located<CgroupPath>>,
    pub(super) unit: Option<Located<UnitName>>,
    #[serde(default)]
    pub(super) ports: Vec<Port>,
    #[serde(default)]
    pub(super) addresses: Vec<Ip>,
    pub(super) certificates: Option<Located<Name>>,
    #[serde(default)]
    pub(super) named_ports: RawNamedPorts,
    #[serde(default)]
    pub(super) permissive: bool,
}

/// Ports by their names.
pub(super) type RawNamedPorts = BTreeMap<PortName, RawNamedPort>;

/// A port of TCP, or with its protocol as in `53/UDP`.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawNamedPort(pub(super) NamedPort);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawNamespace {
    pub(super) name: Option<Located<Name>>,
    #[serde(default)]
    pub(super) labels: Labels,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawPeer {
    pub(super) name: Option<Located<Name>>,
    #[serde(default)]
    pub(super) addresses: Vec<Located<Network>>,
    #[serde(default)]
    pub(super) ports: Vec<Located<Port>>,
    pub(super) namespace: Option<Name>,
    pub(super) service_account: Option<Name>,
    pub(super) labels: Option<Labels>,
    pub(super) spiffe_id: Option<Located<SpiffeId>>,
    #[serde(default)]
    pub(super) tunnel: Option<RawTunnel>,
    #[serde(default)]
    pub(super) named_ports: RawNamedPorts,
}

/// `true`, `false`, or the port of the peer's tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) enum RawTunnel {
    On,
    Off,
    Port(u16),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawPolicies {
    pub(super) folder: Option<PathText>,
    #[serde(default)]
    pub(super) files: Vec<PathText>,
    #[serde(default)]
    pub(super) unselected: Unselected,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawCertificates {
    #[serde(default)]
    pub(super) sources: Vec<Located<RawSource>>,
    #[serde(default)]
    pub(super) trust_bundles: BTreeMap<TrustDomain, PathText>,
    #[serde(default)]
    pub(super) revocation_lists: BTreeMap<TrustDomain, Vec<PathText>>,
    #[serde(default)]
    pub(super) bundle_endpoints: Vec<Located<RawBundleEndpoint>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawBundleEndpoint {
    pub(super) trust_domain: Option<Located<TrustDomain>>,
    pub(super) url: Option<UrlText>,
    pub(super) profile: Option<RawProfile>,
    pub(super) authorities: Option<PathText>,
    pub(super) spiffe_id: Option<SpiffeId>,
    pub(super) bootstrap: Option<PathText>,
}

/// The profiles of bundle endpoints, by the names that the standard gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawProfile {
    HttpsWeb,
    HttpsSpiffe,
}

/// URL of a bundle endpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct UrlText(pub(super) EndpointUrl);

/// Exactly one of the kinds is there.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawSource {
    pub(super) name: Option<Name>,
    pub(super) embedded: Option<RawEmbeddedCa>,
    pub(super) files: Option<Located<RawFiles>>,
    pub(super) workload_api: Option<Located<RawWorkloadApi>>,
    pub(super) delegated_identity: Option<Located<RawDelegatedIdentity>>,
    pub(super) broker: Option<Located<RawBroker>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawFiles {
    pub(super) folder: Option<Pattern>,
    pub(super) certificate: Option<Pattern>,
    pub(super) key: Option<Pattern>,
    #[serde(default = "default_bundle")]
    pub(super) bundle: Option<Pattern>,
    pub(super) revocation_lists: Option<Pattern>,
}

/// A path with parts of an identity in it.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Pattern(pub(super) PathPattern);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawEmbeddedCa {
    pub(super) ca_dir: Option<PathText>,
    #[serde(default)]
    pub(super) leaf_lifetime: Option<LeafLifetime>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawTls {
    #[serde(default)]
    pub(super) profile: CryptoProfile,
    pub(super) key_types: Option<Located<Vec<KeyType>>>,
    pub(super) min_rsa_bits: Option<RsaBits>,
    pub(super) max_lifetime: Option<MaxLifetime>,
    pub(super) groups: Option<Located<Vec<KeyExchangeGroup>>>,
    pub(super) cipher_suites: Option<Located<Vec<CipherSuite>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawWorkloadApi {
    pub(super) socket: Option<PathText>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawDelegatedIdentity {
    pub(super) socket: Option<PathText>,
    #[serde(default)]
    pub(super) selectors: BTreeMap<String, Vec<SelectorText>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawBroker {
    pub(super) socket: Option<PathText>,
    pub(super) agent: Option<SpiffeId>,
    pub(super) identity: Option<SpiffeId>,
    pub(super) workload_api: Option<PathText>,
}

/// One of SPIRE's selectors, as in `k8s:ns:shop`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct SelectorText(pub(super) Selector);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawMetrics {
    #[serde(default = "default_metrics_address")]
    pub(super) address: Option<SocketText>,
    #[serde(
        default = "default_metrics_rules",
        deserialize_with = "number::<_, _, 1, 1_000_000>"
    )]
    pub(super) rules: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawAdmin {
    pub(super) socket: Option<PathText>,
    #[serde(
        default = "default_recent_events",
        deserialize_with = "number::<_, _, 0, 1_000_000>"
    )]
    pub(super) recent_events: u32,
}

/// A path: not empty, and without a zero byte.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct PathText(pub(super) PathBuf);

/// Path of a cgroup below the cgroup root, with a leading slash and not the root itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct CgroupPath(pub(super) String);

/// Name of a systemd unit that has a cgroup, as in `nginx.service`, or of a template, as in
/// `web@.service`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct UnitName(pub(super) String);

/// Address and port.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct SocketText(pub(super) SocketAddr);

/// Least size of an RSA key.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct RsaBits(
    #[serde(
        deserialize_with = "number::<_, _, { SMALLEST_RSA_KEY as u64 }, { LARGEST_RSA_KEY as u64 }>"
    )]
    pub(super) u32,
);

/// Longest lifetime of a workload's certificate.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct MaxLifetime(#[serde(deserialize_with = "positive_duration")] pub(super) Duration);

/// Lifetime of a leaf certificate.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeafLifetime(pub(super) Duration);

/// Default of `metrics.address`.
const METRICS_ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15020);

/// Bounds of a leaf's lifetime: time to renew it, and no longer than a day, since nothing revokes
/// it before.
const LEAF_LIFETIME: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(24 * 3600);

// === defaults ===

// `Option` with a default of its own: the field can be switched off with `null`.
fn default_bundle() -> Option<Pattern> {
    Pattern::try_from("ca.crt".to_owned()).ok()
}

fn default_metrics_address() -> Option<SocketText> {
    Some(SocketText(METRICS_ADDRESS))
}

impl Default for RawMetrics {
    fn default() -> Self {
        Self {
            address: default_metrics_address(),
            rules: default_metrics_rules(),
        }
    }
}

fn default_metrics_rules() -> u32 {
    1000
}

impl Default for RawAdmin {
    fn default() -> Self {
        Self {
            socket: None,
            recent_events: default_recent_events(),
        }
    }
}

fn default_recent_events() -> u32 {
    4096
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

// === impl RawTunnel ===

impl<'de> Deserialize<'de> for RawTunnel {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de;
        struct TunnelVisitor;
        impl de::Visitor<'_> for TunnelVisitor {
            type Value = RawTunnel;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`true`, `false`, or the port of its tunnel from 1 to 65535")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<RawTunnel, E> {
                Ok(if on { RawTunnel::On } else { RawTunnel::Off })
            }

            fn visit_u64<E: de::Error>(self, port: u64) -> Result<RawTunnel, E> {
                match u16::try_from(port) {
                    Ok(port) if port != 0 => Ok(RawTunnel::Port(port)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(port), &self)),
                }
            }
        }
        deserializer.deserialize_any(TunnelVisitor)
    }
}

// === impl RawNamedPort ===

impl<'de> Deserialize<'de> for RawNamedPort {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de;
        struct NamedPortVisitor;
        impl de::Visitor<'_> for NamedPortVisitor {
            type Value = RawNamedPort;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port of TCP, as in `8080`, or with its protocol, as in `53/UDP`")
            }

            fn visit_u64<E: de::Error>(self, port: u64) -> Result<RawNamedPort, E> {
                match u16::try_from(port) {
                    Ok(port) if port != 0 => Ok(RawNamedPort(NamedPort {
                        protocol: protocol::TCP,
                        port,
                    })),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(port), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawNamedPort, E> {
                let parsed = text.split_once('/').and_then(|(port, name)| {
                    let protocol = match name {
                        "TCP" => protocol::TCP,
                        "UDP" => protocol::UDP,
                        "SCTP" => protocol::SCTP,
                        _ => return None,
                    };
                    let port = port.parse().ok().filter(|port| *port != 0)?;
                    Some(RawNamedPort(NamedPort { protocol, port }))
                });
                parsed.ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(NamedPortVisitor)
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

impl TryFrom<String> for PathText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() || text.contains('\0') {
            return Err("found an empty path; expected one as in `/etc/reeve/policies`".into());
        }
        Ok(Self(text.into()))
    }
}

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

impl TryFrom<String> for SocketText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| {
            format!(
                "`{}` is not an address with a port; expected one as in `127.0.0.1:15020` or \
                 `[::1]:15020`, or `null` for off",
                crate::yaml::shown(&text)
            )
        })
    }
}

impl TryFrom<String> for CgroupPath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = |why: String| {
            Err(format!(
                "`{}` {why}; expected a path below the cgroup root, as in \
                 `/system.slice/nginx.service`",
                crate::yaml::shown(&text)
            ))
        };
        let Some(path) = text.strip_prefix('/') else {
            return wrong("has no slash at its beginning".into());
        };
        if path.is_empty() {
            return wrong("is the cgroup root, which holds everything".into());
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') {
            return wrong("has an empty, `.` or `..` part, or ends in a slash".into());
        }
        let depth = path.split('/').count();
        if depth > reeve_common::MAX_CGROUP_DEPTH as usize {
            return wrong(format!(
                "is {depth} deep, the deepest is {}",
                reeve_common::MAX_CGROUP_DEPTH
            ));
        }
        Ok(Self(text))
    }
}

impl TryFrom<String> for UnitName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let kinds = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];
        let stem = kinds.iter().find_map(|kind| text.strip_suffix(kind));
        let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        if stem.is_some_and(|stem| !stem.is_empty() && stem.chars().all(good)) && text.len() <= 255
        {
            return Ok(Self(text));
        }
        Err(format!(
            "`{}` is not the name of a unit with a cgroup; expected one as in `nginx.service`",
            crate::yaml::shown(&text)
        ))
    }
}
