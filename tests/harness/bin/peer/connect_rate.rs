//! `peer connect-rate`: new connections per second. Each is opened, carries one byte there and one
//! back, and is closed by the server.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use serde_json::json;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A server of mode `answer`
    address: SocketAddr,
    /// Connections at the same time
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// How long
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(options.seconds);
    let (mut latencies, mut failed) = (Vec::new(), 0);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|_| scope.spawn(|| measure(options.address, end)))
            .collect();
        for (mut measured, failures) in threads.into_iter().filter_map(|thread| thread.join().ok())
        {
            latencies.append(&mut measured);
            failed += failures;
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        latencies
            .get(index)
            .map(|latency| latency.as_secs_f64() * 1000.0)
    };
    if latencies.is_empty() {
        bail!("no connection to {} worked", options.address);
    }
    let result = json!({
        "connections": latencies.len(),
        "failed": failed,
        "per_second": latencies.len() as f64 / seconds,
        "p50_ms": at(0.50),
        "p99_ms": at(0.99),
    });
    println!("{result}");
    Ok(())
}

fn measure(address: SocketAddr, end: Instant) -> (Vec<Duration>, u64) {
    let (mut latencies, mut failed) = (Vec::new(), 0);
    loop {
        let started = Instant::now();
        if started >= end {
            return (latencies, failed);
        }
        match once(address) {
            Ok(()) => latencies.push(started.elapsed()),
            Err(_) => failed += 1,
        }
    }
}

fn once(address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"?")?;
    let mut rest = Vec::new();
    // Until the server has closed: a connection that is left half-open was not cheap, only unpaid.
    stream.read_to_end(&mut rest)?;
    if rest.is_empty() {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(())
    }
}
