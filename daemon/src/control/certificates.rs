//! The certificate source that the configuration names.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::ca;
use crate::{
    config::{Certificates, Config},
    identity::{
        BundleError, CaError, EmbeddedCa, IdentityStore, TrustBundle, TrustDomain, TrustStore,
    },
};

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// The embedded CA.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A file of a trust bundle cannot be read.
    #[error(
        "the trust bundle of {trust_domain}, {}, cannot be read: {source}; expected PEM with at least one certificate",
        .path.display()
    )]
    File {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls_pki_types::pem::Error,
    },
    /// A trust bundle may not be used.
    #[error("{}: {source}", .path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// Which rule it breaks.
        source: BundleError,
    },
}

/// Opens the source. Identities are named to the store later. Needs a tokio runtime.
///
/// # Errors
/// When the source cannot be used.
pub fn identity_store(config: &Config) -> Result<IdentityStore, CertificatesError> {
    let Certificates::Embedded(embedded) = &config.certificates;
    let ca = EmbeddedCa::open(
        &embedded.ca_dir,
        &config.trust_domain,
        embedded.leaf_lifetime,
    )?;
    let ca = Arc::new(ca);
    ca::follow(ca.clone());
    let store = IdentityStore::new(ca, Arc::new(TrustStore::default()));
    store.replace_bundles(&trust_bundles(config)?);
    Ok(store)
}

/// The bundles of other trust domains.
///
/// # Errors
/// The first file that cannot be used.
pub(super) fn trust_bundles(config: &Config) -> Result<Vec<Arc<TrustBundle>>, CertificatesError> {
    let Certificates::Embedded(embedded) = &config.certificates;
    embedded
        .trust_bundles
        .iter()
        .map(|(domain, path)| trust_bundle(domain, path).map(Arc::new))
        .collect()
}

/// Their files.
pub(super) fn trust_bundle_files(config: &Config) -> Vec<PathBuf> {
    let Certificates::Embedded(embedded) = &config.certificates;
    embedded.trust_bundles.values().cloned().collect()
}

fn trust_bundle(domain: &TrustDomain, path: &Path) -> Result<TrustBundle, CertificatesError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(|certificates| match certificates.is_empty() {
            true => Err(rustls_pki_types::pem::Error::NoItemsFound),
            false => Ok(certificates),
        })
        .map_err(|source| CertificatesError::File {
            trust_domain: domain.clone(),
            path: path.to_owned(),
            source,
        })?;
    TrustBundle::new(domain.clone(), certificates, Vec::new()).map_err(|source| {
        CertificatesError::Bundle {
            path: path.to_owned(),
            source,
        }
    })
}
