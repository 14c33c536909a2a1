//! A stream of a tunnel as a handshake reads and writes it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// More than the certificates of any handshake; whoever sends more is not proving anything.
const MOST: usize = 256 << 10;

/// Both directions of a stream.
pub(in crate::tunnel) struct ProofStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Received, and not read yet.
    rest: Bytes,
    received: usize,
}

impl ProofStream {
    pub(in crate::tunnel) fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self {
            send,
            recv,
            rest: Bytes::new(),
            received: 0,
        }
    }
}

impl AsyncRead for ProofStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.rest.is_empty() {
            match ready!(this.recv.poll_data(cx)) {
                Some(Ok(data)) => {
                    this.received += data.len();
                    if this.received > MOST {
                        return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                    }
                    // An error means that the stream is gone, which the next look at it says.
                    let _ = this.recv.flow_control().release_capacity(data.len());
                    this.rest = data;
                }
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = this.rest.len().min(buf.remaining());
        this.rest.copy_to_slice(buf.initialize_unfilled_to(taken));
        buf.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ProofStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.send.reserve_capacity(buf.len());
        while this.send.capacity() == 0 {
            match ready!(this.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let written = this.send.capacity().min(buf.len());
        let data = Bytes::copy_from_slice(&buf[..written]);
        match this.send.send_data(data, false) {
            Ok(()) => Poll::Ready(Ok(written)),
            Err(error) => Poll::Ready(Err(io::Error::other(error))),
        }
    }

    /// The tunnel's driver sends.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // One that is gone is closed.
        let _ = self.get_mut().send.send_data(Bytes::new(), true);
        Poll::Ready(Ok(()))
    }
}
