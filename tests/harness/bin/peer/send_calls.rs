//! `peer send-calls`: `sendmsg()` of a datagram socket, to which nothing answers: what a call costs, or
//! when its verdict turns.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

/// Between two calls that wait for a turn.
const PAUSE: Duration = Duration::from_micros(200);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to
    address: SocketAddr,
    /// Time this many calls, all of which have to succeed
    #[arg(long)]
    calls: Option<u32>,
    /// End once the verdict is this
    #[arg(long, conflicts_with = "calls", action = clap::ArgAction::Set)]
    until_allowed: Option<bool>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let to = options.address;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    if let Some(calls) = options.calls {
        let started = Instant::now();
        for _ in 0..calls {
            socket
                .send_to(b"x", to)
                .with_context(|| format!("sending to {to}"))?;
        }
        let each = started.elapsed().as_secs_f64() * 1e9 / f64::from(calls);
        println!("{}", json!({"nanoseconds": each}));
        return Ok(());
    }
    let wanted = options.until_allowed.unwrap_or(true);
    println!("asking");
    loop {
        let allowed = match socket.send_to(b"x", to) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => false,
            Err(error) => bail!("sending to {to}: {error}"),
        };
        if allowed == wanted {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            println!("turned at {}", now.as_micros());
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}
