//! The datapath in a real kernel: sockets in network namespaces and cgroups, judged by the
//! programs. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test that fails shall say where"
)]

mod bind;
mod churn;
mod connect;
mod cost;
mod datagram;
mod evasion;
mod handed;
mod headers;
mod ingress;
mod kernel;
mod live;
mod onward;
mod packet;
mod pins;
mod place;
mod ring;
mod room;
mod rules;
mod world;
