//! The threads that carry tunnels, and how the rest of the daemon talks to them.
//!
//! Each worker is one thread with an event loop of its own, which carries tunnels and all their
//! streams: what a stream writes and what its tunnel sends never crosses threads, and one write of
//! a tunnel carries what many streams have written. Connections are spread by `SO_REUSEPORT`.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{mpsc, oneshot},
    task::spawn_local,
    time::timeout_at,
};

use crate::{
    config::{Limits, Ports, Timeouts},
    datapath::{Sockets, netns::Netns},
    privileges::Confinement,
};

use super::{
    ServeError, Shared, StartError, TunnelStatus, TunnelsStatus,
    bounds::Bounds,
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
    /// Namespaces with listeners, by cookie.
    serving: Mutex<HashMap<u64, Arc<Netns>>>,
}

enum Command {
    Listen(Listeners),
    Unlisten(u64),
    JudgeAgain,
    Status(oneshot::Sender<(usize, Vec<TunnelStatus>)>),
    /// Say that the event loop turns.
    Answer(oneshot::Sender<()>),
    Drain {
        deadline: Instant,
        done: oneshot::Sender<()>,
    },
}

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
        confinement: Confinement,
    ) -> Result<Self, StartError> {
        let bounds = Bounds::new(limits);
        let sockets = Sockets::start(confinement).map_err(StartError::Sockets)?;
        let mut workers = Vec::new();
        for number in 0..worker_count(limits) {
            let (commands, inbox) = mpsc::unbounded_channel();
            let (shared, bounds) = (shared.clone(), bounds.clone());
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
                        let worker = Worker::new(shared, limits, timeouts, ports, bounds, sockets);
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
            serving: Mutex::default(),
        })
    }

    /// Makes these the namespaces that are listened in: opens listeners in those that are new,
    /// closes those of the others. What was accepted there goes on. Gives the outcome for each of
    /// `namespaces` by its cookie; one that failed is tried again at the next call.
    pub fn serve(&self, namespaces: &[Arc<Netns>]) -> Vec<(u64, Result<(), ServeError>)> {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        serving.retain(|cookie, _| {
            let keep = namespaces.iter().any(|netns| netns.cookie == *cookie);
            if !keep {
                self.tell_all(|| Command::Unlisten(*cookie));
            }
            keep
        });
        let mut results = Vec::new();
        for netns in namespaces {
            let result = match serving.entry(netns.cookie) {
                Entry::Occupied(_) => Ok(()),
                Entry::Vacant(vacant) => self.listen_in(netns).map(|()| {
                    vacant.insert(netns.clone());
                }),
            };
            results.push((netns.cookie, result));
        }
        results
    }

    /// Opens the listeners of all workers, or none.
    fn listen_in(&self, netns: &Arc<Netns>) -> Result<(), ServeError> {
        let inode = netns.inode;
        let mut opened = Vec::new();
        for _ in &self.workers {
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
                tunnel,
            });
        }
        for (worker, listeners) in self.workers.iter().zip(opened) {
            // A worker ends only with the daemon.
            let _ = worker.send(Command::Listen(listeners));
        }
        Ok(())
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
        self.serving
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let deadline = Instant::now() + patience;
        let mut pending = Vec::new();
        for worker in &self.workers {
            let (done, drained) = oneshot::channel();
            let _ = worker.send(Command::Drain { deadline, done });
            pending.push(drained);
        }
        let all = async {
            for drained in pending {
                // A worker that has ended is drained.
                let _ = drained.await;
            }
        };
        if tokio::time::timeout(patience + DRAIN_SLACK, all)
            .await
            .is_err()
        {
            tracing::warn!("a tunnel worker did not drain in time");
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
        }
    }
}
