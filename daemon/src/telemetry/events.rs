//! The kernel's events, turned into metrics and log lines.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use nix::time::{ClockId, clock_gettime};

use reeve_common::{Address, Direction, DryRun, Event, EventKind, Reason, protocol};

use super::{
    ConnectionLabels, Metrics, Transport, UNKNOWN,
    connections::{Connection, ConnectionLog},
};
use crate::{identity::SpiffeId, policy::Snapshot};

/// Takes the records of the ring buffer, one after another.
#[derive(Clone, Debug)]
pub struct Events {
    metrics: Metrics,
    log: ConnectionLog,
}

// === impl Events ===

impl Events {
    /// Counts in `metrics` and writes to `log`.
    #[must_use]
    pub fn new(metrics: Metrics, log: ConnectionLog) -> Self {
        Self { metrics, log }
    }

    /// Tells that the kernel had no room for this many events.
    pub fn lost(&self, events: u64) {
        self.log.lost(events);
    }

    /// Logs what policies in dry run would change of what an event is about, if anything.
    pub fn dry_run(&self, event: &Event, snapshot: &Snapshot) {
        let would = DryRun::from_number(event.dry_run.into());
        if would == DryRun::Same {
            return;
        }
        let reason = Reason::from_number(event.reason).unwrap_or(Reason::Malformed);
        let connection = Connection {
            rule: snapshot.rule_name(event.dry_run_rule),
            ..describe(event, reason, snapshot)
        };
        self.log.dry_run(event.workload, &connection, would);
    }

    /// Counts and logs one event; the names are those of `snapshot`.
    pub fn record(&self, event: &Event, snapshot: &Snapshot) {
        let reason = Reason::from_number(event.reason).unwrap_or(Reason::Malformed);
        let connection = describe(event, reason, snapshot);
        if event.kind == EventKind::Verdict as u8 {
            let direction = connection.labels.direction;
            self.metrics
                .rule_verdict(direction, event.allowed != 0, connection.rule);
        }
        self.dry_run(event, snapshot);
        if event.kind == EventKind::Closed as u8 {
            self.metrics.connection_closed(
                connection.labels,
                reason,
                event.bytes_sent,
                event.bytes_received,
            );
            self.log.closed(
                event.workload,
                &connection,
                reason,
                event.bytes_sent,
                event.bytes_received,
                Duration::from_nanos(event.duration),
            );
        } else if event.allowed == 0 {
            self.metrics.connection_failed(connection.labels, reason);
            self.log.refused(event.workload, &connection, reason, None);
        } else {
            if is_plaintext_connection(event, reason) {
                self.metrics.connection_opened(connection.labels);
            }
            self.log.allowed(&connection, reason);
        }
    }
}

/// Whether the kernel sends a connection into a tunnel, as what it allows for no other reason, or would, were
/// it not that others have just failed there, or that its socket does not reach reeve.
fn is_for_a_tunnel(allowed: bool, reason: Reason) -> bool {
    match reason {
        Reason::Policy => allowed,
        Reason::PeerUnreachable
        | Reason::HandshakeFailed
        | Reason::PeerCertificate
        | Reason::PeerIdentity
        | Reason::PeerFailed
        | Reason::BoundToDevice
        | Reason::Timeout => !allowed,
        _ => false,
    }
}

/// What goes through a tunnel is counted by the tunnel, once it stands; a protocol without
/// connections has no end that could be counted.
fn is_plaintext_connection(event: &Event, reason: Reason) -> bool {
    event.protocol == protocol::TCP && matches!(reason, Reason::NoTunnel | Reason::Permissive)
}

fn describe<'a>(event: &Event, reason: Reason, snapshot: &'a Snapshot) -> Connection<'a> {
    let workload = snapshot.workload(event.workload);
    let peer = snapshot.peer(event.peer);
    let workload_name = workload.map_or(UNKNOWN, |workload| workload.workload.name.as_str());
    let peer_name = peer.map_or(UNKNOWN, |peer| peer.name.as_str());
    let workload_id: Option<&SpiffeId> =
        workload.map(|workload| &workload.workload.attributes.spiffe_id);
    let peer_id = peer
        .and_then(|peer| peer.attributes.as_ref())
        .map(|attributes| &attributes.spiffe_id);
    let local = SocketAddr::new(ip(&event.local), event.local_port);
    let remote = SocketAddr::new(ip(&event.remote), event.remote_port);
    let rule = snapshot.rule_name(event.rule);
    let rule_place = snapshot.rule_place(event.rule);
    let protocol = event.protocol;
    let time = wall_clock(event.timestamp);

    if event.direction == Direction::Ingress as u8 {
        Connection {
            labels: ConnectionLabels {
                direction: Direction::Ingress,
                transport: Transport::Plaintext,
                source: peer_name,
                destination: workload_name,
            },
            source_id: peer_id,
            destination_id: workload_id,
            source_address: remote,
            destination_address: local,
            protocol,
            id: None,
            rule,
            rule_place,
            time,
        }
    } else {
        Connection {
            labels: ConnectionLabels {
                direction: Direction::Egress,
                transport: if is_for_a_tunnel(event.allowed != 0, reason) {
                    Transport::Tunnel
                } else {
                    Transport::Plaintext
                },
                source: workload_name,
                destination: peer_name,
            },
            source_id: workload_id,
            destination_id: peer_id,
            source_address: local,
            destination_address: remote,
            protocol,
            id: None,
            rule,
            rule_place,
            time,
        }
    }
}

/// The wall clock's time of a moment of the kernel's monotonic clock.
fn wall_clock(timestamp: u64) -> SystemTime {
    let now = SystemTime::now();
    let Ok(monotonic) = clock_gettime(ClockId::CLOCK_MONOTONIC) else {
        return now;
    };
    let ago = Duration::from(monotonic).saturating_sub(Duration::from_nanos(timestamp));
    now.checked_sub(ago).unwrap_or(now)
}

fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}

#[cfg(test)]
mod tests {
    use reeve_common::{Hook, ipv4_mapped};

    use super::{super::Observers, *};

    fn event(kind: EventKind, allowed: bool, reason: Reason) -> Event {
        Event {
            timestamp: 0,
            bytes_sent: 5,
            bytes_received: 7,
            duration: 1_000_000,
            local: [0; 16],
            remote: ipv4_mapped([192, 0, 2, 1]),
            workload: 1,
            peer: 0,
            rule: 0,
            dry_run_rule: 0,
            local_port: 0,
            remote_port: 443,
            protocol: protocol::TCP,
            direction: Direction::Egress as u8,
            kind: kind as u8,
            hook: Hook::Connect as u8,
            allowed: u8::from(allowed),
            reason: reason as u8,
            dry_run: 0,
            reserved: [0; 5],
        }
    }

    #[test]
    fn what_fails_at_connect_since_a_tunnel_has_is_counted_as_the_tunnels() {
        let transport = |allowed, reason| {
            let event = event(EventKind::Verdict, allowed, reason);
            describe(&event, reason, &Snapshot::default())
                .labels
                .transport
        };
        assert_eq!(transport(false, Reason::PeerFailed), Transport::Tunnel);
        assert_eq!(transport(false, Reason::PeerUnreachable), Transport::Tunnel);
        assert_eq!(transport(true, Reason::Policy), Transport::Tunnel);
        assert_eq!(transport(false, Reason::NoPolicy), Transport::Plaintext);
        assert_eq!(transport(true, Reason::NoTunnel), Transport::Plaintext);
    }

    #[test]
    fn a_plaintext_connection_is_counted_from_its_verdict_to_its_end() {
        let metrics = Metrics::default();
        let events = Events::new(
            metrics.clone(),
            ConnectionLog::new(metrics.clone(), Observers::new(8)),
        );
        let snapshot = Snapshot::default();
        for event in [
            event(EventKind::Verdict, false, Reason::NoPolicy),
            event(EventKind::Verdict, true, Reason::NoTunnel),
            event(EventKind::Closed, true, Reason::Closed),
        ] {
            events.record(&event, &snapshot);
        }
        let text = metrics.render().unwrap();
        for line in [
            r#"reeve_connections_failed_total{destination="unknown",direction="egress",reason="no_policy",source="unknown",transport="plaintext"} 1"#,
            r#"reeve_connections_opened_total{destination="unknown",direction="egress",source="unknown",transport="plaintext"} 1"#,
            r#"reeve_connections_closed_total{destination="unknown",direction="egress",reason="closed",source="unknown",transport="plaintext"} 1"#,
            r#"flow="received",source="unknown",transport="plaintext"} 7"#,
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn a_mapped_address_is_shown_as_ipv4() {
        assert_eq!(ip(&ipv4_mapped([10, 0, 0, 1])).to_string(), "10.0.0.1");
    }
}
