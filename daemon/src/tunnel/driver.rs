//! Keeps one tunnel going: HTTP/2's own work, sending what it wrote, PING, and what the tunnel is
//! told through its [`Link`].

use std::{
    future::Future,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, PingPong, RecvStream, server::SendResponse};
use http::Request;
use reeve_common::Reason;
use tokio::time::{Instant, Sleep, sleep};

use super::{
    link::{Link, Order},
    wire::{Wire, WireControl},
    worker::Worker,
};

/// More than this is never outstanding in one tunnel, however many of its streams are stalled.
pub(super) const MOST_OUTSTANDING: u32 = 64 << 20;

/// Between the GOAWAY from which a peer learns that it is to open no more streams here, and the PING
/// whose answer says that it has. HTTP/2's library answers a PING before it sends requests that are
/// queued already; those would come too late, and not every client asks again elsewhere.
const NOTICE: Duration = Duration::from_millis(500);

/// What a peer has at least, from when it was found to be silent: this daemon itself may have stood still.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// Where the workload has ended, its addresses may have gone as well, and nothing answers: a tunnel that
/// still has something to send keeps the namespace for so long.
const ABANDONED: Duration = Duration::from_secs(10);

/// A request that a peer sent.
pub(super) type Incoming = (Request<RecvStream>, SendResponse<Bytes>);

/// What the driver needs of either end of HTTP/2.
pub(super) trait Protocol: Unpin {
    /// Goes on; a new stream of the peer comes out. `None`: the connection is over.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, h2::Error>>>;
    /// Handle for PINGs; given once.
    fn pings(&mut self) -> Option<PingPong>;
    /// What the whole tunnel may have outstanding.
    fn set_window(&mut self, bytes: u32);
    /// Whether the peer opens streams, and has to be told beforehand when it is to open no more.
    const OPENED_BY_PEER: bool;
    /// Takes no new streams.
    fn retire(&mut self);
    /// Tells the peer, where HTTP/2 lets us, that it has gone too far.
    fn calm(&mut self);
}

/// How a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// In good order.
    #[error("closed")]
    Closed,
    /// It was told to.
    #[error("closed: {}", .0.describe())]
    Told(Reason),
    /// HTTP/2, TLS or TCP failed.
    #[error("broken: {0}")]
    Broken(String),
    /// The peer sent more than HTTP/2, or we, put up with.
    #[error("the peer floods it: {0}")]
    Flood(String),
    /// Nothing was heard of the peer for too long.
    #[error("the peer has answered nothing for too long")]
    Silent,
    /// The kernel has given up on the peer, which acknowledges nothing or cannot be reached.
    #[error("the peer acknowledges nothing any more: {0}")]
    Lost(String),
}

/// The future that carries a tunnel until it ends.
pub(super) struct Driver<P, F> {
    protocol: P,
    control: WireControl,
    link: Rc<Link>,
    heartbeat: Heartbeat,
    on_stream: F,
    stream_window: u32,
    tunnel_window: u32,
    /// Streams for whose stalling the window has been widened.
    widened: usize,
    /// Since the peer was told to open no more streams.
    notice: Option<Pin<Box<Sleep>>>,
    retired: bool,
    abandoned: bool,
}

impl<P: Protocol, F: FnMut(Incoming)> Driver<P, F> {
    /// `on_stream` is called for each stream that the peer opens.
    pub(super) fn new(
        worker: &Worker,
        mut protocol: P,
        control: WireControl,
        link: Rc<Link>,
        on_stream: F,
    ) -> Self {
        let heartbeat = Heartbeat::new(
            protocol.pings(),
            worker.timeouts.ping,
            worker.timeouts.ping_answer,
            worker.timeouts.silent,
        );
        Self {
            protocol,
            control,
            link,
            heartbeat,
            on_stream,
            stream_window: worker.limits.stream_window,
            tunnel_window: worker.limits.tunnel_window,
            widened: 0,
            notice: None,
            retired: false,
            abandoned: false,
        }
    }

    fn obey(&mut self, cx: &mut Context<'_>) -> Option<End> {
        match self.link.order() {
            Order::Serve | Order::Pause => {}
            Order::Retire if self.retired => {}
            Order::Retire => {
                if self.poll_noticed(cx).is_ready() {
                    self.retired = true;
                    self.protocol.retire();
                }
            }
            Order::Close(reason) => {
                self.control.close(cx);
                return Some(End::Told(reason));
            }
        }
        if self.link.is_abandoned() && !self.abandoned {
            self.abandoned = true;
            self.control.set_patience(ABANDONED);
        }
        if self.link.take_key_renewal() {
            self.control.renew_keys();
        }
        if self.widened != self.link.stalled() {
            self.widened = self.link.stalled();
            let stalled = u32::try_from(self.widened).unwrap_or(u32::MAX);
            self.protocol.set_window(
                self.stream_window
                    .saturating_mul(stalled)
                    .saturating_add(self.tunnel_window)
                    .min(MOST_OUTSTANDING.max(self.tunnel_window)),
            );
        }
        None
    }

    /// Tells the peer to open no more streams. Ready when it has had the time to obey.
    fn poll_noticed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !P::OPENED_BY_PEER {
            return Poll::Ready(());
        }
        let notice = self.notice.get_or_insert_with(|| {
            self.control.give_notice();
            Box::pin(sleep(NOTICE))
        });
        notice.as_mut().poll(cx)
    }

    fn failed(&self, error: &h2::Error) -> End {
        if error.is_library() && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) {
            return End::Flood(error.to_string());
        }
        match error.get_io() {
            Some(error) => self.failed_below(error),
            None => self.broken(error),
        }
    }

    /// TLS or TCP failed.
    fn failed_below(&self, error: &io::Error) -> End {
        use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
        match error.kind() {
            TimedOut | HostUnreachable | NetworkUnreachable => End::Lost(error.to_string()),
            _ => self.broken(error),
        }
    }

    fn broken(&self, error: &dyn std::fmt::Display) -> End {
        // HTTP/2 keeps no more than a text of what was wrong below it.
        match self.control.fault() {
            Some(fault) => End::Broken(fault.to_string()),
            None => End::Broken(error.to_string()),
        }
    }
}

impl<P: Protocol, F: FnMut(Incoming) + Unpin> Future for Driver<P, F> {
    type Output = End;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        let this = self.get_mut();
        this.link.watch(cx);
        if let Some(end) = this.obey(cx) {
            return Poll::Ready(end);
        }
        loop {
            match this.protocol.poll_next(cx) {
                Poll::Ready(Some(Ok(stream))) => (this.on_stream)(stream),
                Poll::Ready(Some(Err(error))) => {
                    let end = this.failed(&error);
                    // The last GOAWAY says why; nothing more can be done if it cannot be sent.
                    let _ = this.control.poll_send(cx);
                    return Poll::Ready(end);
                }
                Poll::Ready(None) => {
                    let _ = this.control.poll_send(cx);
                    return Poll::Ready(End::Closed);
                }
                Poll::Pending => break,
            }
        }
        if this.control.is_flooded() {
            this.protocol.calm();
            // The tunnel ends in any case: what cannot be sent now is not sent.
            let _ = this.protocol.poll_next(cx);
            let _ = this.control.poll_send(cx);
            return Poll::Ready(End::Flood(
                "more than `limits.controlFrames` frames that carry nothing".into(),
            ));
        }
        if this.heartbeat.poll_stopped(cx).is_ready() {
            return Poll::Ready(End::Silent);
        }
        this.link.set_silent(this.heartbeat.silent);
        match this.control.poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(this.failed_below(&error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    }
}

// === Heartbeat ===

/// Sends PINGs and waits for their answers. A peer that does not answer in time is silent: a wire may be
/// cut, or a host stand still, and what the tunnel carries waits for it as TCP would.
struct Heartbeat {
    pings: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    /// When the peer was heard last.
    heard: Instant,
    silent: bool,
    interval: Duration,
    patience: Duration,
    /// A peer that is silent for so long counts as gone.
    limit: Duration,
}

impl Heartbeat {
    fn new(
        pings: Option<PingPong>,
        interval: Duration,
        patience: Duration,
        limit: Duration,
    ) -> Self {
        Self {
            pings,
            timer: Box::pin(sleep(interval)),
            waiting: false,
            heard: Instant::now(),
            silent: false,
            interval,
            patience,
            limit,
        }
    }

    /// Ready when the peer was silent for too long.
    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else {
            return Poll::Pending;
        };
        loop {
            if self.waiting && pings.poll_pong(cx).is_ready() {
                // An error here is the connection's end, which HTTP/2 itself reports.
                (self.waiting, self.silent) = (false, false);
                self.heard = Instant::now();
                self.timer.as_mut().reset(self.heard + self.interval);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.waiting {
                let gone = self.heard + self.limit;
                if self.silent && Instant::now() >= gone {
                    return Poll::Ready(());
                }
                self.silent = true;
                let chance = Instant::now() + LAST_CHANCE;
                self.timer.as_mut().reset(gone.max(chance));
                continue;
            }
            self.waiting = pings.send_ping(Ping::opaque()).is_ok();
            let next = if self.waiting {
                self.patience
            } else {
                self.interval
            };
            self.timer.as_mut().reset(Instant::now() + next);
        }
    }
}

// === Both ends of HTTP/2 ===

impl Protocol for h2::client::Connection<Wire, Bytes> {
    const OPENED_BY_PEER: bool = false;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, h2::Error>>> {
        Pin::new(self).poll(cx).map(|result| result.err().map(Err))
    }

    fn pings(&mut self) -> Option<PingPong> {
        self.ping_pong()
    }

    fn set_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    /// Nothing: the pool hands out no more streams, and the connection ends with the last one.
    fn retire(&mut self) {}

    /// Nothing: a client of the library cannot, and only closes.
    fn calm(&mut self) {}
}

impl Protocol for h2::server::Connection<Wire, Bytes> {
    const OPENED_BY_PEER: bool = true;

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, h2::Error>>> {
        self.poll_accept(cx)
    }

    fn pings(&mut self) -> Option<PingPong> {
        self.ping_pong()
    }

    fn set_window(&mut self, bytes: u32) {
        self.set_target_window_size(bytes);
    }

    fn retire(&mut self) {
        self.graceful_shutdown();
    }

    fn calm(&mut self) {
        self.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
    }
}

/// Waits for HTTP/2's answer to `future` while sending what it writes.
pub(super) async fn sending<T>(
    control: &WireControl,
    future: impl Future<Output = T>,
) -> io::Result<T> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        let result = future.as_mut().poll(cx);
        match (result, control.poll_send(cx)) {
            (Poll::Ready(value), _) => Poll::Ready(Ok(value)),
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (Poll::Pending, _) => Poll::Pending,
        }
    })
    .await
}
