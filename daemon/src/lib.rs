//! reeve: default-deny policy in the kernel and transparent mutual TLS between workloads, one
//! daemon per Linux node.
//!
//! The modules stand in the order in which a connection meets them. Each one's head says what
//! comes in and what goes out; dependencies point one way, from the bottom of this list to the top.
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test that fails shall say where"
    )
)]

pub mod admin;
pub mod answers;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
mod endpoint;
pub mod handover;
pub mod identity;
pub mod policy;
pub mod privileges;
pub mod telemetry;
pub mod tunnel;
pub mod watch;
pub mod workload;
pub mod yaml;
