//! What is not wrong in policies, and probably not meant.

use std::collections::BTreeSet;

use reeve_common::{Direction, WorkloadId, protocol};
use serde::Serialize;

use super::{Enquiry, Offline, Verdict, explain};
use crate::policy::{Effect, FarEnd, Mode, PortMatch, Rule, Snapshot};

/// Port of the domain name system.
const DNS: u16 = 53;

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
    /// Egress that the destination's ingress refuses, both on this node.
    OneSided,
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
    findings.extend(blocks_dns(snapshot, &scopes));
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
fn blocks_dns(snapshot: &Snapshot, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for running in snapshot.workloads() {
        let workload = &running.workload;
        let egress: Vec<_> = scopes
            .iter()
            .filter(|scope| scope.is_for(workload.id, Direction::Egress))
            .collect();
        let resolves = |protocol| {
            let mut ports = egress.iter().flat_map(|scope| &scope.rule.ports);
            ports.any(|ports| ports.matches(protocol, DNS))
        };
        let (first, missing) = match (
            egress.first(),
            resolves(protocol::UDP),
            resolves(protocol::TCP),
        ) {
            (Some(first), false, false) => (first, "no names: no rule lets it out to UDP or TCP"),
            (Some(first), false, true) => (first, "no names: no rule lets it out to UDP"),
            (Some(first), true, false) => (
                first,
                "no names with long answers: no rule lets it out to TCP",
            ),
            _ => continue,
        };
        findings.push(first.finding(
            FindingKind::BlocksDns,
            format!(
                "{} may call others, and resolve {missing} port {DNS}; allow UDP and TCP port \
                 {DNS} to the resolver, or ignore this where addresses are all that it uses",
                workload.name
            ),
        ));
    }
    findings
}

fn unreachable(snapshot: &Snapshot, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
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
            findings.push(first.finding(
                FindingKind::Unreachable,
                format!(
                    "nobody who is declared can reach {}: its ingress rules fit no peer and no \
                     other workload; declare who shall reach it as a peer, or correct `from`",
                    workload.name
                ),
            ));
        }
    }
    findings
}

/// Asks for the first port of each rule between each two workloads of this node.
fn one_sided(offline: &Offline, scopes: &[Scope<'_>]) -> Vec<Finding> {
    let snapshot = &offline.snapshot;
    let mut findings = Vec::new();
    for scope in scopes
        .iter()
        .filter(|scope| scope.rule.direction == Direction::Egress)
    {
        let asked = scope.rule.ports.iter().filter_map(|ports| match ports {
            PortMatch::Ports(protocol, range) => Some((*protocol, *range.start())),
            _ => None,
        });
        for (protocol, port) in asked {
            for (from, to) in snapshot.workloads().flat_map(|from| {
                let all = snapshot.workloads();
                all.map(move |to| (&from.workload, &to.workload))
            }) {
                let named = scope.rule.far_ends.iter().any(|far_end| {
                    let peer = snapshot.peer(to.id);
                    far_end.needs_identity()
                        && peer.is_some_and(|peer| snapshot.fits_peer(far_end, peer, from))
                });
                if !named || from.id == to.id || !scope.workloads.contains(&from.id) {
                    continue;
                }
                let enquiry = Enquiry {
                    from: from.name.clone(),
                    to: to.name.clone(),
                    port,
                    protocol,
                    plaintext: false,
                };
                let ports = offline.config.ports;
                let Ok(explanation) = explain(snapshot, ports, &enquiry, None) else {
                    continue;
                };
                let verdicts: Vec<_> = explanation.halves.iter().map(|half| half.verdict).collect();
                if verdicts == [Verdict::Allow, Verdict::Deny] {
                    findings.push(scope.finding(
                        FindingKind::OneSided,
                        format!(
                            "{} lets {} call {} on port {port}, and no ingress of {} lets it in; \
                             add one, or remove this",
                            scope.rule.origin.name, from.name, to.name, to.name
                        ),
                    ));
                }
            }
        }
    }
    findings
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

    fn finding(&self, kind: FindingKind, what: String) -> Finding {
        let place = self.rule.origin.place();
        Finding {
            at: place.map_or_else(String::new, |place| place.to_string()),
            kind,
            what,
        }
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
        }
    }
}
