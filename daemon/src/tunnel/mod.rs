//! The data path in user space: HBONE tunnels (HTTP/2 CONNECT over mutual TLS) and the streams in
//! them, each carrying one application connection.
//!
//! In: connections that the kernel redirected, tunnels of peers, the current
//! [`Snapshot`](crate::policy::Snapshot) and identities. Out: bytes, log lines and metrics.
//!
//! Follow a connection that a workload opens: [`outbound`] accepts it, [`pool`] finds or opens a
//! tunnel with [`client`], and [`copy`] moves the bytes. Follow one that a peer opens: [`server`]
//! accepts the tunnel, [`inbound`] judges each stream and connects to the application, and [`copy`]
//! moves the bytes.
//!
//! Below these: [`wire`] is TLS over TCP as HTTP/2 sees it, [`frames`] counts what a peer sends
//! to no purpose, [`driver`] keeps one tunnel going,
//! [`proof`] has its identities proven again while it carries connections,
//! [`link`] is a tunnel as everything else sees it, and [`connection`] an application connection
//! from its first byte to its log line. [`failing`] has `connect()` fail where a connection has just
//! failed, and [`places`] shares handshakes among workloads. All of them run on one of the threads of
//! [`workers`], and share what a thread owns through [`worker`] and never with another thread, but for
//! these two.

mod authority;
mod bounds;
mod client;
mod connection;
mod copy;
mod driver;
mod error;
mod failing;
mod first;
mod frames;
mod inbound;
mod link;
mod outbound;
mod places;
mod pool;
mod proof;
mod registry;
mod said;
mod server;
mod socket;
mod source;
mod spare;
mod stash;
mod sweep;
#[cfg(test)]
mod tests;
mod wire;
mod worker;
mod workers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use crate::{
    datapath::SocketStorage,
    identity::{IdentityStore, SpiffeId},
    policy::Snapshot,
    telemetry::{ConnectionLog, Metrics},
};

pub use authority::parse_text as parse_authority;
pub use error::{ServeError, StartError, TunnelError};
pub use workers::{Tunnels, Until};

/// What the data path shares with the rest of the daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Who is where and who may talk. After it has changed: [`Tunnels::judge_again`].
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Certificates.
    pub identities: Arc<IdentityStore>,
    /// What the kernel programs keep with single sockets: original destinations, for one.
    pub storage: Arc<dyn SocketStorage>,
    /// What is counted.
    pub metrics: Metrics,
    /// Where ended and refused connections are logged.
    pub log: ConnectionLog,
    /// Whether tunnels are proven again: always, but where a test plays peers that do not do so.
    pub proofs: bool,
}

/// What `reeve status` says of one tunnel.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelStatus {
    /// `client` where this node opened it, `server` where the peer did.
    pub role: &'static str,
    /// Own identity.
    pub local: SpiffeId,
    /// The far end's authenticated identity.
    pub peer: SpiffeId,
    /// The far end's address.
    pub address: SocketAddr,
    /// Application connections in it now.
    pub streams: usize,
    /// Time since it was opened.
    #[serde(serialize_with = "seconds")]
    pub age: Duration,
    /// Whether it can be proven again underneath its connections.
    pub provable: bool,
    /// How often it was proven again.
    pub proofs: u64,
    /// Time since it was proven last, or opened.
    #[serde(serialize_with = "seconds")]
    pub proven: Duration,
    /// Proofs that have failed since the last one that has not.
    pub proofs_failed: u64,
    /// Why the last of them has.
    pub proof_error: Option<String>,
    /// The peer answers nothing at the moment.
    pub silent: bool,
    /// Takes no new streams.
    pub retired: bool,
}

/// What `reeve status` says of the data path.
#[derive(Clone, Debug, Default, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelsStatus {
    /// Application connections open now.
    pub connections: usize,
    /// Tunnels open now, all of them.
    pub tunnels_open: usize,
    /// The first tunnels: a bounded number.
    pub tunnels: Vec<TunnelStatus>,
}

fn seconds<S: serde::Serializer>(age: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(age.as_secs())
}
