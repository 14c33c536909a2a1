//! Taking over from the daemon before, and handing over to the next one.

use std::{
    collections::HashSet,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::block_in_place,
    time::sleep_until,
};

use super::{
    Change, Control, RunError, Waits,
    drain::{self, MOVE, News, Predecessors, id},
    follow_events, process,
    reconcile::describe,
    service::{self, StandIn},
    signals::Signal,
};
use crate::handover::{
    self, Asker, Before, Comer, Draining, Offer, Order, Request, Rest, Takeover, TakeoverError,
    Word,
};

/// For this daemon to become ready, before it gives up taking over: certificates that are not
/// there by then are not about to be.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How often a daemon that is about to take over looks whether it is ready.
pub(super) const READY_LOOK: Duration = Duration::from_millis(50);
/// Requests of a daemon that takes over, of which there is one at a time.
const REQUESTS: usize = 1;
/// First wait of an old daemon before it looks again for one that hears it; doubled at each further one.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// Longest such wait.
const LONGEST_LOOK: Duration = Duration::from_secs(15);
/// For an old daemon that no other one hears any more to ask sources of certificates again: one that is
/// restarted passes them soon.
const ALONE: Duration = Duration::from_secs(2);
/// For how long an old daemon goes on that no other one hears. Nobody would see it.
const UNHEARD: Duration = Duration::from_secs(600);
/// For daemons before to end, after they were to have ended: longer than their tunnels take.
pub(super) const LEAVE: Duration = Duration::from_secs(8);

/// What connects this daemon with the one before and the next one.
#[derive(Debug)]
pub(super) struct Succession {
    /// A hand-over to this daemon that has begun.
    takeover: Option<Takeover>,
    /// Since when inherited listeners wait for this daemon to be ready.
    waiting_since: Option<Instant>,
    /// Own cgroups of daemons before that still drain.
    pub(super) old_cgroups: Vec<(u64, u32)>,
    /// The daemons before.
    pub(super) predecessors: Predecessors,
    /// Those of them that are to end since there were too many: process and start. It stays: while one
    /// moves here nobody tells of it.
    too_many: HashSet<(u32, u64)>,
    /// How long those before may go on, where a command has said so.
    end_old_after: Option<Duration>,
    /// The same, once this daemon has taken over.
    end_old_at: Option<Instant>,
    /// Another daemon serves, or is about to, and what concerns all of the node is its to do.
    pub(super) frozen: bool,
    /// The maps are still this daemon's, since those of the other one have another layout.
    pub(super) beside: bool,
    /// Cgroups of daemons that have come after this one, where the maps are this one's.
    pub(super) next_cgroups: Vec<(u64, u32)>,
    /// Cgroups of all daemons before of which this one has sockets.
    inherited_cgroups: Vec<(u64, u32)>,
    /// Another daemon serves, and this one what it has accepted: there is no way back.
    pub(super) has_handed_over: bool,
    /// Which of the kernel's events are this daemon's to tell of.
    pub(super) events: watch::Sender<Reported>,
    pub(super) requests: mpsc::Receiver<Request>,
    sender: mpsc::Sender<Request>,
    /// Whether the next daemon is waited for.
    has_begun: bool,
    /// When what this daemon has accepted is ended, once another one serves.
    until: watch::Sender<Option<Instant>>,
    /// Who tells another daemon what is left of this one.
    teller: Arc<ArcSwapOption<mpsc::Sender<Rest>>>,
    /// The same for one that has not said yet that it hears: until then the one before is told.
    next_teller: Option<mpsc::Sender<Rest>>,
    /// When sources of certificates are asked again, unless another daemon passes these.
    pub(super) asks_at: Option<Instant>,
    /// No other daemon hears what is left of this one.
    unheard: Option<Unheard>,
}

/// Which of the kernel's events a daemon tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    All,
    /// Another daemon's programs judge as well, and tell of what passes.
    Refusals,
    /// Another daemon reads them.
    Nothing,
}

/// Since when an old daemon is heard by no other one, and when it looks for one again.
#[derive(Clone, Copy, Debug)]
struct Unheard {
    since: Instant,
    pause: Duration,
    again: Option<Instant>,
}

// === impl Succession ===

impl Succession {
    /// `inherited` are the cookies of the namespaces whose listeners another process opened.
    pub(super) fn new(
        takeover: Option<Takeover>,
        inherited: &HashSet<u64>,
        end_old_after: Option<Duration>,
    ) -> Self {
        let (sender, requests) = mpsc::channel(REQUESTS);
        let waits = takeover.is_some() || !inherited.is_empty();
        let before = takeover.as_ref().map(|takeover| &takeover.offer);
        let old_cgroups = before.map_or_else(Vec::new, |offer| offer.own_cgroups.clone());
        Self {
            inherited_cgroups: old_cgroups.clone(),
            old_cgroups,
            takeover,
            waiting_since: waits.then(Instant::now),
            predecessors: Predecessors::new(),
            too_many: HashSet::new(),
            end_old_after,
            end_old_at: None,
            frozen: false,
            beside: false,
            next_cgroups: Vec::new(),
            has_handed_over: false,
            events: watch::Sender::new(Reported::All),
            requests,
            sender,
            has_begun: false,
            until: watch::Sender::new(None),
            teller: Arc::default(),
            next_teller: None,
            asks_at: None,
            unheard: None,
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

    /// When an old daemon that nobody hears looks for one that does; none where it is heard.
    pub(super) fn looks_at(&self) -> Option<Instant> {
        self.unheard.and_then(|unheard| unheard.again)
    }

    /// Looks for another daemon some time later.
    fn look_later(&mut self) {
        let unheard = self.unheard.get_or_insert_with(|| Unheard {
            since: Instant::now(),
            pause: FIRST_LOOK,
            again: None,
        });
        unheard.again = Some(Instant::now() + unheard.pause);
        unheard.pause = (unheard.pause * 2).min(LONGEST_LOOK);
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
            && !matches!(Order::read(report), Ok(Some(Order::Upgrade { .. })))
        {
            return Err(RunError::Takeover(TakeoverError::Withdrawn));
        }
        self.succession.waiting_since = None;
        let Some(takeover) = self.succession.takeover.take() else {
            self.daemon.tunnels.release();
            handover::forget_kept();
            return Ok(());
        };
        let offer = takeover.offer.clone();
        let before = if offer.beside {
            // What the old programs have sent to the listener, the old daemon alone knows: it accepts that
            // first.
            let before = block_in_place(|| takeover.take())?;
            // There is no way back. What fails is tried again.
            if let Err(error) = block_in_place(|| self.daemon.datapath.take_place()) {
                tracing::error!("{}", describe(&error));
            }
            self.daemon.tunnels.release();
            before
        } else {
            self.daemon.tunnels.release();
            block_in_place(|| takeover.take())?
        };
        tracing::info!(
            version = offer.version,
            process = offer.process,
            "took over from another daemon, which drains"
        );
        self.daemon.is_service.store(true, Ordering::Relaxed);
        let now = Instant::now();
        self.succession.end_old_at = self.succession.end_old_after.map(|after| now + after);
        self.hear(before);
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
            let told = self.succession.events.subscribe();
            let snapshot = self.snapshot.clone();
            tokio::spawn(follow_events(kernel, events, datapath, snapshot, told));
        }
        let config = self.daemon.config.load();
        if !self.succession.has_begun {
            self.succession.has_begun = true;
            let requests = self.succession.sender.clone();
            handover::Listener::bind(&config.admin.socket)
                .and_then(|listener| listener.serve(config.ports, config.sandbox, requests))
                .map_err(RunError::HandOver)?;
        }
        Ok(())
    }

    /// Leaves the kernel's maps to another daemon, unless its own have another layout, and says what there
    /// is to hand over.
    pub(super) async fn freeze(
        &mut self,
        asker: Asker,
        answer: oneshot::Sender<Result<(Offer, Vec<OwnedFd>), String>>,
    ) {
        let admitted = match self.succession.has_handed_over {
            true => Err("another daemon has its place already".to_owned()),
            false => service::admits(&asker),
        };
        if let Err(why) = admitted {
            // Whoever asked has gone, and is refused all the same.
            let _ = answer.send(Err(why));
            return;
        }
        self.set_frozen(true);
        self.succession.beside = asker.beside;
        // Before it opens any socket.
        self.succession.predecessors.tell_of(&asker.own_cgroups);
        if asker.beside {
            self.know_next(&asker.own_cgroups).await;
        } else {
            self.succession.events.send_replace(Reported::Nothing);
        }
        let mut own_cgroups = self.own_cgroups.clone();
        own_cgroups.extend(&self.succession.old_cgroups);
        own_cgroups.extend(&self.succession.inherited_cgroups);
        own_cgroups.sort_unstable();
        own_cgroups.dedup();
        let offer = Offer {
            beside: asker.beside,
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
        let datapath = self.daemon.datapath.clone();
        let resumed = block_in_place(|| match self.succession.beside {
            // What is held still is removed a little later.
            true => datapath.sweep().map(drop),
            false => datapath.take_back(),
        });
        if let Err(error) = resumed {
            tracing::error!(
                "the kernel's side is not as it should be after a hand-over that failed: {}",
                describe(&error)
            );
        }
        self.set_frozen(false);
        self.succession.beside = false;
        self.succession.next_cgroups.clear();
        self.succession.events.send_replace(Reported::All);
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
        self.daemon.datapath.let_go();
        self.succession.events.send_replace(Reported::Nothing);
        handover::leave(&self.daemon.config.load().admin.socket);
        if !handover::keep(&self.endpoints.sockets()) {
            tracing::warn!("the next daemon opens its own metrics endpoint and admin socket");
        }
        self.daemon.is_service.store(false, Ordering::Relaxed);
        self.endpoints.leave();
        // The next daemon is told once it serves.
        self.succession.look_later();
        let begun = move || block_in_place(|| stand_in.end());
        self.serve_out(Some(patience), begun, waits).await;
    }

    /// Accepts no more, since the other daemon does, and lets connections end. They are still
    /// judged by whatever changes.
    pub(super) async fn hand_over(
        &mut self,
        process: i32,
        done: oneshot::Sender<()>,
        rest: mpsc::Sender<Rest>,
        waits: &mut Waits,
    ) {
        let patience = self.daemon.config.load().timeouts.hand_over;
        let patience = (patience > Duration::ZERO).then_some(patience);
        if self.succession.beside {
            self.step_aside().await;
        } else {
            self.daemon.datapath.let_go();
        }
        tracing::info!(
            process,
            patience = patience.map(|patience| humantime::format_duration(patience).to_string()),
            "handed over to another daemon: connections may end by themselves"
        );
        self.succession.teller.store(Some(Arc::new(rest)));
        self.daemon.is_service.store(false, Ordering::Relaxed);
        process::notify_successor(process);
        self.endpoints.leave();
        // Whoever asked may be gone, and accepts all the same: there is no way back.
        let begun = || {
            let _ = done.send(());
        };
        self.serve_out(patience, begun, waits).await;
        if self.succession.beside {
            self.retire();
        }
        tracing::info!("stopped, after another daemon has taken over");
    }

    /// Serves what was accepted until it has ended, for at most `patience` where there is one. Nothing more
    /// is accepted once `begun` is called.
    async fn serve_out(
        &mut self,
        patience: Option<Duration>,
        begun: impl FnOnce(),
        waits: &mut Waits,
    ) {
        self.succession.has_handed_over = true;
        let until = patience.map(|patience| Instant::now() + patience);
        self.succession.until.send_replace(until);
        self.daemon.drain_until(until);
        let daemon = self.daemon.clone();
        let until = self.succession.until.subscribe();
        let mut ended = std::pin::pin!(daemon.tunnels.hand_over(until));
        let teller = self.succession.teller.clone();
        let mut told = std::pin::pin!(drain::tell(&daemon, |rest| {
            if let Some(teller) = &*teller.load() {
                // One that is told slowly misses some.
                let _ = teller.try_send(rest);
            }
        }));
        begun();
        self.succession.predecessors.tell(Word::Move);
        let mut drained: Option<Instant> = None;
        // Those before it that have not moved are known to this one alone.
        while drained.is_none() || !self.succession.predecessors.are_gone() {
            tokio::select! {
                () = &mut ended, if drained.is_none() => drained = Some(Instant::now()),
                () = at(drained.map(|drained| drained + MOVE)) => {
                    if self.succession.until.borrow().is_some() {
                        self.succession.predecessors.kill();
                    }
                    return;
                }
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

    /// Does what the daemon that took over says.
    pub(super) async fn obey(&mut self, word: Word) {
        match word {
            Word::Reload => {
                self.reload_everything().await;
            }
            Word::Move => {
                self.ask_sources_after(MOVE);
                block_in_place(|| self.look_for_successor());
            }
            Word::Certificates => {
                self.succession.asks_at = None;
                if self.daemon.identities.expect_passed(true) {
                    tracing::info!(
                        "the daemon that serves passes certificates: sources are not asked"
                    );
                }
            }
            Word::EndWithin { seconds } => {
                // Those that have not moved yet.
                self.succession.predecessors.tell(word);
                self.end_within(Duration::from_secs(seconds));
            }
            Word::EndOne {
                process,
                started,
                seconds,
            } => {
                if (process, started) == (std::process::id(), self.daemon.started_at) {
                    self.end_within(Duration::from_secs(seconds));
                } else {
                    self.succession.predecessors.tell(word);
                }
            }
        }
    }

    /// Sources of certificates are asked again after `patience`, unless another daemon passes these by then.
    fn ask_sources_after(&mut self, patience: Duration) {
        if self.daemon.identities.expects_passed() {
            let at = Instant::now() + patience;
            self.succession.asks_at.get_or_insert(at);
        }
    }

    /// Asks sources of certificates again, since no other daemon passes these.
    pub(super) fn ask_sources(&mut self) {
        self.succession.asks_at = None;
        if self.daemon.identities.expect_passed(false) {
            tracing::warn!("no daemon passes certificates any more: sources are asked again");
        }
    }

    /// Connections are ended after `patience`, if that is not due before: then the time is given.
    fn end_within(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        let is_due_before = |due: &Instant| *due <= until;
        if self
            .succession
            .until
            .borrow()
            .as_ref()
            .is_some_and(is_due_before)
        {
            return;
        }
        tracing::warn!(
            patience = %humantime::format_duration(patience),
            "told to end: connections may end by themselves until then"
        );
        self.succession.until.send_replace(Some(until));
        self.daemon.drain_until(Some(until));
    }

    /// Notes that another daemon hears what is left of this one, or that none does.
    pub(super) fn is_heard(&mut self, is_heard: bool) {
        if is_heard {
            self.succession.unheard = None;
            if let Some(teller) = self.succession.next_teller.take() {
                self.succession.teller.store(Some(Arc::new(teller)));
            }
        } else {
            self.ask_sources_after(ALONE);
            self.succession.look_later();
        }
    }

    /// Looks for the daemon that serves, to tell it what is left of this one.
    pub(super) fn look_for_successor(&mut self) {
        let mut since = Instant::now();
        if let Some(unheard) = &mut self.succession.unheard {
            unheard.again = None;
            since = unheard.since;
        }
        let config = self.daemon.config.load_full();
        if since.elapsed() > UNHEARD {
            tracing::warn!(
                since = %humantime::format_duration(UNHEARD),
                "no daemon serves that knows of this one"
            );
            let patience = config.timeouts.drain;
            // It looks no more: there is an end.
            self.end_within(patience);
            return;
        }
        let (rest, told) = mpsc::channel(1);
        let mut own_cgroups = self.own_cgroups.clone();
        own_cgroups.extend(&self.succession.old_cgroups);
        let requests = self.succession.sender.clone();
        let come = handover::come(
            &config.admin.socket,
            own_cgroups,
            config.sandbox,
            told,
            requests,
        );
        match come {
            Ok(()) => self.succession.next_teller = Some(rest),
            Err(error) => {
                tracing::debug!(%error, "no daemon hears what is left of this one");
                self.succession.look_later();
            }
        }
    }

    /// Hears an old daemon that has come, if this one serves.
    pub(super) fn welcome(&mut self, comer: Comer) {
        // Where it does not, the old daemon looks for another one.
        if self.succession.has_handed_over || self.succession.is_taking_over() {
            return;
        }
        match Before::hear(comer, self.daemon.config.load().sandbox) {
            Ok(before) => self.hear(before),
            Err(error) => tracing::warn!(%error, "an old daemon cannot be heard"),
        }
    }

    /// Hears one more daemon, from which another one took over.
    fn hear(&mut self, before: Before) {
        before.tell_of(&self.own_cgroups);
        // First, so that it asks no source when it reads everything again.
        before.tell(Word::Certificates);
        // Where this one was started with another configuration.
        before.tell(Word::Reload);
        // One that was on its way here has not heard it from the one before.
        if let Some(at) = self.succession.end_old_at {
            before.tell(within(at.saturating_duration_since(Instant::now())));
        }
        for cgroup in &before.own_cgroups {
            if !self.succession.old_cgroups.contains(cgroup) {
                self.succession.old_cgroups.push(*cgroup);
            }
        }
        let identities = self.daemon.identities.clone();
        self.succession.predecessors.add(before, identities);
    }

    /// Notes what a daemon before says is left of it, or that it has ended. True where the last one has.
    pub(super) fn hear_of_predecessor(&mut self, news: News) -> bool {
        if news.1.is_none() {
            tracing::info!("a daemon before has ended");
            self.sweep();
        }
        let were_last = self.succession.predecessors.note(news);
        if were_last {
            self.succession.old_cgroups.clear();
        }
        let all = self.succession.predecessors.all();
        self.daemon.predecessors.store(Arc::new(all));
        if !self.succession.has_handed_over {
            self.bound_predecessors();
        }
        if self.daemon.is_service.load(Ordering::Relaxed) {
            process::notify_status(&self.daemon.in_a_line());
        }
        were_last
    }

    /// Ends the oldest of the daemons before, where there are more than may be. One that is on its way
    /// here hears nobody, so that each is told until it says itself when it ends.
    fn bound_predecessors(&mut self) {
        let config = self.daemon.config.load_full();
        let (most, patience) = (config.limits.predecessors, config.timeouts.drain);
        let all = self.daemon.predecessors.load();
        let too_many = &mut self.succession.too_many;
        let staying = all.iter().filter(|daemon| !too_many.contains(&id(daemon)));
        let oldest: Vec<_> = staying.skip(most).map(id).collect();
        for daemon in all.iter().filter(|daemon| oldest.contains(&id(daemon))) {
            tracing::warn!(
                most,
                patience = %humantime::format_duration(patience),
                "more old daemons than `limits.predecessors`: the oldest lets its connections end: {daemon}"
            );
        }
        too_many.extend(oldest);
        let goes_on = |daemon: &&Draining| {
            let left = daemon.left.as_ref().and_then(|left| left.seconds);
            left.is_none_or(|seconds| seconds > patience.as_secs())
        };
        let told = all.iter().filter(|daemon| too_many.contains(&id(daemon)));
        for daemon in told.filter(goes_on) {
            self.succession.predecessors.tell(Word::EndOne {
                process: daemon.process,
                started: daemon.started,
                seconds: patience.as_secs(),
            });
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

/// The word that has old daemons end.
pub(super) fn within(patience: Duration) -> Word {
    Word::EndWithin {
        seconds: patience.as_secs_f64().ceil() as u64,
    }
}

/// Waits for a moment; for ever where there is none.
pub(super) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
