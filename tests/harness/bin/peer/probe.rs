//! `peer probe`: connections to one address, one after another without end, and what became of them.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde_json::json;

/// How often the sums are printed.
const EVERY: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A server of mode `answer`
    address: SocketAddr,
    /// Connections at the same time
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Pause after each connection, in milliseconds
    #[arg(long, default_value_t = 1)]
    pause: u64,
    /// Seconds that each step of a connection may take
    #[arg(long, default_value_t = 10)]
    patience: u64,
}

#[derive(Default)]
struct Seen {
    worked: u64,
    failed: BTreeMap<String, u64>,
    slowest: Duration,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (address, patience) = (options.address, Duration::from_secs(options.patience));
    let pause = Duration::from_millis(options.pause);
    for _ in 0..options.threads {
        let seen = Arc::clone(&seen);
        thread::spawn(move || {
            loop {
                let started = Instant::now();
                let outcome = once(address, patience);
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                match outcome {
                    Ok(()) => {
                        seen.worked += 1;
                        seen.slowest = seen.slowest.max(started.elapsed());
                    }
                    Err(error) => *seen.failed.entry(error.to_string()).or_default() += 1,
                }
                drop(seen);
                thread::sleep(pause);
            }
        });
    }
    loop {
        thread::sleep(EVERY);
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let line = json!({
            "worked": seen.worked,
            "failed": seen.failed,
            "slowest_ms": u64::try_from(seen.slowest.as_millis()).unwrap_or(u64::MAX),
        });
        drop(seen);
        println!("{line}");
    }
}

fn once(address: SocketAddr, patience: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"?")?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    if rest.is_empty() {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(())
    }
}
