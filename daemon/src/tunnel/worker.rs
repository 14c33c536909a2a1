//! What one worker thread owns: its tunnels, its connections, and what it needs to make more.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use reeve_common::Reason;
use socket2::Socket;
use tokio::{
    task::{AbortHandle, spawn_local},
    time::sleep,
};

use crate::{
    config::{Limits, Ports, Timeouts},
    datapath::{Sockets, netns::Netns},
    telemetry::Role,
};

use super::{
    Shared, TunnelStatus,
    bounds::Bounds,
    connection::Connection,
    driver::End,
    failing::Failing,
    link::{Link, Order},
    outbound,
    pool::Pool,
    registry::Registry,
    server, socket,
    stash::Stash,
    workers::Until,
};

/// How often a drain looks whether everything has ended.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// The same where another daemon has taken over, after a while: some connections last for weeks.
const LONGEST_LOOK: Duration = Duration::from_millis(500);
/// For connections that were told to end, to do so and be logged.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// One worker's state. It never leaves its thread.
pub(super) struct Worker {
    pub(super) shared: Shared,
    pub(super) limits: Limits,
    pub(super) timeouts: Timeouts,
    pub(super) ports: Ports,
    pub(super) bounds: Arc<Bounds>,
    pub(super) failing: Arc<Failing>,
    pub(super) pool: Pool,
    pub(super) stash: Rc<Stash>,
    pub(super) links: Rc<Registry<Link>>,
    pub(super) connections: Rc<Registry<Connection>>,
    /// Nothing new is begun.
    pub(super) draining: Cell<bool>,
    /// Another daemon accepts; what this one has accepted is served all the same.
    pub(super) leaving: Cell<bool>,
    /// Tasks that accept, by the cookie of their namespace.
    listening: RefCell<HashMap<u64, Vec<AbortHandle>>>,
    /// Cookies of the namespaces in which workloads run; none before that is said first.
    homes: RefCell<Option<Arc<HashSet<u64>>>>,
}

/// Open listeners of one namespace.
#[derive(Debug)]
pub(super) struct Listeners {
    pub(super) netns: Arc<Netns>,
    /// For redirected connections.
    pub(super) outbound: Vec<Socket>,
    /// For tunnels; several where a daemon before had more workers.
    pub(super) tunnel: Vec<Socket>,
}

impl Worker {
    pub(super) fn new(
        shared: Shared,
        limits: Limits,
        timeouts: Timeouts,
        ports: Ports,
        bounds: Arc<Bounds>,
        failing: Arc<Failing>,
        sockets: Sockets,
    ) -> Rc<Self> {
        Rc::new(Self {
            shared,
            limits,
            timeouts,
            ports,
            bounds,
            failing,
            pool: Pool::default(),
            stash: Stash::new(sockets),
            links: Registry::new(),
            connections: Registry::new(),
            draining: Cell::new(false),
            leaving: Cell::new(false),
            listening: RefCell::default(),
            homes: RefCell::default(),
        })
    }

    /// Accepts what arrives at `listeners` until [`Self::unlisten`].
    pub(super) fn listen(self: &Rc<Self>, listeners: Listeners) {
        let netns = listeners.netns;
        self.stash.keep(&netns);
        let mut tasks = Vec::new();
        for socket in listeners.outbound {
            let (worker, netns) = (self.clone(), netns.clone());
            tasks.extend(self.accept(socket, None, move |tcp, from| {
                outbound::serve(worker.clone(), netns.clone(), tcp, from)
            }));
        }
        let (worker, user) = (self.clone(), self.timeouts.silent);
        let cookie = netns.cookie;
        for socket in listeners.tunnel {
            let (worker, netns) = (worker.clone(), netns.clone());
            tasks.extend(self.accept(socket, Some(user), move |tcp, from| {
                server::serve(worker.clone(), netns.clone(), tcp, from)
            }));
        }
        let mut listening = self.listening.borrow_mut();
        listening.entry(cookie).or_default().extend(tasks);
    }

    fn accept<F: Future<Output = ()> + 'static>(
        &self,
        socket: Socket,
        user: Option<Duration>,
        serve: impl FnMut(tokio::net::TcpStream, std::net::SocketAddr) -> F + 'static,
    ) -> Option<AbortHandle> {
        match socket::listener(socket, user) {
            Ok(listener) => Some(spawn_local(server::accept(listener, serve)).abort_handle()),
            Err(error) => {
                tracing::error!(%error, "cannot accept connections: the event loop refuses the listener");
                None
            }
        }
    }

    /// Closes the listeners of a namespace. What they have accepted goes on.
    pub(super) fn unlisten(&self, cookie: u64) {
        let tasks = self.listening.borrow_mut().remove(&cookie);
        self.stash.forget(cookie);
        tasks.into_iter().flatten().for_each(|task| task.abort());
    }

    /// Workloads run in these namespaces, and in no others: lets go of what it has there. What a workload
    /// had said when it ended still goes to its peers.
    pub(super) fn leave_all_but(&self, homes: Arc<HashSet<u64>>) {
        self.pool.leave(&homes);
        self.links.for_each(|link| {
            if !homes.contains(&link.ends.netns) {
                link.abandon();
            }
        });
        self.homes.replace(Some(homes));
    }

    /// Whether a workload runs in a namespace.
    pub(super) fn is_home(&self, cookie: u64) -> bool {
        let homes = self.homes.borrow();
        homes.as_ref().is_none_or(|homes| homes.contains(&cookie))
    }

    /// A tunnel has ended.
    pub(super) fn ended(&self, link: &Link, end: &End) {
        let ends = &link.ends;
        let reason = match (link.order(), end) {
            (Order::Close(reason), _) => reason,
            (_, End::Told(reason)) => *reason,
            (_, End::Closed) => Reason::Closed,
            (_, End::Broken(_)) => Reason::Reset,
            (_, End::Silent | End::Lost(_)) => Reason::Timeout,
            (_, End::Flood(_)) => Reason::Flood,
        };
        if let End::Silent | End::Lost(_) | End::Flood(_) = end {
            // To HTTP/2 it is a reset; what it was is known here.
            link.close(reason);
            self.stop_closed();
        } else {
            // HTTP/2 tells each stream what it has lost, and those that have lost nothing are not to
            // be stopped: what the tunnel has brought may still wait for an application.
            link.retire();
        }
        self.shared.metrics.tunnel_closed(ends.role, reason);
        if let End::Flood(_) = end {
            let log = &self.shared.log;
            log.tunnel_flooded(ends.remote, &ends.peer, &ends.own, reason, end);
            return;
        }
        tracing::debug!(
            role = ends.role.as_str(),
            id = %ends.own,
            peer_id = %ends.peer,
            peer = %ends.remote,
            reason = reason.as_str(),
            "tunnel ended: {end}"
        );
    }

    /// Ends every connection that is no longer allowed.
    pub(super) fn judge_again(&self) {
        let snapshot = self.shared.snapshot.load_full();
        self.connections
            .for_each(|connection| connection.judge_again(self, &snapshot));
    }

    /// Ends the connections of all tunnels that are told to end.
    pub(super) fn stop_closed(&self) {
        self.connections.for_each(|connection| {
            if let Order::Close(reason) = connection.link().order() {
                connection.stop(reason);
            }
        });
    }

    /// Begins nothing new, lets what there is end until `deadline`, then ends it.
    pub(super) async fn drain(&self, deadline: Instant) {
        self.draining.set(true);
        self.stop_accepting();
        self.pool.retire_all();
        self.links.for_each(|link| link.retire());
        self.until_empty(deadline).await;
        self.end_all().await;
    }

    /// Accepts nothing more, since another daemon does, and serves what it has accepted: until
    /// all of it has ended, or is ended. Peers are told to open new tunnels, which the other
    /// daemon accepts.
    pub(super) async fn hand_over(&self, until: &Until) {
        self.leaving.set(true);
        self.stop_accepting();
        let mut look = DRAIN_LOOK;
        loop {
            self.links.for_each(|link| {
                // One that can be proven again is, for as long as it carries something.
                let proven = link.is_provable() && link.streams() > 0;
                if link.ends.role == Role::Server && !proven {
                    link.retire();
                }
            });
            // First: what was accepted a moment ago has a task that has not run yet.
            sleep(look).await;
            look = (look + look / 8).min(LONGEST_LOOK);
            self.pool.retire_idle();
            let busy = self.bounds.is_busy() || self.links.len() > 0;
            let is_over = until.borrow().is_some_and(|until| Instant::now() >= until);
            if !busy || is_over {
                break;
            }
        }
        self.draining.set(true);
        self.end_all().await;
    }

    fn stop_accepting(&self) {
        let tasks: Vec<_> = self.listening.borrow_mut().drain().collect();
        for (_, tasks) in tasks {
            tasks.into_iter().for_each(|task| task.abort());
        }
    }

    /// Ends what is left.
    async fn end_all(&self) {
        self.connections
            .for_each(|connection| connection.stop(Reason::Shutdown));
        let last = Instant::now() + LAST_WORDS;
        while self.connections.len() > 0 && Instant::now() < last {
            sleep(DRAIN_LOOK).await;
        }
        self.links.for_each(|link| link.close(Reason::Shutdown));
        self.until_empty(last).await;
    }

    async fn until_empty(&self, deadline: Instant) {
        while self.connections.len() + self.links.len() > 0 && Instant::now() < deadline {
            sleep(DRAIN_LOOK).await;
        }
    }

    /// The first `most` tunnels, and how many there are.
    pub(super) fn status(&self, most: usize) -> (usize, Vec<TunnelStatus>) {
        let mut tunnels = Vec::new();
        self.links.for_each(|link| {
            if tunnels.len() < most {
                let ends = &link.ends;
                let (proofs, proven) = link.proofs(Instant::now());
                let (proofs_failed, proof_error) = link.unproven();
                tunnels.push(TunnelStatus {
                    role: ends.role.as_str(),
                    local: ends.own.clone(),
                    peer: ends.peer.clone(),
                    address: ends.remote,
                    streams: link.streams(),
                    age: link.opened.elapsed(),
                    provable: link.is_provable(),
                    proofs,
                    proven,
                    proofs_failed,
                    proof_error,
                    silent: link.is_silent(),
                    retired: link.order() != Order::Serve,
                });
            }
        });
        (self.links.len(), tunnels)
    }
}
