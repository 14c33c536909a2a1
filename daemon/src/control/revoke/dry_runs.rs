//! What policies in dry run would change of connections that stand. The programs tell it of each new
//! connection; of one that stands it is told when it has become another, once.

use reeve_common::{
    Direction, DryRun, Event, FLOW_IDLE_NANOSECONDS, Flow, FlowSlot, NO_WORKLOAD, Reason, protocol,
};

use super::{Judge, Plain};
use crate::{
    datapath::LiveSocket,
    policy::Snapshot,
    telemetry::{Events, Metrics},
};

/// Looks at connections that go on.
pub(super) struct Standing<'a> {
    judge: &'a Judge<'a>,
    /// By which it was told before. None where no policy is in dry run: then there is no work.
    before: Option<&'a Snapshot>,
    events: Vec<Event>,
}

// === impl Standing ===

impl<'a> Standing<'a> {
    pub(super) fn new(judge: &'a Judge<'a>, before: &'a Snapshot) -> Self {
        Self {
            judge,
            before: judge.snapshot.has_dry_runs().then_some(before),
            events: Vec::new(),
        }
    }

    /// Looks at a socket's connection. What is not TCP is a flow, too.
    pub(super) fn socket(&mut self, socket: &LiveSocket, netns: u64) {
        let in_tunnel = socket.remembered.is_some_and(|tag| tag.in_tunnel);
        if self.before.is_none() || in_tunnel || socket.protocol != protocol::TCP {
            return;
        }
        let direction = socket.direction().unwrap_or(Direction::Ingress);
        let Some(mut connection) = self.judge.connection(socket, netns, direction) else {
            return;
        };
        // Of one whose beginning nobody has seen, either direction may be what allows it.
        if socket.direction().is_none() && self.judge.refusal(&connection).is_some() {
            connection.direction = Direction::Egress;
        }
        self.connection(&connection);
    }

    /// Looks at a flow.
    pub(super) fn flow(&mut self, slot: &FlowSlot, flow: &Flow, now: u64) {
        if now.saturating_sub(flow.last_seen) < FLOW_IDLE_NANOSECONDS {
            self.connection(&Plain::of_flow(slot, flow));
        }
    }

    fn connection(&mut self, connection: &Plain) {
        let Some(before) = self.before else { return };
        let snapshot = self.judge.snapshot;
        let (was, is) = (connection.judge(before), connection.judge(snapshot));
        let same = (was.dry_run, was.dry_run_rule) == (is.dry_run, is.dry_run_rule);
        if same || is.dry_run != DryRun::Deny || connection.workload == NO_WORKLOAD {
            return;
        }
        let reason = match connection.protocol {
            protocol::TCP => Reason::NoTunnel,
            _ => Reason::NotTunnelled,
        };
        self.events.push(Event {
            rule: is.rule,
            dry_run_rule: is.dry_run_rule,
            allowed: 1,
            reason: reason as u8,
            dry_run: is.dry_run as u8,
            ..connection.event(snapshot)
        });
    }

    /// Counts and logs what was found.
    pub(super) fn tell(self, events: &Events, metrics: &Metrics) {
        for event in &self.events {
            let direction = if event.direction == Direction::Egress as u8 {
                Direction::Egress
            } else {
                Direction::Ingress
            };
            metrics.dry_run(direction, DryRun::from_number(event.dry_run.into()));
            events.dry_run(event, self.judge.snapshot);
        }
    }
}
