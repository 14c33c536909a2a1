//! HBONE as tests speak it: clients and servers of tunnels that check nothing and do as they are
//! told, right or wrong. They run in the test process, with their sockets in a workload's network
//! namespace, and belong to no workload: to a daemon they are somebody elsewhere.

mod client;
pub mod raw;
mod server;
pub(crate) mod tls;

pub use client::{Client, Handshake, Stream, Tunnel};
pub use raw::Raw;
pub use server::{Conduct, Seen, Server};

use std::{future::Future, sync::OnceLock, time::Duration};

use tokio::runtime::{Builder, Runtime};

/// Port of tunnels, where nothing else is set.
pub const PORT: u16 = 15008;

/// For anything that a daemon should do at once. A daemon that does not is the test's failure.
const PATIENCE: Duration = crate::SOON;

/// What all clients and servers of this process run on.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("making an event loop")
    })
}

/// Runs a future to its end, on the calling thread.
fn wait_for<T>(what: &str, future: impl Future<Output = T>) -> T {
    runtime()
        .block_on(async { tokio::time::timeout(PATIENCE, future).await })
        .unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}
