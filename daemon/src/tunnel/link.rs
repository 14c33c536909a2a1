//! One tunnel, as everything but its driver sees it: who is at its ends, how many streams it
//! carries, and what it has been told to do.

use std::{
    cell::{Cell, Ref, RefCell},
    net::SocketAddr,
    sync::Arc,
    task::{Context, Waker},
    time::{Duration, Instant, SystemTime},
};

use reeve_common::Reason;
use rustls_pki_types::CertificateDer;

use crate::{
    identity::{SpiffeId, TrustBundles, UsedCertificate},
    telemetry::Role,
};

use super::proof::{Plan, Secret};

/// Facts about a tunnel that do not change.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) role: Role,
    /// Own identity.
    pub(super) own: SpiffeId,
    /// The far end's authenticated identity.
    pub(super) peer: SpiffeId,
    /// The far end's address.
    pub(super) remote: SocketAddr,
    /// The own address.
    pub(super) local: SocketAddr,
    /// Cookie of the own network namespace.
    pub(super) netns: u64,
    /// What both ends of the tunnel know, where its handshake has settled that it can be proven again.
    pub(super) secret: Option<Secret>,
}

/// The certificates by which a tunnel was proven last: in its own handshake, or in a later one inside
/// of it.
#[derive(Debug)]
pub(super) struct Proven {
    /// Generation of the own material.
    pub(super) generation: u64,
    /// When the own certificate expires, or one above it.
    pub(super) own_not_after: SystemTime,
    /// The far end's certificates, leaf first, as they were verified.
    pub(super) chain: Vec<CertificateDer<'static>>,
}

/// What a tunnel has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Take streams.
    Serve,
    /// Take no new streams until it is proven again. A client's only.
    Pause,
    /// Take no new streams, and end with the last one.
    Retire,
    /// End now.
    Close(Reason),
}

/// A tunnel.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) ends: Ends,
    pub(super) opened: Instant,
    proven: RefCell<Proven>,
    /// Certificates of the far end that proved it before those of `proven`, until they expire.
    used: RefCell<Vec<UsedCertificate>>,
    /// When it was proven last, and how often since it was opened.
    proven_at: Cell<Instant>,
    proofs: Cell<u64>,
    /// How often that has failed since it last has not, and why at last.
    unproven: RefCell<(u64, Option<String>)>,
    /// When it is to be proven next; the client's.
    pub(super) plan: Plan,
    /// A proof is under way, and when the last one began.
    proving: Cell<bool>,
    proving_since: Cell<Option<Instant>>,
    /// Traffic keys are to be renewed.
    renew_keys: Cell<bool>,
    streams: Cell<usize>,
    served: Cell<bool>,
    /// When the last stream ended, or the tunnel was opened.
    idle_since: Cell<Instant>,
    order: Cell<Order>,
    /// No workload runs in its namespace any more.
    abandoned: Cell<bool>,
    /// The peer has not answered the last PING in time.
    silent: Cell<bool>,
    /// Since its own certificate is not the newest any more.
    outdated_since: Cell<Option<Instant>>,
    /// Streams whose application has not read for a while: each holds up to a stream's window of
    /// what the whole tunnel may have outstanding.
    stalled: Cell<usize>,
    /// The bundles by which the peer was last judged since the tunnel was opened, and until when they
    /// accept it.
    judged: RefCell<Option<(Arc<TrustBundles>, SystemTime)>>,
    /// When the first certificate of either end expires, or one above it.
    not_after: Cell<SystemTime>,
    driver: RefCell<Option<Waker>>,
}

impl Link {
    pub(super) fn new(ends: Ends, proven: Proven) -> Self {
        let now = Instant::now();
        Self {
            not_after: Cell::new(proven.own_not_after),
            ends,
            proven: RefCell::new(proven),
            used: RefCell::default(),
            proven_at: Cell::new(now),
            proofs: Cell::new(0),
            unproven: RefCell::default(),
            plan: Plan::default(),
            proving: Cell::new(false),
            proving_since: Cell::new(None),
            renew_keys: Cell::new(false),
            opened: now,
            streams: Cell::new(0),
            served: Cell::new(false),
            idle_since: Cell::new(now),
            order: Cell::new(Order::Serve),
            abandoned: Cell::new(false),
            silent: Cell::new(false),
            outdated_since: Cell::new(None),
            stalled: Cell::new(0),
            judged: RefCell::new(None),
            driver: RefCell::new(None),
        }
    }

    /// Streams open now.
    pub(super) fn streams(&self) -> usize {
        self.streams.get()
    }

    pub(super) fn stream_opened(&self) {
        self.streams.set(self.streams.get() + 1);
        self.served.set(true);
    }

    /// Whether the tunnel has ever had a stream.
    pub(super) fn has_served(&self) -> bool {
        self.served.get()
    }

    pub(super) fn stream_ended(&self) {
        self.streams.set(self.streams.get().saturating_sub(1));
        self.idle_since.set(Instant::now());
    }

    /// How long the tunnel has had no stream; none while it has one.
    pub(super) fn idle(&self, now: Instant) -> Option<Duration> {
        (self.streams() == 0).then(|| now.saturating_duration_since(self.idle_since.get()))
    }

    /// Takes no new streams from now on.
    pub(super) fn retire(&self) {
        if matches!(self.order.get(), Order::Serve | Order::Pause) {
            self.give(Order::Retire);
        }
    }

    /// No workload runs in its namespace any more: takes no new streams, and ends soon.
    pub(super) fn abandon(&self) {
        if !self.abandoned.replace(true) {
            self.retire();
            self.wake();
        }
    }

    /// Whether no workload runs in its namespace any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.get()
    }

    /// Takes no new streams until it is proven again.
    pub(super) fn pause(&self) {
        if self.order.get() == Order::Serve {
            self.give(Order::Pause);
        }
    }

    /// Its own certificate was replaced: retires, unless it is worth a proof with the new one.
    pub(super) fn outdate(&self, now: Instant) {
        if self.outdated_since.get().is_none() {
            self.outdated_since.set(Some(now));
            self.plan.hurry();
        }
        let is_client = self.ends.role == Role::Client;
        if !self.is_provable() || (is_client && self.streams() == 0) {
            self.retire();
        }
    }

    /// How long ago its own certificate was replaced; none where it is the newest.
    pub(super) fn outdated(&self, now: Instant) -> Option<Duration> {
        let since = self.outdated_since.get()?;
        Some(now.saturating_duration_since(since))
    }

    /// Ends as soon as the driver runs. The first reason given stands.
    pub(super) fn close(&self, reason: Reason) {
        if !matches!(self.order.get(), Order::Close(_)) {
            self.give(Order::Close(reason));
        }
    }

    /// Whether the peer answers nothing at the moment: what it carries waits, and new streams go
    /// elsewhere.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.get()
    }

    /// Sets [`Self::is_silent`].
    pub(super) fn set_silent(&self, silent: bool) {
        self.silent.set(silent);
    }

    /// Whether it takes new streams.
    pub(super) fn serves(&self) -> bool {
        self.order.get() == Order::Serve && !self.silent.get()
    }

    // === Proofs ===

    /// Whether it can be proven again underneath its streams.
    pub(super) fn is_provable(&self) -> bool {
        self.ends.secret.is_some()
    }

    /// By what it was proven last.
    pub(super) fn by(&self) -> Ref<'_, Proven> {
        self.proven.borrow()
    }

    /// Certificates of the far end that proved it before, and have not expired.
    pub(super) fn used(&self, now: SystemTime) -> Ref<'_, Vec<UsedCertificate>> {
        self.used.borrow_mut().retain(|used| !used.is_expired(now));
        self.used.borrow()
    }

    /// It has been proven again. `used` are the far end's certificates that count no longer for it.
    pub(super) fn prove(&self, by: Proven, used: Vec<UsedCertificate>) {
        let mut known = self.used.borrow_mut();
        for certificate in used {
            if !known.contains(&certificate) {
                known.push(certificate);
            }
        }
        drop(known);
        self.proven.replace(by);
        self.judged.replace(None);
        self.proven_at.set(Instant::now());
        self.proofs.set(self.proofs.get() + 1);
        self.outdated_since.set(None);
        self.renew_keys.set(true);
        if self.order.get() == Order::Pause {
            self.order.set(Order::Serve);
        }
        self.wake();
    }

    /// How often it was proven again, and the time since it was proven last.
    pub(super) fn proofs(&self, now: Instant) -> (u64, Duration) {
        let since = now.saturating_duration_since(self.proven_at.get());
        (self.proofs.get(), since)
    }

    /// Notes how a proof has ended: why it has failed, if it has.
    pub(super) fn note_proof(&self, error: Option<String>) {
        let mut unproven = self.unproven.borrow_mut();
        let failed = error.as_ref().map_or(0, |_| unproven.0 + 1);
        *unproven = (failed, error);
    }

    /// How often it could not be proven again since it last was, and why at last.
    pub(super) fn unproven(&self) -> (u64, Option<String>) {
        self.unproven.borrow().clone()
    }

    /// Begins a proof, unless one is under way, or has begun less than `pause` ago. To be followed by
    /// [`Self::end_proof`].
    pub(super) fn begin_proof(&self, pause: Duration) -> bool {
        let now = Instant::now();
        let last = self.proving_since.get();
        let too_soon = last.is_some_and(|last| now.saturating_duration_since(last) < pause);
        if self.proving.get() || too_soon {
            return false;
        }
        self.proving.set(true);
        self.proving_since.set(Some(now));
        true
    }

    /// A proof has come to its end.
    pub(super) fn end_proof(&self) {
        self.proving.set(false);
    }

    /// Whether the traffic keys are to be renewed; said once.
    pub(super) fn take_key_renewal(&self) -> bool {
        self.renew_keys.take()
    }

    /// What the tunnel has been told last.
    pub(super) fn order(&self) -> Order {
        self.order.get()
    }

    /// Until when these very bundles accept the peer; none where they have not judged it.
    pub(super) fn accepted_until(&self, bundles: &Arc<TrustBundles>) -> Option<SystemTime> {
        let judged = self.judged.borrow();
        let (by, until) = judged.as_ref()?;
        Arc::ptr_eq(by, bundles).then_some(*until)
    }

    /// These bundles accept the peer, until a time.
    pub(super) fn accepted(&self, by: Arc<TrustBundles>, until: SystemTime) {
        self.judged.replace(Some((by, until)));
    }

    /// When the first certificate of either end expires, or one above it.
    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after.get()
    }

    /// Sets [`Self::not_after`].
    pub(super) fn expires(&self, not_after: SystemTime) {
        self.not_after.set(not_after);
    }

    /// Whether no certificate has expired since the tunnel was last looked at; ends it where one has.
    /// For each new stream, which is not to wait for the next look.
    pub(super) fn is_in_time(&self) -> bool {
        let in_time = SystemTime::now() <= self.not_after.get();
        if !in_time {
            self.close(Reason::CertificateExpired);
        }
        in_time
    }

    /// Sets the number of streams that hold their whole window.
    pub(super) fn set_stalled(&self, streams: usize) {
        if self.stalled.replace(streams) != streams {
            self.wake();
        }
    }

    pub(super) fn stalled(&self) -> usize {
        self.stalled.get()
    }

    /// The driver is to be woken when anything here changes.
    pub(super) fn watch(&self, cx: &Context<'_>) {
        let mut driver = self.driver.borrow_mut();
        match &mut *driver {
            Some(waker) => waker.clone_from(cx.waker()),
            None => *driver = Some(cx.waker().clone()),
        }
    }

    fn give(&self, order: Order) {
        self.order.set(order);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = &*self.driver.borrow() {
            waker.wake_by_ref();
        }
    }
}
