//! Copies bytes between an application's TCP connection and its stream in a tunnel.
//!
//! Both directions live in one task. Nothing is held for a connection that moves nothing: bytes
//! from the application are read into a buffer of the thread, and bytes from the tunnel are the frames
//! that HTTP/2 received. A direction waits when the other side of it does: HTTP/2 sends only as much
//! as the stream's window allows, and gives the window back only for what the application has taken.
//!
//! A connection that one side breaks still carries what that side had said: the other side gets these
//! bytes, and then the reset.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::Future,
    io::{self, IoSlice},
    mem,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use h2::{RecvStream, SendStream};
use reeve_common::Reason;
use tokio::{
    io::AsyncWrite,
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};
use tokio_util::io::poll_read_buf;

use super::{connection::Connection, socket, wire::FULL_FRAME};

/// One read from the application: what one frame carries.
const CHUNK: usize = FULL_FRAME as usize;
/// What a read must bring to keep the memory that it was read into. Less is copied out of it.
const WORTH_ITS_MEMORY: usize = CHUNK / 4;
/// Frames that are written to the application at once: at least a chunk in frames of 16 KiB.
const FRAMES: usize = 8;
/// A frame with less in it costs more to keep than it holds: behind an application that does not
/// read, such frames are put together. HTTP/2 bounds what it keeps of them itself, and beyond that
/// ends the tunnel with all its streams.
const SMALL: usize = 512;
/// Bytes in one direction after which a connection lets others run: a bulk transfer must not make small requests
/// wait.
const TURN: usize = 256 << 10;
/// What one side said before it broke the connection is given up when nothing of it has moved for so
/// long: the other side does not read, and is to learn of the reset.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// How often is asked whether an application's kernel has everything, which it does not tell.
const LOOK: Duration = Duration::from_millis(10);

thread_local! {
    /// What the next read goes into: empty.
    static ROOM: RefCell<BytesMut> = RefCell::default();
}

/// Copies both ways until both have ended. Gives the reason why the connection ended.
pub(super) async fn copy(
    app: TcpStream,
    send: SendStream<Bytes>,
    recv: RecvStream,
    connection: Rc<Connection>,
) -> Reason {
    Copy {
        app: Some(app),
        out: Out {
            stream: send,
            state: OutState::Open,
            app_is_broken: false,
        },
        into: In {
            stream: recv,
            waiting: VecDeque::new(),
            pile: BytesMut::new(),
            state: InState::Open,
        },
        broken: None,
        patience: None,
        connection,
    }
    .await
}

struct Copy {
    /// There until the end.
    app: Option<TcpStream>,
    out: Out,
    into: In,
    /// Which side has broken the connection. What it had said is still carried.
    broken: Option<Broken>,
    /// How long that may still take.
    patience: Option<Patience>,
    connection: Rc<Connection>,
}

/// From the application to the tunnel.
struct Out {
    stream: SendStream<Bytes>,
    state: OutState,
    /// What can still be read was said before.
    app_is_broken: bool,
}

enum OutState {
    Open,
    /// Everything that was read is HTTP/2's, and sent once this says so.
    Said(Sent),
    /// The stream takes nothing more.
    Deaf,
}

/// From the tunnel to the application.
struct In {
    stream: RecvStream,
    /// Received, and not taken by the application yet; a stream's window at most.
    waiting: VecDeque<Bytes>,
    /// Small frames that come after those.
    pile: BytesMut,
    state: InState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum InState {
    Open,
    /// The tunnel's side has ended; `waiting` may not be empty.
    Ended,
    /// The application has been told, or has everything and is to be reset.
    Done,
}

/// Why a connection ends before both sides have said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The application reset the connection, or cannot be written to.
    Application,
    /// The peer reset the stream, or the tunnel broke.
    Tunnel,
    /// The peer cancelled the stream: it has nothing more to say and does not listen.
    Cancelled,
}

/// How long the last bytes of a broken connection may take.
struct Patience {
    timer: Pin<Box<Sleep>>,
    since: Instant,
    /// What had moved by then.
    moved: (u64, u32),
}

impl Future for Copy {
    type Output = Reason;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reason> {
        let this = self.get_mut();
        if let Poll::Ready(reason) = this.connection.poll_stopped(cx) {
            this.abort(h2::Reason::REFUSED_STREAM);
            return Poll::Ready(reason);
        }
        if this.broken.is_none()
            && let Poll::Ready(result) = this.poll_both(cx)
        {
            match result {
                Ok(()) => return Poll::Ready(Reason::Closed),
                Err(broken) => this.broken = Some(broken),
            }
        }
        let Some(broken) = this.broken else {
            return Poll::Pending;
        };
        ready!(this.poll_last(cx, broken));
        match broken {
            Broken::Cancelled => {}
            // How CONNECT says that the TCP connection broke (RFC 9113, section 8.5).
            Broken::Application | Broken::Tunnel => this.abort(h2::Reason::CONNECT_ERROR),
        }
        Poll::Ready(Reason::Reset)
    }
}

impl Copy {
    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let Some(app) = &mut self.app else {
            return Poll::Ready(Ok(()));
        };
        // Each direction has a turn of its own: neither keeps the other from moving.
        let (mut out_turn, mut in_turn) = (0, 0);
        let out = self.out.poll(cx, app, &self.connection, &mut out_turn);
        if let Poll::Ready(Err(broken)) = out {
            return Poll::Ready(Err(broken));
        }
        let app_has_closed = out.is_ready();
        let into = self
            .into
            .poll(cx, app, &self.connection, &mut in_turn, app_has_closed);
        if let Poll::Ready(Err(broken)) = into {
            return Poll::Ready(Err(broken));
        }
        if out.is_ready() && into.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if out.is_ready() && self.connection.is_forsaken() && self.out.poll_sent(cx).is_ready() {
            // The workload has ended: what the peer still says reaches no process.
            return Poll::Ready(Ok(()));
        }
        if self.into.state == InState::Done {
            // Nothing is read from the stream any more: only this tells of a reset.
            if let Poll::Ready(broken) = poll_broken(cx, &mut self.out.stream) {
                return Poll::Ready(Err(broken));
            }
        }
        if out_turn.max(in_turn) >= TURN {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Ready when what the side that has broken the connection had said before is with the other one,
    /// or cannot get there.
    fn poll_last(&mut self, cx: &mut Context<'_>, broken: Broken) -> Poll<()> {
        let Some(app) = &mut self.app else {
            return Poll::Ready(());
        };
        let mut turn = 0;
        let (over, unsent) = match broken {
            Broken::Application => {
                self.out.app_is_broken = true;
                let said = self.out.poll(cx, app, &self.connection, &mut turn);
                let over = match said {
                    Poll::Ready(Ok(())) => self.out.poll_sent(cx).is_ready(),
                    Poll::Ready(Err(Broken::Application)) => {
                        self.out.says_no_more(false);
                        self.out.poll_sent(cx).is_ready()
                    }
                    Poll::Ready(Err(_)) => true,
                    Poll::Pending => poll_broken(cx, &mut self.out.stream).is_ready(),
                };
                (over, 0)
            }
            Broken::Tunnel | Broken::Cancelled => {
                let taken = self.into.poll_last(cx, app, &self.connection, &mut turn);
                let unsent = socket::unsent(app);
                let over = match taken {
                    Poll::Ready(Ok(())) => unsent == 0,
                    Poll::Ready(Err(_)) => true,
                    Poll::Pending => false,
                };
                (over, unsent)
            }
        };
        if over {
            return Poll::Ready(());
        }
        if turn >= TURN {
            cx.waker().wake_by_ref();
        }
        let moved = (self.connection.moved(), unsent);
        let patience = self.patience.get_or_insert_with(|| Patience::new(moved));
        patience.poll_over(cx, moved)
    }

    /// Resets both sides.
    fn abort(&mut self, reason: h2::Reason) {
        self.out.stream.send_reset(reason);
        if let Some(app) = self.app.take() {
            socket::reset(app);
        }
    }
}

// === impl Patience ===

impl Patience {
    fn new(moved: (u64, u32)) -> Self {
        Self {
            timer: Box::pin(sleep(LOOK)),
            since: Instant::now(),
            moved,
        }
    }

    fn poll_over(&mut self, cx: &mut Context<'_>, moved: (u64, u32)) -> Poll<()> {
        let now = Instant::now();
        if moved != self.moved {
            (self.moved, self.since) = (moved, now);
        }
        if now.saturating_duration_since(self.since) >= LAST_BYTES {
            return Poll::Ready(());
        }
        self.timer.as_mut().reset(now + LOOK);
        // Armed only: it is not due yet.
        let _ = self.timer.as_mut().poll(cx);
        Poll::Pending
    }
}

// === impl Out ===

impl Out {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        connection: &Connection,
        turn: &mut usize,
    ) -> Poll<Result<(), Broken>> {
        while matches!(self.state, OutState::Open) {
            if *turn >= TURN {
                return Poll::Pending;
            }
            let capacity = poll_capacity(cx, &mut self.stream);
            connection.set_held(capacity.is_pending());
            match capacity {
                Poll::Ready(Ok(())) => {}
                // It does not listen any more. What it has said is the application's all the same.
                Poll::Ready(Err(Broken::Cancelled)) => {
                    self.state = OutState::Deaf;
                    connection.set_half_closed();
                    break;
                }
                Poll::Ready(Err(broken)) => return Poll::Ready(Err(broken)),
                // Nothing is read meanwhile that would tell.
                Poll::Pending
                    if !self.app_is_broken && connection.is_quiet() && socket::is_broken(app) =>
                {
                    return Poll::Ready(Err(Broken::Application));
                }
                Poll::Pending => return Poll::Pending,
            }
            let data = match ready!(poll_read(cx, app)) {
                Ok(data) if data.is_empty() => {
                    // The end of what a broken connection has brought is no end in good order.
                    if self.app_is_broken {
                        return Poll::Ready(Err(Broken::Application));
                    }
                    self.says_no_more(true);
                    connection.set_half_closed();
                    break;
                }
                Ok(data) => data,
                Err(_) => return Poll::Ready(Err(Broken::Application)),
            };
            let read = data.len();
            if self.stream.send_data(data, false).is_err() {
                return Poll::Ready(Err(Broken::Tunnel));
            }
            *turn += read;
            connection.moved_out(read);
        }
        Poll::Ready(Ok(()))
    }

    /// Everything that the application has said was read. An empty frame after it tells when HTTP/2 has
    /// sent it all.
    fn says_no_more(&mut self, ends: bool) {
        if !matches!(self.state, OutState::Open) {
            return;
        }
        let (marker, sent) = Sent::marker();
        // An error means that the stream is gone, and drops the marker.
        let _ = self.stream.send_data(marker, ends);
        self.state = OutState::Said(sent);
    }

    /// Ready when HTTP/2 has sent everything, or does not any more.
    fn poll_sent(&self, cx: &Context<'_>) -> Poll<()> {
        match &self.state {
            OutState::Open => Poll::Pending,
            OutState::Said(sent) => sent.poll(cx),
            OutState::Deaf => Poll::Ready(()),
        }
    }
}

// === Sent ===

/// Whether HTTP/2 has sent what it was given: a reset would throw away what it has not.
struct Sent(Arc<Passed>);

#[derive(Default)]
struct Passed {
    gone: AtomicBool,
    task: AtomicWaker,
}

/// No bytes, which HTTP/2 lets go of after those before them.
struct Marker(Arc<Passed>);

impl Sent {
    fn marker() -> (Bytes, Self) {
        let passed = Arc::new(Passed::default());
        (Bytes::from_owner(Marker(passed.clone())), Self(passed))
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        self.0.task.register(cx.waker());
        match self.0.gone.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

impl AsRef<[u8]> for Marker {
    fn as_ref(&self) -> &[u8] {
        &[]
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
        self.0.task.wake();
    }
}

/// Waits until HTTP/2 can send at once what it has been given before.
///
/// One byte is asked for, not a chunk: what an idle stream has been granted is taken from the
/// tunnel's window, and many idle streams would starve the others.
pub(super) fn poll_capacity(
    cx: &mut Context<'_>,
    stream: &mut SendStream<Bytes>,
) -> Poll<Result<(), Broken>> {
    stream.reserve_capacity(1);
    while stream.capacity() == 0 {
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(Broken::of(&error))),
            // It takes nothing more.
            None => {
                return Poll::Ready(Err(match poll_broken(cx, stream) {
                    Poll::Ready(broken) => broken,
                    Poll::Pending => Broken::Tunnel,
                }));
            }
        }
    }
    Poll::Ready(Ok(()))
}

/// Ready when a stream is reset, or its tunnel broken.
fn poll_broken(cx: &mut Context<'_>, stream: &mut SendStream<Bytes>) -> Poll<Broken> {
    let reset = stream.poll_reset(cx);
    reset.map(|reason| reason.map_or(Broken::Tunnel, Broken::of_reset))
}

/// Reads about a chunk at most; empty at the end.
fn poll_read(cx: &mut Context<'_>, app: &mut TcpStream) -> Poll<io::Result<Bytes>> {
    ROOM.with_borrow_mut(|room| {
        room.reserve(CHUNK);
        let read = ready!(poll_read_buf(Pin::new(app), cx, room))?;
        if read >= WORTH_ITS_MEMORY {
            return Poll::Ready(Ok(mem::take(room).freeze()));
        }
        let data = Bytes::copy_from_slice(room);
        room.clear();
        Poll::Ready(Ok(data))
    })
}

// === impl In ===

impl In {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        connection: &Connection,
        turn: &mut usize,
        app_has_closed: bool,
    ) -> Poll<Result<(), Broken>> {
        while self.state != InState::Done {
            if *turn >= TURN {
                return Poll::Pending;
            }
            self.gather(cx)?;
            if !self.waiting.is_empty() {
                ready!(self.poll_take(cx, app, connection, turn)?);
            } else if self.state == InState::Ended {
                // Where nothing is left to read either, closing the socket says it.
                if !app_has_closed && socket::end_writing(app).is_err() {
                    return Poll::Ready(Err(Broken::Application));
                }
                connection.set_half_closed();
                self.state = InState::Done;
            } else {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Gives the application what the tunnel had brought when it broke.
    fn poll_last(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        connection: &Connection,
        turn: &mut usize,
    ) -> Poll<Result<(), Broken>> {
        loop {
            if *turn >= TURN {
                return Poll::Pending;
            }
            // What broke it stands behind what came before.
            if self.gather(cx).is_err() {
                self.state = InState::Done;
            }
            self.seal();
            if self.waiting.is_empty() {
                break;
            }
            ready!(self.poll_take(cx, app, connection, turn)?);
        }
        // A tunnel that is broken for one direction says so of the other as well.
        match self.state {
            InState::Open => Poll::Pending,
            InState::Ended | InState::Done => Poll::Ready(Ok(())),
        }
    }

    /// Has the application take some of what waits.
    fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        connection: &Connection,
        turn: &mut usize,
    ) -> Poll<Result<(), Broken>> {
        let written = match self.poll_write(cx, app) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(_)) => return Poll::Ready(Err(Broken::Application)),
            Poll::Pending => {
                connection.set_blocked(true);
                return Poll::Pending;
            }
        };
        connection.set_blocked(false);
        connection.moved_in(written);
        *turn += written;
        // An error means that the stream is gone, which the next look at it says.
        let _ = self.stream.flow_control().release_capacity(written);
        Poll::Ready(Ok(()))
    }

    /// Takes what the tunnel has.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        while self.state == InState::Open {
            match self.stream.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) if data.is_empty() => {}
                Poll::Ready(Some(Ok(data))) => self.keep(data),
                Poll::Ready(Some(Err(error))) => match Broken::of(&error) {
                    // What came before the end is the application's.
                    Broken::Cancelled if !self.waiting.is_empty() => self.state = InState::Ended,
                    broken => return Err(broken),
                },
                Poll::Ready(None) => self.state = InState::Ended,
                Poll::Pending => break,
            }
        }
        if self.waiting.len() < FRAMES {
            self.seal();
        }
        Ok(())
    }

    fn keep(&mut self, data: Bytes) {
        if self.waiting.len() >= FRAMES && data.len() < SMALL {
            self.pile.extend_from_slice(&data);
        } else {
            self.seal();
            self.waiting.push_back(data);
        }
    }

    /// The pile is next after what waits.
    fn seal(&mut self) {
        if !self.pile.is_empty() {
            self.waiting.push_back(mem::take(&mut self.pile).freeze());
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, app: &mut TcpStream) -> Poll<io::Result<usize>> {
        let mut parts = [IoSlice::new(&[]); FRAMES];
        for (part, data) in parts.iter_mut().zip(&self.waiting) {
            *part = IoSlice::new(data);
        }
        let parts = parts.get(..self.waiting.len()).unwrap_or(&parts);
        let written = ready!(Pin::new(app).poll_write_vectored(cx, parts))?;
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(front) = self.waiting.front_mut() {
            if front.len() > written {
                front.advance(written);
                break;
            }
            written -= front.len();
            self.waiting.pop_front();
        }
        if self.waiting.is_empty() {
            // An idle connection holds no buffer, not even this one's.
            self.waiting = VecDeque::new();
        }
    }
}

// === impl Broken ===

impl Broken {
    fn of(error: &h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::of_reset(reason),
            _ => Self::Tunnel,
        }
    }

    /// NO_ERROR and CANCEL read as the end (ztunnel ends streams so).
    fn of_reset(reason: h2::Reason) -> Self {
        match reason {
            h2::Reason::NO_ERROR | h2::Reason::CANCEL => Self::Cancelled,
            _ => Self::Tunnel,
        }
    }
}
