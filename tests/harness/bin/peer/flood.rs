//! `peer flood`: many TCP connections at once, each of which must work.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// How many.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// An echo server
    address: SocketAddr,
    /// Connections that are open at the same time
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Seconds to hold them open after each has worked
    #[arg(long, default_value_t = 0)]
    hold: u64,
    /// Let each work once more after that
    #[arg(long)]
    again: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    allow_many_files()?;
    let mut streams = Vec::with_capacity(options.connections);
    for number in 0..options.connections {
        let mut stream =
            TcpStream::connect(options.address).with_context(|| format!("connection {number}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(&number.to_le_bytes())?;
        streams.push(stream);
    }
    echoes(&mut streams)?;
    println!("open {}", streams.len());
    thread::sleep(Duration::from_secs(options.hold));
    if options.again {
        for (number, stream) in streams.iter_mut().enumerate() {
            stream
                .write_all(&number.to_le_bytes())
                .with_context(|| format!("sending by connection {number}"))?;
        }
        echoes(&mut streams)?;
        println!("open still {}", streams.len());
    }
    Ok(())
}

/// Reads what each has sent.
fn echoes(streams: &mut [TcpStream]) -> Result<()> {
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut echo = [0; size_of::<usize>()];
        stream
            .read_exact(&mut echo)
            .with_context(|| format!("echo of connection {number}"))?;
        ensure!(
            usize::from_le_bytes(echo) == number,
            "connection {number} echoed another's bytes"
        );
    }
    Ok(())
}

/// Raises the limit of open files as far as it goes.
pub(crate) fn allow_many_files() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
