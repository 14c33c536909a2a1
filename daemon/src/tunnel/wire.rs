//! TLS over TCP as HTTP/2 sees it, built for many small frames and for few large ones.
//!
//! A plain `TlsStream` makes a record, and often a system call, of each frame that HTTP/2 writes,
//! and reads 4 KiB at a time. Here what HTTP/2 writes in small pieces is gathered, and sealed and
//! sent when 61 KiB are there or when [`WireControl::poll_send`] is called at the end of a turn of
//! the tunnel's driver; a large frame is sealed from where it is. Reads from the socket take 64 KiB.
//! The buffers are borrowed from the thread while they hold something, so that an idle tunnel has
//! none.

use std::{
    cell::{Cell, RefCell},
    io::{self, BufRead, Write},
    mem,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::Connection;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use super::{
    frames::FrameMeter,
    socket,
    spare::{Lend, Spare},
};

/// One read from the socket.
const READ: usize = 64 << 10;
/// What is gathered before it is sealed and sent: four records, of which the last is not full, so
/// that TCP sends them, or the application what was in them, as one packet. The kernel puts as many
/// whole segments into one as 64 KiB hold (tcp_xmit_size_goal); with a few bytes more there are two,
/// each with its way through the stack, its programs and its acknowledgement.
const CHUNK: usize = 61 << 10;
/// The most that a TLS record holds (RFC 8446, section 5.1).
const RECORD: usize = 16 << 10;
/// Before the payload of a frame (RFC 9113, section 4.1).
const FRAME_HEAD: usize = 9;
/// The payload with which a DATA frame fills a chunk.
pub(super) const FULL_FRAME: u32 = (CHUNK - FRAME_HEAD) as u32;
/// Less than this is not worth a record of its own where more is to come.
const WORTH_A_RECORD: usize = 4 << 10;
/// Room for a chunk that is one byte short and one more HTTP/2 frame.
const OUTGOING: usize = CHUNK + (16 << 10) + 64;
/// Bytes in one direction after which the driver lets other tasks run: a bulk transfer must not
/// make small requests wait. As much as several streams need for a full write each.
const TURN: usize = 512 << 10;
/// For HTTP/2, which counts each DATA frame as if it held 256 bytes, and ends a tunnel in which too much is
/// counted that no stream has taken yet: streams get to take something after a turn, which may
/// bring nothing but frames of a byte.
pub(super) const SMALL_FRAMES: usize = TURN / (FRAME_HEAD + 1) * 256;
/// For the last packets of a tunnel that has ended: several round trips of a slow network.
const LINGER: Duration = Duration::from_secs(2);

/// GOAWAY with the highest stream and NO_ERROR: open no more streams, all that you opened are served
/// (RFC 9113, section 6.8).
const NOTICE: [u8; 17] = [
    0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0,
];

/// HTTP/2's end of a tunnel's bytes.
#[derive(Debug)]
pub(super) struct Wire(Rc<RefCell<Session>>);

/// The driver's end: sends what HTTP/2 has written.
#[derive(Debug)]
pub(super) struct WireControl(Rc<RefCell<Session>>);

/// A session whose TLS handshake is done.
#[derive(Debug)]
struct Session {
    tcp: TcpStream,
    tls: Connection,
    /// Sealed bytes read from the socket; empty, or of [`READ`] bytes.
    incoming: Box<[u8]>,
    /// What of `incoming` is still to be opened.
    unopened: std::ops::Range<usize>,
    /// Bytes that HTTP/2 wrote and that are not sealed yet.
    outgoing: Vec<u8>,
    /// How many bytes are sealed and not sent yet.
    sealed: usize,
    /// [`NOTICE`] is to be sent between two frames.
    notice: bool,
    reading: Turn,
    writing: Turn,
    /// Of the peer's frames.
    meter: FrameMeter,
    /// The peer has sent too much that carries nothing, and nothing more is read.
    flooded: bool,
    /// What TLS made of the peer's last bytes, kept because HTTP/2 passes on only its text.
    fault: Option<rustls::Error>,
}

/// Counts the bytes since the task last gave way.
#[derive(Debug, Default)]
struct Turn(Cell<usize>);

thread_local! {
    /// Of [`READ`] bytes, with whatever their last user left in them.
    static READ_BUFFERS: Spare<Box<[u8]>> = const { Spare::new() };
    /// Empty, with room for [`OUTGOING`] bytes.
    static WRITE_BUFFERS: Spare<Vec<u8>> = const { Spare::new() };
}

/// Makes the two ends of a session with a peer whose frames `meter` counts.
pub(super) fn wire(tcp: TcpStream, mut tls: Connection, meter: FrameMeter) -> (Wire, WireControl) {
    // What may wait to be sent is bounded here, by `outgoing`.
    tls.set_buffer_limit(None);
    let session = Rc::new(RefCell::new(Session {
        tcp,
        tls,
        incoming: Box::default(),
        unopened: 0..0,
        outgoing: Vec::new(),
        sealed: 0,
        notice: false,
        reading: Turn::default(),
        writing: Turn::default(),
        meter,
        flooded: false,
        fault: None,
    }));
    (Wire(session.clone()), WireControl(session))
}

// === impl WireControl ===

impl WireControl {
    /// Seals and sends what HTTP/2 has written so far. Pending while the socket is full.
    pub(super) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_send(cx)
    }

    /// Tells the peer, when HTTP/2 has next written whole frames, to open no more streams.
    pub(super) fn give_notice(&self) {
        self.0.borrow_mut().notice = true;
    }

    /// Seals what follows with new keys, and has the peer do the same.
    pub(super) fn renew_keys(&self) {
        let mut session = self.0.borrow_mut();
        // What HTTP/2 has written comes before: records are in order.
        if let Err(error) = session.tls.refresh_traffic_keys() {
            tracing::debug!(%error, "the traffic keys of a tunnel stay as they are");
        }
    }

    /// For how long the peer's kernel may acknowledge nothing of what was sent.
    pub(super) fn set_patience(&self, patience: Duration) {
        let session = self.0.borrow();
        // Where the kernel refuses, it stays as long as it was.
        let _ = socket::set_user_timeout(&socket2::SockRef::from(&session.tcp), patience);
    }

    /// Says goodbye as far as the socket takes it without waiting.
    pub(super) fn close(&self, cx: &mut Context<'_>) {
        let mut session = self.0.borrow_mut();
        // The tunnel ends in any case: what cannot be sent now is not sent.
        let _ = session.poll_send(cx);
        session.tls.send_close_notify();
        let _ = session.poll_send(cx);
    }

    /// Whether the peer has sent too many frames that carry nothing.
    pub(super) fn is_flooded(&self) -> bool {
        self.0.borrow().flooded
    }

    /// Another of its kind, for [`Self::linger`].
    pub(super) fn last(&self) -> Self {
        Self(self.0.clone())
    }

    /// Once the driver has gone: closes this direction, and waits a while for the peer to close
    /// the other. A socket that is closed at once leaves the peer's last packets to nobody, and in
    /// the workload's namespace they look like connections without a tunnel, which are refused and
    /// counted as such.
    pub(super) async fn linger(self) {
        let Some(session) = Rc::into_inner(self.0) else {
            return;
        };
        let session = session.into_inner();
        // A flood is not listened to any longer.
        if session.flooded || socket::end_writing(&session.tcp).is_err() {
            return;
        }
        let mut tcp = session.tcp;
        let mut unwanted = [0; 512];
        let until_closed = async { while matches!(tcp.read(&mut unwanted).await, Ok(1..)) {} };
        // Whoever goes on sending after that is reset.
        let _ = timeout(LINGER, until_closed).await;
    }

    /// The TLS error that ended the session, if one did.
    pub(super) fn fault(&self) -> Option<rustls::Error> {
        self.0.borrow().fault.clone()
    }
}

// === impl Session ===

impl Session {
    /// Reads, and counts the frames in what was read. Once there were too many, nothing comes any
    /// more: what becomes of the tunnel is the driver's to say.
    fn poll_read_counted(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.flooded {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let result = self.poll_read(cx, buf);
        let read = buf.filled().get(before..).unwrap_or_default();
        self.flooded = !self.meter.received(read);
        result
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.remaining();
        loop {
            let opened = self.take_opened(buf)?;
            if buf.remaining() == 0 || matches!(opened, Opened::End) {
                return Poll::Ready(Ok(()));
            }
            if !self.unopened.is_empty() {
                self.open()?;
                continue;
            }
            if buf.remaining() < before {
                return Poll::Ready(Ok(()));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                // TCP ended. Without close_notify the next look at the plaintext is an error.
                self.tls.read_tls(&mut io::empty())?;
            }
        }
    }

    /// Moves opened bytes to `buf`.
    fn take_opened(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<Opened> {
        while buf.remaining() > 0 {
            let mut reader = self.tls.reader();
            let taken = match reader.fill_buf() {
                Ok([]) => return Ok(Opened::End),
                Ok(chunk) => {
                    let taken = chunk.len().min(buf.remaining());
                    buf.put_slice(&chunk[..taken]);
                    taken
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            reader.consume(taken);
        }
        Ok(Opened::Some)
    }

    /// Gives TLS the next sealed bytes.
    fn open(&mut self) -> io::Result<()> {
        let mut sealed = self.incoming.get(self.unopened.clone()).unwrap_or_default();
        self.unopened.start += self.tls.read_tls(&mut sealed)?;
        if self.unopened.is_empty() {
            READ_BUFFERS.give_back(&mut self.incoming);
        }
        if let Err(error) = self.tls.process_new_packets() {
            self.fault = Some(error.clone());
            // TLS has an alert to send that says what was wrong; the error stands in any case.
            let _ = self.tls.write_tls(&mut TryWrite(&self.tcp));
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        Ok(())
    }

    /// Reads sealed bytes from the socket.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.reading.is_over() {
            return self.reading.give_way(cx);
        }
        if self.incoming.is_empty() {
            self.incoming = READ_BUFFERS.lend(|| vec![0; READ].into());
        }
        let mut buf = ReadBuf::new(&mut self.incoming);
        let result = Pin::new(&mut self.tcp).poll_read(cx, &mut buf);
        let read = buf.filled().len();
        self.unopened = 0..read;
        if read == 0 {
            READ_BUFFERS.give_back(&mut self.incoming);
        }
        match result {
            Poll::Ready(result) => {
                self.reading.count(read);
                Poll::Ready(result.map(|()| read))
            }
            Poll::Pending => {
                self.reading.start();
                Poll::Pending
            }
        }
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.outgoing.len() + self.sealed >= CHUNK {
            ready!(self.poll_send(cx))?;
        }
        let size = parts.iter().map(|part| part.len()).sum();
        let written = if fills_records(size) {
            if self.writing.is_over() {
                return self.writing.give_way(cx);
            }
            self.seal()?;
            let written = self.tls.writer().write_vectored(parts)?;
            self.sealed += written;
            written
        } else {
            self.gather(parts)
        };
        self.meter.sent(written);
        Poll::Ready(Ok(written))
    }

    fn gather(&mut self, parts: &[io::IoSlice<'_>]) -> usize {
        self.lend_outgoing();
        let mut written = 0;
        for part in parts {
            // What is larger is cut short, and its rest comes again.
            let room = OUTGOING.saturating_sub(self.outgoing.len());
            let taken = part.len().min(room);
            self.outgoing.extend_from_slice(&part[..taken]);
            written += taken;
        }
        written
    }

    fn lend_outgoing(&mut self) {
        if self.outgoing.capacity() == 0 {
            self.outgoing = WRITE_BUFFERS.lend(|| Vec::with_capacity(OUTGOING));
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while self.tls.wants_write() {
                let mut socket = PollWrite {
                    tcp: &mut self.tcp,
                    cx,
                };
                match self.tls.write_tls(&mut socket) {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Ok(sent) => self.writing.count(sent),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.writing.start();
                        return Poll::Pending;
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            self.sealed = 0;
            if self.outgoing.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.writing.is_over() {
                return self.writing.give_way(cx);
            }
            self.seal()?;
        }
    }

    /// Seals what is gathered.
    fn seal(&mut self) -> io::Result<()> {
        if !self.outgoing.is_empty() {
            self.tls.writer().write_all(&self.outgoing)?;
            self.sealed += self.outgoing.len();
            self.outgoing.clear();
            WRITE_BUFFERS.give_back(&mut self.outgoing);
        }
        Ok(())
    }
}

/// Whether so many bytes fill records, and leave no rest that is not worth one. Others are gathered
/// first, at the price of copying them.
fn fills_records(size: usize) -> bool {
    size >= WORTH_A_RECORD && !(1..WORTH_A_RECORD).contains(&(size % RECORD))
}

enum Opened {
    Some,
    End,
}

// === impl Turn ===

impl Turn {
    fn start(&self) {
        self.0.set(0);
    }

    fn count(&self, bytes: usize) {
        self.0.set(self.0.get() + bytes);
    }

    fn is_over(&self) -> bool {
        self.0.get() >= TURN
    }

    /// Ends the turn: the task goes to the end of the queue.
    fn give_way<T>(&self, cx: &Context<'_>) -> Poll<T> {
        self.start();
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

// === Adapters ===

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_read_counted(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Sends nothing: HTTP/2 flushes after each large frame, and the driver at the end of a turn. But
    /// here no frame is half written.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut session = self.0.borrow_mut();
        if mem::take(&mut session.notice) {
            session.lend_outgoing();
            session.outgoing.extend_from_slice(&NOTICE);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut session = self.0.borrow_mut();
        ready!(session.poll_send(cx))?;
        session.tls.send_close_notify();
        ready!(session.poll_send(cx))?;
        Pin::new(&mut session.tcp).poll_shutdown(cx)
    }
}

/// A socket that TLS writes to, within a task.
struct PollWrite<'a, 'b> {
    tcp: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl PollWrite<'_, '_> {
    fn finish(result: Poll<io::Result<usize>>) -> io::Result<usize> {
        match result {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for PollWrite<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Self::finish(Pin::new(&mut *self.tcp).poll_write(self.cx, buf))
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        Self::finish(Pin::new(&mut *self.tcp).poll_write_vectored(self.cx, parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that TLS writes to once, outside of any task.
struct TryWrite<'a>(&'a TcpStream);

impl Write for TryWrite<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_frame_is_one_packet_of_the_kernel() {
        /// Head, kind and tag (RFC 8446, section 5.2).
        const OF_A_RECORD: usize = 5 + 1 + 16;
        /// 64 KiB less what the kernel keeps for heads.
        const PACKET: usize = 65_200;
        let sealed = CHUNK + CHUNK.div_ceil(RECORD) * OF_A_RECORD;
        // Ethernet with IPv4 and with IPv6, an overlay's, jumbo frames.
        for segment in [1448, 1428, 1398, 8948] {
            assert!(sealed <= PACKET / segment * segment, "{segment}");
        }
    }

    #[test]
    fn what_fills_records_is_sealed_from_where_it_is_and_nothing_else() {
        let full = FULL_FRAME as usize + FRAME_HEAD;
        for size in [full, RECORD, 2 * RECORD - 1, RECORD + WORTH_A_RECORD] {
            assert!(fills_records(size), "{size}");
        }
        // A frame of the size that HTTP/2 begins with is one record and nine bytes.
        for size in [0, 100, WORTH_A_RECORD - 1, RECORD + FRAME_HEAD] {
            assert!(!fills_records(size), "{size}");
        }
    }
}
