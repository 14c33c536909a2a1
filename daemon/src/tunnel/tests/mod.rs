//! The data path with real TLS over real sockets.

mod bounds;
mod calls;
mod copy;
mod life;
mod node;
mod requests;
mod rig;
mod stalls;
