//! Certificates from a SPIFFE agent on this node, such as SPIRE's: by the Workload API for reeve
//! itself, by SPIRE's Delegated Identity API or the SPIFFE Broker API for the workloads.
//!
//! In: an agent's socket, and who runs here. Out: three sources of certificates, each of which
//! follows the agent and tells what it has withdrawn from what it cannot say at the moment.

mod answer;
mod connection;
mod feed;
mod holders;
mod messages;
mod per_workload;
mod process;
#[cfg(test)]
mod tests;
mod workload_api;

pub use holders::{Holder, Holders, Selector};
pub use per_workload::{Broker, BrokerPeers, DelegatedIdentity};
pub use workload_api::WorkloadApi;
