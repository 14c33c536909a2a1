//! The threads that carry tunnels, and how the rest of the daemon talks to them.
//!
//! Each worker is one thread with an event loop of its own, which carries tunnels and all their
//! streams: what a stream writes and what its tunnel sends never crosses threads, and one write of
//! a tunnel carries what many streams have written. Connections are spread by `SO_REUSEPORT`.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fmt,
    net::{Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use reeve_common::WorkloadId;
use socket2::Socket;
use tokio::{
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{mpsc, oneshot, watch},
    task::spawn_local,
    time::{sleep_until, timeout_at},
};

use crate::{
    config::{CongestionControl, Limits, Ports, Timeouts},
    datapath::{Sockets, control_congestion, netns::Netns},
    privileges::Confinement,
};

use super::{
    ServeError, Shared, StartError, TunnelStatus, TunnelsStatus,
    bounds::Bounds,
    failing::Failing,
    sweep,
    worker::{Listeners, Worker},
};

/// Tasks that run before sockets are looked at again. Tokio's own number, 61, lets a bulk transfer
/// keep small requests waiting for milliseconds.
const EVENT_INTERVAL: u32 = 4;
/// Tunnels that a status names.
const MOST_IN_STATUS: usize = 1000;
/// Slack for a worker that answers a drain late.
const DRAIN_SLACK: Duration = Duration::from_secs(5);

/// The running data path. Dropping it ends it at once.
pub struct Tunnels {
    workers: Vec<mpsc::UnboundedSender<Command>>,
    bounds: Arc<Bounds>,
    ports: Ports,
    congestion_control: CongestionControl,
    /// Namespaces with listeners, by cookie.
    serving: Mutex<HashMap<u64, Serving>>,
    /// Listeners of a daemon before, by the cookie of their namespace.
    inherited: Mutex<HashMap<u64, Vec<Socket>>>,
    /// Listeners, with their workers' numbers, that accept nothing before [`Tunnels::release`].
    held: Mutex<Option<Vec<(usize, Listeners)>>>,
}

/// What is served in a namespace.
struct Serving {
    /// Keeps the namespace.
    _netns: Arc<Netns>,
    /// The listening sockets, for a daemon that takes over.
    sockets: Vec<Socket>,
}

enum Command {
    Listen(Listeners),
    Unlisten(u64),
    LeaveAllBut(Arc<HashSet<u64>>),
    JudgeAgain,
    Status(oneshot::Sender<(usize, Vec<TunnelStatus>)>),
    /// Say that the event loop turns.
    Answer(oneshot::Sender<()>),
    Drain {
        deadline: Instant,
        done: oneshot::Sender<()>,
    },
    HandOver {
        until: Until,
        done: oneshot::Sender<()>,
    },
}

/// When what is left is ended; none where that is left to the connections. It may be changed.
pub type Until = watch::Receiver<Option<Instant>>;

// === impl Tunnels ===

impl Tunnels {
    /// Starts the workers, without a listener yet.
    ///
    /// # Errors
    /// When a thread or its event loop cannot be made.
    pub fn start(
        shared: Shared,
        limits: &Limits,
        timeouts: &Timeouts,
        ports: Ports,
        congestion_control: CongestionControl,
        confinement: Confinement,
    ) -> Result<Self, StartError> {
        let bounds = Bounds::new(limits);
        let sockets = Sockets::start(confinement, congestion_control, shared.storage.clone())
            .map_err(StartError::Sockets)?;
        let failing = Arc::new(Failing::new(sockets.clone()));
        let mut workers = Vec::new();
        for number in 0..worker_count(limits) {
            let (commands, inbox) = mpsc::unbounded_channel();
            let (shared, bounds) = (shared.clone(), bounds.clone());
            let failing = failing.clone();
            let sockets = sockets.clone();
            let (limits, timeouts) = (*limits, *timeouts);
            let (ready, started) = std::sync::mpsc::sync_channel(1);
            thread::Builder::new()
                .name(format!("tunnel-{number}"))
                .spawn(move || {
                    let runtime = runtime().map_err(StartError::Runtime).and_then(|runtime| {
                        confinement.enter_exposed()?;
                        Ok(runtime)
                    });
                    let runtime = match runtime {
                        Ok(runtime) => runtime,
                        Err(error) => {
                            // Nobody to tell means that starting was given up.
                            let _ = ready.send(Err(error));
                            return;
                        }
                    };
                    let _ = ready.send(Ok(()));
                    runtime.block_on(async {
                        let worker =
                            Worker::new(shared, limits, timeouts, ports, bounds, failing, sockets);
                        work(worker, inbox).await;
                    });
                })
                .map_err(|source| StartError::Thread {
                    worker: number,
                    source,
                })?;
            match started.recv() {
                Ok(Ok(())) => workers.push(commands),
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    return Err(StartError::Runtime(std::io::Error::other(
                        "the thread ended at once",
                    )));
                }
            }
        }
        Ok(Self {
            workers,
            bounds,
            ports,
            congestion_control,
            serving: Mutex::default(),
            inherited: Mutex::default(),
            held: Mutex::default(),
        })
    }

    /// Uses the listeners of a daemon before, by the cookie of their namespace, and accepts
    /// nothing anywhere before [`Tunnels::release`]. To be called before [`Tunnels::serve`].
    pub fn inherit(&self, listeners: HashMap<u64, Vec<Socket>>) {
        *lock(&self.inherited) = listeners;
        *lock(&self.held) = Some(Vec::new());
    }

    /// Begins to accept what [`Tunnels::inherit`] held back. Listeners that nobody has come to
    /// use are closed.
    pub fn release(&self) {
        lock(&self.inherited).clear();
        for (number, listeners) in lock(&self.held).take().into_iter().flatten() {
            self.send_listeners(number, listeners);
        }
    }

    /// The listening sockets, for a daemon that takes over.
    #[must_use]
    pub fn sockets(&self) -> Vec<OwnedFd> {
        let serving = lock(&self.serving);
        let sockets = serving.values().flat_map(|serving| &serving.sockets);
        sockets
            .filter_map(|socket| socket.try_clone().ok())
            .map(OwnedFd::from)
            .collect()
    }

    /// Makes these the namespaces that are listened in: opens listeners in those that are new,
    /// closes those of the others. What was accepted there goes on. Gives the outcome for each of
    /// `namespaces` by its cookie; one that failed is tried again at the next call.
    pub fn serve(&self, namespaces: &[Arc<Netns>]) -> Vec<(u64, Result<(), ServeError>)> {
        let mut serving = lock(&self.serving);
        serving.retain(|cookie, _| {
            let keep = namespaces.iter().any(|netns| netns.cookie == *cookie);
            if !keep {
                self.tell_all(|| Command::Unlisten(*cookie));
                if let Some(held) = &mut *lock(&self.held) {
                    held.retain(|(_, listeners)| listeners.netns.cookie != *cookie);
                }
            }
            keep
        });
        let mut results = Vec::new();
        for netns in namespaces {
            let result = match serving.entry(netns.cookie) {
                Entry::Occupied(mut serving) => self.complete(netns, serving.get_mut()),
                Entry::Vacant(vacant) => self.listen_in(netns).map(|sockets| {
                    vacant.insert(Serving {
                        _netns: netns.clone(),
                        sockets,
                    });
                }),
            };
            results.push((netns.cookie, result));
        }
        results
    }

    /// Says in which namespaces workloads run. Of the others nothing is kept: their idle tunnels end, and
    /// their connections as soon as peers have what the workloads had said.
    pub fn leave_all_but(&self, namespaces: &[Arc<Netns>]) {
        let homes: Arc<HashSet<u64>> =
            Arc::new(namespaces.iter().map(|netns| netns.cookie).collect());
        self.tell_all(|| Command::LeaveAllBut(homes.clone()));
    }

    /// Opens the listeners that a namespace had no addresses for: it may have got IPv6 since.
    fn complete(&self, netns: &Arc<Netns>, serving: &mut Serving) -> Result<(), ServeError> {
        let redirected = SocketAddr::from((Ipv6Addr::LOCALHOST, self.ports.outbound));
        let has_v6 = |socket: &Socket| {
            let local = socket.local_addr();
            local.is_ok_and(|local| local.as_socket() == Some(redirected))
        };
        if serving.sockets.iter().any(has_v6) {
            return Ok(());
        }
        for number in 0..self.workers.len() {
            let opened = netns.outbound_listener_v6(self.ports.outbound);
            let opened = opened.map_err(|source| ServeError::Outbound {
                port: self.ports.outbound,
                inode: netns.inode,
                source,
            })?;
            let Some(socket) = opened else {
                return Ok(());
            };
            serving.sockets.extend(socket.try_clone());
            self.hand_out(
                number,
                Listeners {
                    netns: netns.clone(),
                    outbound: vec![socket],
                    tunnel: Vec::new(),
                },
            );
        }
        Ok(())
    }

    /// Opens the listeners of all workers, or none. Those of a daemon before come first, however
    /// many it had: connections wait in their queues. Gives all sockets.
    fn listen_in(&self, netns: &Arc<Netns>) -> Result<Vec<Socket>, ServeError> {
        let inode = netns.inode;
        let inherited = lock(&self.inherited).remove(&netns.cookie);
        let mut opened = inherited
            .map(|sockets| inherited_sets(netns, sockets, self.ports, self.workers.len()))
            .unwrap_or_default();
        for _ in opened.len()..self.workers.len() {
            let outbound = netns
                .outbound_listeners(self.ports.outbound)
                .map_err(|source| ServeError::Outbound {
                    port: self.ports.outbound,
                    inode,
                    source,
                })?;
            let tunnel =
                netns
                    .tunnel_listener(self.ports.tunnel)
                    .map_err(|source| ServeError::Tunnel {
                        port: self.ports.tunnel,
                        inode,
                        source,
                    })?;
            opened.push(Listeners {
                netns: netns.clone(),
                outbound,
                tunnel: vec![tunnel],
            });
        }
        for tunnel in opened.iter().flat_map(|listeners| &listeners.tunnel) {
            control_congestion(tunnel, self.congestion_control);
        }
        let sockets = opened
            .iter()
            .flat_map(|listeners| listeners.outbound.iter().chain(&listeners.tunnel))
            // One that cannot be doubled cannot be handed over, and serves all the same.
            .filter_map(|socket| socket.try_clone().ok())
            .collect();
        for (number, listeners) in opened.into_iter().enumerate() {
            self.hand_out(number, listeners);
        }
        Ok(sockets)
    }

    /// Gives listeners to a worker, or keeps them back for as long as nothing is accepted.
    fn hand_out(&self, number: usize, listeners: Listeners) {
        match &mut *lock(&self.held) {
            Some(held) => held.push((number, listeners)),
            None => self.send_listeners(number, listeners),
        }
    }

    fn send_listeners(&self, number: usize, listeners: Listeners) {
        if let Some(worker) = self.workers.get(number) {
            // A worker ends only with the daemon.
            let _ = worker.send(Command::Listen(listeners));
        }
    }

    /// Judges every open connection again, to be called when the snapshot has changed: those that
    /// are no longer allowed are reset.
    pub fn judge_again(&self) {
        self.tell_all(|| Command::JudgeAgain);
    }

    /// How the data path stands.
    pub async fn status(&self) -> TunnelsStatus {
        let mut status = TunnelsStatus {
            connections: self.bounds.connections(),
            ..TunnelsStatus::default()
        };
        for worker in &self.workers {
            let (answer, answered) = oneshot::channel();
            let _ = worker.send(Command::Status(answer));
            if let Ok((open, tunnels)) = answered.await {
                status.tunnels_open += open;
                let room = MOST_IN_STATUS - status.tunnels.len().min(MOST_IN_STATUS);
                status.tunnels.extend(tunnels.into_iter().take(room));
            }
        }
        status
    }

    /// Connections open now: in all, and by workload.
    #[must_use]
    pub fn connections(&self) -> (usize, Vec<(WorkloadId, usize)>) {
        let by_workload = self.bounds.connections_by_workload();
        (self.bounds.connections(), by_workload)
    }

    /// The first worker, by its number, that does not answer within `patience`.
    pub async fn silent(&self, patience: Duration) -> Option<usize> {
        let mut pending = Vec::new();
        for worker in &self.workers {
            let (answer, answered) = oneshot::channel();
            let _ = worker.send(Command::Answer(answer));
            pending.push(answered);
        }
        let deadline = tokio::time::Instant::now() + patience;
        for (number, answered) in pending.into_iter().enumerate() {
            if !matches!(timeout_at(deadline, answered).await, Ok(Ok(()))) {
                return Some(number);
            }
        }
        None
    }

    /// Stops accepting, tells peers that no more streams are taken, waits for connections to end
    /// by themselves for at most `patience`, and ends those that have not.
    pub async fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let (_same, until) = watch::channel(Some(deadline));
        self.end(until, |done| Command::Drain { deadline, done })
            .await;
    }

    /// Stops accepting, since another daemon does, and serves what was accepted `until` it has
    /// ended by itself, or is ended.
    pub async fn hand_over(&self, until: Until) {
        self.end(until.clone(), |done| Command::HandOver {
            until: until.clone(),
            done,
        })
        .await;
    }

    async fn end(&self, mut until: Until, command: impl Fn(oneshot::Sender<()>) -> Command) {
        lock(&self.serving).clear();
        let mut pending = Vec::new();
        for worker in &self.workers {
            let (done, drained) = oneshot::channel();
            // A worker ends only with the daemon.
            let _ = worker.send(command(done));
            pending.push(drained);
        }
        let all = async {
            for drained in pending {
                // A worker that has ended is drained.
                let _ = drained.await;
            }
        };
        let mut all = std::pin::pin!(all);
        loop {
            let deadline = *until.borrow_and_update();
            let late = async {
                match deadline {
                    Some(deadline) => sleep_until((deadline + DRAIN_SLACK).into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut all => return,
                () = late => {
                    tracing::warn!("a tunnel worker did not drain in time");
                    return;
                }
                Ok(()) = until.changed() => {}
            }
        }
    }

    fn tell_all(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            // A worker ends only with the daemon.
            let _ = worker.send(command());
        }
    }
}

impl fmt::Debug for Tunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnels")
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}

/// A daemon before's listeners of one namespace, as sets for this one's workers: one for each that
/// there is a set for, and what is more with the first ones.
fn inherited_sets(
    netns: &Arc<Netns>,
    sockets: Vec<Socket>,
    ports: Ports,
    workers: usize,
) -> Vec<Listeners> {
    let port = |socket: &Socket| Some(socket.local_addr().ok()?.as_socket()?.port());
    let (tunnel, outbound): (Vec<_>, Vec<_>) = sockets
        .into_iter()
        .partition(|socket| port(socket) == Some(ports.tunnel));
    let number = tunnel.len().min(workers);
    let mut sets: Vec<_> = (0..number)
        .map(|_| Listeners {
            netns: netns.clone(),
            outbound: Vec::new(),
            tunnel: Vec::new(),
        })
        .collect();
    if number > 0 {
        for (turn, socket) in tunnel.into_iter().enumerate() {
            sets[turn % number].tunnel.push(socket);
        }
        for (turn, socket) in outbound.into_iter().enumerate() {
            sets[turn % number].outbound.push(socket);
        }
    }
    sets
}

/// What a panicking thread left behind is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === A worker's thread ===

/// Number of workers: the configured one, or one for each two cores, so that applications have
/// the others.
fn worker_count(limits: &Limits) -> usize {
    match limits.workers {
        0 => thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1)),
        configured => configured,
    }
}

fn runtime() -> std::io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .build_local(LocalOptions::default())
}

/// Does what it is told until the daemon's end of the channel is gone.
async fn work(worker: Rc<Worker>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    spawn_local(sweep::run(worker.clone()));
    while let Some(command) = inbox.recv().await {
        match command {
            Command::Listen(listeners) => worker.listen(listeners),
            Command::Unlisten(cookie) => worker.unlisten(cookie),
            Command::LeaveAllBut(homes) => worker.leave_all_but(homes),
            Command::JudgeAgain => worker.judge_again(),
            Command::Answer(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(());
            }
            Command::Status(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(worker.status(MOST_IN_STATUS));
            }
            Command::Drain { deadline, done } => {
                let worker = worker.clone();
                spawn_local(async move {
                    worker.drain(deadline).await;
                    let _ = done.send(());
                });
            }
            Command::HandOver { until, done } => {
                let worker = worker.clone();
                spawn_local(async move {
                    worker.hand_over(&until).await;
                    let _ = done.send(());
                });
            }
        }
    }
}
