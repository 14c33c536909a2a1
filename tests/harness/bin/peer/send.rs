//! `peer send`: a TCP client that tells what it saw, as JSON.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Socket, Type};

use crate::enter;

/// Bytes of one read or write.
pub(crate) const BUFFER: usize = 64 << 10;

/// What to send.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to
    address: SocketAddr,
    /// Bytes to send
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// Send for so many seconds, however many bytes that is
    #[arg(long = "for", conflicts_with = "bytes")]
    lifetime: Option<u64>,
    /// Text to send, before the bytes
    #[arg(long, default_value = "")]
    text: String,
    /// Pause between connecting and sending, in milliseconds
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Pause after each read, in milliseconds
    #[arg(long, default_value_t = 0)]
    slow: u64,
    /// Pause after each write, in milliseconds
    #[arg(long, default_value_t = 0)]
    trickle: u64,
    /// Send nothing before the other side has closed its half
    #[arg(long)]
    last: bool,
    /// Do not close the sending half
    #[arg(long, conflicts_with = "last")]
    keep_open: bool,
    /// End with a reset as soon as everything is sent, and read nothing
    #[arg(long)]
    reset: bool,
    /// Exit as soon as everything is sent, and read nothing
    #[arg(long)]
    leave: bool,
    /// Take a reset by the other side for the end, and tell what came before it
    #[arg(long)]
    until_reset: bool,
    /// Pause before the first read, in milliseconds
    #[arg(long, default_value_t = 0)]
    read_later: u64,
    /// Seconds without a byte after which to give up
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// Make the socket first and join this cgroup only then
    #[arg(long)]
    join: Option<PathBuf>,
    /// Local address
    #[arg(long)]
    from: Option<SocketAddr>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let socket = Socket::new(Domain::for_address(options.address), Type::STREAM, None)?;
    if let Some(cgroup) = &options.join {
        enter::join(cgroup)?;
    }
    if let Some(from) = options.from {
        socket
            .bind(&from.into())
            .with_context(|| format!("binding to {from}"))?;
    }
    let patience = Duration::from_secs(options.patience);
    socket
        .connect_timeout(&options.address.into(), patience)
        .with_context(|| format!("connecting to {}", options.address))?;
    let mut stream = TcpStream::from(socket);
    println!("{}", transfer(&mut stream, options)?);
    Ok(())
}

fn transfer(stream: &mut TcpStream, options: &Options) -> Result<serde_json::Value> {
    let patience = Some(Duration::from_secs(options.patience));
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(patience)?;
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    thread::sleep(Duration::from_millis(options.pause));

    let sending = stream.try_clone()?;
    let (text, bytes, trickle) = (
        options.text.clone(),
        options.bytes,
        Duration::from_millis(options.trickle),
    );
    let lifetime = options.lifetime.map(Duration::from_secs);
    let close = !options.keep_open && !options.reset;
    if options.leave {
        // What is sent is the kernel's then.
        let room = usize::try_from(bytes)?;
        socket2::SockRef::from(&*stream).set_send_buffer_size(room)?;
    }
    let send = move || {
        (&sending).write_all(text.as_bytes())?;
        let mut sent = Digest::default();
        sent.add(text.as_bytes());
        match lifetime {
            Some(lifetime) => {
                source_until(&sending, Instant::now() + lifetime, trickle, &mut sent)?
            }
            None => source(&sending, bytes, trickle, &mut sent)?,
        }
        if close {
            sending.shutdown(Shutdown::Write)?;
        }
        io::Result::Ok(sent)
    };
    if options.reset || options.leave {
        let sent = send().context("sending")?;
        if options.reset {
            socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
        }
        return Ok(json!({"sent": {"bytes": sent.length, "sha256": sent.hex()}}));
    }
    let (mut sender, mut later) = (None, None);
    if options.last {
        later = Some(send);
    } else {
        sender = Some(thread::spawn(send));
    }

    thread::sleep(Duration::from_millis(options.read_later));
    let mut received = Digest::default();
    let mut head = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut is_reset = false;
    loop {
        let length = match stream.read(&mut buffer) {
            Err(error) if options.until_reset && error.kind() == io::ErrorKind::ConnectionReset => {
                is_reset = true;
                break;
            }
            read => read.context("receiving")?,
        };
        let read = buffer.get(..length).unwrap_or_default();
        if read.is_empty() {
            break;
        }
        if head.len() < 256 {
            head.extend_from_slice(read);
        }
        received.add(read);
        thread::sleep(Duration::from_millis(options.slow));
    }
    if let Some(send) = later {
        sender = Some(thread::spawn(send));
    }
    let sent = sender
        .context("there is a sender")?
        .join()
        .map_err(|_| anyhow::anyhow!("the sender broke"))?;
    let sent = match sent {
        // Whichever call comes first is told of a reset, and only that one.
        Err(_) if options.until_reset => {
            is_reset = true;
            Digest::default()
        }
        sent => sent.context("sending")?,
    };
    head.truncate(256);
    Ok(json!({
        "local": local.to_string(),
        "remote": remote.to_string(),
        "reset": is_reset,
        "sent": {"bytes": sent.length, "sha256": sent.hex()},
        "received": {
            "bytes": received.length,
            "sha256": received.hex(),
            "head": String::from_utf8_lossy(&head),
        },
    }))
}

/// Sends bytes that look random and are always the same, with a pause after each write.
pub(crate) fn source(
    stream: &TcpStream,
    bytes: u64,
    trickle: Duration,
    digest: &mut Digest,
) -> io::Result<()> {
    let mut left = bytes;
    write_while(stream, trickle, digest, || {
        let length = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
        left -= length as u64;
        length
    })
}

/// The same for a time.
fn source_until(
    stream: &TcpStream,
    end: Instant,
    trickle: Duration,
    digest: &mut Digest,
) -> io::Result<()> {
    write_while(stream, trickle, digest, || match Instant::now() < end {
        true => BUFFER,
        false => 0,
    })
}

/// Writes as many bytes as it is told each time, until it is told none.
fn write_while(
    mut stream: &TcpStream,
    trickle: Duration,
    digest: &mut Digest,
    mut length: impl FnMut() -> usize,
) -> io::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut buffer = vec![0; BUFFER];
    loop {
        for word in buffer.chunks_exact_mut(8) {
            // xorshift64: cheap, and nothing a tunnel could get right by accident.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let part = buffer.get(..length()).unwrap_or_default();
        if part.is_empty() {
            return Ok(());
        }
        stream.write_all(part)?;
        digest.add(part);
        thread::sleep(trickle);
    }
}

/// Length and SHA-256 of what passed.
#[derive(Clone, Default)]
pub(crate) struct Digest {
    pub(crate) length: u64,
    hash: Sha256,
}

impl Digest {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        self.hash.update(bytes);
    }

    pub(crate) fn hex(&self) -> String {
        self.hash
            .clone()
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}
