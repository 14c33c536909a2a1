//! What an application says before the peer has answered: it goes with the CONNECT, so that a
//! client that speaks first does not wait for a round trip more than without a tunnel.
//!
//! The peer has proven who it is by then, and forwards nothing before it has judged the request
//! itself. Until it answers, what was said is kept: a peer that has not looked at the request makes it
//! be asked again in another tunnel.

use std::{
    io::{self, Read},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::SendStream;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

use super::{TunnelError, copy::poll_capacity};

/// What is sent before the answer at most: a request, or the beginning of a TLS handshake.
const MOST: usize = 4 << 10;

/// The beginning of what an application sends.
pub(super) struct FirstBytes<'a> {
    app: &'a mut TcpStream,
    /// Whether they may be sent now: as long as there is no answer, nobody else judges again.
    allowed: &'a dyn Fn() -> Result<(), TunnelError>,
    state: State,
}

enum State {
    /// The socket was not looked at.
    New,
    /// It had nothing.
    Silent,
    /// The application has closed its side, which is told when the connection stands.
    Ended,
    /// To be sent in the stream that is asked for.
    Said(Bytes),
    /// Sent in it.
    Sent(Bytes),
}

// === impl FirstBytes ===

impl<'a> FirstBytes<'a> {
    pub(super) fn new(
        app: &'a mut TcpStream,
        allowed: &'a dyn Fn() -> Result<(), TunnelError>,
    ) -> Self {
        Self {
            app,
            allowed,
            state: State::New,
        }
    }

    /// How many bytes were sent.
    pub(super) fn sent(&self) -> usize {
        match &self.state {
            State::Sent(bytes) => bytes.len(),
            _ => 0,
        }
    }

    /// They are to be sent in another stream, if there are any.
    pub(super) fn again(&mut self) {
        if let State::Sent(bytes) = &self.state {
            self.state = State::Said(bytes.clone());
        }
    }

    /// Sends them once they are there, and `stream` has room.
    ///
    /// # Errors
    ///
    /// The application is gone, or they may not be sent. What is wrong with the stream is told by
    /// the answer to its request.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut SendStream<Bytes>,
    ) -> Poll<Result<(), TunnelError>> {
        if matches!(self.state, State::Sent(_) | State::Ended) {
            return Poll::Ready(Ok(()));
        }
        if ready!(poll_capacity(cx, stream)).is_err() {
            return Poll::Ready(Ok(()));
        }
        let said = match &self.state {
            State::Said(bytes) => bytes.clone(),
            _ => match ready!(self.poll_read(cx)) {
                Ok(bytes) => bytes,
                // It is not to be read again: the next read would say that all is well.
                Err(_) => return Poll::Ready(Err(TunnelError::ClientGone)),
            },
        };
        if said.is_empty() {
            self.state = State::Ended;
            return Poll::Ready(Ok(()));
        }
        (self.allowed)()?;
        self.send(said, stream);
        Poll::Ready(Ok(()))
    }

    /// The peer has answered: what was read and could not be sent goes now.
    pub(super) fn answered(&mut self, stream: &mut SendStream<Bytes>) {
        if let State::Said(bytes) = &self.state {
            self.send(bytes.clone(), stream);
        }
    }

    fn send(&mut self, bytes: Bytes, stream: &mut SendStream<Bytes>) {
        // An error means that the stream is gone, which its answer says, or the next look at it.
        let _ = stream.send_data(bytes.clone(), false);
        self.state = State::Sent(bytes);
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        let mut buffer = [0; MOST];
        if let State::New = self.state {
            self.state = State::Silent;
            // The event loop has not seen the socket yet, and would only say so in its next turn.
            match (&*SockRef::from(&*self.app)).read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    return Poll::Ready(read.map(|read| Bytes::copy_from_slice(&buffer[..read])));
                }
            }
        }
        let mut buffer = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut *self.app).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(Bytes::copy_from_slice(buffer.filled())))
    }
}
