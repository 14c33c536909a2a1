//! What the policies say, read one by one, with nothing prepared.

use std::net::IpAddr;

use reeve_common::Action;

use super::model::{Item, Kind, Model, Place, Policy, Port, Rule};
use crate::{identity::SpiffeId, workload::Attributes};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The best that any rule says, and which rules say it.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) action: Action,
    pub(super) rules: Vec<String>,
}

/// Why an item means somebody.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Because {
    Address,
    Identity,
}

pub(super) fn egress(model: &Model, own: &Place, to: IpAddr, protocol: u8, port: u16) -> Verdict {
    let residents = residents(model, to);
    let many = residents.len() > 1;
    let single = |place: &Place| {
        place
            .addresses
            .iter()
            .any(|net| net.contains(&to) && is_host(net))
    };
    let owns_ports =
        |place: &Place| !place.ports.is_empty() && single(place) && (many || !place.exclusive);
    let by_port = matches!(protocol, TCP | UDP);
    let owner = residents
        .iter()
        .find(|place| by_port && owns_ports(place) && place.ports.contains(&port));
    let there = owner.or_else(|| residents.iter().find(|place| !owns_ports(place)));
    let who = there.and_then(|place| place.who.as_ref());
    let means = |policy: &Policy, item: &Item| {
        by_address(item, to).or_else(|| who.and_then(|who| by_identity(policy, item, who)))
    };
    best(model, own, false, protocol, port, &means, |_| Action::Allow)
}

pub(super) fn plaintext(
    model: &Model,
    own: &Place,
    from: IpAddr,
    protocol: u8,
    port: u16,
) -> Verdict {
    let residents = residents(model, from);
    let means = |policy: &Policy, item: &Item| {
        // It could be any of them.
        let all = !residents.is_empty()
            && residents.iter().all(|place| {
                let who = place.who.as_ref();
                place.exclusive && who.is_some_and(|who| by_identity(policy, item, who).is_some())
            });
        by_address(item, from).or_else(|| all.then_some(Because::Identity))
    };
    let mut verdict = best(
        model,
        own,
        true,
        protocol,
        port,
        &means,
        |because| match because {
            Because::Identity if protocol == TCP => Action::TunnelOnly,
            _ => Action::Allow,
        },
    );
    node(model, from, &mut verdict);
    verdict
}

pub(super) fn tunnel(
    model: &Model,
    own: &Place,
    client: &SpiffeId,
    from: IpAddr,
    port: u16,
) -> Verdict {
    let residents = residents(model, from);
    let declared: Vec<_> = residents
        .iter()
        .filter_map(|place| place.who.as_ref())
        .filter(|who| who.spiffe_id == *client)
        .collect();
    let means = |policy: &Policy, item: &Item| {
        by_address(item, from).or_else(|| {
            if declared.is_empty() {
                return undeclared(policy, item, client).then_some(Because::Identity);
            }
            let all = declared
                .iter()
                .all(|who| by_identity(policy, item, who).is_some());
            all.then_some(Because::Identity)
        })
    };
    let mut verdict = best(model, own, true, TCP, port, &means, |_| Action::Allow);
    node(model, from, &mut verdict);
    verdict
}

fn is_host(net: &ipnet::IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// Everybody with the longest prefix around an address.
fn residents(model: &Model, ip: IpAddr) -> Vec<&Place> {
    let local = |net: &ipnet::IpNet, who: &Attributes| {
        model.places.iter().any(|place| {
            let same = place
                .who
                .as_ref()
                .is_some_and(|own| own.spiffe_id == who.spiffe_id);
            place.local && same && place.addresses.contains(net)
        })
    };
    let longest = |place: &Place| {
        place
            .addresses
            .iter()
            .filter(|net| net.contains(&ip))
            // Declared again under another name.
            .filter(|net| place.local || !place.who.as_ref().is_some_and(|who| local(net, who)))
            .map(|net| net.prefix_len())
            .max()
    };
    let all = model.places.iter().filter_map(longest).max();
    let there = model.places.iter();
    there
        .filter(|place| all.is_some() && longest(place) == all)
        .collect()
}

fn node(model: &Model, from: IpAddr, verdict: &mut Verdict) {
    if model.node.contains(&from) {
        if verdict.action != Action::Allow {
            verdict.rules.clear();
        }
        verdict.action = Action::Allow;
        verdict.rules.push("node".into());
    }
}

fn best(
    model: &Model,
    own: &Place,
    ingress: bool,
    protocol: u8,
    port: u16,
    means: &dyn Fn(&Policy, &Item) -> Option<Because>,
    action: impl Fn(Because) -> Action,
) -> Verdict {
    let mut allow = Vec::new();
    let mut tunnel_only = Vec::new();
    for policy in model.policies.iter().filter(|policy| selects(policy, own)) {
        let (rules, direction) = if ingress {
            (&policy.ingress, "ingress")
        } else {
            (&policy.egress, "egress")
        };
        for (index, rule) in rules.iter().enumerate() {
            if !on_ports(rule, protocol, port) {
                continue;
            }
            let title = match policy.namespace {
                Some(namespace) => format!("{namespace}/{}", policy.name),
                None => policy.name.clone(),
            };
            let name = format!("{title}/{direction}[{index}]");
            let items = rule.items.as_ref();
            let because: Vec<_> = items.map_or_else(
                || vec![Because::Address],
                |items| {
                    items
                        .iter()
                        .filter_map(|item| means(policy, item))
                        .collect()
                },
            );
            for because in because {
                match action(because) {
                    Action::Allow => allow.push(name.clone()),
                    Action::TunnelOnly => tunnel_only.push(name.clone()),
                    Action::Deny | Action::Permissive => {}
                }
            }
        }
    }
    let (action, rules) = match (allow.is_empty(), tunnel_only.is_empty()) {
        (false, _) => (Action::Allow, allow),
        (true, false) => (Action::TunnelOnly, tunnel_only),
        (true, true) => (Action::Deny, Vec::new()),
    };
    Verdict { action, rules }
}

fn selects(policy: &Policy, own: &Place) -> bool {
    let named = policy.names.is_empty() || policy.names.contains(&own.name);
    let who = own.who.as_ref().unwrap();
    named
        && policy.namespace.is_none_or(|n| n == who.namespace)
        && fits(&policy.subjects, None, who)
}

fn fits(kind: &Kind, default_namespace: Option<&str>, who: &Attributes) -> bool {
    let namespace = kind.namespace.or(default_namespace).filter(|n| *n != "*");
    namespace.is_none_or(|n| n == who.namespace)
        && kind.account.is_none_or(|a| a == who.service_account)
        && kind
            .labels
            .iter()
            .all(|(k, v)| who.labels.get(*k).is_some_and(|own| own == v))
        && kind.expressions.iter().all(|expression| {
            let own = who.labels.get(expression.key).map(String::as_str);
            let listed = own.is_some_and(|own| expression.values.contains(&own));
            match expression.operator {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => own.is_some(),
                _ => own.is_none(),
            }
        })
}

fn by_address(item: &Item, ip: IpAddr) -> Option<Because> {
    match item {
        Item::Any => Some(Because::Address),
        Item::Cidr(block, except) => {
            let inside = block.contains(&ip) && !except.iter().any(|hole| hole.contains(&ip));
            inside.then_some(Because::Address)
        }
        _ => None,
    }
}

fn by_identity(policy: &Policy, item: &Item, who: &Attributes) -> Option<Because> {
    let means = match item {
        Item::Identity(id) => who.spiffe_id.as_str() == *id,
        Item::Prefix(prefix) => who.spiffe_id.as_str().starts_with(prefix),
        Item::Kind(kind) => fits(kind, policy.namespace, who),
        Item::Any | Item::Cidr(..) => false,
    };
    means.then_some(Because::Identity)
}

/// Nothing but the ID is known.
fn undeclared(policy: &Policy, item: &Item, client: &SpiffeId) -> bool {
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

fn on_ports(rule: &Rule, protocol: u8, port: u16) -> bool {
    rule.ports.is_empty() || rule.ports.iter().any(|item| on_port(item, protocol, port))
}

fn on_port(item: &Port, protocol: u8, port: u16) -> bool {
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
