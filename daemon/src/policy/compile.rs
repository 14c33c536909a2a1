//! From policies, workloads and peers to a [`Snapshot`].
//!
//! The work grows with what is there and with what the rules really select: a selector looks at
//! those whom an index proposes, workloads with the same rules share them, and only classes that
//! a rule of the workload selects get verdicts of their own.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    path::Path,
    sync::Arc,
};

use ipnet::IpNet;
use reeve_common::{Direction, WorkloadId};

use super::{
    Inputs, Snapshot,
    far_ends::{Block, FarEnds, InUse, Resident},
    identities::Identities,
    number::{Fingerprint, numbers},
    population::{Member, Population},
    rule::{FarEnd, Origin, PortMatch, Rule, Subjects},
    sets::{SelectorId, SetId, Sets},
    tables::Tables,
    verdicts::{By, RuleIndex, RuleList},
};
use crate::workload::{Peer, RunningWorkload};

/// Name of the rule that lets the node's own agent in.
const NODE_RULE: &str = "node";

/// The rules of one workload, by direction.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) egress: Arc<RuleList>,
    pub(super) ingress: Arc<RuleList>,
}

/// The selectors that rules in use name, each once.
#[derive(Debug, Default)]
struct Selectors {
    ids: HashMap<FarEnd, SelectorId>,
    list: Vec<FarEnd>,
    in_use: InUse,
}

/// Compiles.
pub(super) fn compile(inputs: &Inputs<'_>) -> Snapshot {
    let rules = all_rules(inputs);
    let mut selectors = Selectors::default();
    let by_workload = rules_by_workload(inputs.workloads, &rules, &mut selectors);

    let peers = all_peers(inputs);
    let mut sets = Sets::default();
    let identities = identities_of(&peers, &selectors, &mut sets);
    let far_ends = FarEnds::new(
        &residents(inputs, &peers, &identities),
        &selectors.blocks(),
        &selectors.in_use,
        &mut sets,
    );

    let names: Vec<_> = rules
        .iter()
        .map(|rule| Fingerprint::of(&rule.origin.name))
        .collect();
    let rule_numbers = numbers(&names);
    let fingerprints: Vec<_> = selectors
        .list
        .iter()
        .map(|selector| Fingerprint::of(&selector.to_string()))
        .collect();
    let tables = Tables {
        rules: &rules,
        rule_numbers: &rule_numbers,
        far_ends: &far_ends,
        sets: &sets,
        fingerprints: &fingerprints,
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
            identities: Identities::new(&selectors.list),
            peer_identities: identities,
        },
        tables,
    )
}

/// The implicit rules, then those of the policies.
fn all_rules(inputs: &Inputs<'_>) -> Vec<Rule> {
    let mut rules = Vec::with_capacity(inputs.policies.rules.len() + 1);
    if !inputs.node_addresses.is_empty() {
        let block = |address: &IpAddr| FarEnd::Cidr {
            block: IpNet::from(address.to_canonical()),
            except: Vec::new(),
        };
        rules.push(Rule {
            origin: Origin {
                name: NODE_RULE.to_owned(),
                file: Path::new("").into(),
                line: 0,
            },
            subjects: Arc::new(Subjects::default()),
            direction: Direction::Ingress,
            far_ends: inputs.node_addresses.iter().map(block).collect(),
            ports: vec![PortMatch::Everything],
        });
    }
    rules.extend(inputs.policies.rules.iter().cloned());
    rules
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
        })
    });
    local.chain(inputs.peers.iter().cloned()).collect()
}

/// The rules of each workload. Workloads that the same rules are for share the list.
fn rules_by_workload(
    workloads: &[Arc<RunningWorkload>],
    rules: &[Rule],
    selectors: &mut Selectors,
) -> HashMap<WorkloadId, Rules> {
    let mut selected: Vec<[Vec<RuleIndex>; 2]> = vec![Default::default(); workloads.len()];
    let mut subjects: Option<(&Arc<Subjects>, Vec<usize>)> = None;
    for (rule, index) in rules.iter().zip(0..) {
        // The rules of one policy follow each other.
        let same = subjects.as_ref();
        let same = same.is_some_and(|(subjects, _)| Arc::ptr_eq(subjects, &rule.subjects));
        if !same {
            let fits = |running: &RunningWorkload| {
                let workload = &running.workload;
                rule.subjects.matches(&workload.name, &workload.attributes)
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
        let named: BTreeSet<_> = rule
            .far_ends
            .iter()
            .filter(|far_end| **far_end != FarEnd::Anybody)
            .map(|far_end| {
                (
                    selectors.intern(far_end, direction),
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
    sets: &mut Sets,
) -> HashMap<u32, SetId> {
    let population = Population::new(peers.iter().map(|peer| Member {
        name: &peer.name,
        attributes: peer.attributes.as_ref(),
    }));
    let mut matching: Vec<Vec<SelectorId>> = vec![Vec::new(); peers.len()];
    for (selector, id) in selectors.list.iter().zip(0..) {
        for place in population.matching(selector) {
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
    fn intern(&mut self, far_end: &FarEnd, direction: Direction) -> SelectorId {
        let id = match self.ids.get(far_end) {
            Some(id) => *id,
            None => {
                // The sizes of the files bound the number of selectors far below u32.
                let id = SelectorId::try_from(self.list.len()).unwrap_or(SelectorId::MAX);
                self.ids.insert(far_end.clone(), id);
                self.list.push(far_end.clone());
                self.in_use.egress.push(false);
                self.in_use.ingress.push(false);
                id
            }
        };
        let in_use = match direction {
            Direction::Egress => &mut self.in_use.egress,
            Direction::Ingress => &mut self.in_use.ingress,
        };
        if let Some(in_use) = in_use.get_mut(id as usize) {
            *in_use = true;
        }
        id
    }

    fn blocks(&self) -> Vec<Block> {
        let cidr = |(selector, far_end): (SelectorId, &FarEnd)| match far_end {
            FarEnd::Cidr { block, except } => Some(Block {
                selector,
                block: *block,
                except: except.clone(),
            }),
            _ => None,
        };
        (0..).zip(&self.list).filter_map(cidr).collect()
    }
}
