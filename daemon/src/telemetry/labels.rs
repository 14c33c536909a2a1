//! What metrics are labelled with: closed sets, and names within a bound.

use std::{
    collections::{HashMap, HashSet},
    sync::{PoisonError, RwLock},
};

use reeve_common::Direction;

/// Label value for what is beyond the bound of [`NamePairs`].
pub const OTHER: &str = "other";

/// Label value for an end that reeve does not know by name.
pub const UNKNOWN: &str = "unknown";

/// How a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// As it is.
    Plaintext,
    /// Through a tunnel.
    Tunnel,
}

/// Which end of a TLS handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Opened the tunnel.
    Client,
    /// Accepted the tunnel.
    Server,
}

/// A bound beyond which newcomers are refused: a field of `limits` in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Open connections, in all.
    Connections,
    /// Open connections of one workload.
    ConnectionsPerWorkload,
    /// Open connections of one peer's identity.
    ConnectionsPerIdentity,
    /// TLS handshakes under way.
    Handshakes,
    /// TLS handshakes that one address began.
    HandshakesPerAddress,
    /// A workload's share of TLS handshakes towards peers: no field of its own in the configuration.
    HandshakesPerWorkload,
    /// Tunnels that peers opened, in all.
    Tunnels,
    /// Tunnels that one peer's identity opened.
    TunnelsPerIdentity,
    /// Proofs of tunnels under way: fixed, no field of the configuration.
    Proofs,
}

/// Labels of a connection; names of workloads or peers, bounded by the metrics themselves.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLabels<'a> {
    /// Seen from the local workload.
    pub direction: Direction,
    /// How it travels.
    pub transport: Transport,
    /// Name of the source workload or peer, `unknown` otherwise.
    pub source: &'a str,
    /// Name of the destination workload or peer, `unknown` otherwise.
    pub destination: &'a str,
}

/// Why a handshake failed, or that it did not: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeReason {
    /// It did not fail.
    Ok,
    /// No time was left.
    Timeout,
    /// The transport broke.
    Transport,
    /// Something that is not TLS 1.3 with ALPN `h2`, or a protocol error.
    Protocol,
    /// No certificate was presented.
    NoCertificate,
    /// There is no valid certificate of our own to present.
    NoOwnCertificate,
    /// The peer sent an alert about our certificate.
    PeerAlert,
    /// The peer has no valid certificate of the workload that was called.
    PeerNoCertificate,
    /// The certificate has expired or is not yet valid.
    Validity,
    /// The chain does not lead to the bundle of the ID's trust domain.
    UntrustedChain,
    /// The peer's trust domain has no bundle here.
    UnknownTrustDomain,
    /// The certificate breaks a rule of the X.509-SVID standard.
    InvalidSvid,
    /// The certificate is revoked, or its revocation status is unknown.
    Revoked,
    /// The certificate is valid and names another identity than expected.
    WrongIdentity,
    /// A limit was reached before it began.
    Limit,
}

/// The pairs of names, as of source and destination, that have series of their own.
///
/// A name reaches the metrics from configuration or, later, from a cluster in which pods come and
/// go for months; without a bound the series would grow for as long as the daemon lives.
#[derive(Debug)]
pub(super) struct NamePairs {
    limit: usize,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    count: usize,
    destinations: HashMap<Box<str>, HashSet<Box<str>>>,
}

// === names of the closed sets ===

impl Transport {
    /// Label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Tunnel => "tunnel",
        }
    }
}

impl Role {
    /// Label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

impl Limit {
    /// Every limit.
    pub const ALL: [Self; 9] = [
        Self::Connections,
        Self::ConnectionsPerWorkload,
        Self::ConnectionsPerIdentity,
        Self::Handshakes,
        Self::HandshakesPerAddress,
        Self::HandshakesPerWorkload,
        Self::Tunnels,
        Self::TunnelsPerIdentity,
        Self::Proofs,
    ];

    /// Label value, and the name of the field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ConnectionsPerWorkload => "connectionsPerWorkload",
            Self::ConnectionsPerIdentity => "connectionsPerIdentity",
            Self::Handshakes => "handshakes",
            Self::HandshakesPerAddress => "handshakesPerAddress",
            Self::HandshakesPerWorkload => "handshakesPerWorkload",
            Self::Tunnels => "tunnels",
            Self::TunnelsPerIdentity => "tunnelsPerIdentity",
            Self::Proofs => "proofs",
        }
    }
}

impl HandshakeReason {
    /// Label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Timeout => "timeout",
            Self::Transport => "transport",
            Self::Protocol => "protocol",
            Self::NoCertificate => "no_certificate",
            Self::NoOwnCertificate => "no_own_certificate",
            Self::PeerAlert => "peer_alert",
            Self::PeerNoCertificate => "peer_no_certificate",
            Self::Validity => "validity",
            Self::UntrustedChain => "untrusted_chain",
            Self::UnknownTrustDomain => "unknown_trust_domain",
            Self::InvalidSvid => "invalid_svid",
            Self::Revoked => "revoked",
            Self::WrongIdentity => "wrong_identity",
            Self::Limit => "limit",
        }
    }
}

/// Label value and log field of a direction.
#[must_use]
pub const fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "egress",
        Direction::Ingress => "ingress",
    }
}

// === impl NamePairs ===

impl NamePairs {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            known: RwLock::default(),
        }
    }

    /// The pair itself while it is within the bound, else `other` for both: one name alone
    /// would still make a series for each pod that ever was.
    pub(super) fn bounded<'a>(&self, source: &'a str, destination: &'a str) -> (&'a str, &'a str) {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if known.contains(source, destination) {
                return (source, destination);
            }
            if known.count >= self.limit {
                return (OTHER, OTHER);
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.contains(source, destination) {
            return (source, destination);
        }
        if known.count >= self.limit {
            return (OTHER, OTHER);
        }
        known.count += 1;
        known
            .destinations
            .entry(source.into())
            .or_default()
            .insert(destination.into());
        (source, destination)
    }
}

impl Known {
    fn contains(&self, source: &str, destination: &str) -> bool {
        self.destinations
            .get(source)
            .is_some_and(|names| names.contains(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beyond_the_limit_become_other() {
        let pairs = NamePairs::new(2);
        assert_eq!(pairs.bounded("web", "db"), ("web", "db"));
        assert_eq!(pairs.bounded("web", "cache"), ("web", "cache"));
        assert_eq!(pairs.bounded("web", "mail"), (OTHER, OTHER));
        assert_eq!(pairs.bounded("db", "web"), (OTHER, OTHER));
        assert_eq!(pairs.bounded("web", "db"), ("web", "db"));
    }
}
