//! What shapes and bounds the tunnel: ports, congestion control, limits and time-outs, with their
//! defaults.

use std::time::Duration;

use serde::Deserialize;

use crate::yaml::values::{duration, number, port, positive_duration, size};

/// TCP ports that reeve takes in each workload's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ports {
    /// Where redirected connections of workloads arrive, on loopback. Default 15001.
    #[serde(deserialize_with = "port")]
    pub outbound: u16,
    /// Where tunnels arrive (HBONE). Default 15008.
    #[serde(deserialize_with = "port")]
    pub tunnel: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            outbound: reeve_common::DEFAULT_OUTBOUND_PORT,
            tunnel: reeve_common::DEFAULT_TUNNEL_PORT,
        }
    }
}

/// How fast TCP sends what a tunnel carries (`TCP_CONGESTION` of tcp(7)), on this node's side of it.
///
/// A tunnel carries many connections, and between the nodes of a cluster there is little distance:
/// what paces a bulk stream there, as BBR does, keeps all others waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CongestionControl {
    /// Whatever the host uses: `net.ipv4.tcp_congestion_control`.
    Host,
    /// The kernel's own default.
    #[default]
    Cubic,
    /// Without CUBIC's growth; every kernel has it.
    Reno,
    /// For long ways that lose packets.
    Bbr,
    /// Where switches mark packets with ECN before they lose any.
    Dctcp,
}

impl CongestionControl {
    /// The kernel's name; none for whatever the host uses.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::Host => None,
            Self::Cubic => Some("cubic"),
            Self::Reno => Some("reno"),
            Self::Bbr => Some("bbr"),
            Self::Dctcp => Some("dctcp"),
        }
    }
}

/// Bounds. Beyond one, the newcomer is refused and counted; what is open goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Limits {
    /// Threads that carry tunnels; 0 is one for each two cores, at least one. Default 0.
    #[serde(deserialize_with = "number::<_, _, 0, 1024>")]
    pub workers: usize,
    /// Open connections of workloads, in both directions, in all. Default 100000.
    #[serde(deserialize_with = "number::<_, _, 1, 10_000_000>")]
    pub connections: usize,
    /// Open connections of one workload, in both directions: a flood from one leaves room for the
    /// others. Default 25000.
    #[serde(deserialize_with = "number::<_, _, 1, 10_000_000>")]
    pub connections_per_workload: usize,
    /// Open connections that peers of one identity opened: a flood from one peer leaves room for
    /// the others. Default 10000.
    #[serde(deserialize_with = "number::<_, _, 1, 10_000_000>")]
    pub connections_per_identity: usize,
    /// TLS handshakes under way, in all: of peers, and as many towards peers. Default 512.
    #[serde(deserialize_with = "number::<_, _, 1, 1_000_000>")]
    pub handshakes: usize,
    /// TLS handshakes under way that peers at one address began. Default 128.
    #[serde(deserialize_with = "number::<_, _, 1, 1_000_000>")]
    pub handshakes_per_address: usize,
    /// Tunnels that peers opened, in all. Default 10000.
    #[serde(deserialize_with = "number::<_, _, 1, 1_000_000>")]
    pub tunnels: usize,
    /// Tunnels that peers of one identity opened. Default 2000.
    #[serde(deserialize_with = "number::<_, _, 1, 1_000_000>")]
    pub tunnels_per_identity: usize,
    /// Frames of a tunnel's peer within a second that carry nothing, as PING and SETTINGS, beyond
    /// one for each stream and each KiB that the tunnel carries. Default 1000.
    #[serde(deserialize_with = "number::<_, _, 10, 1_000_000>")]
    pub control_frames: usize,
    /// Streams of one tunnel. Default 200.
    #[serde(deserialize_with = "number::<_, _, 1, 100_000>")]
    pub streams_per_tunnel: u32,
    /// Tunnels from one identity to one peer, per worker. Default 16.
    #[serde(deserialize_with = "number::<_, _, 1, 1024>")]
    pub tunnels_per_peer: usize,
    /// Bytes that a stream's receiver may have outstanding. Default 512 KiB.
    #[serde(deserialize_with = "size::<_, _, 65_535, 0x7fff_ffff>")]
    pub stream_window: u32,
    /// Bytes that a tunnel's receiver may have outstanding. Default 4 MiB.
    #[serde(deserialize_with = "size::<_, _, 65_535, 0x7fff_ffff>")]
    pub tunnel_window: u32,
    /// Daemons that were taken over from and still carry connections. Beyond it the one that was taken
    /// over from first lets its connections end within [`Timeouts::drain`]. Default 8.
    #[serde(deserialize_with = "number::<_, _, 1, 16>")]
    pub predecessors: usize,
    /// Largest header list of a CONNECT request in bytes. Default 16 KiB.
    #[serde(deserialize_with = "size::<_, _, 1024, 1_048_576>")]
    pub header_list: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: 0,
            connections: 100_000,
            connections_per_workload: 25_000,
            connections_per_identity: 10_000,
            handshakes: 512,
            handshakes_per_address: 128,
            tunnels: 10_000,
            tunnels_per_identity: 2000,
            control_frames: 1000,
            streams_per_tunnel: 200,
            tunnels_per_peer: 16,
            stream_window: 512 << 10,
            tunnel_window: 4 << 20,
            predecessors: 8,
            header_list: 16 << 10,
        }
    }
}

/// Time-outs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Timeouts {
    /// TCP connection to a peer's tunnel port or to an application. Default 10 s.
    #[serde(deserialize_with = "positive_duration")]
    pub connect: Duration,
    /// TLS handshake, from the first byte to the last. Default 5 s.
    #[serde(deserialize_with = "positive_duration")]
    pub handshake: Duration,
    /// From a CONNECT request to its answer; also from the end of the handshake to the first
    /// request. Default 15 s.
    #[serde(deserialize_with = "positive_duration")]
    pub request: Duration,
    /// A connection whose one direction is closed and whose other carries nothing. Default 5 min.
    #[serde(deserialize_with = "positive_duration")]
    pub half_closed: Duration,
    /// A connection that carries nothing in either direction; zero is never. Default zero.
    #[serde(deserialize_with = "duration")]
    pub idle: Duration,
    /// A tunnel without streams. Default 60 s.
    #[serde(deserialize_with = "positive_duration")]
    pub tunnel_idle: Duration,
    /// Age at which a tunnel takes no new streams. Default 1 h.
    #[serde(deserialize_with = "positive_duration")]
    pub tunnel_age: Duration,
    /// For connections to end by themselves at a shutdown; so long before one of its certificates
    /// expires a tunnel takes no new streams. Default 30 s.
    #[serde(deserialize_with = "positive_duration")]
    pub drain: Duration,
    /// For connections of a tunnel to end by themselves after its own certificate was replaced, where
    /// the tunnel was not proven again with the new one; zero is never. Default zero.
    #[serde(deserialize_with = "duration")]
    pub outdated: Duration,
    /// For connections to end by themselves after another daemon has taken over; zero is for ever.
    /// Default zero.
    #[serde(deserialize_with = "duration")]
    pub hand_over: Duration,
    /// Between PINGs on a tunnel. Default 10 s.
    #[serde(deserialize_with = "positive_duration")]
    pub ping: Duration,
    /// For the answer to a PING, after which the tunnel takes no new streams. Default 20 s.
    #[serde(deserialize_with = "positive_duration")]
    pub ping_answer: Duration,
    /// A tunnel whose peer answers nothing and acknowledges nothing, with the connections in it. New
    /// ones go elsewhere from the first PING on that is not answered in time. Default 15 min.
    #[serde(deserialize_with = "positive_duration")]
    pub silent: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connect: seconds(10),
            handshake: seconds(5),
            request: seconds(15),
            half_closed: seconds(300),
            idle: Duration::ZERO,
            tunnel_idle: seconds(60),
            tunnel_age: seconds(3600),
            drain: seconds(30),
            outdated: Duration::ZERO,
            hand_over: Duration::ZERO,
            ping: seconds(10),
            ping_answer: seconds(20),
            silent: seconds(900),
        }
    }
}
