//! What the policies say, read one by one, with nothing prepared.

mod fits;

use std::{collections::BTreeMap, net::IpAddr};

use reeve_common::{Action, DryRun};

use self::fits::{
    by_address, by_block, by_identity, has_labels, is_pod, on_ports, possibly, selects, undeclared,
    undeclared_pod,
};
use super::model::{Item, Model, NetworkPeer, NetworkPolicy, NetworkPort, Place, Policy};
use crate::{identity::SpiffeId, workload::Attributes};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// What holds, and which rules say it.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) action: Action,
    /// None for the default deny.
    pub(super) rules: Vec<String>,
    pub(super) dry_run: DryRun,
}

/// Why an item means somebody.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Because {
    Address,
    Identity,
}

/// One question.
struct Question<'a> {
    model: &'a Model,
    own: &'a Place,
    ingress: bool,
    protocol: u8,
    port: u16,
    /// By a certificate.
    proven: bool,
    /// The named ports of the destination.
    named: Option<&'a BTreeMap<&'static str, (u8, u16)>>,
}

/// Whom items and peers mean.
struct Means<'a> {
    allow: &'a dyn Fn(&Policy, &Item) -> Option<Because>,
    deny: &'a dyn Fn(&Policy, &Item) -> bool,
    network: &'a dyn Fn(&NetworkPolicy, &NetworkPeer) -> Option<Because>,
}

/// What one rule says, in the order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Says {
    Node,
    Deny,
    Allow,
    Permissive,
    TunnelOnly,
}

/// Everything that any rule says: what, by which name, in force, and with the dry runs in force.
type Said = Vec<(Says, String, bool, bool)>;

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
    let others: Vec<_> = residents
        .iter()
        .filter(|place| !owns_ports(place))
        .collect();
    let there = owner.or_else(|| others.first().copied());
    let possible: Vec<_> = match owner {
        Some(owner) => vec![owner],
        None if others.is_empty() => residents.iter().collect(),
        None => others,
    };
    let who = there.and_then(|place| place.who.as_ref());
    let question = Question {
        model,
        own,
        ingress: false,
        protocol,
        port,
        proven: false,
        named: who.and(there).map(|place| &place.named),
    };
    question.answer(&Means {
        allow: &|policy, item| {
            by_address(item, to).or_else(|| who.and_then(|who| by_identity(policy, item, who)))
        },
        deny: &|policy, item| {
            by_address(item, to).is_some()
                || any_of(&possible, |who| by_identity(policy, item, who))
        },
        network: &|policy, peer| {
            by_block(peer, to).or_else(|| {
                who.filter(|who| is_pod(model, policy, peer, who))
                    .map(|_| Because::Identity)
            })
        },
    })
}

pub(super) fn plaintext(
    model: &Model,
    own: &Place,
    from: IpAddr,
    protocol: u8,
    port: u16,
) -> Verdict {
    let residents = residents(model, from);
    // It could be any of them.
    let all = |means: &dyn Fn(&Attributes) -> bool| {
        let means = |place: &&Place| place.exclusive && place.who.as_ref().is_some_and(means);
        (!residents.is_empty() && residents.iter().all(means)).then_some(Because::Identity)
    };
    let possible: Vec<_> = residents.iter().collect();
    let question = Question {
        model,
        own,
        ingress: true,
        protocol,
        port,
        proven: false,
        named: Some(&own.named),
    };
    let means = Means {
        allow: &|policy, item| {
            by_address(item, from).or_else(|| all(&|who| by_identity(policy, item, who).is_some()))
        },
        deny: &|policy, item| {
            by_address(item, from).is_some()
                || any_of(&possible, |who| by_identity(policy, item, who))
        },
        network: &|policy, peer| {
            by_block(peer, from).or_else(|| all(&|who| is_pod(model, policy, peer, who)))
        },
    };
    question.answer_to(&means, from)
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
        .filter(|place| {
            place
                .who
                .as_ref()
                .is_some_and(|who| who.spiffe_id == *client)
        })
        .collect();
    let all = |means: &dyn Fn(&Attributes) -> bool, otherwise: bool| {
        let means = |place: &&&Place| place.who.as_ref().is_some_and(means);
        let fits = if declared.is_empty() {
            otherwise
        } else {
            declared.iter().all(means)
        };
        fits.then_some(Because::Identity)
    };
    let question = Question {
        model,
        own,
        ingress: true,
        protocol: TCP,
        port,
        proven: true,
        named: Some(&own.named),
    };
    let means = Means {
        allow: &|policy, item| {
            let otherwise = undeclared(policy, item, client);
            by_address(item, from)
                .or_else(|| all(&|who| by_identity(policy, item, who).is_some(), otherwise))
        },
        deny: &|policy, item| {
            let could_be = declared.is_empty() && possibly(policy, item, client);
            by_address(item, from).is_some()
                || could_be
                || any_of(&declared, |who| by_identity(policy, item, who))
        },
        network: &|policy, peer| {
            let otherwise = undeclared_pod(model, policy, peer, client);
            by_block(peer, from).or_else(|| all(&|who| is_pod(model, policy, peer, who), otherwise))
        },
    };
    question.answer_to(&means, from)
}

fn any_of(places: &[&&Place], means: impl Fn(&Attributes) -> Option<Because>) -> bool {
    let who = places.iter().filter_map(|place| place.who.as_ref());
    who.into_iter().any(|who| means(who).is_some())
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

// === impl Question ===

impl Question<'_> {
    /// For what comes in, the node's own address included.
    fn answer_to(&self, means: &Means<'_>, from: IpAddr) -> Verdict {
        let mut said = self.said(means);
        if self.model.node.contains(&from) {
            said.push((Says::Node, "node".into(), true, true));
        }
        if self.own.permissive && !self.proven {
            said.push((Says::Permissive, "permissive".into(), true, true));
        }
        verdict(&said)
    }

    fn answer(&self, means: &Means<'_>) -> Verdict {
        verdict(&self.said(means))
    }

    fn said(&self, means: &Means<'_>) -> Said {
        let mut said = Said::new();
        let mut closed = (false, false);
        for policy in self.model.policies.iter().filter(|p| selects(p, self.own)) {
            self.connection_policy(policy, means, &mut said, &mut closed);
        }
        for policy in &self.model.network_policies {
            let who = self.own.who.as_ref().unwrap();
            if policy.namespace == who.namespace && has_labels(&policy.subjects, who) {
                self.network_policy(policy, means, &mut said, &mut closed);
            }
        }
        if self.model.open && !closed.0 {
            said.push((Says::Allow, "unselected".into(), true, !closed.1));
        }
        said
    }

    fn connection_policy(
        &self,
        policy: &Policy,
        means: &Means<'_>,
        said: &mut Said,
        closed: &mut (bool, bool),
    ) {
        let (rules, direction) = if self.ingress {
            (&policy.ingress, "ingress")
        } else {
            (&policy.egress, "egress")
        };
        if !policy.deny && !rules.is_empty() {
            closed.0 |= !policy.dry_run;
            closed.1 = true;
        }
        let title = match policy.namespace {
            Some(namespace) => format!("{namespace}/{}", policy.name),
            None => policy.name.clone(),
        };
        for (index, rule) in rules.iter().enumerate() {
            if !on_ports(rule, self.protocol, self.port) {
                continue;
            }
            let name = format!("{title}/{direction}[{index}]");
            let anybody = [Item::Any];
            let items = rule.items.as_deref().unwrap_or(&anybody);
            for item in items {
                let says = if policy.deny {
                    (means.deny)(policy, item).then_some(Says::Deny)
                } else {
                    (means.allow)(policy, item).map(|because| self.allowed(because))
                };
                said.extend(says.map(|says| (says, name.clone(), !policy.dry_run, true)));
            }
        }
    }

    fn network_policy(
        &self,
        policy: &NetworkPolicy,
        means: &Means<'_>,
        said: &mut Said,
        closed: &mut (bool, bool),
    ) {
        let (rules, direction, name) = if self.ingress {
            (&policy.ingress, "Ingress", "ingress")
        } else {
            (&policy.egress, "Egress", "egress")
        };
        let about = match policy.types.as_deref() {
            None | Some([]) => self.ingress || !rules.is_empty(),
            Some(types) => types.contains(&direction),
        };
        if !about {
            return;
        }
        closed.0 |= !policy.dry_run;
        closed.1 = true;
        for (index, rule) in rules.iter().enumerate() {
            let ports = &rule.ports;
            if !ports.is_empty() && !ports.iter().any(|port| self.on_network_port(port)) {
                continue;
            }
            let name = format!("{}/{}/{name}[{index}]", policy.namespace, policy.name);
            let because: Vec<_> = if rule.peers.is_empty() {
                vec![Because::Address]
            } else {
                let peers = rule.peers.iter();
                peers
                    .filter_map(|peer| (means.network)(policy, peer))
                    .collect()
            };
            for because in because {
                said.push((self.allowed(because), name.clone(), !policy.dry_run, true));
            }
        }
    }

    fn allowed(&self, because: Because) -> Says {
        let unproven = self.ingress && self.protocol == TCP && !self.proven;
        if because == Because::Identity && unproven {
            Says::TunnelOnly
        } else {
            Says::Allow
        }
    }

    fn on_network_port(&self, port: &NetworkPort) -> bool {
        let protocol = match port.protocol.unwrap_or("TCP") {
            "TCP" => TCP,
            "UDP" => UDP,
            _ => SCTP,
        };
        let first = match (port.port, port.name) {
            (Some(first), _) => first,
            (None, None) => return protocol == self.protocol,
            (None, Some(name)) => match self.named.and_then(|named| named.get(name)) {
                Some((own, number)) if *own == protocol => *number,
                _ => return false,
            },
        };
        protocol == self.protocol && (first..=port.end.unwrap_or(first)).contains(&self.port)
    }
}

fn verdict(said: &Said) -> Verdict {
    let best = |counts: fn(&(Says, String, bool, bool)) -> bool| {
        said.iter()
            .filter(|said| counts(said))
            .map(|(says, ..)| *says)
            .min()
    };
    let (enforced, dry_run) = (best(|said| said.2), best(|said| said.3));
    let passes = |says| matches!(says, Some(Says::Node | Says::Allow | Says::Permissive));
    let said = said
        .iter()
        .filter(|said| said.2 && Some(said.0) == enforced);
    Verdict {
        action: match enforced {
            Some(Says::Node | Says::Allow) => Action::Allow,
            Some(Says::Permissive) => Action::Permissive,
            Some(Says::TunnelOnly) => Action::TunnelOnly,
            Some(Says::Deny) | None => Action::Deny,
        },
        rules: said.map(|(_, name, ..)| name.clone()).collect(),
        dry_run: match (passes(enforced), passes(dry_run)) {
            (true, false) => DryRun::Deny,
            (false, true) => DryRun::Allow,
            _ => DryRun::Same,
        },
    }
}
