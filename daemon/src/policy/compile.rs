//! From policies, workloads and peers to a [`Snapshot`].
//!
//! The work grows with what is there and with what the rules really select: a selector looks at
//! those whom an index proposes, workloads with the same rules share them, and only classes that
//! a rule of the workload selects get verdicts of their own.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use ipnet::IpNet;
use reeve_common::{Direction, WorkloadId};

use super::{
    Inputs, Snapshot,
    far_ends::{Block, FarEnds, InUse, Resident},
    identities::Identities,
    implicit::Implicit,
    named_ports::{Resolved, resolve_egress},
    number::{Fingerprint, numbers},
    population::{Member, Population},
    rule::{Effect, FarEnd, Rule, Subjects},
    sets::{SelectorId, SetId, Sets},
    tables::Tables,
    verdicts::{By, RuleIndex, RuleList},
};
use crate::workload::{Namespaces, Peer, RunningWorkload};

/// The rules of one workload, by direction.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) egress: Arc<RuleList>,
    pub(super) ingress: Arc<RuleList>,
}

/// Whom rules name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Selector {
    pub(super) far_end: FarEnd,
    /// Whether it matches whoever it could match: that is enough to deny.
    pub(super) possible: bool,
}

/// The selectors that rules in use name, each once.
#[derive(Debug, Default)]
struct Selectors {
    ids: HashMap<Selector, SelectorId>,
    list: Vec<Selector>,
    in_use: InUse,
}

/// Compiles.
pub(super) fn compile(inputs: &Inputs<'_>) -> Snapshot {
    let peers = all_peers(inputs);
    let mut rules = resolve_egress(inputs.policies.rules.iter().cloned(), &peers);
    let mut selectors = Selectors::default();
    let by_workload = rules_by_workload(inputs, &mut rules, &mut selectors);

    let mut sets = Sets::default();
    let identities = identities_of(&peers, &selectors, inputs.namespaces, &mut sets);
    let far_ends = FarEnds::new(
        &residents(inputs, &peers, &identities),
        &selectors.blocks(),
        &selectors.in_use,
        &mut sets,
    );

    let rule_numbers = rule_numbers(&rules);
    let tables = Tables {
        rules: &rules,
        rule_numbers: &rule_numbers,
        far_ends: &far_ends,
        sets: &sets,
        node_addresses: inputs.node_addresses,
    }
    .build(inputs.workloads, &by_workload);

    Snapshot::new(
        inputs.workloads,
        peers,
        super::snapshot::Compiled {
            rules,
            rule_numbers,
            by_workload,
            sets,
            far_ends,
            identities: Identities::new(&selectors.list, inputs.namespaces),
            peer_identities: identities,
            possible: selectors.in_use.possible,
        },
        tables,
    )
}

/// A number for each rule, by its name: what a named port made several of stays one.
fn rule_numbers(rules: &[Rule]) -> Vec<u32> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut fingerprints = Vec::new();
    let places: Vec<usize> = rules
        .iter()
        .map(|rule| {
            let name = rule.origin.name.as_str();
            *places.entry(name).or_insert_with(|| {
                fingerprints.push(Fingerprint::of(name));
                fingerprints.len() - 1
            })
        })
        .collect();
    let numbers = numbers(&fingerprints);
    let number = |place| numbers.get(place).copied().unwrap_or_default();
    places.into_iter().map(number).collect()
}

/// Local workloads first, so that they win an address that both they and a peer claim.
fn all_peers(inputs: &Inputs<'_>) -> Vec<Arc<Peer>> {
    let local = inputs.workloads.iter().map(|running| {
        let workload = &running.workload;
        let addresses = if running.addresses.is_empty() {
            &workload.addresses
        } else {
            &running.addresses
        };
        Arc::new(Peer {
            id: workload.id,
            name: workload.name.clone(),
            addresses: addresses
                .iter()
                .map(|address| IpNet::from(address.to_canonical()))
                .collect(),
            ports: workload.ports.clone(),
            attributes: Some(workload.attributes.clone()),
            tunnel_port: Some(inputs.tunnel_port),
            named_ports: workload.named_ports.clone(),
        })
    });
    local.chain(inputs.peers.iter().cloned()).collect()
}

/// The rules of each workload. Workloads that the same rules are for share the list.
fn rules_by_workload(
    inputs: &Inputs<'_>,
    rules: &mut Vec<Rule>,
    selectors: &mut Selectors,
) -> HashMap<WorkloadId, Rules> {
    let workloads = inputs.workloads;
    let mut selected = selected(inputs, rules);
    let mut implicit = Implicit::new(inputs.node_addresses, rules);
    let mut resolved = Resolved::default();
    for (running, [egress, ingress]) in workloads.iter().zip(&mut selected) {
        let workload = &running.workload;
        for index in ingress.iter_mut() {
            *index = resolved.at(*index, &workload.named_ports, rules);
        }
        implicit.add(inputs, workload, rules, egress, ingress);
    }
    let mut lists = HashMap::new();
    workloads
        .iter()
        .zip(selected)
        .map(|(running, [egress, ingress])| {
            let mut list = |direction, indices: Vec<RuleIndex>| -> Arc<RuleList> {
                let key = (direction, indices);
                if let Some(list) = lists.get(&key) {
                    return Arc::clone(list);
                }
                let list = Arc::new(rule_list(direction, &key.1, rules, selectors));
                lists.insert(key, Arc::clone(&list));
                list
            };
            let rules = Rules {
                egress: list(Direction::Egress, egress),
                ingress: list(Direction::Ingress, ingress),
            };
            (running.workload.id, rules)
        })
        .collect()
}

/// The policies' rules for each workload: egress, then ingress.
fn selected(inputs: &Inputs<'_>, rules: &[Rule]) -> Vec<[Vec<RuleIndex>; 2]> {
    let workloads = inputs.workloads;
    let mut selected: Vec<[Vec<RuleIndex>; 2]> = vec![Default::default(); workloads.len()];
    let mut subjects: Option<(&Arc<Subjects>, Vec<usize>)> = None;
    for (rule, index) in rules.iter().zip(0..) {
        // The rules of one policy follow each other.
        let same = subjects.as_ref();
        let same = same.is_some_and(|(subjects, _)| Arc::ptr_eq(subjects, &rule.subjects));
        if !same {
            let fits = |running: &RunningWorkload| {
                rule.subjects.matches(&running.workload, inputs.namespaces)
            };
            let members = workloads.iter().enumerate();
            let members = members.filter(|(_, running)| fits(running));
            subjects = Some((&rule.subjects, members.map(|(place, _)| place).collect()));
        }
        let members = subjects.as_ref().map_or(&[][..], |(_, members)| members);
        for member in members {
            if let Some([egress, ingress]) = selected.get_mut(*member) {
                match rule.direction {
                    Direction::Egress => egress.push(index),
                    Direction::Ingress => ingress.push(index),
                }
            }
        }
    }
    selected
}

fn rule_list(
    direction: Direction,
    indices: &[RuleIndex],
    rules: &[Rule],
    selectors: &mut Selectors,
) -> RuleList {
    let mut list = RuleList::new(direction);
    for index in indices {
        let Some(rule) = rules.get(*index as usize) else {
            continue;
        };
        if rule.far_ends.contains(&FarEnd::Anybody) {
            list.add_for_anybody(*index);
        }
        let denies = rule.effect == Effect::Deny;
        let named: BTreeSet<_> = rule
            .far_ends
            .iter()
            .filter(|far_end| **far_end != FarEnd::Anybody)
            .map(|far_end| {
                (
                    selectors.intern(far_end, denies, direction),
                    far_end.needs_identity(),
                )
            })
            .collect();
        for (selector, needs_identity) in named {
            let by = if needs_identity {
                By::Identity
            } else {
                By::Address
            };
            list.add(*index, selector, by);
        }
    }
    list
}

/// The selectors that match who each peer is.
fn identities_of(
    peers: &[Arc<Peer>],
    selectors: &Selectors,
    namespaces: &Namespaces,
    sets: &mut Sets,
) -> HashMap<u32, SetId> {
    let members = peers.iter().map(|peer| Member {
        name: &peer.name,
        attributes: peer.attributes.as_ref(),
        ports: &peer.named_ports,
    });
    let population = Population::new(members, namespaces);
    let mut matching: Vec<Vec<SelectorId>> = vec![Vec::new(); peers.len()];
    for (selector, id) in selectors.list.iter().zip(0..) {
        for place in population.matching(&selector.far_end) {
            if let Some(matching) = matching.get_mut(place) {
                matching.push(id);
            }
        }
    }
    peers
        .iter()
        .zip(matching)
        .map(|(peer, matching)| (peer.id, sets.intern(matching)))
        .collect()
}

fn residents(
    inputs: &Inputs<'_>,
    peers: &[Arc<Peer>],
    identities: &HashMap<u32, SetId>,
) -> Vec<Resident> {
    // A peer that is declared with an address of a local workload and its identity is that
    // workload, as one file for all nodes will have it.
    let mut local = BTreeSet::new();
    let mut residents = Vec::with_capacity(peers.len());
    for (index, peer) in peers.iter().enumerate() {
        let running = inputs.workloads.get(index);
        let id = peer.attributes.as_ref().map(|a| &a.spiffe_id);
        let mut addresses = peer.addresses.clone();
        if running.is_some() {
            local.extend(addresses.iter().map(|address| (*address, id)));
        } else {
            addresses.retain(|address| !local.contains(&(*address, id)));
        }
        residents.push(Resident {
            peer: peer.id,
            addresses,
            ports: peer.ports.clone(),
            identity: identities.get(&peer.id).copied().unwrap_or(SetId::EMPTY),
            tunnel: peer.tunnel_port.is_some(),
            exclusive: running.is_none_or(|running| running.owns_netns),
        });
    }
    residents
}

// === impl Selectors ===

impl Selectors {
    /// The selector of a rule for a direction, which denies or does something else.
    fn intern(&mut self, far_end: &FarEnd, denies: bool, direction: Direction) -> SelectorId {
        let id = self.id(far_end, denies);
        let in_use = match direction {
            Direction::Egress => &mut self.in_use.egress,
            Direction::Ingress => &mut self.in_use.ingress,
        };
        if let Some(in_use) = in_use.get_mut(id as usize) {
            *in_use = true;
        }
        id
    }

    fn id(&mut self, far_end: &FarEnd, denies: bool) -> SelectorId {
        let selector = Selector {
            far_end: far_end.clone(),
            // Of an address there is no doubt.
            possible: denies && far_end.needs_identity(),
        };
        if let Some(id) = self.ids.get(&selector) {
            return *id;
        }
        if let FarEnd::Both(block, identity) = far_end {
            let parts = (self.id(block, denies), self.id(identity, denies));
            let id = self.add(selector);
            let of_identity = self.in_use.both.entry(parts.1).or_default();
            of_identity.push((parts.0, id));
            return id;
        }
        self.add(selector)
    }

    fn add(&mut self, selector: Selector) -> SelectorId {
        // The sizes of the files bound the number of selectors far below u32.
        let id = SelectorId::try_from(self.list.len()).unwrap_or(SelectorId::MAX);
        self.in_use.egress.push(false);
        self.in_use.ingress.push(false);
        self.in_use.possible.push(selector.possible);
        self.ids.insert(selector.clone(), id);
        self.list.push(selector);
        id
    }

    fn blocks(&self) -> Vec<Block> {
        let cidr = |(id, selector): (SelectorId, &Selector)| match &selector.far_end {
            FarEnd::Cidr { block, except } => Some(Block {
                selector: id,
                block: *block,
                except: except.clone(),
            }),
            _ => None,
        };
        (0..).zip(&self.list).filter_map(cidr).collect()
    }
}
