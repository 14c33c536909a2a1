//! Live connections after a change: judged again, and ended where they are no longer allowed.
//!
//! The programs judge every packet by what is in force now, so nothing passes that is not allowed
//! any more. Here silent connections are ended too, so that both applications learn of it at
//! once, and whatever was ended is counted and logged. Of what goes on it is told what policies in
//! dry run would change. Tunnels look after their own.

mod dry_runs;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use reeve_common::{
    Address, Direction, DryRun, Event, EventKind, FLOW_IDLE_NANOSECONDS, Flow, FlowSlot, Hook,
    NO_WORKLOAD, Reason, UNKNOWN_WORKLOAD, WORKLOAD_IS_REEVE, WORKLOAD_UNKNOWN, WorkloadEntry,
    WorkloadId, link_local_key, protocol,
};
use tokio::task::block_in_place;

use self::dry_runs::Standing;
use super::{Control, desired, reconcile::describe};
use crate::{
    datapath::{self, KernelState, LiveSocket, Remembered, monotonic_nanoseconds, netns::Netns},
    policy::{Decision, Snapshot},
    workload::cgroup::CgroupTree,
};

/// What live connections are judged by.
struct Judge<'a> {
    snapshot: &'a Snapshot,
    /// Connections of another layout's daemon may be unknown to the programs.
    beside: bool,
    generation: u32,
    /// Whose each cgroup is.
    owners: HashMap<u64, WorkloadEntry>,
    /// Whose each namespace is, by cookie.
    namespaces: HashMap<u64, WorkloadId>,
    /// Addresses that belong to one workload alone.
    local: HashSet<(Address, WorkloadId)>,
}

/// A connection without a tunnel.
#[derive(Clone, Copy)]
struct Plain {
    workload: WorkloadId,
    protocol: u8,
    direction: Direction,
    local: SocketAddr,
    remote: SocketAddr,
}

/// A connection that is over.
struct Over {
    connection: Plain,
    /// The rule that denies it.
    rule: u32,
}

impl Control {
    /// Judges every live connection of `namespaces` again, if what is enforced has changed since
    /// it was last done.
    pub(super) fn revoke(
        &mut self,
        snapshot: &Arc<Snapshot>,
        namespaces: &[Arc<Netns>],
        state: &KernelState,
    ) {
        let generation = self.daemon.datapath.generation();
        if self.judged == Some(generation) {
            return;
        }
        let started = Instant::now();
        let over = block_in_place(|| {
            let beside = self.daemon.datapath.is_beside();
            let judge = Judge::new(snapshot, beside, generation, state, &self.cgroups);
            self.end_connections(&judge, namespaces)
        });
        self.told = Arc::clone(snapshot);
        match over {
            Ok(0) => {}
            Ok(ended) => tracing::info!(
                ended,
                milliseconds = started.elapsed().as_millis(),
                "live connections that are no longer allowed were ended"
            ),
            Err(error) => {
                tracing::warn!(
                    error = describe(&error),
                    "live connections cannot all be ended; those that are no longer allowed carry nothing more"
                );
                return;
            }
        }
        self.judged = Some(generation);
    }

    /// Ends what is over, and gives its number.
    fn end_connections(
        &self,
        judge: &Judge<'_>,
        namespaces: &[Arc<Netns>],
    ) -> Result<usize, datapath::Error> {
        let datapath = &self.daemon.datapath;
        let mut standing = Standing::new(judge, &self.told);
        let mut number = 0;
        let mut result = Ok(());
        for netns in namespaces {
            let ended = datapath.end_connections(netns, |socket| {
                let over = judge.of_socket(socket, netns.cookie).is_some();
                if !over {
                    standing.socket(socket, netns.cookie);
                }
                over
            });
            match ended {
                Ok(sockets) => {
                    number += sockets.len();
                    for socket in sockets.iter().filter(|socket| !Judge::is_told(socket)) {
                        if datapath.tells(socket, judge.generation)
                            && let Some(over) = judge.of_socket(socket, netns.cookie)
                        {
                            self.tell(judge, &over);
                        }
                    }
                }
                Err(error) => result = Err(error),
            }
        }
        let now = monotonic_nanoseconds();
        let flows = datapath.end_flows(|slot, flow| {
            let over = judge.of_flow(slot, flow, now).is_some();
            if !over {
                standing.flow(slot, flow, now);
            }
            over
        });
        standing.tell(&self.kernel_events, &self.daemon.metrics);
        let flows = flows?;
        number += flows.len();
        for (slot, flow) in flows {
            if let Some(over) = judge.of_flow(&slot, &flow, now) {
                self.tell(judge, &over);
            }
        }
        result.map(|()| number)
    }

    /// Counts and logs that a connection was revoked, as the programs do where it sends something.
    fn tell(&self, judge: &Judge<'_>, over: &Over) {
        let connection = &over.connection;
        let event = Event {
            rule: over.rule,
            reason: Reason::Revoked as u8,
            ..connection.event(judge.snapshot)
        };
        self.kernel_events.record(&event, judge.snapshot);
        let metrics = &self.daemon.metrics;
        metrics.verdict(connection.direction, false, Reason::Revoked);
    }
}

// === impl Judge ===

impl<'a> Judge<'a> {
    fn new(
        snapshot: &'a Snapshot,
        beside: bool,
        generation: u32,
        state: &KernelState,
        cgroups: &CgroupTree,
    ) -> Self {
        Self {
            snapshot,
            beside,
            generation,
            owners: desired::owners(cgroups, state),
            namespaces: state
                .namespaces
                .iter()
                .map(|(cookie, entry)| (*cookie, entry.workload))
                .collect(),
            local: state.local_addresses.iter().copied().collect(),
        }
    }

    /// Whether the programs have told already that a connection is refused, now or before.
    fn is_told(socket: &LiveSocket) -> bool {
        let remembered = socket.remembered;
        remembered.is_some_and(|remembered| remembered.generation != 0 && !remembered.allowed)
    }

    /// What becomes of a socket's connection: none where it may go on, or is none of a workload's.
    fn of_socket(&self, socket: &LiveSocket, netns: u64) -> Option<Over> {
        let remembered = socket.remembered;
        let goes_on = |remembered: Remembered| {
            remembered.in_tunnel || (remembered.allowed && remembered.generation == self.generation)
        };
        if remembered.is_some_and(goes_on) || self.is_of_other_daemon(socket) {
            return None;
        }
        let mut connection = self.connection(socket, netns, Direction::Egress)?;
        let over = |connection, rule| Over { connection, rule };
        if connection.workload == NO_WORKLOAD {
            return Some(over(connection, 0));
        }
        let rule = match socket.direction() {
            Some(direction) => {
                connection.direction = direction;
                self.refusal(&connection)?
            }
            // Nobody has seen its beginning: either direction will do.
            None => {
                self.refusal(&Plain {
                    direction: Direction::Ingress,
                    ..connection
                })?;
                self.refusal(&connection)?
            }
        };
        Some(over(connection, rule))
    }

    /// Whether a socket is connected to one of reeve's own, and the programs have not seen that yet: the
    /// daemon that carries the connection judges it.
    fn is_of_other_daemon(&self, socket: &LiveSocket) -> bool {
        let owner = socket
            .other_cgroup
            .and_then(|cgroup| self.owners.get(&cgroup));
        self.beside && owner.is_some_and(|owner| owner.flags & WORKLOAD_IS_REEVE != 0)
    }

    /// A socket's connection, in a direction; none where it is none of a workload's, or stays in
    /// it.
    fn connection(&self, socket: &LiveSocket, netns: u64, direction: Direction) -> Option<Plain> {
        let workload = match self.owners.get(&socket.cgroup) {
            Some(entry) if entry.flags & WORKLOAD_IS_REEVE != 0 => return None,
            Some(entry) if entry.flags & WORKLOAD_UNKNOWN != 0 => NO_WORKLOAD,
            Some(entry) => entry.workload,
            None => {
                let of_socket = socket.remembered.map(|remembered| remembered.workload);
                let of_namespace = self.namespaces.get(&netns).copied();
                let known = |workload: &WorkloadId| *workload != NO_WORKLOAD;
                match of_socket.filter(known) {
                    Some(UNKNOWN_WORKLOAD) => NO_WORKLOAD,
                    Some(workload) => workload,
                    None => of_namespace.filter(known)?,
                }
            }
        };
        let (local, remote) = (socket.local, socket.remote);
        let own = || {
            let address = datapath::address(remote.ip());
            let key = link_local_key(&address, workload).unwrap_or(address);
            self.local.contains(&(key, workload))
        };
        let stays = local.ip().is_loopback() || remote.ip().is_loopback() || own();
        (!stays).then_some(Plain {
            workload,
            protocol: socket.protocol,
            direction,
            local,
            remote,
        })
    }

    /// The same for a flow.
    fn of_flow(&self, slot: &FlowSlot, flow: &Flow, now: u64) -> Option<Over> {
        let idle = now.saturating_sub(flow.last_seen);
        if flow.generation == self.generation || idle >= FLOW_IDLE_NANOSECONDS {
            return None;
        }
        let connection = Plain::of_flow(slot, flow);
        let rule = self.refusal(&connection)?;
        Some(Over { connection, rule })
    }

    /// The rule that refuses a connection; none where it is allowed.
    fn refusal(&self, connection: &Plain) -> Option<u32> {
        let decision = connection.judge(self.snapshot);
        // What a tunnel is to carry does not go without.
        let Plain {
            protocol, remote, ..
        } = *connection;
        let bypasses = connection.direction == Direction::Egress
            && protocol == protocol::TCP
            && self.snapshot.destination(remote, protocol).1;
        let allowed = decision.allows() && !bypasses;
        (!allowed).then_some(decision.rule)
    }
}

// === impl Plain ===

impl Plain {
    fn of_flow(slot: &FlowSlot, flow: &Flow) -> Self {
        Self {
            workload: slot.workload,
            protocol: flow.protocol as u8,
            direction: if flow.direction == Direction::Egress as u32 {
                Direction::Egress
            } else {
                Direction::Ingress
            },
            // A socket that is bound to no address is asked about before the kernel has chosen one.
            local: SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), flow.local_port),
            remote: SocketAddr::new(ip(&flow.remote), flow.remote_port),
        }
    }

    fn judge(&self, snapshot: &Snapshot) -> Decision {
        let Self {
            workload,
            protocol,
            local,
            remote,
            ..
        } = *self;
        match self.direction {
            Direction::Egress => snapshot.judge_egress(workload, remote, protocol),
            Direction::Ingress => {
                snapshot.judge_plaintext(workload, remote.ip(), protocol, local.port())
            }
        }
    }

    /// The event of a verdict, as of the programs: for no reason yet, and a denial.
    fn event(&self, snapshot: &Snapshot) -> Event {
        Event {
            timestamp: monotonic_nanoseconds(),
            bytes_sent: 0,
            bytes_received: 0,
            duration: 0,
            local: datapath::address(self.local.ip()),
            remote: datapath::address(self.remote.ip()),
            workload: self.workload,
            peer: snapshot.destination(self.remote, self.protocol).0,
            rule: 0,
            dry_run_rule: 0,
            local_port: self.local.port(),
            remote_port: self.remote.port(),
            protocol: self.protocol,
            direction: self.direction as u8,
            kind: EventKind::Verdict as u8,
            hook: Hook::SocketState as u8,
            allowed: 0,
            reason: Reason::NoPolicy as u8,
            dry_run: DryRun::Same as u8,
            reserved: [0; 5],
        }
    }
}

fn ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}
