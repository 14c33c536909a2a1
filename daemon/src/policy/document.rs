//! Policy documents as they are written: what serde reads.

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};

use super::selector::IdentityPrefix;
use crate::{
    identity::SpiffeId,
    yaml::{
        Located,
        values::{LabelKey, LabelValue, Labels, Name, Network, Port},
    },
};

pub(super) mod network;

/// `kind: ConnectionPolicy`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "the kind is looked at before the document is read"
)]
pub(super) struct ConnectionPolicy {
    pub(super) api_version: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) metadata: Option<Located<Metadata>>,
    pub(super) spec: Option<Located<Spec>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "annotations are for people and other tools")]
pub(super) struct Metadata {
    pub(super) name: Option<Located<Name>>,
    pub(super) namespace: Option<Located<Name>>,
    #[serde(default)]
    pub(super) labels: Labels,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    #[serde(default)]
    pub(super) action: RawAction,
    #[serde(default)]
    pub(super) mode: RawMode,
    pub(super) workloads: Option<Located<RawSubjects>>,
    #[serde(default)]
    pub(super) ingress: Vec<Located<IngressRule>>,
    #[serde(default)]
    pub(super) egress: Vec<Located<EgressRule>>,
}

/// What the rules of a policy do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) enum RawAction {
    #[default]
    Allow,
    Deny,
}

/// Whether a policy is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) enum RawMode {
    #[default]
    Enforce,
    DryRun,
}

/// `kind: IdentityGroup`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "the kind is looked at before the document is read"
)]
pub(super) struct IdentityGroup {
    pub(super) api_version: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) metadata: Option<Located<GroupMetadata>>,
    pub(super) spec: Option<Located<GroupSpec>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "labels and annotations are for people and other tools"
)]
pub(super) struct GroupMetadata {
    pub(super) name: Option<Located<Name>>,
    #[serde(default)]
    pub(super) labels: Labels,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// Several documents in one: `kind: List`, as `kubectl get -o yaml` writes it, or a list of one
/// kind, as the API server does.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "the kind is looked at before the document is read, and the items by themselves"
)]
pub(super) struct List {
    pub(super) api_version: Option<IgnoredAny>,
    pub(super) kind: Option<IgnoredAny>,
    pub(super) metadata: Option<ListMetadata>,
    pub(super) items: Option<Located<Vec<IgnoredAny>>>,
}

/// What Kubernetes says of a list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "for Kubernetes and other tools")]
pub(super) struct ListMetadata {
    resource_version: Option<IgnoredAny>,
    self_link: Option<IgnoredAny>,
    #[serde(rename = "continue")]
    more: Option<IgnoredAny>,
    remaining_item_count: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GroupSpec {
    pub(super) members: Option<Located<Vec<Located<Member>>>>,
}

/// Whom a group has: as in [`RawFarEnd`], by identity.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Member {
    pub(super) identity: Option<SpiffeId>,
    pub(super) identity_prefix: Option<PrefixText>,
    pub(super) namespace: Option<NamespaceText>,
    pub(super) service_account: Option<Name>,
    #[serde(default)]
    pub(super) labels: Labels,
    #[serde(default)]
    pub(super) match_expressions: Vec<Located<Expression>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawSubjects {
    #[serde(default)]
    pub(super) names: Vec<Located<Name>>,
    pub(super) namespace: Option<Located<Name>>,
    pub(super) service_account: Option<Name>,
    #[serde(default)]
    pub(super) match_labels: Labels,
    #[serde(default)]
    pub(super) match_expressions: Vec<Located<Expression>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IngressRule {
    pub(super) from: Option<Located<Vec<Located<RawFarEnd>>>>,
    pub(super) ports: Option<Vec<Located<RawPort>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EgressRule {
    pub(super) to: Option<Located<Vec<Located<RawFarEnd>>>>,
    pub(super) ports: Option<Vec<Located<RawPort>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawFarEnd {
    pub(super) group: Option<Located<Name>>,
    pub(super) identity: Option<SpiffeId>,
    pub(super) identity_prefix: Option<PrefixText>,
    pub(super) namespace: Option<NamespaceText>,
    pub(super) service_account: Option<Name>,
    #[serde(default)]
    pub(super) labels: Labels,
    #[serde(default)]
    pub(super) match_expressions: Vec<Located<Expression>>,
    pub(super) cidr: Option<Network>,
    #[serde(default)]
    pub(super) except: Vec<Located<Network>>,
    pub(super) any: Option<Anybody>,
}

/// `{}`: there is nothing to say of anybody.
#[derive(Debug, Deserialize)]
pub(super) struct Anybody {}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Expression {
    pub(super) key: Option<LabelKey>,
    pub(super) operator: Option<RawOperator>,
    #[serde(default)]
    pub(super) values: Vec<LabelValue>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum RawOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawPort {
    #[serde(default)]
    pub(super) protocol: RawProtocol,
    pub(super) port: Option<Port>,
    pub(super) end_port: Option<Port>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) enum RawProtocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
    #[serde(rename = "ICMP")]
    Icmp,
    #[serde(rename = "ESP")]
    Esp,
    #[serde(rename = "AH")]
    Ah,
    Any,
}

/// Beginning of SPIFFE IDs.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct PrefixText(pub(super) IdentityPrefix);

/// A namespace, or `*` for every one.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) enum NamespaceText {
    Every,
    One(String),
}

// === impl TryFrom ===

impl TryFrom<String> for PrefixText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        IdentityPrefix::parse(&text).map(Self)
    }
}

impl TryFrom<String> for NamespaceText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Every);
        }
        Name::try_from(text).map(|name| Self::One(name.into()))
    }
}
