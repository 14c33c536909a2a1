//! `peer heartbeat`: one connection whose life can be watched.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// An echo server
    address: SocketAddr,
    /// Pause between two beats, in milliseconds
    #[arg(long, default_value_t = 50)]
    every: u64,
    /// Bytes of one beat, at least eight
    #[arg(long, default_value_t = 8)]
    bytes: usize,
    /// Seconds to wait for an echo
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// Seconds after which to close the sending half and read to the end; for ever if not given
    #[arg(long = "for")]
    lifetime: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut stream = TcpStream::connect(options.address)
        .with_context(|| format!("connecting to {}", options.address))?;
    let patience = Some(Duration::from_secs(options.patience));
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(patience)?;
    let begun = Instant::now();
    let left = || {
        let lifetime = options.lifetime.map(Duration::from_secs);
        lifetime.map(|lifetime| lifetime.saturating_sub(begun.elapsed()))
    };
    let mut echo = vec![0; options.bytes.max(size_of::<u64>())];
    for beat in 1_u64.. {
        if left() == Some(Duration::ZERO) {
            break;
        }
        // No two beats are alike, nor two words of one.
        let words = (0..(echo.len() as u64).div_ceil(8)).map(|word| beat.wrapping_add(word << 32));
        let mut sent: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        sent.truncate(echo.len());
        stream.write_all(&sent).context("sending")?;
        stream.read_exact(&mut echo).context("receiving")?;
        ensure!(echo == sent, "beat {beat} came back as something else");
        println!("beat {beat}");
        let pause = Duration::from_millis(options.every);
        thread::sleep(left().map_or(pause, |left| left.min(pause)));
    }
    stream
        .shutdown(Shutdown::Write)
        .context("closing the sending half")?;
    let rest = stream.read(&mut echo).context("reading to the end")?;
    ensure!(rest == 0, "{rest} bytes came that were not sent");
    println!("closed");
    Ok(())
}
