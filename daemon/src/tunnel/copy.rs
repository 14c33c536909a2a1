//! Copies bytes between an application's TCP connection and its stream in a tunnel.
//!
//! Both directions live in one task. Nothing is held for a connection that moves nothing: bytes
//! from the application are read into a buffer of the thread, and bytes from the tunnel are the frames
//! that HTTP/2 received. A direction waits when the other side of it does: HTTP/2 sends only as much
//! as the stream's window allows, and gives the window back only for what the application has taken.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::Future,
    io::{self, IoSlice},
    mem,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use reeve_common::Reason;
use tokio::{io::AsyncWrite, net::TcpStream};
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
            done: false,
        },
        into: In {
            stream: recv,
            waiting: VecDeque::new(),
            pile: BytesMut::new(),
            state: InState::Open,
        },
        connection,
    }
    .await
}

struct Copy {
    /// There until the end.
    app: Option<TcpStream>,
    out: Out,
    into: In,
    connection: Rc<Connection>,
}

/// From the application to the tunnel.
struct Out {
    stream: SendStream<Bytes>,
    done: bool,
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
    /// The application has been told.
    Done,
}

/// Why a connection ends before both sides have said so.
pub(super) enum Broken {
    /// The application reset the connection, or cannot be written to.
    Application,
    /// The peer reset the stream, or the tunnel broke.
    Tunnel,
    /// The peer cancelled the stream: it has nothing more to say and does not listen.
    Cancelled,
}

impl Future for Copy {
    type Output = Reason;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reason> {
        let this = self.get_mut();
        if let Poll::Ready(reason) = this.connection.poll_stopped(cx) {
            this.abort(h2::Reason::REFUSED_STREAM);
            return Poll::Ready(reason);
        }
        match this.poll_both(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => Poll::Ready(Reason::Closed),
            Poll::Ready(Err(broken)) => {
                match broken {
                    Broken::Cancelled => {}
                    // How CONNECT says that the TCP connection broke (RFC 9113, section 8.5).
                    Broken::Application | Broken::Tunnel => this.abort(h2::Reason::CONNECT_ERROR),
                }
                Poll::Ready(Reason::Reset)
            }
        }
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
        let into = self
            .into
            .poll(cx, app, &self.connection, &mut in_turn, self.out.done);
        if let Poll::Ready(Err(broken)) = into {
            return Poll::Ready(Err(broken));
        }
        if out.is_ready() && into.is_ready() {
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

    /// Resets both sides.
    fn abort(&mut self, reason: h2::Reason) {
        self.out.stream.send_reset(reason);
        if let Some(app) = self.app.take() {
            socket::reset(app);
        }
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
        while !self.done {
            if *turn >= TURN {
                return Poll::Pending;
            }
            let capacity = poll_capacity(cx, &mut self.stream);
            connection.set_held(capacity.is_pending());
            match capacity {
                Poll::Ready(Ok(())) => {}
                // It does not listen any more. What it has said is the application's all the same.
                Poll::Ready(Err(Broken::Cancelled)) => {
                    self.done = true;
                    connection.set_half_closed();
                    break;
                }
                Poll::Ready(Err(broken)) => return Poll::Ready(Err(broken)),
                // Nothing is read meanwhile that would tell.
                Poll::Pending if connection.is_quiet() && socket::is_broken(app) => {
                    return Poll::Ready(Err(Broken::Application));
                }
                Poll::Pending => return Poll::Pending,
            }
            let data = match ready!(poll_read(cx, app)) {
                Ok(data) => data,
                Err(_) => return Poll::Ready(Err(Broken::Application)),
            };
            self.done = data.is_empty();
            let read = data.len();
            if self.stream.send_data(data, self.done).is_err() {
                return Poll::Ready(Err(Broken::Tunnel));
            }
            *turn += read;
            if self.done {
                connection.set_half_closed();
            } else {
                connection.moved_out(read);
            }
        }
        Poll::Ready(Ok(()))
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
