//! Taking over from the daemon before, and handing over to the next one.

use std::{
    collections::HashSet,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::block_in_place,
    time::sleep_until,
};

use super::{
    Change, Control, RunError, Waits,
    drain::{self, Predecessor},
    follow_events, process,
    reconcile::describe,
    service::{self, StandIn},
    signals::Signal,
};
use crate::handover::{
    self, Asker, Draining, Offer, Order, Request, Takeover, TakeoverError, Word,
};

/// For this daemon to become ready, before it gives up taking over: certificates that are not
/// there by then are not about to be.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How often a daemon that is about to take over looks whether it is ready.
pub(super) const READY_LOOK: Duration = Duration::from_millis(50);
/// Requests of a daemon that takes over, of which there is one at a time.
const REQUESTS: usize = 1;

/// What connects this daemon with the one before and the next one.
#[derive(Debug)]
pub(super) struct Succession {
    /// A hand-over to this daemon that has begun.
    takeover: Option<Takeover>,
    /// Since when inherited listeners wait for this daemon to be ready.
    waiting_since: Option<Instant>,
    /// Own cgroups of daemons before that still drain.
    pub(super) predecessors: Vec<(u64, u32)>,
    /// The daemon before.
    pub(super) predecessor: Predecessor,
    /// The kernel's maps are another daemon's.
    pub(super) frozen: bool,
    /// Another daemon serves, and this one what it has accepted: there is no way back.
    pub(super) has_handed_over: bool,
    /// Whether events are left to another daemon.
    pub(super) events_paused: watch::Sender<bool>,
    pub(super) requests: mpsc::Receiver<Request>,
    sender: Option<mpsc::Sender<Request>>,
}

// === impl Succession ===

impl Succession {
    /// `inherited` are the cookies of the namespaces whose listeners another process opened.
    pub(super) fn new(takeover: Option<Takeover>, inherited: &HashSet<u64>) -> Self {
        let (sender, requests) = mpsc::channel(REQUESTS);
        let waits = takeover.is_some() || !inherited.is_empty();
        Self {
            predecessors: takeover
                .as_ref()
                .map(|takeover| takeover.offer.own_cgroups.clone())
                .unwrap_or_default(),
            takeover,
            waiting_since: waits.then(Instant::now),
            predecessor: Predecessor::default(),
            frozen: false,
            has_handed_over: false,
            events_paused: watch::Sender::new(false),
            requests,
            sender: Some(sender),
        }
    }

    /// Whether another daemon serves until this one is ready.
    pub(super) fn is_taking_over(&self) -> bool {
        self.takeover.is_some()
    }

    /// Whether inherited listeners wait for this daemon to be ready.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting_since.is_some()
    }
}

impl Control {
    /// Accepts connections at inherited listeners, and takes over from the daemon before, as soon
    /// as this one is as ready as that one was.
    ///
    /// # Errors
    /// When this daemon does not become ready, or the one before does not let go.
    pub(super) fn take_over_when_ready(&mut self) -> Result<(), RunError> {
        let Some(since) = self.succession.waiting_since else {
            return Ok(());
        };
        let takeover = self.succession.takeover.as_ref();
        let must_be_ready = takeover.is_none_or(|takeover| takeover.offer.is_ready);
        let readiness = self.daemon.readiness();
        let may = self.is_enforced && (readiness.is_ready() || !must_be_ready);
        if !may && since.elapsed() < READY_WITHIN {
            return Ok(());
        }
        if !may && takeover.is_some() {
            return Err(RunError::Takeover(TakeoverError::NotReady {
                within: READY_WITHIN,
                missing: readiness.missing.join("; "),
            }));
        }
        if let Some(report) = &self.report
            && self.succession.is_taking_over()
            && !matches!(Order::read(report), Ok(Some(Order::Upgrade)))
        {
            return Err(RunError::Takeover(TakeoverError::Withdrawn));
        }
        self.succession.waiting_since = None;
        self.daemon.tunnels.release();
        let Some(takeover) = self.succession.takeover.take() else {
            handover::forget_kept();
            return Ok(());
        };
        let offer = takeover.offer.clone();
        let before = block_in_place(|| takeover.take())?;
        // Where this one was started with another configuration.
        before.tell(Word::Reload);
        tracing::info!(
            version = offer.version,
            process = offer.process,
            "took over from another daemon, which drains"
        );
        self.daemon.is_service.store(true, Ordering::Relaxed);
        self.succession.predecessor = Predecessor::new(before);
        self.endpoints.serve(&self.daemon)?;
        self.begin()?;
        if let Some(report) = &self.report {
            let done = Order::Done(std::process::id()).write(report);
            if let Err(error) = done {
                tracing::warn!(%error, "`reeve upgrade` is not told that it is done");
            }
        }
        Ok(())
    }

    /// Begins what only one daemon does: reads events, and waits for the next daemon.
    ///
    /// # Errors
    /// When there can be no hand-over socket.
    pub(super) fn begin(&mut self) -> Result<(), RunError> {
        if let Some(kernel) = self.events.take() {
            let events = self.kernel_events.clone();
            let datapath = self.daemon.datapath.clone();
            let paused = self.succession.events_paused.subscribe();
            let snapshot = self.snapshot.clone();
            tokio::spawn(follow_events(kernel, events, datapath, snapshot, paused));
        }
        let config = self.daemon.config.load();
        if let Some(requests) = self.succession.sender.take() {
            handover::Listener::bind(&config.admin.socket)
                .and_then(|listener| listener.serve(config.ports, config.sandbox, requests))
                .map_err(RunError::HandOver)?;
        }
        Ok(())
    }

    /// Leaves the kernel's maps to another daemon, and says what there is to hand over.
    pub(super) fn freeze(
        &mut self,
        asker: Asker,
        answer: oneshot::Sender<Result<(Offer, Vec<OwnedFd>), String>>,
    ) {
        if let Err(why) = service::admits(asker) {
            // Whoever asked has gone, and is refused all the same.
            let _ = answer.send(Err(why));
            return;
        }
        self.set_frozen(true);
        self.succession.events_paused.send_replace(true);
        let mut own_cgroups = self.own_cgroups.clone();
        own_cgroups.extend(&self.succession.predecessors);
        let offer = Offer {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            is_ready: self.daemon.readiness().is_ready(),
            own_cgroups,
            sockets: 0,
        };
        let mut sockets = self.daemon.tunnels.sockets();
        sockets.extend(self.endpoints.sockets());
        // Whoever asked has gone; it says so itself.
        let _ = answer.send(Ok((offer, sockets)));
    }

    /// Goes on as before, since the other daemon has given up.
    pub(super) async fn resume(&mut self) {
        if let Err(error) = block_in_place(|| self.daemon.datapath.take_back()) {
            tracing::error!(
                "the kernel's side is not as it should be after a hand-over that failed: {}",
                describe(&error)
            );
        }
        self.set_frozen(false);
        self.succession.events_paused.send_replace(false);
        self.reconcile().await;
    }

    /// Leaves the unit to the next daemon, which the service manager then starts at once, and lets
    /// connections end.
    pub(super) async fn make_way(&mut self, stand_in: StandIn, waits: &mut Waits) {
        let patience = self.daemon.config.load().timeouts.drain;
        tracing::info!(
            patience = %humantime::format_duration(patience),
            "the service restarts: the next daemon starts now, and connections of this one may end by \
             themselves"
        );
        // The next daemon begins with the maps as they are, and answers where this one did.
        self.set_frozen(true);
        self.succession.events_paused.send_replace(true);
        self.succession.requests.close();
        if !handover::keep(&self.endpoints.sockets()) {
            tracing::warn!("the next daemon opens its own metrics endpoint and admin socket");
        }
        self.daemon.is_service.store(false, Ordering::Relaxed);
        self.endpoints.leave();
        let (untold, _) = mpsc::channel(1);
        let begun = move || block_in_place(|| stand_in.end());
        self.serve_out(patience, begun, untold, waits).await;
    }

    /// Accepts no more, since the other daemon does, and lets connections end. They are still
    /// judged by whatever changes.
    pub(super) async fn hand_over(
        &mut self,
        process: i32,
        done: oneshot::Sender<()>,
        left: mpsc::Sender<Vec<Draining>>,
        waits: &mut Waits,
    ) {
        let patience = self.daemon.config.load().timeouts.hand_over;
        tracing::info!(
            process,
            patience = %humantime::format_duration(patience),
            "handed over to another daemon: connections may end by themselves"
        );
        self.daemon.is_service.store(false, Ordering::Relaxed);
        process::notify_successor(process);
        self.endpoints.leave();
        // Whoever asked may be gone, and accepts all the same: there is no way back.
        let begun = || {
            let _ = done.send(());
        };
        self.serve_out(patience, begun, left, waits).await;
        tracing::info!("stopped, after another daemon has taken over");
    }

    /// Serves what was accepted until it has ended, for at most `patience`, and tells what is `left`.
    /// Nothing more is accepted once `begun` is called.
    async fn serve_out(
        &mut self,
        patience: Duration,
        begun: impl FnOnce(),
        left: mpsc::Sender<Vec<Draining>>,
        waits: &mut Waits,
    ) {
        self.succession.has_handed_over = true;
        self.daemon.begin_draining(patience);
        let daemon = self.daemon.clone();
        let mut ended = std::pin::pin!(daemon.tunnels.hand_over(patience));
        let mut told = std::pin::pin!(drain::tell(&daemon, |all| {
            // One that is told slowly misses some.
            let _ = left.try_send(all);
        }));
        let mut drained: Option<Instant> = None;
        begun();
        // The next daemon knows of those before only through this one.
        while drained.is_none() || !self.succession.predecessor.is_gone() {
            let last = drained.unwrap_or_else(Instant::now) + patience;
            tokio::select! {
                () = &mut ended, if drained.is_none() => drained = Some(Instant::now()),
                () = sleep_until(last.into()), if drained.is_some() => break,
                () = &mut told => {}
                change = self.next_change(waits) => match change {
                    Change::Signal(Signal::Stop) => {
                        tracing::warn!("asked to stop: connections are ended");
                        return;
                    }
                    Change::RegistryEnded => {
                        tracing::error!("workloads are not followed any more: connections are ended");
                        return;
                    }
                    other => self.follow(other, waits).await,
                },
            }
        }
    }

    /// Notes what the daemon before says is left of it, or that it has ended.
    pub(super) fn hear_of_predecessor(&mut self, news: Option<Vec<Draining>>) {
        match news {
            Some(left) => self.daemon.predecessors.store(Arc::new(left)),
            None => {
                tracing::info!("the daemon before has ended");
                self.daemon.predecessors.store(Arc::default());
                self.succession.predecessors.clear();
            }
        }
        if self.daemon.is_service.load(Ordering::Relaxed) {
            process::notify_status(&self.daemon.in_a_line());
        }
    }

    fn set_frozen(&mut self, frozen: bool) {
        self.succession.frozen = frozen;
        self.daemon
            .kernel_is_anothers
            .store(frozen, Ordering::Relaxed);
    }

    /// Leaves the listeners to the service manager for the next daemon, where it keeps them:
    /// connections wait there. False where it does not.
    pub(super) fn leave_listeners(&self) -> bool {
        let kept = service::keeps_sockets() && handover::keep(&self.daemon.tunnels.sockets());
        if kept {
            tracing::info!("the service manager keeps the listeners for the next daemon");
        }
        kept
    }
}
