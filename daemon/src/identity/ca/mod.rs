//! The embedded CA: a CA of one's own, for a node or a fleet that has no other.
//!
//! In: a folder that holds a key and certificates (see `folder`), made by `reeve ca` or at the
//! first start. Out: a short-lived certificate for whichever identity of the trust domain is asked
//! for. A folder that changes, as it does when its root is rotated or a certificate is revoked, is
//! read again while the daemon runs: checked as a whole, and put in force as a whole.

mod authority;
mod changes;
mod error;
mod folder;
mod lists;
mod operations;
mod show;
mod template;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::watch;

use super::{CertificateSource, Material, SourceError, SpiffeId, TrustBundle, TrustDomain};
use authority::Authority;
use folder::Folder;

pub use error::CaError;
pub use operations::{
    ROOT_LIFETIME, Revocation, drop_old_roots, init_intermediate, init_root, issue, prepare_root,
    renew_intermediate, revoke, switch_root,
};
pub use show::{CaStatus, RevocationListStatus, RevokedStatus, Role, RootStatus, show};

/// A CA whose key is in a file of this machine.
pub struct EmbeddedCa {
    folder: PathBuf,
    trust_domain: TrustDomain,
    leaf_lifetime: Duration,
    authority: ArcSwap<Authority>,
    changes: watch::Sender<u64>,
}

// === impl EmbeddedCa ===

impl EmbeddedCa {
    /// Opens the CA in `folder`, or makes a new root where the folder is empty or not there.
    /// Several daemons may share the folder, or have copies of it: they then have the same root.
    /// Leaves are valid for `leaf_lifetime`, and never longer than what signs them.
    ///
    /// # Errors
    /// When the folder or the key can be reached by others, when only half of the CA is there, when
    /// it is not the CA of `trust_domain`, or nobody would accept what it issues. Nothing is
    /// repaired: a CA replaced by mistake cuts the node off from all others.
    pub fn open(
        folder: &Path,
        trust_domain: &TrustDomain,
        leaf_lifetime: Duration,
    ) -> Result<Self, CaError> {
        let opened = Folder::create(folder)?;
        let contents = match opened.read()? {
            Some(contents) => contents,
            None => {
                operations::make_root(&opened, trust_domain, ROOT_LIFETIME)?;
                tracing::info!(folder = %folder.display(), "made a new root certificate");
                opened.contents()?
            }
        };
        let authority = Authority::check(folder, contents, Some(trust_domain))?;
        Ok(Self {
            folder: folder.to_owned(),
            trust_domain: trust_domain.clone(),
            leaf_lifetime,
            authority: ArcSwap::from_pointee(authority),
            changes: watch::Sender::new(0),
        })
    }

    /// Reads the folder again; certificates are renewed at once where it has changed. Returns
    /// whether it has.
    ///
    /// # Errors
    /// As [`Self::open`], but that nothing is made; what was in force before stays so.
    pub fn reload(&self) -> Result<bool, CaError> {
        let contents = Folder::open(&self.folder)?.contents()?;
        let new = Authority::check(&self.folder, contents, Some(&self.trust_domain))?;
        let old = self.authority.load();
        if new.signer == old.signer && new.bundle.same_as(&old.bundle) {
            return Ok(false);
        }
        self.authority.store(Arc::new(new));
        self.changes
            .send_modify(|number| *number = number.wrapping_add(1));
        Ok(true)
    }

    /// The folder that it lives in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The bundle that peers need in order to trust what this CA issues.
    #[must_use]
    pub fn bundle(&self) -> Arc<TrustBundle> {
        self.authority.load().bundle.clone()
    }

    /// Validity of the certificate that signs.
    #[must_use]
    pub fn validity(&self) -> (SystemTime, SystemTime) {
        let authority = self.authority.load();
        (authority.not_before, authority.not_after)
    }

    /// Issues a certificate with a new key.
    ///
    /// # Errors
    /// When the identity is of another trust domain, or nothing could be generated.
    pub fn issue(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        let issued = self.authority.load().issue(id, self.leaf_lifetime);
        issued.map_err(|error| SourceError::Unavailable(format!("the embedded CA: {error}")))
    }
}

impl CertificateSource for EmbeddedCa {
    fn name(&self) -> &'static str {
        "embedded_ca"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready(self.issue(id)).boxed()
    }

    fn issues(&self) -> bool {
        true
    }

    fn changes(&self, _id: &SpiffeId) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("folder", &self.folder)
            .field("leaf_lifetime", &self.leaf_lifetime)
            .field("authority", &self.authority.load())
            .finish_non_exhaustive()
    }
}
