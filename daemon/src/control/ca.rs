//! Follows the folder of the embedded CA.

use std::sync::Arc;

use tokio::task::block_in_place;

use crate::{identity::EmbeddedCa, watch::Look};

/// Reads the CA's folder again at each change since the look, for as long as the daemon runs. Needs a
/// tokio runtime.
pub(super) fn follow(ca: Arc<EmbeddedCa>, look: Look) {
    let mut files = look.watch();
    tokio::spawn(async move {
        loop {
            files.changed().await;
            match block_in_place(|| ca.reload()) {
                Ok(true) => tracing::info!(
                    folder = %ca.folder().display(),
                    "the embedded CA has changed: certificates are renewed"
                ),
                Ok(false) => {}
                Err(error) => tracing::error!(
                    "the changed CA is not used, the one before stays in force: {error}"
                ),
            }
        }
    });
}
