//! The tunnels that a worker has opened: shared by all connections from one identity to one peer.
//!
//! A tunnel is opened when a connection needs one and those there are have no free stream. All
//! that wait share the handshake under way, and are served in the order in which they came. With an
//! identity's new certificate its tunnels are proven again; those that cannot be take no more streams
//! and end with their last.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    mem,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::SendRequest};
use reeve_common::Reason;
use tokio::{sync::oneshot, task::spawn_local, time::timeout};

use crate::{
    datapath::netns::Netns,
    identity::{SpiffeId, Svid},
    telemetry::{ConnectionId, Role},
};

use super::{
    TunnelError,
    client::{self, NoStream, Target},
    error::Stage,
    first::FirstBytes,
    link::{Link, Order},
    proof,
    worker::Worker,
};

/// Tunnels tried for one connection when peers say that they have not looked at the request.
const ATTEMPTS: usize = 3;
/// Tunnels that take no streams from the beginning, one after the other, before the peer counts as one
/// that failed.
const STILLBORN: usize = 3;
/// A peer that failed is not tried again for this long at first: a burst of connections must not
/// become a burst of handshakes.
const FIRST_BACK_OFF: Duration = Duration::from_millis(50);
/// Each failure doubles the wait up to this, short enough for a peer that comes back.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(1);
/// Tunnels whose server disowns the address are replaced once in this time at most: where each of them
/// does, the peer is declared wrongly.
const DISOWNED_PAUSE: Duration = Duration::from_secs(1);

/// Which tunnel is wanted: from where and as whom, and to whom.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) netns: &'a Arc<Netns>,
    pub(super) own: &'a SpiffeId,
    /// The address that it comes from, where the kernel is not to choose one.
    pub(super) source: Option<IpAddr>,
    /// The tunnel port, whose owner must prove to be `expected`.
    pub(super) peer: SocketAddr,
    pub(super) expected: &'a SpiffeId,
    /// What the connection is called at both ends.
    pub(super) id: Option<ConnectionId>,
}

/// What tunnels are told apart by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    netns: u64,
    own: SpiffeId,
    source: Option<IpAddr>,
    peer: SocketAddr,
    expected: SpiffeId,
}

/// The tunnels of one worker.
#[derive(Default)]
pub(super) struct Pool {
    entries: RefCell<HashMap<Key, Rc<Entry>>>,
}

/// The tunnels from one identity to one peer.
struct Entry {
    /// With the identity's newest certificate that is known here.
    target: RefCell<Target>,
    /// Streams that a tunnel may have, if the peer allows as many.
    most_streams: usize,
    tunnels: RefCell<Vec<Tunnel>>,
    /// Connections that wait for a stream.
    waiting: RefCell<VecDeque<oneshot::Sender<Result<Ready, TunnelError>>>>,
    /// Handshakes under way.
    opening: Cell<usize>,
    failure: RefCell<Option<Failure>>,
    /// Tunnels, one after the other, that the peer accepted only to say that they take no streams.
    stillborn: Cell<usize>,
    /// The identity has no certificate any more, or the daemon ends: tunnels that still open serve
    /// those who wait for them and nobody else.
    retired: Cell<bool>,
    /// When a server said last that it does not have the address.
    disowned: Cell<Option<Instant>>,
}

struct Tunnel {
    link: Rc<Link>,
    request: SendRequest<Bytes>,
}

struct Failure {
    error: TunnelError,
    until: Instant,
    back_off: Duration,
}

/// A tunnel with a place for a stream.
struct Ready {
    slot: Slot,
    request: SendRequest<Bytes>,
}

/// The place of one stream in a tunnel, given to the next who waits when dropped.
pub(super) struct Slot {
    entry: Rc<Entry>,
    link: Rc<Link>,
}

/// A stream that the peer has connected to its application.
pub(super) struct Stream {
    pub(super) slot: Slot,
    pub(super) send: SendStream<Bytes>,
    pub(super) recv: RecvStream,
}

// === impl Pool ===

impl Pool {
    /// A stream to `destination`. The application's first bytes go with the request.
    pub(super) async fn stream(
        &self,
        worker: &Rc<Worker>,
        wanted: Wanted<'_>,
        destination: SocketAddr,
        first: &mut FirstBytes<'_>,
    ) -> Result<Stream, TunnelError> {
        let Wanted { peer, id, .. } = wanted;
        let called = (destination, id);
        let asked = Instant::now();
        for _ in 0..ATTEMPTS {
            let ready = self.ready(worker, wanted).await?;
            match client::request(worker, ready.request, peer, called, first).await {
                Ok((send, response)) => {
                    if proof::is_wanted(&response) {
                        ready.slot.prove(worker);
                    }
                    return Ok(Stream {
                        slot: ready.slot,
                        send,
                        recv: response.into_body(),
                    });
                }
                Err(NoStream::Failed(error)) => return Err(ready.slot.explain(error)),
                Err(NoStream::Unprocessed) => ready.slot.link.retire(),
                Err(NoStream::Disowned(error)) => {
                    if !ready.slot.disown(asked) {
                        return Err(error);
                    }
                }
            }
        }
        Err(takes_no_more(peer))
    }

    async fn ready(&self, worker: &Rc<Worker>, wanted: Wanted<'_>) -> Result<Ready, TunnelError> {
        let Wanted {
            netns,
            own,
            source,
            peer,
            expected,
            id: _,
        } = wanted;
        let limits = &worker.timeouts;
        let patience = limits.connect + limits.handshake + limits.request;
        loop {
            if worker.draining.get() {
                return Err(TunnelError::Shutdown);
            }
            if !worker.is_home(netns.cookie) {
                return Err(TunnelError::Stale("the workload"));
            }
            let svid = worker
                .shared
                .identities
                .current_soon(own)
                .await
                .ok_or_else(|| TunnelError::NoCertificate(own.clone()))?;
            let target = Target {
                netns: netns.clone(),
                svid,
                source,
                peer,
                expected: expected.clone(),
            };
            let entry = self.entry(target, worker.limits.streams_per_tunnel);
            if let Some(ready) = entry.take() {
                return Ok(ready);
            }
            let waiting = entry.wait(worker)?;
            match timeout(patience, waiting).await {
                Ok(Ok(result)) => return result,
                // The entry was retired.
                Ok(Err(_)) => {}
                Err(_) => {
                    return Err(TunnelError::Timeout {
                        stage: Stage::Stream,
                        to: peer,
                        limit: patience,
                    });
                }
            }
        }
    }

    fn entry(&self, target: Target, most_streams: u32) -> Rc<Entry> {
        let key = Key {
            netns: target.netns.cookie,
            own: target.svid.id.clone(),
            source: target.source,
            peer: target.peer,
            expected: target.expected.clone(),
        };
        let mut entries = self.entries.borrow_mut();
        if let Some(entry) = entries.get(&key) {
            entry.present(&target.svid);
            return entry.clone();
        }
        let entry = Rc::new(Entry::new(target, most_streams as usize));
        entries.insert(key, entry.clone());
        entry
    }

    /// Retires what is too old, too long without use, or told to take no more streams, and opens
    /// tunnels for those who have waited for a stream of it.
    pub(super) fn sweep(&self, worker: &Rc<Worker>, now: Instant) {
        let limits = &worker.timeouts;
        let snapshot = worker.shared.snapshot.load();
        self.entries.borrow_mut().retain(|_, entry| {
            let target = entry.target.borrow();
            for tunnel in &*entry.tunnels.borrow() {
                let link = &tunnel.link;
                // Its address may have become another workload's.
                let from = link.ends.local.ip();
                if target.speaks_from_own(&snapshot, from).is_err() {
                    link.retire();
                }
                let idle = link.idle(now);
                let (_, age) = link.proofs(now);
                // One that carries something and can be proven again is, at that age.
                let is_old = age >= limits.tunnel_age && (!link.is_provable() || idle.is_some());
                if idle >= Some(limits.tunnel_idle) || is_old {
                    link.retire();
                }
            }
            drop(target);
            entry.forget_retired();
            entry.serve_waiting();
            entry.waiting.borrow_mut().retain(|one| !one.is_closed());
            entry.open_as_needed(worker);
            entry.is_needed(now)
        });
    }

    /// Presents the newest certificates, and retires the tunnels whose identity has none.
    pub(super) fn renew(&self, worker: &Rc<Worker>) {
        let identities = &worker.shared.identities;
        self.retire(|key| identities.current(&key.own).is_none());
        for (key, entry) in &*self.entries.borrow() {
            if let Some(svid) = identities.current(&key.own) {
                entry.present(&svid);
                entry.forget_retired();
                entry.open_as_needed(worker);
            }
        }
    }

    /// Has those tunnels proven again whose time it is.
    pub(super) fn prove(&self, worker: &Rc<Worker>, now: SystemTime) {
        let age = worker.timeouts.tunnel_age;
        for entry in self.entries.borrow().values() {
            for tunnel in &*entry.tunnels.borrow() {
                let link = &tunnel.link;
                // One without streams ends soon, or is proven once it has some.
                let carries = link.is_provable() && !link.is_silent() && link.streams() > 0;
                if carries && link.plan.is_due(link.not_after(), now, age) {
                    let (link, request) = (link.clone(), tunnel.request.clone());
                    spawn_local(proof::ask(worker.clone(), link, request));
                }
            }
        }
    }

    /// Retires the tunnels that nobody uses or waits for.
    pub(super) fn retire_idle(&self) {
        for entry in self.entries.borrow().values() {
            if !entry.waiting.borrow().is_empty() {
                continue;
            }
            for tunnel in &*entry.tunnels.borrow() {
                if tunnel.link.streams() == 0 {
                    tunnel.link.retire();
                }
            }
            entry.forget_retired();
        }
    }

    /// Retires the tunnels of namespaces that are not among these.
    pub(super) fn leave(&self, namespaces: &HashSet<u64>) {
        self.retire(|key| !namespaces.contains(&key.netns));
    }

    /// Retires every tunnel.
    pub(super) fn retire_all(&self) {
        self.retire(|_| true);
    }

    fn retire(&self, outdated: impl Fn(&Key) -> bool) {
        let mut retired = Vec::new();
        self.entries.borrow_mut().retain(|key, entry| {
            let keep = !outdated(key);
            if !keep {
                retired.push(entry.clone());
            }
            keep
        });
        retired.iter().for_each(|entry| entry.retire());
    }
}

// === impl Entry ===

impl Entry {
    fn new(target: Target, most_streams: usize) -> Self {
        Self {
            target: RefCell::new(target),
            most_streams,
            tunnels: RefCell::default(),
            waiting: RefCell::default(),
            opening: Cell::new(0),
            failure: RefCell::default(),
            stillborn: Cell::new(0),
            retired: Cell::new(false),
            disowned: Cell::new(None),
        }
    }

    /// A place in the first tunnel that has one: the others then become idle and end.
    fn take(self: &Rc<Self>) -> Option<Ready> {
        self.forget_retired();
        let tunnels = self.tunnels.borrow();
        let has_room = |tunnel: &&Tunnel| {
            let for_proofs = usize::from(tunnel.link.is_provable());
            let peers_limit = tunnel.request.current_max_send_streams();
            let most = peers_limit.saturating_sub(for_proofs);
            tunnel.link.serves() && tunnel.link.streams() < self.most_streams.min(most)
        };
        let tunnel = tunnels.iter().find(has_room)?;
        tunnel.link.stream_opened();
        Some(Ready {
            slot: Slot {
                entry: self.clone(),
                link: tunnel.link.clone(),
            },
            request: tunnel.request.clone(),
        })
    }

    /// New tunnels are opened with this certificate, and what is open is proven again with it or takes
    /// no new streams.
    fn present(&self, svid: &Arc<Svid>) {
        if self.target.borrow().svid.generation == svid.generation {
            return;
        }
        self.target.borrow_mut().svid = svid.clone();
        // Peers may accept this one.
        self.failure.borrow_mut().take();
        self.stillborn.set(0);
        for tunnel in &*self.tunnels.borrow() {
            if tunnel.link.by().generation != svid.generation {
                tunnel.link.outdate(Instant::now());
            }
        }
    }

    /// Tunnels that take streams.
    fn serving(&self) -> usize {
        let tunnels = self.tunnels.borrow();
        let serving = |tunnel: &&Tunnel| tunnel.link.serves();
        tunnels.iter().filter(serving).count()
    }

    /// Queues for a stream, and opens as many tunnels as the queue needs.
    fn wait(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
    ) -> Result<oneshot::Receiver<Result<Ready, TunnelError>>, TunnelError> {
        match self.backing_off() {
            Some(error) if self.serving() == 0 => return Err(error),
            _ => {}
        }
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().push_back(sender);
        self.open_as_needed(worker);
        Ok(receiver)
    }

    /// Why no tunnel is to be opened now.
    fn backing_off(&self) -> Option<TunnelError> {
        let failure = self.failure.borrow();
        let failure = failure.as_ref()?;
        (Instant::now() < failure.until).then(|| failure.error.clone())
    }

    fn open_as_needed(self: &Rc<Self>, worker: &Rc<Worker>) {
        if self.backing_off().is_some() {
            return;
        }
        let limits = &worker.limits;
        loop {
            let under_way = self.opening.get();
            let served = under_way * self.most_streams;
            let tunnels = self.serving() + under_way;
            if self.waiting.borrow().len() <= served || tunnels >= limits.tunnels_per_peer {
                return;
            }
            self.opening.set(under_way + 1);
            spawn_local(run(worker.clone(), self.clone()));
        }
    }

    /// Gives free places to those who wait.
    fn serve_waiting(self: &Rc<Self>) {
        loop {
            let next = {
                let mut waiting = self.waiting.borrow_mut();
                while waiting.front().is_some_and(oneshot::Sender::is_closed) {
                    waiting.pop_front();
                }
                if waiting.is_empty() {
                    return;
                }
                let Some(ready) = self.take() else {
                    return;
                };
                waiting.pop_front().map(|sender| (sender, ready))
            };
            if let Some((sender, ready)) = next {
                // A waiter that went away in between gives its place back by dropping it.
                let _ = sender.send(Ok(ready));
            }
        }
    }

    fn opened(self: &Rc<Self>, link: Rc<Link>, request: SendRequest<Bytes>) {
        let mut tunnel = Tunnel { link, request };
        if tunnel.takes_streams() {
            self.failure.borrow_mut().take();
            self.stillborn.set(0);
            let outdated = tunnel.link.by().generation != self.target.borrow().svid.generation;
            let link = tunnel.link.clone();
            self.tunnels.borrow_mut().push(tunnel);
            self.serve_waiting();
            if outdated {
                link.outdate(Instant::now());
            }
        } else {
            self.stillborn.set(self.stillborn.get() + 1);
            if self.stillborn.get() >= STILLBORN {
                let peer = self.target.borrow().peer;
                self.failed(&takes_no_more(peer));
            }
        }
        if self.retired.get() {
            self.retire();
        }
    }

    fn failed(&self, error: &TunnelError) {
        let last = self.failure.borrow().as_ref().map(|last| last.back_off);
        let back_off = last.map_or(FIRST_BACK_OFF, |last| (last * 2).min(LONGEST_BACK_OFF));
        *self.failure.borrow_mut() = Some(Failure {
            error: error.clone(),
            until: Instant::now() + back_off,
            back_off,
        });
        if self.opening.get() == 0 && self.serving() == 0 {
            for waiting in mem::take(&mut *self.waiting.borrow_mut()) {
                // One that went away needs no answer.
                let _ = waiting.send(Err(error.clone()));
            }
        }
    }

    fn retire(&self) {
        self.retired.set(true);
        for tunnel in mem::take(&mut *self.tunnels.borrow_mut()) {
            tunnel.link.retire();
        }
        if self.opening.get() == 0 {
            // They look again.
            self.waiting.borrow_mut().clear();
        }
    }

    /// Lets go of tunnels that take no more streams, so that they end with their last one. Until then
    /// those are kept that can be proven again.
    fn forget_retired(&self) {
        self.tunnels
            .borrow_mut()
            .retain_mut(|tunnel| tunnel.takes_streams() || tunnel.is_kept());
    }

    fn is_needed(&self, now: Instant) -> bool {
        self.opening.get() > 0
            || !self.tunnels.borrow().is_empty()
            || !self.waiting.borrow().is_empty()
            || matches!(&*self.failure.borrow(), Some(failure) if now < failure.until + LONGEST_BACK_OFF)
    }
}

fn takes_no_more(peer: SocketAddr) -> TunnelError {
    TunnelError::Broken {
        to: peer,
        detail: "it takes no more streams".into(),
    }
}

/// Opens a tunnel and carries it until it ends.
async fn run(worker: Rc<Worker>, entry: Rc<Entry>) {
    let target = entry.target.borrow().clone();
    let result = client::open(&worker, &target).await;
    entry.opening.set(entry.opening.get() - 1);
    let tunnel = match result {
        Ok(tunnel) => tunnel,
        Err(error) => {
            tracing::warn!(
                peer = %target.peer,
                peer_id = %target.expected,
                id = %target.svid.id,
                reason = error.reason().as_str(),
                "no tunnel: {error}"
            );
            entry.failed(&error);
            return;
        }
    };
    let (link, request, driver, last) = tunnel.into_parts();
    if !worker.is_home(target.netns.cookie) {
        link.value().abandon();
    }
    entry.opened(link.value().clone(), request);
    entry.open_as_needed(&worker);
    worker.shared.metrics.tunnels_open(Role::Client, 1);
    let end = driver.await;
    worker.shared.metrics.tunnels_open(Role::Client, -1);
    worker.ended(&link, &end);
    entry.forget_retired();
    entry.open_as_needed(&worker);
    drop((link, entry));
    last.linger().await;
}

// === impl Tunnel ===

impl Tunnel {
    /// Whether neither this end nor the peer has said that it takes no more streams.
    fn takes_streams(&mut self) -> bool {
        // Nobody waits: HTTP/2 knows already.
        let mut nobody = Context::from_waker(Waker::noop());
        if let Poll::Ready(Err(_)) = self.request.poll_ready(&mut nobody) {
            self.link.retire();
        }
        self.link.is_in_time() && self.link.serves()
    }

    /// Whether it takes no streams now, and is still of use for those that it has: it can be proven
    /// again, or its peer may be heard again.
    fn is_kept(&mut self) -> bool {
        let mut nobody = Context::from_waker(Waker::noop());
        let stands = !matches!(self.request.poll_ready(&mut nobody), Poll::Ready(Err(_)));
        let open = !matches!(self.link.order(), Order::Close(_));
        let waits = self.link.is_provable() || self.link.is_silent();
        stands && open && waits && self.link.streams() > 0
    }
}

// === impl Slot ===

impl Slot {
    /// Has the tunnel proven again at once.
    fn prove(&self, worker: &Rc<Worker>) {
        let tunnels = self.entry.tunnels.borrow();
        let is_it = |tunnel: &&Tunnel| Rc::ptr_eq(&tunnel.link, &self.link);
        if let Some(tunnel) = tunnels.iter().find(is_it) {
            let (link, request) = (tunnel.link.clone(), tunnel.request.clone());
            spawn_local(proof::ask(worker.clone(), link, request));
        }
    }

    /// Retires the tunnels from before `asked`, since their server does not have the address any more:
    /// whoever had it has ended, or moved. False where that would change nothing.
    fn disown(&self, asked: Instant) -> bool {
        let last = self.entry.disowned.get();
        let just_now = last.is_some_and(|last| {
            self.link.opened >= last && asked.saturating_duration_since(last) < DISOWNED_PAUSE
        });
        if self.link.opened >= asked || just_now {
            return false;
        }
        self.entry.disowned.set(Some(Instant::now()));
        for tunnel in &*self.entry.tunnels.borrow() {
            if tunnel.link.opened < asked {
                tunnel.link.retire();
            }
        }
        true
    }

    /// The tunnel.
    pub(super) fn link(&self) -> &Rc<Link> {
        &self.link
    }

    /// To HTTP/2 a tunnel that was given up is a broken one.
    fn explain(&self, error: TunnelError) -> TunnelError {
        match (self.link.order(), error) {
            (Order::Close(Reason::Timeout), TunnelError::Broken { to, .. }) => {
                TunnelError::Silent { to }
            }
            (_, error) => error,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.link.stream_ended();
        if !self.link.serves() {
            self.entry.forget_retired();
        }
        if !self.entry.waiting.borrow().is_empty() {
            self.entry.serve_waiting();
        }
    }
}
