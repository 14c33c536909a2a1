//! The datapath in a real kernel: sockets in network namespaces and cgroups, judged by the
//! programs. Needs root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test that fails shall say where"
)]

mod adopted;
mod beside;
mod bind;
mod churn;
mod connect;
mod cost;
mod datagram;
mod errors;
mod evasion;
mod expected;
mod extension;
mod flows;
mod halfway;
mod handed;
mod headers;
mod icmp;
mod ids;
mod ingress;
mod ipsec;
mod kernel;
mod live;
mod memory;
mod namespaces;
mod nat;
mod neighbours;
mod onward;
mod options;
mod origin;
mod own;
mod packet;
mod pins;
mod place;
mod programs;
mod raw;
mod refusal;
mod ring;
mod room;
mod rules;
mod world;
