//! Whom and what a rule means, taken by itself.

use std::net::IpAddr;

use super::{
    super::model::{Item, Kind, Model, NetworkPeer, NetworkPolicy, Place, Policy, Port, Rule},
    Because, TCP, UDP,
};
use crate::{identity::SpiffeId, workload::Attributes};

pub(super) fn selects(policy: &Policy, own: &Place) -> bool {
    let named = policy.names.is_empty() || policy.names.contains(&own.name);
    let who = own.who.as_ref().unwrap();
    named
        && policy.namespace.is_none_or(|n| n == who.namespace)
        && fits(&policy.subjects, None, who)
}

pub(super) fn fits(kind: &Kind, default_namespace: Option<&str>, who: &Attributes) -> bool {
    let namespace = kind.namespace.or(default_namespace).filter(|n| *n != "*");
    namespace.is_none_or(|n| n == who.namespace)
        && kind.account.is_none_or(|a| a == who.service_account)
        && has_labels(kind, who)
}

pub(super) fn has_labels(kind: &Kind, who: &Attributes) -> bool {
    labels_fit(kind, &|key| who.labels.get(key).map(String::as_str))
}

pub(super) fn labels_fit<'a>(kind: &Kind, own: &dyn Fn(&str) -> Option<&'a str>) -> bool {
    kind.labels
        .iter()
        .all(|(key, value)| own(key) == Some(*value))
        && kind.expressions.iter().all(|expression| {
            let own = own(expression.key);
            let listed = own.is_some_and(|own| expression.values.contains(&own));
            match expression.operator {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => own.is_some(),
                _ => own.is_none(),
            }
        })
}

pub(super) fn by_address(item: &Item, ip: IpAddr) -> Option<Because> {
    match item {
        Item::Any => Some(Because::Address),
        Item::Cidr(block, except) => {
            let inside = block.contains(&ip) && !except.iter().any(|hole| hole.contains(&ip));
            inside.then_some(Because::Address)
        }
        _ => None,
    }
}

pub(super) fn by_identity(policy: &Policy, item: &Item, who: &Attributes) -> Option<Because> {
    let means = match item {
        Item::Identity(id) => who.spiffe_id.as_str() == *id,
        Item::Prefix(prefix) => who.spiffe_id.as_str().starts_with(prefix),
        Item::Kind(kind) => fits(kind, policy.namespace, who),
        Item::Any | Item::Cidr(..) => false,
    };
    means.then_some(Because::Identity)
}

/// Nothing but the ID is known.
pub(super) fn undeclared(policy: &Policy, item: &Item, client: &SpiffeId) -> bool {
    match item {
        Item::Identity(id) => client.as_str() == *id,
        Item::Prefix(prefix) => client.as_str().starts_with(prefix),
        Item::Kind(kind) => {
            let names = client.service_account();
            let namespace = kind.namespace.or(policy.namespace).filter(|n| *n != "*");
            client.trust_domain().as_str() == "example.org"
                && kind.labels.is_empty()
                && kind.expressions.is_empty()
                && namespace.is_none_or(|n| names.is_some_and(|(own, _)| own == n))
                && kind
                    .account
                    .is_none_or(|a| names.is_some_and(|(_, own)| own == a))
        }
        Item::Any | Item::Cidr(..) => false,
    }
}

pub(super) fn on_ports(rule: &Rule, protocol: u8, port: u16) -> bool {
    rule.ports.is_empty() || rule.ports.iter().any(|item| on_port(item, protocol, port))
}

pub(super) fn on_port(item: &Port, protocol: u8, port: u16) -> bool {
    let same = match item.protocol.unwrap_or("TCP") {
        "TCP" => protocol == TCP,
        "UDP" => protocol == UDP,
        "SCTP" => protocol == 132,
        "ICMP" => matches!(protocol, 1 | 58),
        _ => true,
    };
    let Some(first) = item.port else { return same };
    same && (first..=item.end.unwrap_or(first)).contains(&port)
}

/// What an ID shows does not speak against it.
pub(super) fn possibly(policy: &Policy, item: &Item, client: &SpiffeId) -> bool {
    match item {
        Item::Kind(kind) => {
            let namespace = kind.namespace.or(policy.namespace).filter(|n| *n != "*");
            client.service_account().is_none_or(|(ns, account)| {
                namespace.is_none_or(|n| n == ns) && kind.account.is_none_or(|a| a == account)
            })
        }
        other => undeclared(policy, other, client),
    }
}

pub(super) fn by_block(peer: &NetworkPeer, ip: IpAddr) -> Option<Because> {
    let NetworkPeer::Block(block, except) = peer else {
        return None;
    };
    let inside = block.contains(&ip) && !except.iter().any(|hole| hole.contains(&ip));
    inside.then_some(Because::Address)
}

pub(super) fn in_namespace(
    model: &Model,
    policy: &NetworkPolicy,
    selector: Option<&Kind>,
    namespace: &str,
) -> bool {
    let Some(selector) = selector else {
        return namespace == policy.namespace;
    };
    let labels = model.namespaces.get(namespace);
    labels_fit(selector, &|key| labels?.get(key).copied())
}

pub(super) fn is_pod(
    model: &Model,
    policy: &NetworkPolicy,
    peer: &NetworkPeer,
    who: &Attributes,
) -> bool {
    let NetworkPeer::Pods(namespaces, pods) = peer else {
        return false;
    };
    in_namespace(model, policy, namespaces.as_ref(), &who.namespace)
        && pods.as_ref().is_none_or(|pods| has_labels(pods, who))
}

/// A client that nobody declared has no labels, and its namespace is that of its ID.
pub(super) fn undeclared_pod(
    model: &Model,
    policy: &NetworkPolicy,
    peer: &NetworkPeer,
    client: &SpiffeId,
) -> bool {
    let NetworkPeer::Pods(namespaces, pods) = peer else {
        return false;
    };
    let everything = |kind: &Kind| kind.labels.is_empty() && kind.expressions.is_empty();
    let every_namespace = namespaces.as_ref().is_some_and(everything);
    let inside = |(namespace, _)| in_namespace(model, policy, namespaces.as_ref(), namespace);
    client.trust_domain().as_str() == "example.org"
        && pods.as_ref().is_none_or(everything)
        && (every_namespace || client.service_account().is_some_and(inside))
}
