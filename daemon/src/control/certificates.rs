//! The certificate sources that the configuration names, and the trust bundles.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::ca;
use crate::{
    config::{Config, Source},
    identity::{
        Broker, BundleError, CaError, CertificateSource, CryptoPolicy, DelegatedIdentity,
        EmbeddedCa, FilesSource, Holder, Holders, IdentityStore, RevocationLists, SourceError,
        Sources, SpiffeId, TrustBundle, TrustDomain, WorkloadApi, read_revocation_lists,
    },
    workload::{CgroupSelector, Discovery, cgroup::CgroupTree},
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
    let holders = Holders::default();
    let mut sources = Sources::new();
    for (name, source) in &config.certificates.sources {
        sources.insert(name.clone(), open(config, source, &holders)?);
    }
    let policy = Arc::new(CryptoPolicy::new(config.tls.clone()));
    let store = IdentityStore::with_policy(sources, policy).telling(holders);
    let (bundles, lists) = trust(config)?;
    store.configure_trust(&bundles, lists);
    Ok(store)
}

fn open(
    config: &Config,
    source: &Source,
    holders: &Holders,
) -> Result<Arc<dyn CertificateSource>, CertificatesError> {
    match source {
        Source::WorkloadApi(api) => Ok(Arc::new(WorkloadApi::new(api.socket.clone()))),
        Source::DelegatedIdentity(api) => Ok(Arc::new(DelegatedIdentity::new(
            api.socket.clone(),
            holders.clone(),
        ))),
        Source::Broker(broker) => Ok(Arc::new(Broker::new(
            broker.socket.clone(),
            broker.peers.clone(),
            holders.clone(),
        ))),
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

/// Who has which identity now, as agents are told.
pub(super) fn holders(
    config: &Config,
    cgroups: &CgroupTree,
    discovery: &Discovery,
) -> BTreeMap<SpiffeId, Holder> {
    let mut holders: BTreeMap<SpiffeId, Holder> = BTreeMap::new();
    for running in &discovery.workloads {
        let workload = &running.workload;
        let holder = holders
            .entry(workload.attributes.spiffe_id.clone())
            .or_default();
        if !running.cgroups.is_empty() {
            match &workload.selector {
                CgroupSelector::Cgroup(path) => holder.cgroups.push(cgroups.folder(path)),
                CgroupSelector::Unit(name) => holder.cgroups.extend(cgroups.units(name).0),
            }
        }
        let source = config.certificates.source(workload);
        if let Some(Source::DelegatedIdentity(api)) = source
            && let Some(selectors) = api.selectors.get(&workload.name)
        {
            holder.selectors.clone_from(selectors);
        }
    }
    holders
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
