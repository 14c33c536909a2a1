//! `kind: NetworkPolicy`, as Kubernetes has it (`networking.k8s.io/v1`).

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, Unexpected, Visitor},
};

use super::Expression;
use crate::yaml::{
    Located, shown,
    values::{Labels, Name, Port, PortName, address_hint, parse_network, port_hint},
};

/// The document.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "the kind is looked at before the document is read, and the status by nobody"
)]
pub(in crate::policy) struct NetworkPolicy {
    api_version: Option<IgnoredAny>,
    kind: Option<IgnoredAny>,
    pub(in crate::policy) metadata: Option<Located<ObjectMeta>>,
    pub(in crate::policy) spec: Option<Located<NetworkPolicySpec>>,
    status: Option<IgnoredAny>,
}

/// Everything that Kubernetes writes into the metadata of an object is taken, and most of it not
/// looked at.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "for Kubernetes and other tools")]
pub(in crate::policy) struct ObjectMeta {
    pub(in crate::policy) name: Option<Located<Name>>,
    pub(in crate::policy) namespace: Option<Located<Name>>,
    pub(in crate::policy) annotations: Option<BTreeMap<String, Located<String>>>,
    labels: Option<IgnoredAny>,
    creation_timestamp: Option<IgnoredAny>,
    deletion_timestamp: Option<IgnoredAny>,
    deletion_grace_period_seconds: Option<IgnoredAny>,
    finalizers: Option<IgnoredAny>,
    generate_name: Option<IgnoredAny>,
    generation: Option<IgnoredAny>,
    managed_fields: Option<IgnoredAny>,
    owner_references: Option<IgnoredAny>,
    resource_version: Option<IgnoredAny>,
    self_link: Option<IgnoredAny>,
    uid: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct NetworkPolicySpec {
    pub(in crate::policy) pod_selector: Option<Located<LabelSelector>>,
    pub(in crate::policy) policy_types: Option<Vec<PolicyType>>,
    pub(in crate::policy) ingress: Option<Vec<Located<Ingress>>>,
    pub(in crate::policy) egress: Option<Vec<Located<Egress>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(in crate::policy) enum PolicyType {
    Ingress,
    Egress,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct LabelSelector {
    pub(in crate::policy) match_labels: Option<Labels>,
    pub(in crate::policy) match_expressions: Option<Vec<Located<Expression>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct Ingress {
    pub(in crate::policy) from: Option<Vec<Located<NetworkPeer>>>,
    pub(in crate::policy) ports: Option<Vec<Located<NetworkPort>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct Egress {
    pub(in crate::policy) to: Option<Vec<Located<NetworkPeer>>>,
    pub(in crate::policy) ports: Option<Vec<Located<NetworkPort>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct NetworkPeer {
    pub(in crate::policy) pod_selector: Option<LabelSelector>,
    pub(in crate::policy) namespace_selector: Option<LabelSelector>,
    pub(in crate::policy) ip_block: Option<Located<IpBlock>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct IpBlock {
    pub(in crate::policy) cidr: Option<Cidr>,
    pub(in crate::policy) except: Option<Vec<Located<Cidr>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::policy) struct NetworkPort {
    #[serde(default)]
    pub(in crate::policy) protocol: Option<NetworkProtocol>,
    pub(in crate::policy) port: Option<PortOrName>,
    pub(in crate::policy) end_port: Option<Port>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(in crate::policy) enum NetworkProtocol {
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
}

/// A port by its number or by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) enum PortOrName {
    Port(u16),
    Name(String),
}

/// A network. Kubernetes takes one with bits set after its prefix, and so does this.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::policy) struct Cidr(pub(in crate::policy) IpNet);

// === impl PortOrName ===

impl<'de> Deserialize<'de> for PortOrName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;
        impl Visitor<'_> for PortVisitor {
            type Value = PortOrName;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port from 1 to 65535 without quotes, or the name of one")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<PortOrName, E> {
                match u16::try_from(value) {
                    Ok(port) if port != 0 => Ok(PortOrName::Port(port)),
                    _ => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PortOrName, E> {
                match PortName::try_from(text.to_owned()) {
                    Ok(name) => Ok(PortOrName::Name(name.0)),
                    Err(error) => Err(E::custom(port_hint(text).unwrap_or(error))),
                }
            }
        }
        deserializer.deserialize_any(PortVisitor)
    }
}

// === impl Cidr ===

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Err(format!(
                "`{address}` has no prefix length; write `{}` for this address alone",
                IpNet::from(address)
            ));
        }
        let network = parse_network(&text).ok_or_else(|| {
            format!(
                "`{}` is not a network; expected one as in `10.1.0.0/16` or `2001:db8::/32`{}",
                shown(&text),
                address_hint(&text)
            )
        })?;
        if network.addr().to_canonical() != network.addr() {
            return Err(format!(
                "`{network}` is an IPv4 network in IPv6's notation; write it as IPv4"
            ));
        }
        Ok(Self(network.trunc()))
    }
}
