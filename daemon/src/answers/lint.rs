//! What is not wrong in policies, and probably not meant.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use reeve_common::{Direction, WorkloadId, protocol};
use serde::Serialize;

use super::{Enquiry, Offline, Verdict, explain};
use crate::{
    policy::{Effect, FarEnd, Mode, PortMatch, Ports, Rule, Snapshot},
    workload::Workload,
};

/// Port of the domain name system.
const DNS: u16 = 53;
/// Stands for any port of a workload that declares none.
const ANY_PORT: u16 = 8080;
/// Names in one line.
const MOST_NAMES: usize = 5;

/// One finding. Fields of its JSON are never renamed, only added to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// File and line.
    pub at: String,
    /// Which kind.
    pub kind: FindingKind,
    /// What it is, and what to do.
    pub what: String,
}

/// The kinds of findings: a closed set, never renamed, only added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A policy or rule, or a part of one, that matches nothing that is declared.
    MatchesNothing,
    /// A rule that another rule covers whole: one that allows as much, or one that denies it.
    Shadowed,
    /// A workload that may call somebody, and may not resolve names.
    BlocksDns,
    /// A workload that policies are for, and that nobody who is declared can reach.
    Unreachable,
    /// Egress that the destination's ingress refuses, or ingress that the source's egress refuses, both on
    /// this node.
    OneSided,
    /// A rule that means everybody, since nothing is written where its far ends would be.
    Emptied,
    /// A rule for a port that none of its workloads declares.
    OtherPort,
}

/// What a rule is for, to be compared with others.
struct Scope<'a> {
    rule: &'a Rule,
    workloads: BTreeSet<WorkloadId>,
}

/// Everything that is found, in the order of files and lines.
#[must_use]
pub fn lint(offline: &Offline) -> Vec<Finding> {
    let snapshot = &offline.snapshot;
    let with = |effect| -> Vec<Scope<'_>> {
        snapshot
            .rules_of_policies()
            .filter(|rule| rule.origin.line > 0)
            .filter(|rule| rule.effect == effect && rule.mode == Mode::Enforce)
            .map(|rule| Scope::new(rule, snapshot))
            .filter(|scope| !scope.workloads.is_empty())
            .collect()
    };
    let (scopes, denials) = (with(Effect::Allow), with(Effect::Deny));
    let mut findings: Vec<_> = matches_nothing(offline).collect();
    findings.extend(shadowed(&scopes));
    findings.extend(overruled(&scopes, &denials));
    findings.extend(emptied(offline));
    findings.extend(other_port(snapshot, &scopes));
    findings.extend(blocks_dns(offline, &scopes));
    findings.extend(unreachable(snapshot, &scopes));
    findings.extend(one_sided(offline, &scopes));
    findings.sort();
    findings.dedup();
    findings
}

fn matches_nothing(offline: &Offline) -> impl Iterator<Item = Finding> {
    offline.policies.warnings().iter().map(|warning| {
        let line = warning.place.map_or(0, |(line, _)| line);
        Finding {
            at: format!("{}:{line}", warning.file.display()),
            kind: FindingKind::MatchesNothing,
            what: format!(
                "{}: {}; correct it, or remove it",
                warning.field, warning.what
            ),
        }
    })
}

fn emptied(offline: &Offline) -> impl Iterator<Item = Finding> {
    offline.policies.emptied_rules().iter().map(|rule| {
        let line = rule.place.map_or(0, |(line, _)| line);
        Finding {
            at: format!("{}:{line}", rule.file.display()),
            kind: FindingKind::Emptied,
            what: format!("{}: {}", rule.field, rule.what),
        }
    })
}

fn shadowed(scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (place, scope) in scopes.iter().enumerate() {
        // Of two that are the same, the later one is too much.
        let wider = scopes.iter().enumerate().find(|(other, wider)| {
            *other != place && wider.covers(scope) && (*other < place || !scope.covers(wider))
        });
        if let Some((_, wider)) = wider {
            findings.push(scope.finding(
                FindingKind::Shadowed,
                format!(
                    "{} allows nothing that {}{} does not allow already; remove one of them",
                    scope.rule.origin.name,
                    wider.rule.origin.name,
                    wider.place()
                ),
            ));
        }
    }
    findings
}

/// A denial goes before every allowance.
fn overruled(scopes: &[Scope<'_>], denials: &[Scope<'_>]) -> Vec<Finding> {
    scopes
        .iter()
        .filter_map(|scope| {
            let denial = denials.iter().find(|denial| denial.covers(scope))?;
            Some(scope.finding(
                FindingKind::Shadowed,
                format!(
                    "{} allows nothing: {}{} denies all of it; remove one of them",
                    scope.rule.origin.name,
                    denial.rule.origin.name,
                    denial.place()
                ),
            ))
        })
        .collect()
}

/// Names are asked for over UDP, and over TCP where the answer is long (RFC 7766).
fn blocks_dns(offline: &Offline, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut affected: BTreeMap<(String, &str), Vec<&str>> = BTreeMap::new();
    for running in offline.snapshot.workloads() {
        let workload = &running.workload;
        let egress: Vec<_> = scopes
            .iter()
            .filter(|scope| scope.is_for(workload.id, Direction::Egress))
            .collect();
        let resolves = |protocol| {
            let mut ports = egress.iter().flat_map(|scope| &scope.rule.ports);
            ports.any(|ports| ports.matches(protocol, DNS))
        };
        let missing = match (resolves(protocol::UDP), resolves(protocol::TCP)) {
            (false, false) => "no names: no rule lets them out to UDP or TCP",
            (false, true) => "no names: no rule lets them out to UDP",
            (true, false) => "no names with long answers: no rule lets them out to TCP",
            (true, true) => continue,
        };
        let at = match egress.first() {
            Some(first) => first.at(),
            // A policy that allows nothing closes names, too.
            None => match isolating(offline, workload) {
                Some(at) => at,
                None => continue,
            },
        };
        let names = affected.entry((at, missing)).or_default();
        names.push(&workload.name);
    }
    affected
        .into_iter()
        .map(|((at, missing), names)| Finding {
            at,
            kind: FindingKind::BlocksDns,
            what: format!(
                "policies are about what {} may call, who resolve {missing} port {DNS}; allow UDP and TCP \
                 port {DNS} to the resolver, or ignore this where addresses are all that is used",
                some(&names)
            ),
        })
        .collect()
}

/// Where the first `NetworkPolicy` stands that closes what a workload sends.
fn isolating(offline: &Offline, workload: &Workload) -> Option<String> {
    let policies = &offline.policies;
    let isolation = policies.isolations.iter().find(|isolation| {
        isolation.egress
            && isolation.mode == Mode::Enforce
            && offline.snapshot.is_for(&isolation.subjects, workload)
    })?;
    let mut heads = policies.heads.iter();
    let head = heads.find(|head| Arc::ptr_eq(&head.subjects, &isolation.subjects))?;
    Some(format!("{}:{}", head.file.display(), head.line))
}

fn unreachable(snapshot: &Snapshot, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut affected: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for running in snapshot.workloads() {
        let workload = &running.workload;
        let ingress: Vec<_> = scopes
            .iter()
            .filter(|scope| scope.is_for(workload.id, Direction::Ingress))
            .collect();
        let anybody = |far_end: &FarEnd| {
            let others = snapshot.peers().filter(|peer| peer.id != workload.id);
            !far_end.needs_identity()
                || others
                    .into_iter()
                    .any(|peer| snapshot.fits_peer(far_end, peer, workload))
        };
        let reached = ingress
            .iter()
            .any(|scope| scope.rule.far_ends.iter().any(anybody));
        if let Some(first) = ingress.first().filter(|_| !reached) {
            affected.entry(first.at()).or_default().push(&workload.name);
        }
    }
    affected
        .into_iter()
        .map(|(at, names)| Finding {
            at,
            kind: FindingKind::Unreachable,
            what: format!(
                "nobody who is declared can reach {}: the ingress rules fit no peer and no other workload; \
                 declare who shall reach them as a peer, or correct `from`",
                some(&names)
            ),
        })
        .collect()
}

/// A port that none of the workloads has which a rule is for, where all of them say which they have: a
/// policy names the port of the workload, and not the one of a Service before it.
fn other_port(snapshot: &Snapshot, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for scope in scopes
        .iter()
        .filter(|scope| scope.rule.direction == Direction::Ingress)
    {
        let workloads = snapshot.workloads().map(|running| &running.workload);
        let workloads: Vec<_> = workloads
            .filter(|workload| scope.workloads.contains(&workload.id))
            .collect();
        let ports = |workload: &Workload| -> BTreeSet<u16> {
            let named = workload.named_ports.values().map(|port| port.port);
            workload.ports.iter().copied().chain(named).collect()
        };
        let known: Vec<_> = workloads.iter().map(|workload| ports(workload)).collect();
        if known.iter().any(BTreeSet::is_empty) {
            continue;
        }
        let there: BTreeSet<u16> = known.into_iter().flatten().collect();
        for port in &scope.rule.ports {
            let PortMatch::Ports(_, range) = port else {
                continue;
            };
            if there.range(range.clone()).next().is_some() {
                continue;
            }
            let names: Vec<_> = workloads.iter().map(|it| it.name.as_str()).collect();
            let there: Vec<_> = there.iter().map(ToString::to_string).collect();
            findings.push(scope.finding(
                FindingKind::OtherPort,
                format!(
                    "{} is about {}, and {} declares {} only; name the port of the workload, not the one of a \
                     Service before it",
                    scope.rule.origin.name,
                    Ports(port),
                    some(&names),
                    there.join(", ")
                ),
            ));
        }
    }
    findings
}

/// A port for which a rule can be asked, of a destination: the first of those that the rule names, or
/// one that the destination has.
fn asked(ports: &PortMatch, to: &Workload) -> Option<(u8, u16)> {
    let own = || {
        let named = to.named_ports.values().map(|port| port.port);
        to.ports
            .iter()
            .copied()
            .chain(named)
            .next()
            .unwrap_or(ANY_PORT)
    };
    match ports {
        PortMatch::Ports(protocol, range) => Some((*protocol, *range.start())),
        PortMatch::Everything => Some((protocol::TCP, own())),
        PortMatch::Protocol(protocol) if *protocol == protocol::TCP => Some((*protocol, own())),
        PortMatch::Protocol(_) | PortMatch::Named(..) => None,
    }
}

/// Asks for one port of each rule between each two workloads of this node: what one end lets pass and the
/// other does not.
fn one_sided(offline: &Offline, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for scope in scopes {
        let mut refused: BTreeMap<(u8, u16), Vec<String>> = BTreeMap::new();
        let all = || {
            offline
                .snapshot
                .workloads()
                .map(|running| &running.workload)
        };
        for subject in all().filter(|subject| scope.workloads.contains(&subject.id)) {
            for other in all().filter(|other| other.id != subject.id) {
                if !scope.names(offline, other, subject) {
                    continue;
                }
                let (from, to) = match scope.rule.direction {
                    Direction::Egress => (subject, other),
                    Direction::Ingress => (other, subject),
                };
                for port in scope.rule.ports.iter().filter_map(|ports| asked(ports, to)) {
                    if is_one_sided(offline, scope.rule.direction, from, to, port) {
                        let pair = format!("{} to {}", from.name, to.name);
                        refused.entry(port).or_default().push(pair);
                    }
                }
            }
        }
        for ((_, port), pairs) in refused {
            let pairs: Vec<_> = pairs.iter().map(String::as_str).collect();
            let (name, pairs) = (&scope.rule.origin.name, some(&pairs));
            let what = match scope.rule.direction {
                Direction::Egress => format!(
                    "{name} lets {pairs} call port {port}, and no ingress of the destination lets it in; add \
                     one, or remove this"
                ),
                Direction::Ingress => format!(
                    "{name} lets {pairs} in on port {port}, and no egress of the source lets it out; add one, \
                     or remove this"
                ),
            };
            findings.push(scope.finding(FindingKind::OneSided, what));
        }
    }
    findings
}

/// Whether the end in whose direction a rule is lets a connection pass, and the other does not.
fn is_one_sided(
    offline: &Offline,
    direction: Direction,
    from: &Workload,
    to: &Workload,
    (protocol, port): (u8, u16),
) -> bool {
    let enquiry = Enquiry {
        from: from.name.clone(),
        to: to.name.clone(),
        port,
        protocol,
        plaintext: false,
        dry_run: false,
    };
    let Ok(explanation) = explain(&offline.snapshot, offline.config.ports, &enquiry, None) else {
        return false;
    };
    let verdicts: Vec<_> = explanation.halves.iter().map(|half| half.verdict).collect();
    match direction {
        Direction::Egress => verdicts == [Verdict::Allow, Verdict::Deny],
        Direction::Ingress => verdicts == [Verdict::Deny, Verdict::Allow],
    }
}

/// Some names, for a line.
fn some(names: &[&str]) -> String {
    match names {
        [] => "nobody".to_owned(),
        _ if names.len() <= MOST_NAMES => names.join(", "),
        _ => {
            let first = names.get(..MOST_NAMES).unwrap_or_default().join(", ");
            format!("{first} and {} more", names.len() - MOST_NAMES)
        }
    }
}

// === impl Scope ===

impl<'a> Scope<'a> {
    fn new(rule: &'a Rule, snapshot: &Snapshot) -> Self {
        let workloads = snapshot
            .workloads()
            .filter(|running| snapshot.is_for(&rule.subjects, &running.workload))
            .map(|running| running.workload.id)
            .collect();
        Self { rule, workloads }
    }

    fn is_for(&self, workload: WorkloadId, direction: Direction) -> bool {
        self.rule.direction == direction && self.workloads.contains(&workload)
    }

    fn place(&self) -> String {
        let place = self.rule.origin.place();
        place.map_or_else(String::new, |place| format!(" ({place})"))
    }

    /// File and line.
    fn at(&self) -> String {
        let place = self.rule.origin.place();
        place.map_or_else(String::new, |place| place.to_string())
    }

    fn finding(&self, kind: FindingKind, what: String) -> Finding {
        Finding {
            at: self.at(),
            kind,
            what,
        }
    }

    /// Whether the rule names a workload as a far end of another, by what it is.
    fn names(&self, offline: &Offline, other: &Workload, subject: &Workload) -> bool {
        let snapshot = &offline.snapshot;
        let peer = snapshot.peer(other.id);
        self.rule.far_ends.iter().any(|far_end| {
            far_end.needs_identity()
                && peer.is_some_and(|peer| snapshot.fits_peer(far_end, peer, subject))
        })
    }

    /// Whether it says all that another rule says.
    fn covers(&self, other: &Self) -> bool {
        let far_end = |narrow: &FarEnd| self.rule.far_ends.iter().any(|wide| holds(wide, narrow));
        let ports = |narrow: &PortMatch| self.rule.ports.iter().any(|wide| spans(wide, narrow));
        self.rule.direction == other.rule.direction
            && self.workloads.is_superset(&other.workloads)
            && other.rule.far_ends.iter().all(far_end)
            && other.rule.ports.iter().all(ports)
    }
}

/// Whether everybody whom `narrow` means is meant by `wide`, whoever there may be.
fn holds(wide: &FarEnd, narrow: &FarEnd) -> bool {
    match (wide, narrow) {
        (FarEnd::Anybody, _) => true,
        (FarEnd::Both(one, other), narrow) => holds(one, narrow) && holds(other, narrow),
        (wide, FarEnd::Both(one, other)) => holds(wide, one) || holds(wide, other),
        (FarEnd::IdentityPrefix(prefix), FarEnd::Identity(id)) => {
            id.as_str().starts_with(prefix.as_str())
        }
        (FarEnd::IdentityPrefix(wide), FarEnd::IdentityPrefix(narrow)) => {
            narrow.as_str().starts_with(wide.as_str())
        }
        (
            FarEnd::Cidr { block, except },
            FarEnd::Cidr {
                block: inner,
                except: holes,
            },
        ) => {
            let apart = |hole: &ipnet::IpNet| {
                let overlap = hole.contains(inner) || inner.contains(hole);
                !overlap || holes.iter().any(|own| own.contains(hole))
            };
            block.contains(inner) && except.iter().all(apart)
        }
        (wide, narrow) => wide == narrow,
    }
}

/// Whether all ports of `narrow` are among those of `wide`.
fn spans(wide: &PortMatch, narrow: &PortMatch) -> bool {
    match (wide, narrow) {
        (PortMatch::Everything, _) => true,
        (
            PortMatch::Protocol(wide),
            PortMatch::Protocol(narrow) | PortMatch::Ports(narrow, _) | PortMatch::Named(narrow, _),
        ) => wide == narrow,
        (PortMatch::Ports(a, wide), PortMatch::Ports(b, narrow)) => {
            a == b && wide.start() <= narrow.start() && narrow.end() <= wide.end()
        }
        (wide, narrow) => wide == narrow,
    }
}

// === impl FindingKind ===

impl FindingKind {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MatchesNothing => "matches_nothing",
            Self::Shadowed => "shadowed",
            Self::BlocksDns => "blocks_dns",
            Self::Unreachable => "unreachable",
            Self::OneSided => "one_sided",
            Self::Emptied => "emptied",
            Self::OtherPort => "other_port",
        }
    }
}
