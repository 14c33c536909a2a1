//! `peer ping`: an ICMP echo request and its reply.

use std::{
    io::Read,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of an echo request or reply without data.
const HEADER: usize = 8;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Whom
    address: IpAddr,
    /// Milliseconds to wait for the reply
    #[arg(long, default_value_t = 1000)]
    patience: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let to = SocketAddr::new(options.address, 0);
    let protocol = match options.address {
        IpAddr::V4(_) => Protocol::ICMPV4,
        IpAddr::V6(_) => Protocol::ICMPV6,
    };
    let mut socket = Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))
        .context("opening a raw socket")?;
    socket.connect(&to.into()).context("connecting")?;
    let identifier = std::process::id().to_be_bytes();
    let identifier = [identifier[2], identifier[3]];
    socket
        .send(&request(options.address, identifier))
        .context("sending")?;

    let deadline = Instant::now() + Duration::from_millis(options.patience);
    let mut buffer = [0; 1500];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no reply");
        }
        socket.set_read_timeout(Some(left))?;
        let length = socket.read(&mut buffer).context("no reply")?;
        let packet = buffer.get(..length).unwrap_or_default();
        // An IPv4 raw socket gets the IP header as well.
        let start = match options.address {
            IpAddr::V4(_) => usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4,
            IpAddr::V6(_) => 0,
        };
        if packet
            .get(start..)
            .is_some_and(|icmp| is_reply(icmp, identifier))
        {
            println!("reply from {}", options.address);
            return Ok(());
        }
    }
}

fn request(to: IpAddr, identifier: [u8; 2]) -> [u8; HEADER] {
    let [high, low] = identifier;
    match to {
        IpAddr::V4(_) => {
            let sum = 0x0800 + u32::from(u16::from_be_bytes(identifier)) + 1;
            let folded = (sum & 0xffff) + (sum >> 16);
            let [.., sum_high, sum_low] = (!folded).to_be_bytes();
            [8, 0, sum_high, sum_low, high, low, 0, 1]
        }
        // The kernel writes this checksum, as it knows the source.
        IpAddr::V6(_) => [128, 0, 0, 0, high, low, 0, 1],
    }
}

fn is_reply(icmp: &[u8], identifier: [u8; 2]) -> bool {
    let kind = icmp.first().copied();
    matches!(kind, Some(0 | 129)) && icmp.get(4..6) == Some(&identifier)
}
