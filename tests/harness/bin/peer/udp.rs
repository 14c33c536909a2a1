//! `peer udp-serve` and `peer udp-send`: datagrams.

use std::{
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::enter;

/// The largest datagram.
const DATAGRAM: usize = 64 << 10;

#[derive(clap::Args)]
pub(crate) struct ServeOptions {
    /// Where to listen
    address: SocketAddr,
}

pub(crate) fn serve(options: &ServeOptions) -> Result<()> {
    let socket = UdpSocket::bind(options.address)?;
    println!("listening on {}", socket.local_addr()?);
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        println!("datagram of {length} from {from}");
        socket.send_to(buffer.get(..length).unwrap_or_default(), from)?;
    }
}

#[derive(clap::Args)]
pub(crate) struct SendOptions {
    /// Where to
    address: SocketAddr,
    /// What to send
    #[arg(long, default_value = "hello")]
    text: String,
    /// Connect the socket first
    #[arg(long)]
    connect: bool,
    /// Make the socket, and connect it if asked to, and join this cgroup only then
    #[arg(long)]
    join: Option<PathBuf>,
    /// Milliseconds to wait for an answer
    #[arg(long, default_value_t = 1000)]
    patience: u64,
}

pub(crate) fn send(options: &SendOptions) -> Result<()> {
    let any: SocketAddr = if options.address.is_ipv4() {
        "0.0.0.0:0".parse()?
    } else {
        "[::]:0".parse()?
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_millis(options.patience)))?;
    if options.connect {
        socket
            .connect(options.address)
            .with_context(|| format!("connecting to {}", options.address))?;
    }
    if let Some(cgroup) = &options.join {
        enter::join(cgroup)?;
    }
    let sent = if options.connect {
        socket.send(options.text.as_bytes())
    } else {
        socket.send_to(options.text.as_bytes(), options.address)
    };
    sent.context("sending")?;
    let mut buffer = vec![0; DATAGRAM];
    let (length, from) = socket.recv_from(&mut buffer).context("receiving")?;
    println!(
        "{from} {}",
        String::from_utf8_lossy(buffer.get(..length).unwrap_or_default())
    );
    Ok(())
}
