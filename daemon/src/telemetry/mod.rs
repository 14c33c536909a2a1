//! What is told to the outside: metrics, the connection log, logs.
//!
//! In: what the other modules count, and the kernel's events. Out: the Prometheus endpoint, log
//! lines, and the same facts for those who observe.

mod certificates;
mod connections;
mod events;
mod http;
mod journal;
mod labels;
mod log;
mod metrics;
mod observed;
mod observers;
mod readings;

pub use connections::{Connection, ConnectionId, ConnectionLog};
pub use events::Events;
pub use http::{Health, HttpServer, HttpServing, Readiness, Told};
pub use journal::prefix as journal_prefix;
pub use labels::{
    ConnectionLabels, HandshakeReason, Limit, OTHER, Role, Transport, UNKNOWN, direction_name,
};
pub use log::{LogError, start as start_logging};
pub use metrics::{Handshake, Metrics};
pub use observed::{Carried, Facts, Filter, Happening, Lost, LostIn, Observed, ProtocolName, Who};
pub use observers::{Observation, ObserveRequest, Observers};
pub use readings::Readings;
