//! What happens to connections, as `reeve observe` shows it: one value for each happening, and
//! the filter that chooses among them.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use ipnet::IpNet;
use reeve_common::{Direction, Reason, protocol};
use serde::{Deserialize, Serialize};

use super::{
    connections::{Connection, ConnectionId, known},
    labels::direction_name,
};
use crate::identity::SpiffeId;

/// One happening. Its JSON is one flat object whose fields are never renamed, only added to;
/// `docs/answers.md` describes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// When, on this node's clock; RFC 3339 in UTC with microseconds.
    #[serde(with = "rfc3339")]
    pub time: SystemTime,
    /// What.
    #[serde(flatten)]
    pub happening: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum Happening {
    /// The kernel let a connection go on. One that needs a tunnel stands only once it is
    /// [`Happening::Opened`].
    Allowed(Facts),
    /// A connection was refused, or could not be made.
    Refused(Facts),
    /// A connection in a tunnel stands, end to end.
    Opened(Facts),
    /// A connection that stood has ended.
    Closed(Facts),
    /// A tunnel was not proven again underneath its connections, which end with the certificates that
    /// proved it last unless another attempt succeeds.
    Unproven(Facts),
    /// A peer's tunnel to a workload here did not come to stand.
    HandshakeFailed(Facts),
    /// Something is missing here.
    Lost(Lost),
}

/// A word of a closed set: costs nothing where it is written, and is owned where it was read.
pub(super) type Word = Cow<'static, str>;

/// What is known of a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// `allow`, or `deny` for what was refused or could not be made.
    pub verdict: Word,
    /// `egress` or `ingress`, seen from the local workload.
    pub direction: Word,
    /// `tunnel` or `plaintext`.
    pub transport: Word,
    /// `tcp`, `udp`, `icmp`, `sctp`, or the number of another IP protocol.
    pub protocol: Word,
    /// Name of the source, `unknown` where it is neither a workload here nor a peer.
    pub source: String,
    /// Its SPIFFE ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_id: Option<SpiffeId>,
    /// Its address; port 0 where the kernel has not chosen one yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_address: Option<SocketAddr>,
    /// Name of the destination.
    pub destination: String,
    /// Its SPIFFE ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_id: Option<SpiffeId>,
    /// The address that the source asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_address: Option<SocketAddr>,
    /// Why: a name of the closed set of reasons.
    pub reason: Word,
    /// Of what was refused or could not be made: `policy` where reeve refuses it, here or at the far end,
    /// and `failure` where something does not work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Word>,
    /// The same on both nodes, of a connection through a tunnel between two reeves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<ConnectionId>,
    /// The rule that said so, as `policy/rule`.
    pub rule: String,
    /// File and line of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_at: Option<String>,
    /// What there is to say beyond the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What a connection carried, at its end.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub carried: Option<Carried>,
}

/// What a connection carried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Carried {
    /// Application bytes that the local workload sent.
    pub bytes_sent: u64,
    /// Application bytes that the local workload received.
    pub bytes_received: u64,
    /// How long the connection stood.
    pub duration_seconds: f64,
}

/// What is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    /// Where it was lost.
    #[serde(rename = "where")]
    pub place: LostIn,
    /// How many events; none where nobody counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<u64>,
}

/// Where events are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LostIn {
    /// The kernel's ring buffer was full (`maps.events`).
    Kernel,
    /// This observer did not read fast enough.
    Queue,
    /// They are older than what the daemon keeps (`admin.recentEvents`).
    Recent,
}

/// Chooses among happenings: of each kind of condition that is given, one has to fit. The default
/// chooses all. [`Happening::Lost`] is always chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Filter {
    /// The local workload.
    pub workloads: Vec<Who>,
    /// The far end.
    pub peers: Vec<Who>,
    /// `allow` or `deny`.
    pub verdicts: Vec<String>,
    /// `egress` or `ingress`.
    pub directions: Vec<String>,
    /// Ports of the destination.
    pub ports: Vec<u16>,
    /// Names of reasons.
    pub reasons: Vec<String>,
    /// `policy` or `failure`.
    pub causes: Vec<String>,
    /// Names or numbers of IP protocols.
    pub protocols: Vec<String>,
}

/// Somebody: by name, SPIFFE ID, address or network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Who {
    text: String,
    network: Option<IpNet>,
}

/// Name of an IP protocol, or its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolName(pub u8);

/// What kind of reason it is: whether reeve refuses the connection, or something does not work.
fn cause(reason: Reason) -> &'static str {
    match reason {
        Reason::NoPolicy
        | Reason::PolicyDeny
        | Reason::PlaintextRefused
        | Reason::UnknownWorkload
        | Reason::ReservedPort
        | Reason::Malformed
        | Reason::RawSocket
        | Reason::TunnelBypassed
        | Reason::PeerDenied
        | Reason::WrongAuthority
        | Reason::Revoked
        | Reason::SourceRouted
        | Reason::ForgedSource => "policy",
        _ => "failure",
    }
}

// === impl Facts ===

impl Facts {
    /// What is known, with what there is to say beyond the reason and what it carried.
    pub(super) fn new(
        connection: &Connection<'_>,
        allowed: bool,
        reason: Reason,
        error: Option<&dyn fmt::Display>,
        carried: Option<Carried>,
    ) -> Self {
        let labels = connection.labels;
        Self {
            verdict: if allowed { "allow" } else { "deny" }.into(),
            direction: direction_name(labels.direction).into(),
            transport: labels.transport.as_str().into(),
            protocol: ProtocolName(connection.protocol).into(),
            source: labels.source.to_owned(),
            source_id: connection.source_id.cloned(),
            source_address: known(connection.source_address),
            destination: labels.destination.to_owned(),
            destination_id: connection.destination_id.cloned(),
            destination_address: known(connection.destination_address),
            reason: reason.as_str().into(),
            cause: (!allowed).then(|| cause(reason).into()),
            connection: connection.id,
            rule: connection.rule.to_owned(),
            rule_at: connection.rule_place.map(|place| place.to_string()),
            error: error.map(ToString::to_string),
            carried,
        }
    }

    /// The local workload and the far end: name, identity, address.
    fn ends(&self) -> [(&str, Option<&SpiffeId>, Option<IpAddr>); 2] {
        let source = (
            self.source.as_str(),
            self.source_id.as_ref(),
            self.source_address.map(|address| address.ip()),
        );
        let destination = (
            self.destination.as_str(),
            self.destination_id.as_ref(),
            self.destination_address.map(|address| address.ip()),
        );
        if self.direction == direction_name(Direction::Ingress) {
            [destination, source]
        } else {
            [source, destination]
        }
    }
}

// === impl Happening ===

impl Happening {
    /// What is known of the connection; none where something is missing.
    #[must_use]
    pub fn facts(&self) -> Option<&Facts> {
        match self {
            Self::Allowed(facts)
            | Self::Refused(facts)
            | Self::Opened(facts)
            | Self::Closed(facts)
            | Self::Unproven(facts)
            | Self::HandshakeFailed(facts) => Some(facts),
            Self::Lost(_) => None,
        }
    }
}

// === impl Filter ===

impl Filter {
    /// Whether this is chosen.
    #[must_use]
    pub fn chooses(&self, observed: &Observed) -> bool {
        let Some(facts) = observed.happening.facts() else {
            return true;
        };
        let one_of = |wanted: &[String], is: &str| {
            wanted.is_empty() || wanted.iter().any(|wanted| wanted == is)
        };
        let [local, remote] = facts.ends();
        let fits = |wanted: &[Who], end| wanted.is_empty() || wanted.iter().any(|who| who.is(end));
        let port = facts
            .destination_address
            .map_or(0, |address| address.port());
        one_of(&self.verdicts, &facts.verdict)
            && one_of(&self.directions, &facts.direction)
            && one_of(&self.reasons, &facts.reason)
            && one_of(&self.causes, facts.cause.as_deref().unwrap_or_default())
            && one_of(&self.protocols, &facts.protocol)
            && (self.ports.is_empty() || self.ports.contains(&port))
            && fits(&self.workloads, local)
            && fits(&self.peers, remote)
    }
}

// === impl Who ===

impl Who {
    fn is(&self, (name, id, address): (&str, Option<&SpiffeId>, Option<IpAddr>)) -> bool {
        self.text == name
            || id.is_some_and(|id| id.as_str() == self.text)
            || matches!((self.network, address), (Some(network), Some(address)) if network.contains(&address))
    }
}

impl From<String> for Who {
    fn from(text: String) -> Self {
        let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
        let network = text.parse().ok().or_else(address);
        Self { text, network }
    }
}

impl From<Who> for String {
    fn from(who: Who) -> Self {
        who.text
    }
}

// === impl ProtocolName ===

impl ProtocolName {
    /// Reads a name in upper or lower case, or a number.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let number = match text.to_ascii_lowercase().as_str() {
            "tcp" => protocol::TCP,
            "udp" => protocol::UDP,
            "icmp" => protocol::ICMP,
            "sctp" => protocol::SCTP,
            other => other.parse().ok().filter(|number| *number != 0)?,
        };
        Some(Self(number))
    }
}

impl From<ProtocolName> for Word {
    fn from(protocol: ProtocolName) -> Self {
        match protocol.0 {
            protocol::TCP => "tcp".into(),
            protocol::UDP => "udp".into(),
            protocol::ICMP | protocol::ICMPV6 => "icmp".into(),
            protocol::SCTP => "sctp".into(),
            other => other.to_string().into(),
        }
    }
}

impl fmt::Display for ProtocolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Word::from(*self))
    }
}

/// Times as RFC 3339 has them.
mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_rfc3339_micros(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_rfc3339(&text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests;
