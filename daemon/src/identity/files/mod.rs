//! Certificates from files, as cert-manager, spiffe-helper, Vault agent and systemd leave them.
//!
//! In: for each identity a chain, a key, and where wanted a trust bundle and revocation lists, in
//! PEM. Out: whole sets. [`layout`] says which files, [`read`] reads a set of one moment, [`parse`]
//! makes material of it; [`crate::watch`] tells when there is something new.
//!
//! Files that cannot be read count as a source that cannot be reached: whoever writes them may be
//! about to put them back. What they gave before is good until it expires.

mod layout;
mod parse;
mod read;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{sync::watch, task::spawn_blocking};

use self::{parse::Bundles, read::Paths};
use super::{CertificateSource, Material, Remark, RevocationList, SourceError, SpiffeId};
use crate::watch::{Files, Polled};

pub use layout::{FilesLayout, PathPattern};

/// The revocation lists in a file, as for [`crate::identity::IdentityStore::configure_trust`].
///
/// # Errors
/// When the file cannot be read, or holds none.
pub fn read_revocation_lists(path: &Path) -> Result<Vec<Arc<RevocationList>>, SourceError> {
    let bytes = read::read_file(path)?;
    let lists = parse::revocation_lists(path, &bytes)?.into_iter();
    let parse = |der| match RevocationList::parse(der) {
        Ok(list) => Ok(Arc::new(list)),
        Err(error) => Err(SourceError::Unreadable(format!(
            "{} holds a revocation list that cannot be used: {error}",
            path.display()
        ))),
    };
    lists.map(parse).collect()
}

/// Certificates from files.
pub struct FilesSource {
    layout: FilesLayout,
    known: Mutex<HashMap<SpiffeId, Arc<Known>>>,
    bundles: Arc<Bundles>,
}

/// What is known of one identity's files.
#[derive(Debug, Default)]
struct Known {
    polled: Polled,
    /// One of them is mounted by itself, and will never change.
    mounted: AtomicBool,
    /// One of them is a systemd credential.
    credential: AtomicBool,
}

// === impl FilesSource ===

impl FilesSource {
    /// Nothing is opened before an identity is asked for.
    #[must_use]
    pub fn new(layout: FilesLayout) -> Self {
        Self {
            layout,
            known: Mutex::default(),
            bundles: Arc::default(),
        }
    }

    /// Reads what there is for `id` now, and waits for the file system.
    ///
    /// # Errors
    /// When a file cannot be read, or does not hold what it should.
    pub fn read(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        self.reading(id)?()
    }

    /// The same for another thread to do.
    fn reading(
        &self,
        id: &SpiffeId,
    ) -> Result<impl FnOnce() -> Result<Material, SourceError> + Send + use<>, SourceError> {
        let paths = self.layout.paths(id)?;
        let (bundles, known) = (self.bundles.clone(), self.known(id));
        let domain = id.trust_domain().clone();
        Ok(move || {
            let set = read::read(&paths)?;
            known.mounted.store(set.mounted, Ordering::Relaxed);
            known.credential.store(set.credential, Ordering::Relaxed);
            parse::material(&paths, &set, &domain, &bundles)
        })
    }

    fn known(&self, id: &SpiffeId) -> Arc<Known> {
        // Whoever panicked under it left it whole.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(id.clone()).or_default().clone()
    }
}

impl CertificateSource for FilesSource {
    fn name(&self) -> &'static str {
        "files"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        async move {
            // A file system may hang, and must not take those with it who do other things.
            let read = spawn_blocking(self.reading(id)?);
            match read.await {
                Ok(result) => result,
                Err(_) => Err(SourceError::Unavailable("reading was broken off".into())),
            }
        }
        .boxed()
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        let Ok(paths) = self.layout.paths(id) else {
            // Fetching says what is wrong, and nothing will make it right.
            return watch::channel(0).1;
        };
        let files = Files::watch(Vec::new(), paths.all().cloned().collect());
        let known = Arc::new(Known {
            polled: files.polled().clone(),
            ..Known::default()
        });
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(id.clone(), known);
        files.changes()
    }

    fn remarks(&self, id: &SpiffeId) -> Vec<Remark> {
        let known = self.known(id);
        let set = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        [
            (known.polled.get(), Remark::Polled),
            (set(&known.mounted), Remark::MountedFile),
            (set(&known.credential), Remark::SystemdCredential),
        ]
        .into_iter()
        .filter_map(|(is, remark)| is.then_some(remark))
        .collect()
    }
}

impl fmt::Debug for FilesSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilesSource")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}
