//! A client of tunnels that sends HTTP/2 frame by frame, right or wrong (RFC 9113, sections 4
//! and 6).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_rustls::client::TlsStream;

use super::{Client, runtime, wait_for};

/// What a client sends before its first frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes that a flood writes at once.
const CHUNK: usize = 64 << 10;

/// Reset of a stream that the server has not looked at.
pub const REFUSED_STREAM: u32 = 7;
/// The end of a tunnel whose client goes too far.
pub const ENHANCE_YOUR_CALM: u32 = 11;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// Setting of the window that each stream of the server's begins with.
pub const INITIAL_WINDOW: u16 = 4;

/// Half of a tunnel: what it sends, and what was sent to it.
#[derive(Debug)]
pub struct Raw {
    writer: WriteHalf<TlsStream<TcpStream>>,
    /// Kept where nobody reads from it.
    _unread: Option<ReadHalf<TlsStream<TcpStream>>>,
    seen: Arc<Mutex<Seen>>,
    reader: Option<JoinHandle<()>>,
}

/// What the server has sent.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Answers to requests with status 200.
    pub connected: usize,
    /// Bytes of connections.
    pub bytes: usize,
    /// Why streams were reset.
    pub resets: Vec<u32>,
    /// Answers to PINGs.
    pub pongs: usize,
    /// Why the server ended the tunnel, if it said so.
    pub goaway: Option<u32>,
    /// The connection has ended.
    pub ended: bool,
}

impl Client {
    /// A tunnel of frames. It ends when dropped.
    ///
    /// # Errors
    /// When the TLS handshake fails, as far as the client can see it.
    pub fn raw(&self, to: std::net::SocketAddr) -> Result<Raw, String> {
        Raw::new(self, to, true)
    }

    /// A tunnel of frames, from which nothing is read.
    ///
    /// # Errors
    /// When the TLS handshake fails, as far as the client can see it.
    pub fn raw_and_deaf(&self, to: std::net::SocketAddr) -> Result<Raw, String> {
        Raw::new(self, to, false)
    }
}

// === impl Raw ===

impl Raw {
    fn new(client: &Client, to: std::net::SocketAddr, reads: bool) -> Result<Self, String> {
        let stream = wait_for("the TLS handshake", client.tls(to))?;
        let (reader, writer) = split(stream);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (reader, unread) = if reads {
            let reading = read(reader, seen.clone());
            (Some(runtime().spawn(reading)), None)
        } else {
            (None, Some(reader))
        };
        let mut raw = Self {
            writer,
            _unread: unread,
            seen,
            reader,
        };
        raw.send(PREFACE)?;
        Ok(raw)
    }

    /// Sends bytes: frames, or whatever.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        wait_for("frames to be sent", async {
            self.writer.write_all(bytes).await?;
            self.writer.flush().await
        })
        .map_err(|error: std::io::Error| error.to_string())
    }

    /// Sends a frame again and again, at most this often, until the server takes no more.
    pub fn flood(&mut self, frame: &[u8], times: usize) {
        let per_chunk = (CHUNK / frame.len()).clamp(1, times);
        let chunk = frame.repeat(per_chunk);
        for _ in 0..times.div_ceil(per_chunk) {
            let sent = async {
                let writing = self.writer.write_all(&chunk);
                tokio::time::timeout(super::PATIENCE / 10, writing).await
            };
            // Also when it does not read: what it has not read it need not hold.
            if !matches!(runtime().block_on(sent), Ok(Ok(()))) {
                return;
            }
        }
        // What is still to be sent shall be.
        let _ = wait_for("frames to be sent", self.writer.flush());
    }

    /// What the server has sent until now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

async fn read(mut from: ReadHalf<TlsStream<TcpStream>>, seen: Arc<Mutex<Seen>>) {
    let mut payload = Vec::new();
    let mut head = [0; 9];
    while from.read_exact(&mut head).await.is_ok() {
        let [high, middle, low, kind, flags, ..] = head;
        payload.resize(u32::from_be_bytes([0, high, middle, low]) as usize, 0);
        if from.read_exact(&mut payload).await.is_err() {
            break;
        }
        let number = |at: usize| {
            let bytes = payload.get(at..at + 4)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        let mut seen = lock(&seen);
        match kind {
            DATA => seen.bytes += payload.len(),
            // A status of 200 is an entry of the static table (RFC 7541, appendix A).
            HEADERS if payload.first() == Some(&0x88) => seen.connected += 1,
            RST_STREAM => seen.resets.extend(number(0)),
            PING if flags & ACK != 0 => seen.pongs += 1,
            GOAWAY => seen.goaway = number(4),
            _ => {}
        }
    }
    lock(&seen).ended = true;
}

/// Nothing that is done under this lock can fail half way.
fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

// === Frames ===

/// A frame of any type.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame is small");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Asks for an answer.
#[must_use]
pub fn ping() -> Vec<u8> {
    frame(PING, 0, 0, &[7; 8])
}

/// The answer to a PING that nobody sent.
#[must_use]
pub fn pong() -> Vec<u8> {
    frame(PING, ACK, 0, &[7; 8])
}

/// Settings, each a number and a value.
#[must_use]
pub fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (number, value) in settings {
        payload.extend(number.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    frame(SETTINGS, 0, 0, &payload)
}

/// Says what a stream depends on, which means nothing any more.
#[must_use]
pub fn priority(stream: u32) -> Vec<u8> {
    frame(PRIORITY, 0, stream, &[0, 0, 0, 0, 16])
}

/// Gives a stream, or with 0 the tunnel, a wider window.
#[must_use]
pub fn window_update(stream: u32, bytes: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes())
}

/// Ends a stream abruptly.
#[must_use]
pub fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}

/// A CONNECT request.
#[must_use]
pub fn connect(stream: u32, authority: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &request(authority))
}

/// A CONNECT request whose headers go on in CONTINUATION frames.
#[must_use]
pub fn endless_connect(stream: u32, authority: &str) -> Vec<u8> {
    frame(HEADERS, 0, stream, &request(authority))
}

/// More headers, and not the last ones.
#[must_use]
pub fn continuation(stream: u32, headers: &[u8]) -> Vec<u8> {
    frame(CONTINUATION, 0, stream, headers)
}

/// A header as it is on the wire: not remembered, not compressed (RFC 7541, section 6.2.2).
#[must_use]
pub fn header(name: &str, value: &str) -> Vec<u8> {
    let mut header = vec![0];
    for text in [name, value] {
        // Up to 126 a length is a byte.
        header.push(u8::try_from(text.len()).expect("a header is short"));
        header.extend(text.as_bytes());
    }
    header
}

fn request(authority: &str) -> Vec<u8> {
    // `:method` and `:authority` by their names' places in the static table.
    let mut request = vec![2, 7];
    request.extend(b"CONNECT");
    request.push(1);
    request.push(u8::try_from(authority.len()).expect("an authority is short"));
    request.extend(authority.as_bytes());
    request
}
