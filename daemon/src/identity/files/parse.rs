//! From a set of PEM files to material.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use zeroize::Zeroizing;

use super::read::{Paths, Set};
use crate::identity::{
    Material, PemError, SourceError, TrustBundle, TrustDomain, pem_file, svid_rules,
};

/// The bundles that are in use, by what they were made from: a thousand identities mostly have the
/// same, and it is kept once.
#[derive(Debug, Default)]
pub(super) struct Bundles(Mutex<HashMap<Key, Weak<TrustBundle>>>);

type Key = (TrustDomain, Vec<u8>);

pub(super) fn material(
    paths: &Paths,
    set: &Set,
    domain: &TrustDomain,
    bundles: &Bundles,
) -> Result<Material, SourceError> {
    let chain = certificates(&paths.certificate, &set.certificate)?;
    let key = pem_file::private_key(&set.key)
        .map(Zeroizing::new)
        .map_err(|error| unreadable(&paths.key, "a private key", error))?;
    let mut own = Vec::new();
    if let (Some(path), Some(bytes)) = (&paths.bundle, &set.bundle) {
        let lists = set.revocation_lists.as_deref();
        let make = || {
            let mut roots = certificates(path, bytes)?;
            if *path == paths.certificate {
                // Chain and authorities in one file: the workload's own is no authority.
                roots.retain(|der| svid_rules::parse(der).is_ok_and(|parsed| parsed.is_ca()));
            }
            let lists = match (&paths.revocation_lists, lists) {
                (Some(path), Some(bytes)) => revocation_lists(path, bytes)?,
                _ => Vec::new(),
            };
            Ok(TrustBundle::new(domain.clone(), roots, lists)?)
        };
        own.push(bundles.get_or_make(domain, [bytes, lists.map_or(&[][..], |list| list)], make)?);
    }
    Ok(Material {
        chain,
        key,
        bundles: own,
    })
}

/// The certificates in a PEM file, at least one.
fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, SourceError> {
    pem_file::certificates(bytes).map_err(|error| unreadable(path, "a certificate", error))
}

/// The revocation lists in a file, at least one.
pub(in crate::identity) fn revocation_lists(
    path: &Path,
    bytes: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, SourceError> {
    pem_file::revocation_lists(bytes).map_err(|error| unreadable(path, "a revocation list", error))
}

fn unreadable(path: &Path, what: &str, error: PemError) -> SourceError {
    SourceError::Unreadable(format!(
        "{} does not hold {what} in PEM: {error}",
        path.display()
    ))
}

// === impl Bundles ===

impl Bundles {
    fn get_or_make(
        &self,
        domain: &TrustDomain,
        made_from: [&[u8]; 2],
        make: impl FnOnce() -> Result<TrustBundle, SourceError>,
    ) -> Result<Arc<TrustBundle>, SourceError> {
        let digests = made_from.map(|bytes| digest(&SHA256, bytes));
        let key = (
            domain.clone(),
            digests.iter().flat_map(AsRef::as_ref).copied().collect(),
        );
        // Whoever panicked under it left it whole.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bundle) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(bundle);
        }
        known.retain(|_, bundle| bundle.strong_count() > 0);
        let bundle = Arc::new(make()?);
        known.insert(key, Arc::downgrade(&bundle));
        Ok(bundle)
    }
}
