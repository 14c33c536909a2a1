//! What the end-to-end tests, the demo and the bench are made of: nodes, workloads and networks
//! that are real namespaces and cgroups, and daemons, clients and servers that are real processes.
//!
//! A test reads as a sentence: make a [`Network`], a [`Node`] on it, [`Workload`]s on the node,
//! start the node's [`Daemon`], and run programs in the workloads.
//!
//! Everything has a name or a namespace of its own, so tests run side by side, in one process and
//! in several. Nothing outlives the test: values clean up when dropped, and where the process is
//! killed, a [reaper](run) does.
//!
//! Whatever goes wrong in here fails the test that asked for it, so functions panic with what they
//! were doing rather than return errors.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failure of the harness is the failure of the test"
)]

#[cfg(feature = "certificates")]
pub mod agent;
#[cfg(feature = "certificates")]
pub mod bundles;
mod capture;
#[cfg(feature = "certificates")]
pub mod certs;
mod cgroup;
mod clock;
mod config;
mod cut;
mod daemon;
mod file_issuer;
mod haproxy;
#[cfg(feature = "certificates")]
pub mod hbone;
mod machine;
mod metrics;
mod netns;
mod network;
mod nginx;
mod node;
mod process;
mod programs;
mod rotated_pair;
pub mod run;
mod soak;
#[cfg(feature = "certificates")]
pub mod spire;
mod storm;
mod wait;
mod workload;

pub use capture::{Capture, Captured};
pub use cgroup::Cgroup;
pub use clock::WallClock;
pub use config::Reeve;
pub use cut::{Cut, CutPlan, Patience};
pub use daemon::{Daemon, Thread};
pub use file_issuer::FileIssuer;
pub use haproxy::HaProxy;
pub use machine::Machine;
pub use metrics::Metrics;
pub use netns::Netns;
pub use network::{Addresses, Network};
pub use nginx::Nginx;
pub use node::Node;
pub use process::{Output, Place, Process};
pub use programs::Programs;
pub use soak::{Course, Happening, Kind, Sample, Soak, Tally};
pub use storm::Storm;
pub use wait::{SOON, eventually, holds_for};
pub use workload::Workload;
