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
        BundleError, CaError, CertificateSource, CryptoPolicy, EmbeddedCa, FilesSource,
        IdentityStore, RevocationLists, SourceError, Sources, TrustBundle, TrustDomain,
        read_revocation_lists,
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
    /// A file of revocation lists cannot be used.
    #[error("the revocation lists of {trust_domain} cannot be used: {source}")]
    RevocationLists {
        /// Whose lists.
        trust_domain: TrustDomain,
        /// What is wrong.
        source: SourceError,
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
    let (bundles, lists) = trust(config)?;
    store.configure_trust(&bundles, lists);
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
        Source::Files(layout) => Ok(Arc::new(FilesSource::new(layout.clone()))),
    }
}

/// The bundles and revocation lists that are configured.
///
/// # Errors
/// The first file that cannot be used.
pub(super) fn trust(
    config: &Config,
) -> Result<(Vec<Arc<TrustBundle>>, RevocationLists), CertificatesError> {
    let bundles = config.certificates.trust_bundles.iter();
    let bundles = bundles.map(|(domain, path)| trust_bundle(domain, path).map(Arc::new));
    let lists = config.certificates.revocation_lists.iter();
    let lists = lists.map(|(domain, paths)| {
        let mut lists = Vec::new();
        for path in paths {
            let read = read_revocation_lists(path);
            lists.extend(read.map_err(|source| CertificatesError::RevocationLists {
                trust_domain: domain.clone(),
                source,
            })?);
        }
        Ok((domain.clone(), lists))
    });
    Ok((
        bundles.collect::<Result<_, _>>()?,
        lists.collect::<Result<_, CertificatesError>>()?,
    ))
}

/// Their files.
pub(super) fn trust_files(config: &Config) -> Vec<PathBuf> {
    let lists = config.certificates.revocation_lists.values().flatten();
    let bundles = config.certificates.trust_bundles.values();
    bundles.chain(lists).cloned().collect()
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
