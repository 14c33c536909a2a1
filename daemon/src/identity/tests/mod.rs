//! Real handshakes in memory, with right and wrong certificates.

mod alerts;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "shared with the end-to-end tests, which use other parts of it"
)]
#[path = "../../../../tests/harness/bundles.rs"]
mod bundles;
mod ca_life;
#[expect(
    dead_code,
    unreachable_pub,
    reason = "shared with the end-to-end tests, which use other parts of it"
)]
#[path = "../../../../tests/harness/certs/mod.rs"]
pub(crate) mod certs;
mod chains;
mod crypto_policy;
mod embedded_ca;
mod federation;
mod files;
mod handshake;
mod outcomes;
mod passed;
mod peers;
mod revocation;
mod roots;
mod store;
mod tickets;

use super::*;
