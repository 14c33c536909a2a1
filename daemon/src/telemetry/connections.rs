//! The connection log: one line for each connection that was refused or has ended, the same
//! fields for the kernel's and for the tunnel's. Who observes is told the same, and of those that
//! were allowed and came to stand.

use std::{
    collections::HashMap,
    fmt::{self, Display},
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use reeve_common::{Direction, DryRun, NO_WORKLOAD, Reason, WorkloadId, protocol};
use serde::{Deserialize, Serialize};

use super::{
    ConnectionLabels, HandshakeReason, Metrics,
    labels::{Role, UNKNOWN, direction_name},
    observed::{Carried, Facts, Happening, ProtocolName},
    observers::Observers,
};
use crate::{identity::SpiffeId, policy::RulePlace};

/// Lines that one workload may make for ever, of each kind: some 500 MB a day at worst.
const PER_SECOND: u32 = 10;
/// Seconds whose lines one workload may make at once.
const AT_ONCE: f64 = 10.0;
/// Workloads that are told apart; ids beyond share one allowance.
const MAX_WORKLOADS: usize = 4096;

/// What is known of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// Direction, transport and names.
    pub labels: ConnectionLabels<'a>,
    /// Identity of the source, where it is known.
    pub source_id: Option<&'a SpiffeId>,
    /// Identity of the destination, where it is known.
    pub destination_id: Option<&'a SpiffeId>,
    /// Address of the source; unspecified where the kernel has not chosen one yet.
    pub source_address: SocketAddr,
    /// Address that the source asked for.
    pub destination_address: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// What both ends call it, where it goes through a tunnel between two reeves.
    pub id: Option<ConnectionId>,
    /// Rule that gave the verdict, as `policy/rule`.
    pub rule: &'a str,
    /// Where that rule is written.
    pub rule_place: Option<RulePlace<'a>>,
    /// When it happened.
    pub time: SystemTime,
}

/// What both ends of a connection through a tunnel call it, 16 hexadecimal digits. The client chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ConnectionId(u64);

/// Writes the lines, each workload within its allowance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ConnectionLog {
    metrics: Metrics,
    observers: Observers,
    /// Lines of each workload and kind; 0 is no bound.
    per_second: f64,
    allowances: Arc<Mutex<HashMap<(WorkloadId, Kind), Allowance>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Refused,
    Closed,
    DryRun,
    Handshake,
    Proof,
    Flood,
}

#[derive(Clone, Copy, Debug)]
struct Allowance {
    lines: f64,
    filled: Instant,
    suppressed: u64,
}

// === impl ConnectionId ===

impl ConnectionId {
    /// A new one, which nobody can guess.
    #[must_use]
    pub fn new() -> Self {
        Self(RandomState::new().hash_one(()))
    }

    /// Reads what its `Display` writes, and nothing else: a peer may send anything.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u64::from_str_radix(text, 16).ok());
        number.flatten().map(Self)
    }
}

impl Default for ConnectionId {
    fn default() -> Self {
        Self::new()
    }
}

impl Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<ConnectionId> for String {
    fn from(id: ConnectionId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ConnectionId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("no 16 hexadecimal digits")
    }
}

// === impl ConnectionLog ===

impl ConnectionLog {
    /// A log whose suppressed lines are counted in `metrics`, and which tells `observers` of all.
    #[must_use]
    pub fn new(metrics: Metrics, observers: Observers) -> Self {
        Self {
            metrics,
            observers,
            per_second: PER_SECOND.into(),
            allowances: Arc::default(),
        }
    }

    /// The log with another number of lines for each workload and kind in a second; 0 is no bound.
    #[must_use]
    pub fn with_lines_per_second(mut self, lines: u32) -> Self {
        self.per_second = lines.into();
        self
    }

    /// The kernel had no room for this many events.
    pub(super) fn lost(&self, events: u64) {
        self.observers.lost_in_kernel(events);
    }

    /// The kernel let a connection go on.
    pub fn allowed(&self, connection: &Connection<'_>, reason: Reason) {
        self.observers.tell(connection.time, || {
            Happening::Allowed(Facts::new(connection, true, reason, None, None))
        });
        tracing::debug!(
            target: "reeve::connection",
            source = connection.labels.source,
            source_address = known(connection.source_address).map(display),
            destination = connection.labels.destination,
            destination_address = known(connection.destination_address).map(display),
            protocol = %ProtocolName(connection.protocol),
            reason = reason.as_str(),
            rule = connection.rule,
            "connection allowed"
        );
    }

    /// A connection in a tunnel stands.
    pub fn opened(&self, connection: &Connection<'_>) {
        self.observers.tell(connection.time, || {
            Happening::Opened(Facts::new(connection, true, Reason::Policy, None, None))
        });
    }

    /// A connection of `workload` was refused or could not be made; `error` has what there is to
    /// say beyond the reason.
    pub fn refused(
        &self,
        workload: WorkloadId,
        connection: &Connection<'_>,
        reason: Reason,
        error: Option<&dyn Display>,
    ) {
        self.observers.tell(connection.time, || {
            Happening::Refused(Facts::new(connection, false, reason, error, None))
        });
        let Some(suppressed) = self.take(workload, Kind::Refused, Instant::now()) else {
            return;
        };
        tracing::warn!(
            target: "reeve::connection",
            direction = direction_name(connection.labels.direction),
            transport = connection.labels.transport.as_str(),
            source = connection.labels.source,
            source_id = connection.source_id.map(display),
            source_address = known(connection.source_address).map(display),
            destination = connection.labels.destination,
            destination_id = connection.destination_id.map(display),
            destination_address = known(connection.destination_address).map(display),
            connection = connection.id.map(display),
            protocol = %ProtocolName(connection.protocol),
            reason = reason.as_str(),
            rule = connection.rule,
            rule_at = connection.rule_place.map(display),
            error = error.map(tracing::field::display),
            suppressed = (suppressed > 0).then_some(suppressed),
            "connection refused"
        );
    }

    /// Policies in dry run would have let a connection of `workload` pass, or refused it.
    pub fn dry_run(&self, workload: WorkloadId, connection: &Connection<'_>, would: DryRun) {
        let Some(suppressed) = self.take(workload, Kind::DryRun, Instant::now()) else {
            return;
        };
        tracing::info!(
            target: "reeve::connection",
            direction = direction_name(connection.labels.direction),
            transport = connection.labels.transport.as_str(),
            source = connection.labels.source,
            source_id = connection.source_id.map(display),
            source_address = known(connection.source_address).map(display),
            destination = connection.labels.destination,
            destination_id = connection.destination_id.map(display),
            destination_address = known(connection.destination_address).map(display),
            protocol = %ProtocolName(connection.protocol),
            would = if would == DryRun::Allow { "allow" } else { "deny" },
            rule = connection.rule,
            suppressed = (suppressed > 0).then_some(suppressed),
            "dry run of a policy"
        );
    }

    /// A tunnel that somebody opened did not come to stand: the connection is the tunnel's own, and
    /// `failed` is what it is counted under among connections. Anybody can make such lines, so all of
    /// them share one allowance.
    pub fn handshake_failed(
        &self,
        connection: &Connection<'_>,
        failed: Reason,
        reason: HandshakeReason,
        error: &dyn Display,
    ) {
        let (from, to) = (connection.source_address, connection.destination_address);
        self.observers.tell(connection.time, || {
            let why = format!("{}: {error}", reason.as_str());
            let facts = Facts::new(connection, false, failed, Some(&why), None);
            Happening::HandshakeFailed(facts)
        });
        let Some(suppressed) = self.take(NO_WORKLOAD, Kind::Handshake, Instant::now()) else {
            return;
        };
        tracing::warn!(
            target: "reeve::connection",
            source_address = %from,
            destination_address = %to,
            reason = reason.as_str(),
            %error,
            suppressed = (suppressed > 0).then_some(suppressed),
            "handshake of a tunnel failed"
        );
    }

    /// A tunnel with a peer, at an address, was not proven again, and ends with the certificates that
    /// proved it last unless another attempt succeeds. All of them share one allowance.
    pub fn proof_failed(
        &self,
        role: Role,
        (from, peer): (SocketAddr, &SpiffeId),
        own: &SpiffeId,
        until: SystemTime,
        result: &'static str,
        error: &dyn Display,
    ) {
        self.observers.tell(SystemTime::now(), || {
            Happening::Unproven(unproven(role, (from, peer), own, result, error))
        });
        let until = humantime::format_rfc3339_seconds(until);
        let Some(suppressed) = self.take(NO_WORKLOAD, Kind::Proof, Instant::now()) else {
            return;
        };
        tracing::warn!(
            target: "reeve::connection",
            role = role.as_str(),
            peer_address = %from,
            peer_id = %peer,
            id = %own,
            result,
            %error,
            %until,
            suppressed = (suppressed > 0).then_some(suppressed),
            "tunnel not proven again; it ends with the certificates that proved it last"
        );
    }

    /// A tunnel was ended since the peer at `from` sent what nobody puts up with. Whoever does may
    /// do it again and again, so all of them share one allowance.
    pub fn tunnel_flooded(
        &self,
        from: SocketAddr,
        peer: &SpiffeId,
        own: &SpiffeId,
        reason: Reason,
        error: &dyn Display,
    ) {
        let Some(suppressed) = self.take(NO_WORKLOAD, Kind::Flood, Instant::now()) else {
            return;
        };
        tracing::warn!(
            target: "reeve::connection",
            peer_address = %from,
            peer_id = %peer,
            id = %own,
            reason = reason.as_str(),
            %error,
            suppressed = (suppressed > 0).then_some(suppressed),
            "tunnel ended"
        );
    }

    /// A connection of `workload` stood for `duration` and has ended. The bytes are the
    /// application's, as the workload sent and received them.
    pub fn closed(
        &self,
        workload: WorkloadId,
        connection: &Connection<'_>,
        reason: Reason,
        sent: u64,
        received: u64,
        duration: Duration,
    ) {
        self.observers.tell(connection.time, || {
            let carried = Carried {
                bytes_sent: sent,
                bytes_received: received,
                duration_seconds: duration.as_secs_f64(),
            };
            Happening::Closed(Facts::new(connection, true, reason, None, Some(carried)))
        });
        let Some(suppressed) = self.take(workload, Kind::Closed, Instant::now()) else {
            return;
        };
        tracing::info!(
            target: "reeve::connection",
            direction = direction_name(connection.labels.direction),
            transport = connection.labels.transport.as_str(),
            source = connection.labels.source,
            source_id = connection.source_id.map(display),
            source_address = known(connection.source_address).map(display),
            destination = connection.labels.destination,
            destination_id = connection.destination_id.map(display),
            destination_address = known(connection.destination_address).map(display),
            connection = connection.id.map(display),
            protocol = %ProtocolName(connection.protocol),
            reason = reason.as_str(),
            rule = connection.rule,
            rule_at = connection.rule_place.map(display),
            bytes_sent = sent,
            bytes_received = received,
            duration_seconds = duration.as_secs_f64(),
            suppressed = (suppressed > 0).then_some(suppressed),
            "connection closed"
        );
    }

    /// Whether one more line may be written, and how many were left out since the last one.
    fn take(&self, workload: WorkloadId, kind: Kind, now: Instant) -> Option<u64> {
        if self.per_second == 0.0 {
            return Some(0);
        }
        let mut allowances = self
            .allowances
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = allowances.len() < MAX_WORKLOADS || allowances.contains_key(&(workload, kind));
        let key = (if known { workload } else { WorkloadId::MAX }, kind);
        let allowance = allowances.entry(key).or_insert(Allowance {
            lines: self.per_second * AT_ONCE,
            filled: now,
            suppressed: 0,
        });
        let taken = allowance.take(now, self.per_second);
        drop(allowances);
        if taken.is_none() {
            self.metrics.log_lines_suppressed(1);
        }
        taken
    }
}

// === impl Allowance ===

impl Allowance {
    fn take(&mut self, now: Instant, per_second: f64) -> Option<u64> {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.lines = (self.lines + passed * per_second).min(per_second * AT_ONCE);
        self.filled = now;
        if self.lines < 1.0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// An address that is one.
pub(super) fn known(address: SocketAddr) -> Option<SocketAddr> {
    (!address.ip().is_unspecified()).then_some(address)
}

/// What there is to say of a tunnel that was not proven again.
fn unproven(
    role: Role,
    (address, peer): (SocketAddr, &SpiffeId),
    own: &SpiffeId,
    result: &'static str,
    error: &dyn Display,
) -> Facts {
    let ends = [(peer, Some(address)), (own, None)];
    let (direction, [source, destination]) = match role {
        Role::Client => (Direction::Egress, [ends[1], ends[0]]),
        Role::Server => (Direction::Ingress, ends),
    };
    Facts {
        verdict: "deny".into(),
        direction: direction_name(direction).into(),
        transport: "tunnel".into(),
        protocol: ProtocolName(protocol::TCP).into(),
        source: UNKNOWN.to_owned(),
        source_id: Some(source.0.clone()),
        source_address: source.1,
        destination: UNKNOWN.to_owned(),
        destination_id: Some(destination.0.clone()),
        destination_address: destination.1,
        reason: result.into(),
        cause: Some("failure".into()),
        connection: None,
        rule: String::new(),
        rule_at: None,
        error: Some(error.to_string()),
        carried: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_what_was_left_out_is_said() {
        let log = ConnectionLog::new(Metrics::default(), Observers::new(0));
        let start = Instant::now();
        let written = (0..1000)
            .filter(|_| log.take(1, Kind::Refused, start).is_some())
            .count();
        assert_eq!(written, 100);
        assert!(
            log.take(2, Kind::Refused, start).is_some(),
            "another workload"
        );
        assert!(log.take(1, Kind::Closed, start).is_some(), "another kind");
        let later = start + Duration::from_millis(101);
        assert_eq!(log.take(1, Kind::Refused, later), Some(900));
        assert_eq!(log.take(1, Kind::Refused, later), None);
        // What was not used is no leave for a flood.
        let much_later = start + Duration::from_secs(3600);
        let written = (0..1000)
            .filter(|_| log.take(1, Kind::Refused, much_later).is_some())
            .count();
        assert_eq!(written, 100);
    }

    #[test]
    fn the_number_of_lines_can_be_set_and_unbounded() {
        let log = || ConnectionLog::new(Metrics::default(), Observers::new(0));
        let now = Instant::now();
        for (lines, expected) in [(1, 10), (50, 500), (0, 1000)] {
            let log = log().with_lines_per_second(lines);
            let taken = (0..1000).filter(|_| log.take(1, Kind::Refused, now).is_some());
            assert_eq!(taken.count(), expected, "{lines}");
        }
    }

    #[test]
    fn workloads_without_end_share_one_allowance_and_nothing_more_is_remembered() {
        let log = ConnectionLog::new(Metrics::default(), Observers::new(0));
        let now = Instant::now();
        let known = MAX_WORKLOADS as WorkloadId;
        let written = |id| log.take(id, Kind::Refused, now).is_some();
        assert!((1..=known).all(written));
        let others = (known + 1..=known + 1000).filter(|id| written(*id));
        assert_eq!(others.count(), 100);
        assert!(written(1), "who is known has its own");
        assert_eq!(log.allowances.lock().unwrap().len(), MAX_WORKLOADS + 1);
    }
}
