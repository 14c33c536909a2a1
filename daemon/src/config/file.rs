//! The configuration as it is written: what serde reads, before checks across fields.
//!
//! A field that has to be there is an `Option` here: its absence is one mistake among others.

mod certificates;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::Deserialize;

use reeve_common::protocol;

pub(super) use certificates::{
    Pattern, RawBroker, RawBundleEndpoint, RawCertificates, RawDelegatedIdentity, RawEmbeddedCa,
    RawFiles, RawProfile, RawSource, RawTls, RawWorkloadApi,
};

use super::{CongestionControl, Limits, Log, Maps, Ports, Timeouts};
use crate::{
    identity::{SpiffeId, TrustDomain},
    policy::Unselected,
    privileges::Confinement,
    workload::NamedPort,
    yaml::{
        Located,
        values::{Ip, Labels, Name, Network, Port, PortName, number},
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
    pub(super) tunnel: RawTunnelTransport,
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
    #[serde(default)]
    pub(super) host_addresses: bool,
    pub(super) cgroup_root: Option<PathText>,
    pub(super) bpffs: Option<PathText>,
    pub(super) proc: Option<PathText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawTunnelTransport {
    pub(super) congestion_control: CongestionControl,
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

/// Path of a cgroup from the cgroup2 mount, with a leading slash and not the root itself.
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

/// Default of `metrics.address`.
const METRICS_ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 15020);

// === defaults ===

// `Option` with a default of its own: the field can be switched off with `null`.
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
                "`{}` {why}; expected a path from the cgroup2 mount, as in \
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
