//! The certificate sources that the configuration names, and the trust bundles.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::ca;
use crate::{
    config::{Config, Source},
    identity::{
        BundleError, CaError, CertificateSource, CryptoPolicy, EmbeddedCa, IdentityStore, Sources,
        TrustBundle, TrustDomain,
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

/// Opens the sources. Identities are named to the store later. Needs a tokio runtime.
///
/// # Errors
/// When a source cannot be used.
pub fn identity_store(config: &Config) -> Result<IdentityStore, CertificatesError> {
    let mut sources = Sources::new();
    for (name, source) in &config.certificates.sources {
        sources.insert(name.clone(), open(config, source)?);
    }
    let policy = Arc::new(CryptoPolicy::new(config.tls.clone()));
    let store = IdentityStore::with_policy(sources, policy);
    store.replace_bundles(&trust_bundles(config)?);
    Ok(store)
}

fn open(config: &Config, source: &Source) -> Result<Arc<dyn CertificateSource>, CertificatesError> {
    match source {
        Source::Embedded(embedded) => {
            let ca = Arc::new(EmbeddedCa::open(
                &embedded.ca_dir,
                &config.trust_domain,
                embedded.leaf_lifetime,
            )?);
            ca::follow(ca.clone());
            Ok(ca)
        }
    }
}

/// The bundles that are configured.
///
/// # Errors
/// The first file that cannot be used.
pub(super) fn trust_bundles(config: &Config) -> Result<Vec<Arc<TrustBundle>>, CertificatesError> {
    let files = config.certificates.trust_bundles.iter();
    files
        .map(|(domain, path)| trust_bundle(domain, path).map(Arc::new))
        .collect()
}

/// Their files.
pub(super) fn trust_bundle_files(config: &Config) -> Vec<PathBuf> {
    config
        .certificates
        .trust_bundles
        .values()
        .cloned()
        .collect()
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
