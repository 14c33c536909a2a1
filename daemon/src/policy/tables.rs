//! The compiled policy in the form of the kernel's maps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    rc::Rc,
    sync::Arc,
};

use ipnet::IpNet;
use reeve_common::{
    Action, Address, Direction, IPV4_MAPPED_PREFIX, PEER_BY_PORT, PEER_NODE, PEER_TUNNEL,
    PeerEntry, PeerPortKey, VERDICT_PREFIX_ANY_PROTOCOL, VerdictEntry, VerdictKey, WorkloadId,
    ipv4_mapped, protocol,
};

use super::{
    KernelTables,
    compile::Rules,
    far_ends::{FarEnds, Occupant, PORT_PROTOCOLS},
    number::{Fingerprint, numbers},
    rule::Rule,
    sets::{SelectorId, SetId, Sets},
    verdicts::{Answer, Match, Prefix, RuleIndex, RuleList, Told},
};
use crate::workload::RunningWorkload;

/// Bits before an IPv4 address in its mapped form.
const MAPPED_BITS: u32 = 8 * IPV4_MAPPED_PREFIX.len() as u32;

/// What the tables are made of.
pub(super) struct Tables<'a> {
    pub(super) rules: &'a [Rule],
    pub(super) rule_numbers: &'a [u32],
    pub(super) far_ends: &'a FarEnds,
    pub(super) sets: &'a Sets,
    /// Addresses of the node.
    pub(super) node_addresses: &'a [IpAddr],
}

/// What matches a far end, in both directions.
type Pair = (SetId, SetId);

/// The rules that match a far end, in both directions, each by the first that differs from it in nothing
/// but its far ends. Where these are the same, every verdict is.
type Signature = [BTreeSet<Match>; 2];

/// The rules that name each selector.
type Naming = HashMap<SelectorId, BTreeSet<Match>>;

/// The classes: each pair of sets that some far end has, with the number of its class. Pairs that stand
/// in the same rules are one class.
struct Classes {
    numbers: HashMap<Pair, u32>,
    /// By direction: the sets that contain a selector, and the classes that have a set.
    egress: Sides,
    ingress: Sides,
}

#[derive(Default)]
struct Sides {
    sets: HashMap<SelectorId, Vec<SetId>>,
    classes: HashMap<SetId, Vec<u32>>,
}

// === impl Tables ===

impl Tables<'_> {
    pub(super) fn build(
        &self,
        workloads: &[Arc<RunningWorkload>],
        by_workload: &HashMap<WorkloadId, Rules>,
    ) -> KernelTables {
        let classes = self.classes(by_workload);
        let mut tables = KernelTables::default();
        self.peers(&classes, &mut tables);
        let mut lists: HashMap<*const RuleList, Rc<ListVerdicts>> = HashMap::new();
        for running in workloads {
            let id = running.workload.id;
            let Some(rules) = by_workload.get(&id) else {
                continue;
            };
            for (direction, list, sides) in [
                (Direction::Egress, &rules.egress, &classes.egress),
                (Direction::Ingress, &rules.ingress, &classes.ingress),
            ] {
                let verdicts = lists
                    .entry(Arc::as_ptr(list))
                    .or_insert_with(|| Rc::new(self.list_verdicts(list, sides)));
                for (class, prefixes) in verdicts.iter() {
                    self.emit(id, direction, *class, prefixes, &mut tables);
                }
            }
        }
        tables
    }

    fn classes(&self, by_workload: &HashMap<WorkloadId, Rules>) -> Classes {
        let pair = |occupant: &Occupant| (occupant.egress, occupant.ingress);
        let occupants = self
            .far_ends
            .iter()
            .flat_map(|(_, far_end)| far_end.occupants());
        let mut pairs: BTreeSet<Pair> = occupants.map(pair).collect();
        pairs.remove(&(SetId::EMPTY, SetId::EMPTY));
        let naming = self.naming(by_workload);
        let mut alike: BTreeMap<Signature, Vec<Pair>> = BTreeMap::new();
        for pair in pairs {
            let signature = self.signature(pair, &naming);
            alike.entry(signature).or_default().push(pair);
        }
        let rules: Vec<_> = self.rules.iter().map(fingerprint).collect();
        let fingerprints: Vec<_> = alike
            .keys()
            .map(|signature| of_signature(signature, &rules))
            .collect();
        let mut classes = Classes {
            numbers: HashMap::new(),
            egress: Sides::default(),
            ingress: Sides::default(),
        };
        for (pairs, number) in alike.into_values().zip(numbers(&fingerprints)) {
            // One of them is enough to find the verdicts of all.
            if let Some((egress, ingress)) = pairs.first() {
                classes.egress.add(*egress, number, self.sets);
                classes.ingress.add(*ingress, number, self.sets);
            }
            let numbered = pairs.into_iter().map(|pair| (pair, number));
            classes.numbers.extend(numbered);
        }
        classes
    }

    /// The rules that name each selector, of the workloads here: egress, then ingress.
    fn naming(&self, by_workload: &HashMap<WorkloadId, Rules>) -> [Naming; 2] {
        let first = first_alike(self.rules);
        let mut naming = [Naming::new(), Naming::new()];
        let mut seen = HashSet::new();
        for rules in by_workload.values() {
            for (list, naming) in [&rules.egress, &rules.ingress].into_iter().zip(&mut naming) {
                if !seen.insert(Arc::as_ptr(list)) {
                    continue;
                }
                for (selector, by, rules) in list.naming() {
                    let first = |rule: &RuleIndex| first.get(*rule as usize).copied();
                    let rules = rules.iter().filter_map(first).map(|rule| (rule, by));
                    naming.entry(selector).or_default().extend(rules);
                }
            }
        }
        naming
    }

    fn signature(&self, (egress, ingress): Pair, naming: &[Naming; 2]) -> Signature {
        let [of_egress, of_ingress] = naming;
        [(egress, of_egress), (ingress, of_ingress)].map(|(set, naming)| {
            let selectors = self.sets.get(set).iter();
            selectors
                .filter_map(|selector| naming.get(selector))
                .flatten()
                .copied()
                .collect()
        })
    }

    /// `PEERS` and `PEER_PORTS`. A prefix that says what the one around it says is left out.
    fn peers(&self, classes: &Classes, tables: &mut KernelTables) {
        let entry = |occupant: &Occupant| PeerEntry {
            class: classes.number((occupant.egress, occupant.ingress)),
            peer: occupant.peer,
            flags: if occupant.tunnel { PEER_TUNNEL } else { 0 },
        };
        let node: HashSet<IpNet> = self.node_addresses.iter().map(single).collect();
        let mut around: Vec<(IpNet, PeerEntry)> = Vec::new();
        let mut covers_mapped = false;
        let mut has_all_v4 = false;
        for (prefix, far_end) in self.far_ends.iter() {
            let mut rest = entry(&far_end.rest);
            if node.contains(prefix) {
                rest.flags |= PEER_NODE;
            }
            for (port, occupant) in &far_end.ports {
                rest.flags |= PEER_BY_PORT;
                for protocol in PORT_PROTOCOLS {
                    let key = PeerPortKey {
                        address: mapped(prefix.addr()),
                        port: *port,
                        protocol,
                        reserved: 0,
                    };
                    tables.peer_ports.push((key, entry(occupant)));
                }
            }
            while around
                .pop_if(|(outer, _)| !outer.contains(prefix))
                .is_some()
            {}
            let before = around
                .last()
                .map_or(PeerEntry::default(), |(_, entry)| *entry);
            around.push((*prefix, rest));
            // Under an IPv6 prefix the mapped addresses would be told wrong.
            if rest == before {
                continue;
            }
            let length = u32::from(prefix.prefix_len());
            match prefix {
                IpNet::V4(_) => {
                    has_all_v4 |= length == 0;
                    tables
                        .peers
                        .push((length + MAPPED_BITS, mapped(prefix.addr()), rest));
                }
                IpNet::V6(network) => {
                    covers_mapped |=
                        network.contains(&std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped());
                    tables.peers.push((length, mapped(prefix.addr()), rest));
                }
            }
        }
        // A prefix of IPv6 around all mapped addresses says nothing of IPv4.
        if covers_mapped && !has_all_v4 {
            let all = ipv4_mapped([0; 4]);
            tables.peers.push((MAPPED_BITS, all, PeerEntry::default()));
        }
    }

    /// The verdicts of a list of rules: for class 0, and for each class that a rule selects.
    fn list_verdicts(&self, list: &RuleList, sides: &Sides) -> ListVerdicts {
        let mut cache: HashMap<Vec<Match>, Rc<[Prefix]>> = HashMap::new();
        let mut prefixes = |set: SetId| -> Rc<[Prefix]> {
            let mut matches: Vec<_> = list.matches(self.sets.get(set)).collect();
            matches.sort_unstable();
            matches.dedup();
            if let Some(prefixes) = cache.get(&matches) {
                return Rc::clone(prefixes);
            }
            let prefixes: Rc<[Prefix]> = list.prefixes(self.rules, &matches).into();
            cache.insert(matches, Rc::clone(&prefixes));
            prefixes
        };
        let anybody = prefixes(SetId::EMPTY);
        // A deny in dry run can take away, of a class, what a dry run would allow anybody. Without an
        // entry of its own that class would be told what anybody is told.
        let has_own_rest = anybody.iter().any(|prefix| prefix.told.enforced.is_none());
        let selected: BTreeSet<SetId> = list
            .selectors()
            .filter_map(|selector| sides.sets.get(&selector))
            .flatten()
            .copied()
            .collect();
        let mut verdicts = vec![(0, Rc::clone(&anybody))];
        for set in selected {
            let prefixes = prefixes(set);
            // Then the kernel's second question, with class 0, gives the same answer.
            if prefixes == anybody {
                continue;
            }
            let prefixes = if has_own_rest {
                with_rest(&prefixes)
            } else {
                prefixes
            };
            let classes = sides.classes.get(&set).into_iter().flatten();
            verdicts.extend(classes.map(|class| (*class, Rc::clone(&prefixes))));
        }
        verdicts
    }

    fn emit(
        &self,
        workload: WorkloadId,
        direction: Direction,
        class: u32,
        prefixes: &[Prefix],
        tables: &mut KernelTables,
    ) {
        tables.verdicts.extend(prefixes.iter().map(|prefix| {
            let key = VerdictKey {
                workload,
                class,
                direction: direction as u8,
                protocol: prefix.protocol,
                port: prefix.port.to_be_bytes(),
            };
            let number = |rule: RuleIndex| {
                let number = self.rule_numbers.get(rule as usize);
                number.copied().unwrap_or_default()
            };
            let Told {
                enforced,
                dry_run,
                dry_run_rule,
            } = prefix.told;
            let entry = VerdictEntry {
                action: enforced.map_or(Action::Deny, Answer::action) as u32,
                rule: enforced.map_or(0, |answer| number(answer.rule)),
                dry_run: dry_run as u32,
                dry_run_rule: dry_run_rule.map_or(0, number),
            };
            (prefix.length, key, entry)
        }));
    }
}

/// For each rule, the first that differs from it in nothing but its far ends and where it is written.
fn first_alike(rules: &[Rule]) -> Vec<RuleIndex> {
    let mut known: HashMap<&str, Vec<RuleIndex>> = HashMap::new();
    (0..)
        .zip(rules)
        .map(|(index, rule)| {
            let same_name = known.entry(&rule.origin.name).or_default();
            let alike = |other: &&RuleIndex| {
                rules.get(**other as usize).is_some_and(|other| {
                    (&other.ports, &other.subjects) == (&rule.ports, &rule.subjects)
                        && (other.direction, other.effect, other.mode)
                            == (rule.direction, rule.effect, rule.mode)
                })
            };
            same_name.iter().find(alike).copied().unwrap_or_else(|| {
                same_name.push(index);
                index
            })
        })
        .collect()
}

/// Of what [`first_alike`] compares: a far end that is added to a rule, or taken from it, leaves the
/// number of the rule's class as it is.
fn fingerprint(rule: &Rule) -> u64 {
    let Rule {
        origin,
        subjects,
        direction,
        ports,
        effect,
        mode,
        far_ends: _,
    } = rule;
    let name = &origin.name;
    Fingerprint::of(&format!(
        "{name} {subjects:?} {direction:?} {ports:?} {effect:?} {mode:?}"
    ))
}

fn of_signature(signature: &Signature, rules: &[u64]) -> u64 {
    let mut fingerprint = Fingerprint::new();
    for matches in signature {
        let part = |(rule, by): &Match| Some((*rules.get(*rule as usize)?, *by));
        let mut parts: Vec<_> = matches.iter().filter_map(part).collect();
        parts.sort_unstable();
        fingerprint.add(&parts.len().to_be_bytes());
        for (rule, by) in parts {
            fingerprint.add(&rule.to_be_bytes());
            fingerprint.add(&[by as u8]);
        }
    }
    fingerprint.finish()
}

/// The prefixes, with one for whatever they leave to the default deny.
fn with_rest(prefixes: &[Prefix]) -> Rc<[Prefix]> {
    let rest = Prefix {
        length: VERDICT_PREFIX_ANY_PROTOCOL,
        protocol: protocol::ANY,
        port: 0,
        told: Told::default(),
    };
    let has_rest = prefixes.iter().any(|prefix| prefix.length == rest.length);
    let rest = (!has_rest).then_some(rest);
    rest.into_iter().chain(prefixes.iter().copied()).collect()
}

/// Prefixes by class.
type ListVerdicts = Vec<(u32, Rc<[Prefix]>)>;

/// The network of one address.
fn single(address: &IpAddr) -> IpNet {
    IpNet::from(address.to_canonical())
}

/// An address as the maps have it.
fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => ipv4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

// === impl Classes ===

impl Classes {
    fn number(&self, pair: Pair) -> u32 {
        self.numbers.get(&pair).copied().unwrap_or_default()
    }
}

// === impl Sides ===

impl Sides {
    fn add(&mut self, set: SetId, class: u32, sets: &Sets) {
        let classes = self.classes.entry(set).or_default();
        if classes.is_empty() {
            for selector in sets.get(set) {
                self.sets.entry(*selector).or_default().push(set);
            }
        }
        classes.push(class);
    }
}
