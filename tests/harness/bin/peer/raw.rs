//! `peer raw`: packets past the socket layer.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to
    address: SocketAddrV4,
    /// What to send
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: Kind,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// A TCP segment with SYN
    Tcp,
    /// A UDP datagram
    Udp,
    /// An ICMP echo request
    Icmp,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let (protocol, payload) = match options.protocol {
        Kind::Tcp => (Protocol::TCP, syn(options.address.port())),
        Kind::Udp => (Protocol::UDP, datagram(options.address.port())),
        Kind::Icmp => (Protocol::ICMPV4, echo_request()),
    };
    let socket =
        Socket::new(Domain::IPV4, Type::RAW, Some(protocol)).context("opening a raw socket")?;
    // The kernel writes the IP header; a port would be taken for a protocol.
    let to = SocketAddrV4::new(*options.address.ip(), 0);
    socket.send_to(&payload, &to.into()).context("sending")?;
    println!(
        "sent {} bytes from {}",
        payload.len(),
        Ipv4Addr::UNSPECIFIED
    );
    Ok(())
}

/// Source port of what is made here.
const SOURCE: u16 = 40_000;

fn syn(port: u16) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(SOURCE.to_be_bytes());
    segment.extend(port.to_be_bytes());
    segment.extend([0; 8]);
    // Header of five words, SYN, and a window; no checksum: whoever captures sees it all the same.
    segment.extend([0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

fn datagram(port: u16) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(SOURCE.to_be_bytes());
    datagram.extend(port.to_be_bytes());
    datagram.extend(12u16.to_be_bytes());
    // No checksum, which UDP over IPv4 allows.
    datagram.extend([0, 0]);
    datagram.extend(*b"raw!");
    datagram
}

fn echo_request() -> Vec<u8> {
    // Type 8, code 0, the checksum of it all, identifier 1, sequence 1.
    vec![8, 0, 0xf7, 0xfd, 0, 1, 0, 1]
}
