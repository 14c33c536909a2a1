//! The certificate sources that the configuration names, and the trust bundles.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::ca;
use crate::{
    config::{Config, Source},
    identity::{
        Broker, BundleEndpoint, BundleFileError, CaError, CertificateSource, CryptoPolicy,
        DelegatedIdentity, EmbeddedCa, Federation, FilesSource, Holder, Holders, IdentityStore,
        RevocationLists, SourceError, Sources, SpiffeId, TrustBundle, TrustDomain, WorkloadApi,
        read_bundle, read_revocation_lists,
    },
    watch::Look,
    workload::{CgroupSelector, Discovery, cgroup::CgroupTree},
};

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// The embedded CA.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A file of a trust bundle cannot be used.
    #[error("the trust bundle of {trust_domain}, {}: {source}", .path.display())]
    Bundle {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BundleFileError,
    },
    /// A file of revocation lists cannot be used.
    #[error("the revocation lists of {trust_domain} cannot be used: {source}")]
    RevocationLists {
        /// Whose lists.
        trust_domain: TrustDomain,
        /// What is wrong.
        source: SourceError,
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

/// Where the bundles of bundle endpoints are kept, in the state folder.
const BUNDLES: &str = "bundles";

/// Follows the bundle endpoints that the configuration names. Needs a tokio runtime.
///
/// # Errors
/// When a bundle to begin with cannot be used.
pub fn federation(
    config: &Config,
    identities: Arc<IdentityStore>,
) -> Result<Federation, CertificatesError> {
    let folder = config.state_dir.join(BUNDLES);
    let federation = Federation::new(identities, folder, config.sandbox);
    follow(&federation, config)?;
    Ok(federation)
}

/// Follows the endpoints that the configuration names now.
///
/// # Errors
/// When a bundle to begin with cannot be used; nothing is changed then.
pub(super) fn follow(federation: &Federation, config: &Config) -> Result<(), CertificatesError> {
    let endpoints = &config.certificates.bundle_endpoints;
    federation
        .follow(endpoints)
        .map_err(|(trust_domain, path, source)| CertificatesError::Bundle {
            trust_domain,
            path,
            source,
        })
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
            let look = Look::at(vec![embedded.ca_dir.clone()], Vec::new());
            let ca = Arc::new(EmbeddedCa::open(
                &embedded.ca_dir,
                &config.trust_domain,
                embedded.leaf_lifetime,
            )?);
            ca::follow(ca.clone(), look);
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
    let endpoints = config.certificates.bundle_endpoints.iter();
    let bootstraps = endpoints.filter_map(BundleEndpoint::bootstrap);
    bundles.chain(lists).chain(bootstraps).cloned().collect()
}

fn trust_bundle(domain: &TrustDomain, path: &Path) -> Result<TrustBundle, CertificatesError> {
    read_bundle(domain, path).map_err(|source| CertificatesError::Bundle {
        trust_domain: domain.clone(),
        path: path.to_owned(),
        source,
    })
}
