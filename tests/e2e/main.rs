//! The end-to-end tests: one module per capability. `cargo xtask test` runs them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "these are tests"
)]

mod abuse;
mod agents;
mod arrange;
mod balancers;
mod busy;
mod ca;
mod certificate_files;
mod certificates;
mod certs;
mod claims;
mod clock;
mod command_line;
mod concurrency;
mod connect_requests;
mod container;
mod crypto_policy;
mod deploy;
mod documents;
mod endings;
mod expiry;
mod explain;
mod fail_closed;
mod faults;
mod federation;
mod guard;
mod harness_itself;
mod hbone_itself;
mod health;
mod image;
mod inherited;
mod interoperation;
mod layouts;
mod metrics_port;
mod network_policy;
mod no_way_round;
mod observe;
mod opposite;
mod peers;
mod plaintext;
mod policy_files;
mod policy_kinds;
mod policy_tools;
mod predecessors;
mod privileges;
mod program;
mod prometheus;
mod proofs;
mod release;
mod reload;
mod restart;
mod revocation;
mod service;
mod shared_host;
mod silence;
mod soak;
mod sockets;
mod stalls;
mod storage;
mod storm;
mod surroundings;
mod systemd;
mod tcp;
mod transfer;
mod udp;
mod upgrade;
