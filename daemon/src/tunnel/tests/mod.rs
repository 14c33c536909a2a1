//! The data path with real TLS over real sockets.

mod bounds;
mod calls;
mod copy;
mod first;
mod life;
mod node;
mod proofs;
mod requests;
pub(super) mod rig;
mod stalls;
mod wire;
