//! Why no rule allowed a connection: the rules that came nearest, and what of each did not fit.
//!
//! For people only. The verdict itself never comes from here; a test holds the two together.

use std::{collections::HashSet, fmt, net::IpAddr};

use reeve_common::{Direction, WorkloadId, protocol};

use super::{
    Decision, RulePlace, Snapshot, named_ports,
    rule::{FarEnd, PortMatch, Rule, Subjects},
    selector::NamespaceSelector,
};
use crate::{
    identity::SpiffeId,
    telemetry::ProtocolName,
    workload::{Attributes, NamedPorts, Peer, Workload},
};

/// A connection of a local workload, to be explained.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The workload.
    pub workload: WorkloadId,
    /// Which end it is.
    pub direction: Direction,
    /// Address of the far end.
    pub address: IpAddr,
    /// The client's identity, where the connection comes through a tunnel.
    pub client: Option<&'a SpiffeId>,
    /// IP protocol number.
    pub protocol: u8,
    /// Port of the destination.
    pub port: u16,
}

/// A rule that does not allow a connection, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Near<'a> {
    /// `policy/rule`.
    pub rule: &'a str,
    /// Where it is written.
    pub place: Option<RulePlace<'a>>,
    /// What does not fit; empty where all of it does.
    pub misfits: Vec<Misfit>,
}

/// What of a rule does not fit, with a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// Which part.
    pub part: Part,
    /// What it asks for, and what there is.
    pub why: String,
}

/// A part of a rule, the easiest to correct first.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "camelCase")]
pub enum Part {
    /// It allows an identity, and the connection comes without one that is proven.
    Proof,
    /// It is about other ports.
    Port,
    /// It is about other protocols.
    Protocol,
    /// It is for other workloads.
    Subject,
    /// It is about other far ends.
    FarEnd,
}

/// What is known of a far end.
struct Known<'a> {
    address: IpAddr,
    /// Who is declared there.
    attributes: Option<&'a Attributes>,
    /// Names of its ports.
    ports: &'a NamedPorts,
    /// Who it proves to be.
    client: Option<&'a SpiffeId>,
    /// Name for people.
    name: String,
}

/// Nobody's.
static NO_PORTS: NamedPorts = NamedPorts::new();

/// Parts that do not fit, at most, for a rule to be near: of three, one has to.
const MOST_MISFITS: usize = 2;

impl Snapshot {
    /// Judges the connection as the kernel or the tunnel does.
    #[must_use]
    pub fn judge(&self, question: &Question<'_>) -> Decision {
        let Question {
            workload,
            address,
            protocol,
            port,
            ..
        } = *question;
        match (question.direction, question.client) {
            (Direction::Egress, _) => self.judge_egress(workload, (address, port).into(), protocol),
            (Direction::Ingress, Some(client)) => {
                self.judge_ingress(workload, client, address, protocol, port)
            }
            (Direction::Ingress, None) => self.judge_plaintext(workload, address, protocol, port),
        }
    }

    /// The rules that came nearest to allowing a connection, at most `most` of them.
    #[must_use]
    pub fn nearest(&self, question: &Question<'_>, most: usize) -> Vec<Near<'_>> {
        let mut near = self.measured(question);
        near.retain(|near| (1..=MOST_MISFITS).contains(&near.misfits.len()));
        // Rules keep their order where they are equally near.
        near.sort_by_key(|near| {
            let parts: Vec<_> = near
                .misfits
                .iter()
                .map(|misfit| misfit.part)
                .rev()
                .collect();
            (near.misfits.len(), parts)
        });
        // What named ports made several of is one to people.
        let mut seen = HashSet::new();
        near.retain(|near| seen.insert(near.rule));
        near.truncate(most);
        near
    }

    /// Every rule of the direction that allows, with what does not fit.
    pub(super) fn measured(&self, question: &Question<'_>) -> Vec<Near<'_>> {
        let Some(running) = self.workload(question.workload) else {
            return Vec::new();
        };
        let known = self.far_end(question);
        self.rules_of_policies()
            .filter(|rule| rule.direction == question.direction && rule.allows())
            .map(|rule| self.near(rule, question, &running.workload, &known))
            .collect()
    }

    fn near<'a>(
        &'a self,
        rule: &'a Rule,
        question: &Question<'_>,
        workload: &Workload,
        known: &Known<'_>,
    ) -> Near<'a> {
        let mut misfits = Vec::new();
        let mut misfit = |part, why| misfits.push(Misfit { part, why });
        let needs_proof = question.direction == Direction::Ingress
            && question.protocol == protocol::TCP
            && known.client.is_none();
        let fitting = rule
            .far_ends
            .iter()
            .filter(|far_end| self.fits(far_end, known, workload));
        match fitting.map(FarEnd::needs_identity).min() {
            None => misfit(
                Part::FarEnd,
                format!(
                    "is about {}; the {} is {}",
                    list(rule.far_ends.iter()),
                    match question.direction {
                        Direction::Egress => "destination",
                        Direction::Ingress => "source",
                    },
                    known.name
                ),
            ),
            Some(true) if needs_proof => misfit(
                Part::Proof,
                "asks for an identity that is proven through a tunnel; this is plaintext".into(),
            ),
            Some(_) => {}
        }
        let (number, port) = super::snapshot::judged(question.protocol, question.port);
        let ports: Vec<_> = rule
            .ports
            .iter()
            .map(|ports| PortHere::new(ports, workload))
            .collect();
        if !ports.iter().any(|ports| ports.matches(number, port)) {
            let same_protocol = rule.ports.iter().any(|ports| protocol_of(ports) == number);
            let part = if same_protocol {
                Part::Port
            } else {
                Part::Protocol
            };
            misfit(
                part,
                format!(
                    "is about {}; this is {} {}",
                    list(ports.iter()),
                    ProtocolName(number),
                    question.port
                ),
            );
        }
        if !self.is_for(&rule.subjects, workload) {
            misfit(
                Part::Subject,
                format!(
                    "is for workloads with {}; {} is {}",
                    Written(&rule.subjects),
                    workload.name,
                    WrittenAttributes(&workload.attributes)
                ),
            );
        }
        misfits.sort_by_key(|misfit| misfit.part);
        Near {
            rule: &rule.origin.name,
            place: rule.origin.place(),
            misfits,
        }
    }

    /// What is known of the far end of a connection.
    fn far_end<'a>(&'a self, question: &Question<'a>) -> Known<'a> {
        let declared = match (question.direction, question.client) {
            (Direction::Egress, _) => {
                self.peer_at(question.address, question.protocol, question.port)
            }
            (Direction::Ingress, Some(client)) => self.peers_at(question.address).find(|peer| {
                let attributes = peer.attributes.as_ref();
                attributes.is_some_and(|attributes| attributes.spiffe_id == *client)
            }),
            (Direction::Ingress, None) => self.peers_at(question.address).next(),
        };
        let attributes = declared.and_then(|peer| peer.attributes.as_ref());
        let no_ports = &NO_PORTS;
        let mut name = match (declared, question.client) {
            (Some(peer), _) => peer.name.clone(),
            (None, Some(client)) => client.to_string(),
            (None, None) => question.address.to_string(),
        };
        if let Some(attributes) = attributes {
            name.push_str(&format!(" ({})", WrittenAttributes(attributes)));
        }
        Known {
            address: question.address,
            attributes,
            ports: declared.map_or(no_ports, |peer| &peer.named_ports),
            client: question.client,
            name,
        }
    }

    /// Whether a far end means somebody who is declared, for a rule of a workload.
    pub(crate) fn fits_peer(&self, far_end: &FarEnd, peer: &Peer, workload: &Workload) -> bool {
        let address = peer.addresses.first().map(ipnet::IpNet::addr);
        let known = Known {
            address: address.unwrap_or(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)),
            attributes: peer.attributes.as_ref(),
            ports: &peer.named_ports,
            client: None,
            name: String::new(),
        };
        self.fits(far_end, &known, workload)
    }

    fn fits(&self, far_end: &FarEnd, known: &Known<'_>, workload: &Workload) -> bool {
        let declared = known.attributes.map(|attributes| &attributes.spiffe_id);
        let id = known.client.or(declared);
        match far_end {
            FarEnd::Anybody => true,
            FarEnd::Cidr { block, except } => {
                let contains = |block: &ipnet::IpNet| block.contains(&known.address.to_canonical());
                contains(block) && !except.iter().any(contains)
            }
            FarEnd::Identity(wanted) => id == Some(wanted),
            FarEnd::IdentityPrefix(prefix) => id.is_some_and(|id| prefix.contains(id)),
            FarEnd::Attributes(selector) => match (known.attributes, known.client) {
                (Some(attributes), _) => {
                    selector.matches(attributes, known.ports, self.namespaces())
                }
                // As `identities` has it of those whom nobody declared.
                (None, Some(client)) => {
                    let names = client.service_account();
                    let own = workload.attributes.spiffe_id.trust_domain();
                    let every = selector.namespace == NamespaceSelector::Any
                        && selector.service_account.is_none();
                    let same = |(namespace, account): (&str, &str)| {
                        selector.namespace.matches(namespace, self.namespaces())
                            && selector.matches_account(account)
                    };
                    client.trust_domain() == own
                        && selector.labels.is_empty()
                        && selector.port.is_none()
                        && (every || names.is_some_and(same))
                }
                (None, None) => false,
            },
            FarEnd::Both(one, other) => {
                self.fits(one, known, workload) && self.fits(other, known, workload)
            }
        }
    }

    /// Whether a policy is for a workload.
    pub(crate) fn is_for(&self, subjects: &Subjects, workload: &Workload) -> bool {
        subjects.matches(workload, self.namespaces())
    }
}

fn protocol_of(ports: &PortMatch) -> u8 {
    match ports {
        PortMatch::Everything => protocol::ANY,
        PortMatch::Protocol(number) | PortMatch::Ports(number, _) | PortMatch::Named(number, _) => {
            *number
        }
    }
}

// === for people ===

fn list(items: impl Iterator<Item = impl fmt::Display>) -> String {
    let items: Vec<_> = items.map(|item| item.to_string()).collect();
    if items.is_empty() {
        return "nobody".to_owned();
    }
    items.join(", or ")
}

/// Ports of a rule.
pub(crate) struct Ports<'a>(pub(crate) &'a PortMatch);

impl fmt::Display for Ports<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            PortMatch::Everything => f.write_str("everything"),
            PortMatch::Protocol(number) => write!(f, "{}", ProtocolName(*number)),
            PortMatch::Ports(number, range) if range.start() == range.end() => {
                write!(f, "{} {}", ProtocolName(*number), range.start())
            }
            PortMatch::Named(number, name) => write!(f, "{} {name}", ProtocolName(*number)),
            PortMatch::Ports(number, range) => {
                let name = ProtocolName(*number);
                write!(f, "{name} {}-{}", range.start(), range.end())
            }
        }
    }
}

/// A port of a rule, with what its name stands for at the workload. For egress the compiler has put
/// numbers in place of the names.
struct PortHere<'a> {
    written: &'a PortMatch,
    here: Option<PortMatch>,
    workload: &'a str,
}

impl<'a> PortHere<'a> {
    fn new(written: &'a PortMatch, workload: &'a Workload) -> Self {
        Self {
            written,
            here: named_ports::at(written, &workload.named_ports),
            workload: &workload.name,
        }
    }

    fn matches(&self, protocol: u8, port: u16) -> bool {
        let here = self.here.as_ref();
        here.is_some_and(|here| here.matches(protocol, port))
    }
}

impl fmt::Display for PortHere<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Ports(self.written))?;
        match (self.written, &self.here) {
            (PortMatch::Named(..), Some(PortMatch::Ports(_, range))) => {
                write!(f, " ({} at {})", range.start(), self.workload)
            }
            (PortMatch::Named(..), _) => write!(f, " (no port of {})", self.workload),
            _ => Ok(()),
        }
    }
}

/// The workloads that a policy is for.
struct Written<'a>(&'a Subjects);

impl fmt::Display for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.names.iter().map(String::as_str).collect();
        if names.is_empty() {
            return write!(f, "{}", self.0.attributes);
        }
        write!(f, "name {}", names.join(" or "))?;
        if self.0.attributes != super::selector::AttributeSelector::default() {
            write!(f, ", {}", self.0.attributes)?;
        }
        Ok(())
    }
}

/// Who somebody is.
struct WrittenAttributes<'a>(&'a Attributes);

impl fmt::Display for WrittenAttributes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Attributes {
            namespace,
            service_account,
            labels,
            spiffe_id,
        } = self.0;
        write!(
            f,
            "{spiffe_id}, namespace {namespace}, service account {service_account}"
        )?;
        for (key, value) in labels {
            write!(f, ", {key}={value}")?;
        }
        Ok(())
    }
}
