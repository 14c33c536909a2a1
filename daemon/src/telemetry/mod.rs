//! What is told to the outside: metrics, the connection log, logs.
//!
//! In: what the other modules count, and the kernel's events. Out: the Prometheus endpoint and
//! log lines.

mod connections;
mod events;
mod http;
mod labels;
mod log;
mod metrics;
mod readings;

pub use connections::{Connection, ConnectionLog};
pub use events::Events;
pub use http::{HttpServer, Readiness};
pub use labels::{
    ConnectionLabels, HandshakeReason, OTHER, Role, Transport, UNKNOWN, direction_name,
};
pub use log::{LogError, start as start_logging};
pub use metrics::{Handshake, Metrics};
pub use readings::{CertificateTimes, Readings};
