//! `peer heartbeat`: one connection whose life can be watched.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// An echo server
    address: SocketAddr,
    /// Pause between two beats, in milliseconds
    #[arg(long, default_value_t = 50)]
    every: u64,
    /// Seconds to wait for an echo
    #[arg(long, default_value_t = 30)]
    patience: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut stream = TcpStream::connect(options.address)
        .with_context(|| format!("connecting to {}", options.address))?;
    stream.set_read_timeout(Some(Duration::from_secs(options.patience)))?;
    for beat in 1_u64.. {
        let sent = beat.to_le_bytes();
        stream.write_all(&sent).context("sending")?;
        let mut echo = [0; size_of::<u64>()];
        stream.read_exact(&mut echo).context("receiving")?;
        ensure!(echo == sent, "beat {beat} came back as something else");
        println!("beat {beat}");
        thread::sleep(Duration::from_millis(options.every));
    }
    Ok(())
}
