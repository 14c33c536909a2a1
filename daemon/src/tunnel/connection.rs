//! An application connection in a tunnel, from what is known of it first to its line in the log.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use reeve_common::{Direction, DryRun, NO_WORKLOAD, Reason, WorkloadId, protocol};

use crate::{
    datapath::netns::Netns,
    identity::SpiffeId,
    policy::{Decision, Snapshot},
    telemetry::{self, ConnectionId, ConnectionLabels, Role, Transport, UNKNOWN},
    workload::{Peer, RunningWorkload, Workload},
};

use super::{TunnelError, bounds::Place, link::Link, registry::Registered, worker::Worker};

/// Who talks to whom. What is not known yet is not there.
#[derive(Clone, Debug)]
pub(super) enum Parties {
    /// A workload here opened the connection.
    Outbound {
        workload: Option<Arc<Workload>>,
        /// The peer, and the identity that it must prove.
        peer: Option<(Arc<Peer>, SpiffeId)>,
    },
    /// A peer opened the connection to a workload here.
    Inbound {
        workload: Option<Arc<Workload>>,
        /// The identity that the tunnel presented.
        own: SpiffeId,
        /// The client's authenticated identity.
        client: SpiffeId,
    },
}

/// A connection that someone asks for.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) parties: Parties,
    /// Where it comes from.
    pub(super) source: SocketAddr,
    /// Where it wants to go.
    pub(super) destination: SocketAddr,
    /// Cookie of the local workload's network namespace.
    pub(super) netns: u64,
    /// The rule that allowed it, or 0.
    pub(super) rule: u32,
    /// What policies in dry run would change of that.
    pub(super) would: Would,
    /// The same at both ends, where both are reeve's.
    pub(super) id: Option<ConnectionId>,
}

/// What policies in dry run would change of a verdict, and the rule that would say so.
pub(super) type Would = (DryRun, u32);

/// A connection that stands.
#[derive(Debug)]
pub(super) struct Connection {
    call: Call,
    link: Rc<Link>,
    opened: Instant,
    _place: Place,
    /// What policies in dry run would change, as it was told last.
    would: Cell<Would>,
    sent: Cell<u64>,
    received: Cell<u64>,
    /// What of `sent` and `received` the metrics have been told.
    told: Cell<(u64, u64)>,
    /// Bytes have moved since the last sweep.
    active: Cell<bool>,
    /// Start of the first sweep since which nothing has moved.
    quiet_since: Cell<Instant>,
    half_closed: Cell<bool>,
    /// The application does not read, and the tunnel's bytes for it wait.
    blocked: Cell<bool>,
    /// The peer takes no more, and the application's bytes wait.
    held: Cell<bool>,
    /// The workload that it is of has ended.
    forsaken: Cell<bool>,
    stop: Cell<Option<Reason>>,
    task: RefCell<Option<Waker>>,
}

/// A connection's entry among those of its worker, and its place in the tunnel; dropped when it
/// has ended.
pub(super) struct Live {
    connection: Registered<Connection>,
    worker: Rc<Worker>,
}

// === impl Call ===

impl Call {
    fn direction(&self) -> Direction {
        match self.parties {
            Parties::Outbound { .. } => Direction::Egress,
            Parties::Inbound { .. } => Direction::Ingress,
        }
    }

    fn workload(&self) -> Option<&Arc<Workload>> {
        match &self.parties {
            Parties::Outbound { workload, .. } | Parties::Inbound { workload, .. } => {
                workload.as_ref()
            }
        }
    }

    fn workload_id(&self) -> WorkloadId {
        self.workload().map_or(NO_WORKLOAD, |workload| workload.id)
    }

    /// Judges the connection as things stand now: the policy, and that the ends still are who
    /// they were.
    pub(super) fn judge(&self, snapshot: &Snapshot) -> Result<Decision, TunnelError> {
        let decision = match &self.parties {
            Parties::Outbound {
                workload: Some(workload),
                peer: Some((peer, expected)),
            } => {
                still_peer(snapshot, peer, expected, self.destination)?;
                let running = snapshot
                    .workload(workload.id)
                    .ok_or(TunnelError::Stale("the workload"))?;
                if running.workload.attributes.spiffe_id != workload.attributes.spiffe_id {
                    return Err(TunnelError::Stale("the workload"));
                }
                snapshot.judge_egress(workload.id, self.destination, protocol::TCP)
            }
            Parties::Inbound {
                own,
                client,
                workload,
            } => {
                let (ip, port) = (self.destination.ip(), self.destination.port());
                let admitted = workload.as_ref();
                let running = admitted
                    .and_then(|workload| self.ended(snapshot, workload))
                    .or_else(|| snapshot.workload_at(self.netns, ip, port))
                    .filter(|running| running.workload.attributes.spiffe_id == *own)
                    .ok_or(TunnelError::WrongAuthority)?;
                let source = self.source.ip();
                snapshot.judge_ingress(running.workload.id, client, source, protocol::TCP, port)
            }
            Parties::Outbound { .. } => return Err(TunnelError::Stale("the workload or the peer")),
        };
        match decision.action {
            reeve_common::Action::Deny | reeve_common::Action::NoRoom => {
                Err(TunnelError::Denied(decision))
            }
            _ => Ok(decision),
        }
    }

    /// A workload of this connection, where it has ended, or runs elsewhere now: what it said before is
    /// still the peer's.
    fn ended<'a>(
        &self,
        snapshot: &'a Snapshot,
        workload: &Workload,
    ) -> Option<&'a Arc<RunningWorkload>> {
        let running = snapshot.workload(workload.id)?;
        let is_here = |netns: &Arc<Netns>| netns.cookie == self.netns;
        (!running.netns.as_ref().is_some_and(is_here)).then_some(running)
    }

    fn labels<'a>(&'a self, snapshot: &'a Snapshot) -> ConnectionLabels<'a> {
        let here = self.workload().map_or(UNKNOWN, |workload| &workload.name);
        let (source, destination) = match &self.parties {
            Parties::Outbound { peer, .. } => {
                let peer = peer.as_ref().map_or(UNKNOWN, |(peer, _)| &peer.name);
                (here, peer)
            }
            Parties::Inbound { client, .. } => {
                // Who has the identity and is there, before whoever else has it.
                let mut there = snapshot.peers_at(self.source.ip());
                let there = there.find(|peer| {
                    let attributes = peer.attributes.as_ref();
                    attributes.is_some_and(|attributes| attributes.spiffe_id == *client)
                });
                let peer = there.or_else(|| snapshot.peer_with_id(client));
                (peer.map_or(UNKNOWN, |peer| &peer.name), here)
            }
        };
        ConnectionLabels {
            direction: self.direction(),
            transport: Transport::Tunnel,
            source,
            destination,
        }
    }

    fn describe<'a>(&'a self, snapshot: &'a Snapshot) -> telemetry::Connection<'a> {
        let here = self
            .workload()
            .map(|workload| &workload.attributes.spiffe_id);
        let (source_id, destination_id) = match &self.parties {
            Parties::Outbound { peer, .. } => (here, peer.as_ref().map(|(_, id)| id)),
            Parties::Inbound { client, own, .. } => (Some(client), Some(own)),
        };
        telemetry::Connection {
            labels: self.labels(snapshot),
            source_id,
            destination_id,
            source_address: self.source,
            destination_address: self.destination,
            protocol: protocol::TCP,
            id: self.id,
            rule: snapshot.rule_name(self.rule),
            rule_place: snapshot.rule_place(self.rule),
            time: SystemTime::now(),
        }
    }

    /// Counts and logs that the connection never came to stand.
    pub(super) fn refused(&self, worker: &Worker, error: &TunnelError) {
        let (shared, reason) = (&worker.shared, error.reason());
        let snapshot = shared.snapshot.load();
        let mut described = self.describe(&snapshot);
        if let TunnelError::Denied(decision) = error {
            described.rule = snapshot.rule_name(decision.rule);
            described.rule_place = snapshot.rule_place(decision.rule);
            shared.metrics.verdict(self.direction(), false, reason);
            shared
                .metrics
                .rule_verdict(self.direction(), false, described.rule);
            self.dry_run(worker, decision);
        }
        if let TunnelError::Limit(limit) = error {
            shared.metrics.limit_reached(*limit);
        }
        shared.metrics.connection_failed(described.labels, reason);
        shared
            .log
            .refused(self.workload_id(), &described, reason, Some(error));
    }

    /// Notes the verdict that allowed it.
    pub(super) fn allowed_by(&mut self, decision: &Decision) {
        self.rule = decision.rule;
        self.would = (decision.dry_run, decision.dry_run_rule);
    }

    /// Counts and logs what policies in dry run would change of the verdict on a new connection. Of
    /// what goes out the kernel has told already.
    pub(super) fn dry_run(&self, worker: &Worker, decision: &Decision) {
        if self.direction() == Direction::Ingress {
            self.tell_dry_run(worker, decision);
        }
    }

    fn tell_dry_run(&self, worker: &Worker, decision: &Decision) {
        let shared = &worker.shared;
        if decision.dry_run == DryRun::Same {
            return;
        }
        shared.metrics.dry_run(self.direction(), decision.dry_run);
        let snapshot = shared.snapshot.load();
        let mut described = self.describe(&snapshot);
        described.rule = snapshot.rule_name(decision.dry_run_rule);
        let workload = self.workload_id();
        shared.log.dry_run(workload, &described, decision.dry_run);
    }

    /// The connection stands in `link`.
    pub(super) fn open(self, worker: &Rc<Worker>, link: &Rc<Link>, place: Place) -> Live {
        let now = Instant::now();
        let metrics = &worker.shared.metrics;
        let snapshot = worker.shared.snapshot.load();
        let described = self.describe(&snapshot);
        metrics.connection_opened(described.labels);
        metrics.streams_open(link.ends.role, 1);
        worker.shared.log.opened(&described);
        drop(snapshot);
        let connection = worker.connections.insert(Connection {
            would: Cell::new(self.would),
            call: self,
            link: link.clone(),
            opened: now,
            _place: place,
            sent: Cell::new(0),
            received: Cell::new(0),
            told: Cell::new((0, 0)),
            active: Cell::new(false),
            quiet_since: Cell::new(now),
            half_closed: Cell::new(false),
            blocked: Cell::new(false),
            held: Cell::new(false),
            forsaken: Cell::new(false),
            stop: Cell::new(None),
            task: RefCell::new(None),
        });
        Live {
            connection,
            worker: worker.clone(),
        }
    }
}

fn still_peer(
    snapshot: &Snapshot,
    peer: &Peer,
    expected: &SpiffeId,
    destination: SocketAddr,
) -> Result<(), TunnelError> {
    let now = snapshot
        .peer(peer.id)
        .ok_or(TunnelError::Stale("the peer"))?;
    let same = now.attributes.as_ref().map(|a| &a.spiffe_id) == Some(expected)
        && now.tunnel_port == peer.tunnel_port
        && now
            .addresses
            .iter()
            .any(|net| net.contains(&destination.ip()));
    if same {
        Ok(())
    } else {
        Err(TunnelError::Stale("the peer"))
    }
}

// === impl Connection ===

impl Connection {
    /// The tunnel that carries it.
    pub(super) fn link(&self) -> &Rc<Link> {
        &self.link
    }

    /// Bytes moved from the application into the tunnel.
    pub(super) fn moved_out(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
        self.active.set(true);
    }

    /// Bytes moved from the tunnel to the application.
    pub(super) fn moved_in(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
        self.active.set(true);
    }

    /// Bytes moved so far.
    pub(super) fn moved(&self) -> u64 {
        self.sent.get() + self.received.get()
    }

    /// Whether the workload has ended: what it said still goes to the peer, and then the connection ends.
    pub(super) fn set_forsaken(&self, forsaken: bool) {
        if self.forsaken.replace(forsaken) != forsaken {
            self.wake();
        }
    }

    /// Whether the workload has ended.
    pub(super) fn is_forsaken(&self) -> bool {
        self.forsaken.get()
    }

    /// One direction has ended.
    pub(super) fn set_half_closed(&self) {
        self.half_closed.set(true);
        self.active.set(true);
    }

    /// Whether bytes of the tunnel wait for the application.
    pub(super) fn set_blocked(&self, blocked: bool) {
        self.blocked.set(blocked);
    }

    /// Whether nothing has moved since the last sweep.
    pub(super) fn is_quiet(&self) -> bool {
        !self.active.get()
    }

    /// Whether bytes of the application wait for the tunnel.
    pub(super) fn set_held(&self, held: bool) {
        self.held.set(held);
    }

    /// Ends the connection, abruptly. The first reason given stands.
    pub(super) fn stop(&self, reason: Reason) {
        if self.stop.get().is_none() {
            self.stop.set(Some(reason));
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(task) = &*self.task.borrow() {
            task.wake_by_ref();
        }
    }

    /// Ready when the connection is to end. Wakes the task when that comes later.
    pub(super) fn poll_stopped(&self, cx: &Context<'_>) -> Poll<Reason> {
        if let Some(reason) = self.stop.get() {
            return Poll::Ready(reason);
        }
        let mut task = self.task.borrow_mut();
        match &mut *task {
            Some(waker) => waker.clone_from(cx.waker()),
            None => *task = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Ends the connection if the policy or the ends' identities no longer allow it. Where it goes
    /// on, tells what policies in dry run would change, if that is another than before.
    pub(super) fn judge_again(&self, worker: &Worker, snapshot: &Snapshot) {
        match self.call.judge(snapshot) {
            Ok(decision) => {
                let workload = self.call.workload();
                let ended = |one: &Arc<Workload>| self.call.ended(snapshot, one).is_some();
                self.set_forsaken(workload.is_some_and(ended));
                let would = (decision.dry_run, decision.dry_run_rule);
                if self.would.replace(would) != would {
                    self.call.tell_dry_run(worker, &decision);
                }
            }
            Err(_) => self.stop(Reason::Revoked),
        }
    }

    /// Looks after what needs no exact time: ends the connection if nothing has moved for too
    /// long, and tells the metrics of bytes. True where the application keeps the tunnel waiting.
    pub(super) fn sweep(&self, worker: &Worker, now: Instant) -> bool {
        let moved = self.active.replace(false);
        if self.held.get() {
            // The event loop says nothing of a reset behind bytes that nobody reads.
            self.wake();
        }
        if moved {
            self.quiet_since.set(now);
            self.tell_bytes(worker);
            return false;
        }
        let limit = match (self.forsaken.get(), self.half_closed.get()) {
            (true, _) => worker.timeouts.drain,
            (false, true) => worker.timeouts.half_closed,
            (false, false) => worker.timeouts.idle,
        };
        if limit != Duration::ZERO && now.duration_since(self.quiet_since.get()) >= limit {
            self.stop(Reason::Timeout);
        }
        self.blocked.get()
    }

    fn tell_bytes(&self, worker: &Worker) {
        let (sent, received) = self.untold();
        let (metrics, snapshot) = (&worker.shared.metrics, worker.shared.snapshot.load());
        metrics.connection_bytes(self.call.labels(&snapshot), sent, received);
    }

    /// Bytes since this was last asked.
    fn untold(&self) -> (u64, u64) {
        let (sent, received) = (self.sent.get(), self.received.get());
        let told = self.told.replace((sent, received));
        (sent - told.0, received - told.1)
    }
}

// === impl Live ===

impl Live {
    /// The connection itself.
    pub(super) fn connection(&self) -> &Rc<Connection> {
        self.connection.value()
    }

    /// Counts and logs that the connection has ended.
    pub(super) fn ended(self, reason: Reason) {
        let (connection, shared) = (&self.connection, &self.worker.shared);
        let (sent, received) = connection.untold();
        let call = &connection.call;
        let snapshot = shared.snapshot.load();
        let described = call.describe(&snapshot);
        shared
            .metrics
            .connection_closed(described.labels, reason, sent, received);
        shared.log.closed(
            call.workload_id(),
            &described,
            reason,
            connection.sent.get(),
            connection.received.get(),
            connection.opened.elapsed(),
        );
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let role: Role = self.connection.link.ends.role;
        self.worker.shared.metrics.streams_open(role, -1);
    }
}
