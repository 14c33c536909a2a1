//! Named ports: each destination resolves them for itself, so the compiler puts numbers in place of
//! the names. What resolves to nothing matches nothing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use reeve_common::Direction;

use super::{
    rule::{FarEnd, PortMatch, Rule},
    selector::AttributeSelector,
    verdicts::RuleIndex,
};
use crate::workload::{NamedPort, NamedPorts, Peer};

/// Ingress rules as they are for workloads that name their ports differently.
#[derive(Default)]
pub(super) struct Resolved {
    places: HashMap<(RuleIndex, Vec<PortMatch>), RuleIndex>,
}

/// For egress the names are those of the far end: one rule for each number that a name has
/// anywhere, for those far ends where it has it.
pub(super) fn resolve_egress(
    rules: impl IntoIterator<Item = Rule>,
    peers: &[Arc<Peer>],
) -> Vec<Rule> {
    let mut resolved = Vec::new();
    for rule in rules {
        let named = names(&rule);
        if rule.direction == Direction::Ingress || named.is_empty() {
            resolved.push(rule);
            continue;
        }
        let plain = rule.ports.iter().filter(|ports| !is_named(ports));
        let plain: Vec<_> = plain.cloned().collect();
        if !plain.is_empty() {
            resolved.push(Rule {
                ports: plain,
                ..rule.clone()
            });
        }
        for (protocol, name) in named {
            let ports: BTreeSet<NamedPort> = peers
                .iter()
                .filter_map(|peer| peer.named_ports.get(&name).copied())
                .filter(|port| port.protocol == protocol)
                .collect();
            for port in ports {
                let having = |far_end: &FarEnd| having(far_end, &name, port);
                resolved.push(Rule {
                    far_ends: rule.far_ends.iter().map(having).collect(),
                    ports: vec![PortMatch::Ports(protocol, port.port..=port.port)],
                    ..rule.clone()
                });
            }
        }
    }
    resolved
}

/// The rules as they are written: without those that [`Resolved::at`] has made of others.
pub(super) fn as_written(rules: &[Rule]) -> impl Iterator<Item = &Rule> {
    let named: HashSet<&str> = rules
        .iter()
        .filter(|rule| rule.ports.iter().any(is_named))
        .map(|rule| rule.origin.name.as_str())
        .collect();
    rules.iter().filter(move |rule| {
        rule.ports.iter().any(is_named) || !named.contains(rule.origin.name.as_str())
    })
}

/// A port as it is for a workload whose ports have these names; none for a name that it has not.
pub(super) fn at(matched: &PortMatch, ports: &NamedPorts) -> Option<PortMatch> {
    match matched {
        PortMatch::Named(protocol, name) => {
            let port = ports.get(name).filter(|port| port.protocol == *protocol)?;
            Some(PortMatch::Ports(*protocol, port.port..=port.port))
        }
        other => Some(other.clone()),
    }
}

fn is_named(ports: &PortMatch) -> bool {
    matches!(ports, PortMatch::Named(..))
}

fn names(rule: &Rule) -> BTreeSet<(u8, String)> {
    let name = |ports: &PortMatch| match ports {
        PortMatch::Named(protocol, name) => Some((*protocol, name.clone())),
        _ => None,
    };
    rule.ports.iter().filter_map(name).collect()
}

/// Those of a far end whose port has this name.
fn having(far_end: &FarEnd, name: &str, port: NamedPort) -> FarEnd {
    let port = Some((name.to_owned(), port));
    let anybody = AttributeSelector {
        port: port.clone(),
        ..AttributeSelector::default()
    };
    match far_end {
        FarEnd::Attributes(selector) => FarEnd::Attributes(AttributeSelector {
            port,
            ..selector.clone()
        }),
        FarEnd::Anybody => FarEnd::Attributes(anybody),
        other => FarEnd::Both(
            Box::new(other.clone()),
            Box::new(FarEnd::Attributes(anybody)),
        ),
    }
}

// === impl Resolved ===

impl Resolved {
    /// The rule as it is for a workload whose ports have these names.
    pub(super) fn at(
        &mut self,
        index: RuleIndex,
        ports: &NamedPorts,
        rules: &mut Vec<Rule>,
    ) -> RuleIndex {
        let Some(rule) = rules.get(index as usize) else {
            return index;
        };
        if !rule.ports.iter().any(is_named) {
            return index;
        }
        let number = |matched| at(matched, ports);
        let numbers: Vec<_> = rule.ports.iter().filter_map(number).collect();
        let resolved = Rule {
            ports: numbers.clone(),
            ..rule.clone()
        };
        *self.places.entry((index, numbers)).or_insert_with(|| {
            let place = RuleIndex::try_from(rules.len()).unwrap_or(RuleIndex::MAX);
            rules.push(resolved);
            place
        })
    }
}
