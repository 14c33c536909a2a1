//! What an agent has answered, taken apart: SVIDs by SPIFFE ID, and trust bundles.
//!
//! Whether the certificates are good is for the identity store to judge. Here it is only seen that
//! there is one of each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, revocation_list::CertificateRevocationList,
};
use zeroize::Zeroizing;

use super::messages::{BundlesResponse, DelegatedResponse, X509SvidResponse};
use crate::identity::{
    BundleError, Material, SourceError, SpiffeId, SpiffeIdError, TrustBundle, TrustDomain,
};

const SCHEME: &str = "spiffe://";

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    svids: BTreeMap<SpiffeId, Issued>,
    /// Put in force together with any of the SVIDs.
    bundles: BTreeMap<TrustDomain, Arc<TrustBundle>>,
}

/// One identity's certificate and key.
struct Issued {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<PrivateKeyDer<'static>>,
}

/// What is wrong with an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AnswerError {
    #[error("it holds `{0}`, which is no SPIFFE ID: {1}")]
    Id(String, SpiffeIdError),
    #[error("what it holds as {0} is not DER of certificates, one after another")]
    Certificates(String),
    #[error("a revocation list in it cannot be read")]
    RevocationList,
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

// === impl Answer ===

impl Answer {
    /// The answer of the Workload API or of the Broker API.
    pub(super) fn whole(response: X509SvidResponse) -> Result<Self, AnswerError> {
        let federated = response.federated_bundles.clone();
        let (svids, mut certificates) = svids_and_own_bundles(response.svids)?;
        let own: BTreeSet<TrustDomain> = certificates.keys().cloned().collect();
        for (domain, der) in federated {
            let domain = trust_domain(&domain)?;
            // Nobody else speaks for the trust domain of one's own identity.
            if !own.contains(&domain) {
                let parsed = certificates_of(&der, || format!("the bundle of {domain}"))?;
                certificates.insert(domain, parsed);
            }
        }
        let mut lists = assigned(response.crl, &certificates, own.first())?;
        let mut bundles = BTreeMap::new();
        for (domain, certificates) in certificates {
            let lists = lists.remove(&domain).unwrap_or_default();
            match TrustBundle::new(domain.clone(), certificates, lists) {
                Ok(bundle) => {
                    bundles.insert(domain, Arc::new(bundle));
                }
                Err(error) if own.contains(&domain) => return Err(error.into()),
                // A mistake of another trust domain must not keep this one from renewing.
                Err(error) => tracing::warn!(%error, "a federated trust bundle is refused"),
            }
        }
        Ok(Self { svids, bundles })
    }

    /// The answer of the Delegated Identity API, with the bundles that came apart from it. Of those
    /// only what the workload is to trust counts: the agent gives the bundles of everybody.
    pub(super) fn delegated(
        response: &DelegatedResponse,
        bundles: &BTreeMap<TrustDomain, Arc<TrustBundle>>,
    ) -> Result<Self, AnswerError> {
        let mut svids = BTreeMap::new();
        for svid in &response.x509_svids {
            let chain = svid.x509_svid.clone().unwrap_or_default();
            let id = chain.id.unwrap_or_default();
            let id = spiffe_id(&format!("{SCHEME}{}{}", id.trust_domain, id.path))?;
            let der = chain.cert_chain.into_iter().map(CertificateDer::from);
            svids.entry(id).or_insert_with(|| Issued {
                chain: der.collect(),
                key: pkcs8(svid.x509_svid_key.clone()),
            });
        }
        let own: BTreeSet<_> = svids.keys().map(SpiffeId::trust_domain).collect();
        let federated = response
            .federates_with
            .iter()
            .map(|name| trust_domain(name));
        let federated = federated.collect::<Result<BTreeSet<_>, _>>()?;
        let bundles = bundles
            .iter()
            .filter(|(domain, _)| own.contains(domain) || federated.contains(domain))
            .map(|(domain, bundle)| (domain.clone(), bundle.clone()));
        let bundles = bundles.collect();
        Ok(Self { svids, bundles })
    }

    /// Whether there is no SVID in it.
    pub(super) fn is_empty(&self) -> bool {
        self.svids.is_empty()
    }

    /// One identity's part of it, with all the bundles.
    pub(super) fn material(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        let issued = self.svids.get(id).ok_or(SourceError::Withdrawn)?;
        Ok(Material {
            chain: issued.chain.clone(),
            key: Zeroizing::new(issued.key.clone_key()),
            bundles: self.bundles.values().cloned().collect(),
        })
    }
}

/// The bundles in an answer of the Delegated Identity API.
pub(super) fn bundles(
    response: BundlesResponse,
) -> Result<BTreeMap<TrustDomain, Arc<TrustBundle>>, AnswerError> {
    let mut bundles = BTreeMap::new();
    for (name, der) in response.ca_certificates {
        let domain = trust_domain(&name)?;
        let certificates = certificates_of(&der, || format!("the bundle of {domain}"))?;
        match TrustBundle::new(domain.clone(), certificates, Vec::new()) {
            Ok(bundle) => {
                bundles.insert(domain, Arc::new(bundle));
            }
            Err(error) => tracing::warn!(%error, "a trust bundle of the agent is refused"),
        }
    }
    Ok(bundles)
}

type Certificates = BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>;

/// Of two SVIDs for one ID the first counts (Workload API, section 5.3).
fn svids_and_own_bundles(
    messages: Vec<super::messages::X509Svid>,
) -> Result<(BTreeMap<SpiffeId, Issued>, Certificates), AnswerError> {
    let (mut svids, mut bundles) = (BTreeMap::new(), BTreeMap::new());
    for message in messages {
        let key = pkcs8(message.x509_svid_key);
        let id = spiffe_id(&message.spiffe_id)?;
        let chain = certificates_of(&message.x509_svid, || format!("the SVID of {id}"))?;
        let domain = id.trust_domain().clone();
        let bundle = certificates_of(&message.bundle, || format!("the bundle of {domain}"))?;
        bundles.entry(domain).or_insert(bundle);
        svids.entry(id).or_insert(Issued { chain, key });
    }
    Ok((svids, bundles))
}

/// Revocation lists come without their trust domain's name: each goes to the trust domain that has
/// its issuer for an authority, and to one's own where none has, since an intermediate may have
/// signed it. A list too many refuses, one too few would let pass.
fn assigned(
    lists: Vec<Vec<u8>>,
    certificates: &Certificates,
    own: Option<&TrustDomain>,
) -> Result<BTreeMap<TrustDomain, Vec<CertificateRevocationListDer<'static>>>, AnswerError> {
    let mut assigned: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for der in lists {
        let (_, list) =
            CertificateRevocationList::from_der(&der).map_err(|_| AnswerError::RevocationList)?;
        let issuer = list.issuer().as_raw();
        let signed = |of: &CertificateDer<'_>| {
            X509Certificate::from_der(of).is_ok_and(|(_, ca)| ca.subject().as_raw() == issuer)
        };
        let whose: Vec<TrustDomain> = certificates
            .iter()
            .filter(|(_, authorities)| authorities.iter().any(signed))
            .map(|(domain, _)| domain.clone())
            .collect();
        let whose = if whose.is_empty() {
            own.into_iter().cloned().collect()
        } else {
            whose
        };
        for domain in whose {
            let list = CertificateRevocationListDer::from(der.clone());
            assigned.entry(domain).or_default().push(list);
        }
    }
    Ok(assigned)
}

fn spiffe_id(text: &str) -> Result<SpiffeId, AnswerError> {
    SpiffeId::parse(text).map_err(|error| AnswerError::Id(text.to_owned(), error))
}

/// By name or by the trust domain's SPIFFE ID.
fn trust_domain(text: &str) -> Result<TrustDomain, AnswerError> {
    let name = text.strip_prefix(SCHEME).unwrap_or(text);
    TrustDomain::parse(name).map_err(|error| AnswerError::Id(text.to_owned(), error))
}

fn pkcs8(der: Vec<u8>) -> Zeroizing<PrivateKeyDer<'static>> {
    Zeroizing::new(PrivatePkcs8KeyDer::from(der).into())
}

/// Splits certificates that follow one another without anything in between.
fn certificates_of(
    mut der: &[u8],
    what: impl Fn() -> String,
) -> Result<Vec<CertificateDer<'static>>, AnswerError> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) =
            X509Certificate::from_der(der).map_err(|_| AnswerError::Certificates(what()))?;
        let (first, _) = der.split_at(der.len() - rest.len());
        certificates.push(CertificateDer::from(first.to_vec()));
        der = rest;
    }
    Ok(certificates)
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("certificates", &self.chain.len())
            .finish_non_exhaustive()
    }
}
