//! `peer hold`: a silent connection, whose end can be timed.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// An echo server
    address: SocketAddr,
    /// Hold a connected datagram socket
    #[arg(long)]
    udp: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let to = options.address;
    let mut buffer = [0; 64];
    let end = if options.udp {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket
            .connect(to)
            .with_context(|| format!("connecting to {to}"))?;
        socket.send(b"hello").context("sending")?;
        socket.recv(&mut buffer).context("receiving")?;
        println!("holding {}", socket.local_addr()?);
        socket.recv(&mut buffer)
    } else {
        let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        stream.write_all(b"hello").context("sending")?;
        stream.read_exact(&mut [0; 5]).context("receiving")?;
        println!("holding {}", stream.local_addr()?);
        stream.read(&mut buffer)
    };
    let end = match end {
        Ok(bytes) => format!("{bytes} bytes"),
        Err(error) => error.to_string(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    println!("ended at {}: {end}", now.as_millis());
    Ok(())
}
