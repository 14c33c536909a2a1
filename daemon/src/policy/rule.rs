//! The one form that every kind of policy document is brought into.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, path::Path, sync::Arc};

use ipnet::IpNet;
use reeve_common::{Direction, protocol};

use super::{
    RulePlace,
    selector::{AttributeSelector, IdentityPrefix},
};
use crate::{
    identity::SpiffeId,
    workload::{Namespaces, Workload},
};

/// One rule: what becomes of connections of these workloads, in this direction, with these far
/// ends, on these ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Where it is written.
    pub(crate) origin: Origin,
    /// Whom it is for. Shared by the rules of a policy.
    pub(crate) subjects: Arc<Subjects>,
    /// Which end of the connection these workloads are.
    pub(crate) direction: Direction,
    /// Who may be at the other end: any of these.
    pub(crate) far_ends: Vec<FarEnd>,
    /// On which ports of the destination: any of these.
    pub(crate) ports: Vec<PortMatch>,
    /// What becomes of them.
    pub(crate) effect: Effect,
    /// Whether it is in force.
    pub(crate) mode: Mode,
}

/// What a rule does. Of several rules that fit, the first of these that any of them has holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Effect {
    /// Refuses everything, since the kernel's maps have no room for what the policies say.
    NoRoom,
    /// Lets the node's own agent in, whatever the policies say.
    Node,
    /// Refuses.
    Deny,
    /// Lets pass.
    Allow,
    /// Lets plaintext in that nothing else allows.
    Permissive,
}

/// Whether a rule is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// It is.
    Enforce,
    /// It is not; what it would change is reported.
    DryRun,
    /// It is, and would not be if the policies in dry run were.
    NotInDryRun,
}

/// That a policy is for some workloads, whatever its rules: what it is about is closed to all
/// that no rule allows, also where [`Unselected::Allow`] leaves the rest open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Isolation {
    /// Whom the policy is for.
    pub(crate) subjects: Arc<Subjects>,
    /// Whether it is about what comes in.
    pub(crate) ingress: bool,
    /// Whether it is about what goes out.
    pub(crate) egress: bool,
    /// Whether it is in force.
    pub(crate) mode: Mode,
}

/// What a workload may do in a direction that no policy is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unselected {
    /// Nothing: reeve's default deny.
    #[default]
    Deny,
    /// Everything, as in Kubernetes.
    Allow,
}

/// Where a rule is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// `policy/rule`, unique, as in `shop/cart/egress[0]`.
    pub(crate) name: String,
    /// The file.
    pub(crate) file: Arc<Path>,
    /// Line in the file, from 1.
    pub(crate) line: usize,
}

/// Which workloads a policy is for: those that fit everything that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subjects {
    /// By what they are.
    pub(crate) attributes: AttributeSelector,
    /// By name, where any is given.
    pub(crate) names: BTreeSet<String>,
}

/// Who may be at the other end. Its text is its identity: equal texts select the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FarEnd {
    /// Anybody, authenticated or not.
    Anybody,
    /// The workload with this SPIFFE ID.
    Identity(SpiffeId),
    /// The workloads whose SPIFFE ID lies below.
    IdentityPrefix(IdentityPrefix),
    /// The workloads of this kind.
    Attributes(AttributeSelector),
    /// Whoever has an address in the block and in none of the exceptions.
    Cidr {
        /// The block.
        block: IpNet,
        /// What is left out. Each is smaller than the block and lies in it; sorted.
        except: Vec<IpNet>,
    },
    /// Whoever both mean.
    Both(Box<FarEnd>, Box<FarEnd>),
}

/// Ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PortMatch {
    /// Every protocol, every port.
    Everything,
    /// Every port of a protocol; the protocol may be one without ports.
    Protocol(u8),
    /// Some ports of a protocol.
    Ports(u8, RangeInclusive<u16>),
    /// The port of a protocol that has a name at the destination, which each resolves for itself.
    Named(u8, String),
}

// === impl Origin ===

impl Origin {
    /// File and line, for people; none for what no file says.
    pub(crate) fn place(&self) -> Option<RulePlace<'_>> {
        (self.line > 0).then(|| RulePlace {
            file: &self.file,
            line: self.line,
        })
    }
}

// === impl Rule ===

impl Rule {
    /// Whether it lets anything pass, and is in force.
    pub(crate) fn allows(&self) -> bool {
        self.mode != Mode::DryRun && matches!(self.effect, Effect::Node | Effect::Allow)
    }
}

// === impl Subjects ===

impl Subjects {
    /// Whether a workload is meant.
    pub(crate) fn matches(&self, workload: &Workload, namespaces: &Namespaces) -> bool {
        let attributes = &workload.attributes;
        (self.names.is_empty() || self.names.contains(&workload.name))
            && self
                .attributes
                .matches(attributes, &workload.named_ports, namespaces)
    }
}

// === impl FarEnd ===

impl FarEnd {
    /// Whether the far end is told by its identity, which TCP has to prove.
    pub(crate) fn needs_identity(&self) -> bool {
        match self {
            Self::Identity(_) | Self::IdentityPrefix(_) | Self::Attributes(_) => true,
            Self::Anybody | Self::Cidr { .. } => false,
            Self::Both(one, other) => one.needs_identity() && other.needs_identity(),
        }
    }
}

impl fmt::Display for FarEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anybody => f.write_str("anybody"),
            Self::Identity(id) => write!(f, "identity {id}"),
            Self::IdentityPrefix(prefix) => write!(f, "identities below {prefix}"),
            Self::Attributes(selector) => write!(f, "{selector}"),
            Self::Cidr { block, except } => {
                write!(f, "cidr {block}")?;
                for block in except {
                    write!(f, " except {block}")?;
                }
                Ok(())
            }
            Self::Both(one, other) => write!(f, "{one} and {other}"),
        }
    }
}

// === impl PortMatch ===

impl PortMatch {
    /// Whether a connection to this port is meant. Both ICMPs are [`protocol::ICMP`].
    pub(crate) fn matches(&self, protocol: u8, port: u16) -> bool {
        match self {
            Self::Everything => true,
            Self::Protocol(number) => *number == protocol,
            Self::Ports(number, ports) => *number == protocol && ports.contains(&port),
            // The compiler put numbers in place of all names that mean something.
            Self::Named(..) => false,
        }
    }
}

/// The number under which verdicts of a protocol are asked.
pub(crate) fn judged_protocol(number: u8) -> u8 {
    if number == protocol::ICMPV6 {
        protocol::ICMP
    } else {
        number
    }
}
