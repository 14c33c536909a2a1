//! `peer serve`: a TCP server.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use socket2::SockRef;

use crate::{
    enter,
    flood::allow_many_files,
    send::{BUFFER, Digest, source},
};

/// Small, as there may be thousands.
const STACK: usize = 128 << 10;

/// Threads of `answer`: as many as `connect-rate` has by default.
const ANSWERING: usize = 16;

/// What to serve.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to listen
    address: SocketAddr,
    /// What to do with a connection
    #[arg(long, value_enum, default_value = "echo")]
    mode: Mode,
    /// Bytes that `source`, `refuse` and `once` send
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// Pause after each read, in milliseconds
    #[arg(long, default_value_t = 0)]
    slow: u64,
    /// Listen first and join this cgroup only then
    #[arg(long)]
    join: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Mode {
    /// Send back what comes, and close when the client has
    Echo,
    /// Read until the client closes its half, then answer with the SHA-256 of it all
    Hash,
    /// Send bytes, close that half, then read until the client closes
    Source,
    /// Read what comes first, then reset
    Reset,
    /// Read what comes first, answer with bytes, and close: what the client says meanwhile makes that a
    /// reset
    Refuse,
    /// Read what comes first, answer with bytes and exit
    Once,
    /// Accept and do nothing at all
    Hold,
    /// Close at once
    Close,
    /// Read one byte, answer with one, and close: as little as a connection can be for
    Answer,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    allow_many_files()?;
    let listener = TcpListener::bind(options.address)
        .with_context(|| format!("listening on {}", options.address))?;
    if let Some(cgroup) = &options.join {
        enter::join(cgroup)?;
    }
    println!("listening on {}", listener.local_addr()?);
    if let Mode::Answer = options.mode {
        return answer(&listener);
    }
    let mut held = Vec::new();
    for stream in listener.incoming() {
        let stream = stream?;
        // A client may be gone again.
        let Ok(client) = stream.peer_addr() else {
            continue;
        };
        println!("accepted {client}");
        let (mode, bytes, slow) = (
            options.mode,
            options.bytes,
            Duration::from_millis(options.slow),
        );
        match mode {
            Mode::Close => continue,
            Mode::Hold => held.push(stream),
            Mode::Once => {
                answer_once(stream, bytes)?;
                return Ok(());
            }
            Mode::Echo | Mode::Hash | Mode::Source | Mode::Answer | Mode::Reset | Mode::Refuse => {
                thread::Builder::new().stack_size(STACK).spawn(move || {
                    // A client that goes away is not this server's failure.
                    if let Err(error) = serve(stream, mode, bytes, slow) {
                        eprintln!("connection: {error}");
                    }
                })?;
            }
        }
    }
    Ok(())
}

/// Answers from a few threads that share the listener: one thread per connection would measure
/// the making of threads.
fn answer(listener: &TcpListener) -> Result<()> {
    thread::scope(|scope| {
        for _ in 0..ANSWERING {
            scope.spawn(|| {
                for mut stream in listener.incoming().flatten() {
                    let mut byte = [0];
                    // Who asks and goes away is not answered.
                    let _ = stream
                        .read_exact(&mut byte)
                        .and_then(|()| stream.write_all(&byte));
                }
            });
        }
    });
    Ok(())
}

/// The kernel has the answer by the time this returns.
fn answer_once(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let room = usize::try_from(bytes).unwrap_or(usize::MAX);
    SockRef::from(&stream).set_send_buffer_size(room)?;
    stream.read_exact(&mut [0])?;
    source(&stream, bytes, Duration::ZERO, &mut Digest::default())
}

fn serve(mut stream: TcpStream, mode: Mode, bytes: u64, slow: Duration) -> io::Result<()> {
    // Not to be had any more once both ends have closed.
    let client = stream.peer_addr()?;
    if let Mode::Source = mode {
        source(&stream, bytes, Duration::ZERO, &mut Digest::default())?;
        stream.shutdown(Shutdown::Write)?;
    }
    let mut digest = Digest::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = stream.read(&mut buffer).inspect_err(|_| {
            println!("broken {client} {} {}", digest.length, digest.hex());
        })?;
        let read = buffer.get(..length).unwrap_or_default();
        if read.is_empty() {
            break;
        }
        digest.add(read);
        match mode {
            Mode::Echo => stream.write_all(read)?,
            Mode::Refuse => {
                return source(&stream, bytes, Duration::ZERO, &mut Digest::default());
            }
            Mode::Reset => return SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
            _ => {}
        }
        if !slow.is_zero() {
            thread::sleep(slow);
        }
    }
    if let Mode::Hash = mode {
        stream.write_all(digest.hex().as_bytes())?;
    }
    println!("served {client} {} {}", digest.length, digest.hex());
    stream.shutdown(Shutdown::Both)
}
