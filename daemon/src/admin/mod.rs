//! The admin socket: one request, one answer, for those who run the daemon.
//!
//! In: a line of JSON over a Unix socket that only root and the daemon's own user may use. Out: a
//! line of JSON, or one after another for those who observe. The daemon's side is [`AdminSocket`],
//! the command line's are [`ask`] and [`observe`].

mod client;
mod protocol;
mod reload;
mod server;
mod socket;
mod status;

pub use client::{AskError, Observing, ask, observe};
pub use protocol::{Answer, Command, PROTOCOL_VERSION, Request};
pub use reload::{ReloadPart, ReloadReport};
pub use server::{AdminServing, Responder};
pub use socket::{AdminError, AdminSocket};
pub use status::{
    BundleEndpointStatus, BundleStatus, CertificateStatus, MapUsage, PolicyStatus, RefusedBundle,
    Status, TunnelStatus, TunnelsStatus, WorkloadState, WorkloadStatus,
};
