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

use super::{
    feed::plain,
    messages::{BundlesResponse, DelegatedResponse, X509SvidResponse},
};
use crate::identity::{
    BundleError, Denied, Material, RefusedBundle, SourceError, SpiffeId, SpiffeIdError,
    TrustBundle, TrustDomain,
};

const SCHEME: &str = "spiffe://";
/// So many identities of an answer are named.
const SHOWN: usize = 4;

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    svids: BTreeMap<SpiffeId, Issued>,
    /// Put in force together with any of the SVIDs.
    bundles: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    /// Bundles of other trust domains that are left out.
    refused: Vec<RefusedBundle>,
}

/// Bundles of trust domains, and those that cannot be used.
#[derive(Debug, Default)]
pub(super) struct Bundles {
    usable: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    refused: Vec<(TrustDomain, String)>,
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
        let mut refused = Vec::new();
        for (domain, der) in federated {
            let domain = trust_domain(&domain)?;
            // Nobody else speaks for the trust domain of one's own identity.
            if own.contains(&domain) {
                continue;
            }
            // A mistake of another trust domain must not keep this one from renewing.
            match certificates_of(&der, || format!("the bundle of {domain}")) {
                Ok(parsed) => drop(certificates.insert(domain, parsed)),
                Err(error) => refused.push(RefusedBundle::new(&domain, &error)),
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
                Err(error) => refused.push(RefusedBundle::new(&domain, &error)),
            }
        }
        refused.sort_by(|one, other| one.trust_domain.cmp(&other.trust_domain));
        Ok(Self {
            svids,
            bundles,
            refused,
        })
    }

    /// The answer of the Delegated Identity API, with the bundles that came apart from it. Of those
    /// only what the workload is to trust counts: the agent gives the bundles of everybody.
    pub(super) fn delegated(
        response: &DelegatedResponse,
        bundles: &Bundles,
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
        let is_trusted = |domain: &TrustDomain| own.contains(domain) || federated.contains(domain);
        let refused = bundles.refused.iter();
        let refused = refused.filter(|(domain, _)| is_trusted(domain));
        let refused = refused.map(|(domain, why)| RefusedBundle::new(domain, why));
        let refused = refused.collect();
        let bundles = bundles.usable.iter();
        let bundles = bundles.filter(|(domain, _)| is_trusted(domain));
        let bundles = bundles.map(|(domain, bundle)| (domain.clone(), bundle.clone()));
        let bundles = bundles.collect();
        Ok(Self {
            svids,
            bundles,
            refused,
        })
    }

    /// Whether there is no SVID in it.
    pub(super) fn is_empty(&self) -> bool {
        self.svids.is_empty()
    }

    /// Whether there is an SVID of `id` in it.
    pub(super) fn has(&self, id: &SpiffeId) -> bool {
        self.svids.contains_key(id)
    }

    /// Which SVIDs it has, in words.
    pub(super) fn contents(&self) -> String {
        if self.is_empty() {
            return "an answer without any identity".to_owned();
        }
        let shown = self.svids.keys().take(SHOWN).map(SpiffeId::as_str);
        let mut contents = format!("only {}", shown.collect::<Vec<_>>().join(", "));
        if self.svids.len() > SHOWN {
            contents.push_str(", ...");
        }
        contents
    }

    /// Bundles in it that are not used.
    pub(super) fn refused(&self) -> &[RefusedBundle] {
        &self.refused
    }

    /// One identity's part of it, with all the bundles.
    pub(super) fn material(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        let issued = self.svids.get(id).ok_or_else(|| {
            let contents = self.contents();
            Denied::NeverGranted(format!(
                "the agent gave {contents}; it has to have an entry with this identity"
            ))
        })?;
        Ok(Material {
            chain: issued.chain.clone(),
            key: Zeroizing::new(issued.key.clone_key()),
            bundles: self.bundles.values().cloned().collect(),
        })
    }
}

/// The bundles in an answer of the Delegated Identity API.
pub(super) fn bundles(response: BundlesResponse) -> Result<Bundles, AnswerError> {
    let mut bundles = Bundles::default();
    for (name, der) in response.ca_certificates {
        let domain = trust_domain(&name)?;
        let certificates = certificates_of(&der, || format!("the bundle of {domain}"));
        let bundle = certificates.and_then(|certificates| {
            Ok(TrustBundle::new(domain.clone(), certificates, Vec::new())?)
        });
        match bundle {
            Ok(bundle) => drop(bundles.usable.insert(domain, Arc::new(bundle))),
            Err(error) => bundles.refused.push((domain, error.to_string())),
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
    SpiffeId::parse(text).map_err(|error| AnswerError::Id(plain(text), error))
}

/// By name or by the trust domain's SPIFFE ID.
fn trust_domain(text: &str) -> Result<TrustDomain, AnswerError> {
    let name = text.strip_prefix(SCHEME).unwrap_or(text);
    TrustDomain::parse(name).map_err(|error| AnswerError::Id(plain(text), error))
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

impl RefusedBundle {
    fn new(trust_domain: &TrustDomain, why: &impl ToString) -> Self {
        Self {
            trust_domain: trust_domain.to_string(),
            reason: why.to_string(),
        }
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("certificates", &self.chain.len())
            .finish_non_exhaustive()
    }
}
