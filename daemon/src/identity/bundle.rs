//! Trust bundles: whose signature counts in which trust domain.

use std::{
    collections::BTreeMap,
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};
use x509_parser::{certificate::X509Certificate, extensions::ParsedExtension, x509::X509Version};

use super::{
    CryptoPolicy, KeyKind, RejectReason, RevocationList, TrustDomain, UsedCertificate, Validity,
    clock, revocation, svid_rules,
};

/// The certificates that sign for one trust domain, and the revocation lists that go with them.
///
/// An empty bundle revokes the trust domain. An expired certificate in a bundle is kept, so that a
/// root can be replaced ahead of time, and signs for nothing.
pub struct TrustBundle {
    trust_domain: TrustDomain,
    authorities: Arc<Authorities>,
    lists: Vec<Arc<RevocationList>>,
}

struct Authorities {
    anchors: Vec<TrustAnchor<'static>>,
    /// What webpki does not keep of each anchor, in the order of `anchors`.
    facts: Vec<Facts>,
    certificates: Vec<CertificateDer<'static>>,
}

#[derive(Debug)]
struct Facts {
    not_before: SystemTime,
    not_after: SystemTime,
    key: KeyKind,
    public_key: Vec<u8>,
    key_id: Option<Vec<u8>>,
    /// How many CAs it allows between itself and a workload's certificate.
    path_length: Option<u32>,
    may_sign_lists: bool,
}

/// An authority of a bundle that may sign now.
pub(super) struct Anchor<'a> {
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) issuer: revocation::Issuer<'a>,
}

/// Why a trust bundle cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// A certificate may not be a trust anchor.
    #[error("certificate {position} of the trust bundle of {trust_domain} is refused: {reason}")]
    Certificate {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// Which certificate, counted from 1.
        position: usize,
        /// Which rule it breaks.
        reason: RejectReason,
    },
    /// A revocation list cannot be read.
    #[error("revocation list {position} of the trust bundle of {trust_domain} is refused: {error}")]
    RevocationList {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// Which list, counted from 1.
        position: usize,
        /// What is wrong with it.
        error: webpki::Error,
    },
}

/// Bundles by trust domain, and the cryptography that chains to them must keep to. They are never
/// merged: a trust domain's bundle says nothing of another's identities.
#[derive(Clone, Debug)]
pub struct TrustBundles {
    by_domain: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    policy: Arc<CryptoPolicy>,
}

/// The bundles in force for one identity, replaced at runtime as a whole. Every verifier of the
/// identity reads the newest.
#[derive(Debug, Default)]
pub struct TrustStore(ArcSwap<TrustBundles>);

// === impl TrustBundle ===

impl TrustBundle {
    /// A bundle of these signing certificates. Without revocation lists revocation is not checked;
    /// with at least one, what no list speaks of is refused.
    ///
    /// # Errors
    /// The first certificate that may not sign by the X.509-SVID standard, or the first list that
    /// cannot be read: a bundle is taken whole or not at all.
    pub fn new(
        trust_domain: TrustDomain,
        certificates: Vec<CertificateDer<'static>>,
        crl_ders: Vec<CertificateRevocationListDer<'static>>,
    ) -> Result<Self, BundleError> {
        let mut anchors = Vec::with_capacity(certificates.len());
        let mut facts = Vec::with_capacity(certificates.len());
        for (index, certificate) in certificates.iter().enumerate() {
            let (anchor, about) =
                anchor(certificate).map_err(|reason| BundleError::Certificate {
                    trust_domain: trust_domain.clone(),
                    position: index + 1,
                    reason,
                })?;
            anchors.push(anchor);
            facts.push(about);
        }
        let mut lists = Vec::with_capacity(crl_ders.len());
        for (index, der) in crl_ders.into_iter().enumerate() {
            let list = RevocationList::parse(der);
            lists.push(Arc::new(list.map_err(|error| {
                BundleError::RevocationList {
                    trust_domain: trust_domain.clone(),
                    position: index + 1,
                    error,
                }
            })?));
        }
        Ok(Self {
            trust_domain,
            authorities: Arc::new(Authorities {
                anchors,
                facts,
                certificates,
            }),
            lists,
        })
    }

    /// The same authorities, with more revocation lists.
    #[must_use]
    pub fn with_lists(&self, more: &[Arc<RevocationList>]) -> Self {
        Self {
            trust_domain: self.trust_domain.clone(),
            authorities: self.authorities.clone(),
            lists: self.lists.iter().chain(more).cloned().collect(),
        }
    }

    /// Whose bundle it is.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Whether it revokes its trust domain.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.authorities.anchors.is_empty()
    }

    /// The signing certificates.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.authorities.certificates
    }

    /// Number of revocation lists; with none, revocation is not checked.
    #[must_use]
    pub fn revocation_lists(&self) -> usize {
        self.lists.len()
    }

    /// When the first of its certificates expires; none for an empty bundle.
    #[must_use]
    pub fn earliest_not_after(&self) -> Option<SystemTime> {
        let facts = &self.authorities.facts;
        facts.iter().map(|about| about.not_after).min()
    }

    /// Validity of the certificate that expires last; none for an empty bundle.
    #[must_use]
    pub fn newest(&self) -> Option<Validity> {
        let facts = self.authorities.facts.iter();
        let newest = facts.max_by_key(|about| about.not_after)?;
        Some(Validity {
            not_before: newest.not_before,
            not_after: newest.not_after,
        })
    }

    /// When the first of its revocation lists expires for which there is no newer one; none where
    /// revocation is not checked.
    #[must_use]
    pub fn next_update(&self) -> Option<SystemTime> {
        revocation::first_to_expire(&self.lists).map(RevocationList::next_update)
    }

    /// When the list of [`Self::next_update`] was issued.
    #[must_use]
    pub fn this_update(&self) -> Option<SystemTime> {
        revocation::first_to_expire(&self.lists).map(RevocationList::this_update)
    }

    /// The times at which it begins to say something else by itself.
    pub(super) fn turns(&self) -> impl Iterator<Item = SystemTime> {
        let facts = self.authorities.facts.iter();
        let lists = self.lists.iter().map(|list| list.next_update());
        facts
            .flat_map(|about| [about.not_before, about.not_after])
            .chain(lists)
    }

    /// Whether both were made from the same certificates and lists.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        if std::ptr::eq(self, other) {
            return true;
        }
        let same_list = |(one, other): (&Arc<RevocationList>, &Arc<RevocationList>)| {
            Arc::ptr_eq(one, other) || one.der() == other.der()
        };
        self.trust_domain == other.trust_domain
            && (Arc::ptr_eq(&self.authorities, &other.authorities)
                || self.authorities.certificates == other.authorities.certificates)
            && self.lists.len() == other.lists.len()
            && self.lists.iter().zip(&other.lists).all(same_list)
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.authorities.anchors
    }

    /// Its revocation lists.
    #[must_use]
    pub fn lists(&self) -> &[Arc<RevocationList>] {
        &self.lists
    }

    /// This very element of [`Self::anchors`], where it may sign at `now` with so many CAs below it.
    pub(super) fn check_anchor(
        &self,
        anchor: &TrustAnchor<'_>,
        below: usize,
        policy: &CryptoPolicy,
        now: SystemTime,
    ) -> Result<Anchor<'_>, RejectReason> {
        let Authorities {
            anchors,
            facts,
            certificates,
        } = &*self.authorities;
        let (about, der) = anchors
            .iter()
            .zip(facts.iter().zip(certificates))
            .find(|(candidate, _)| std::ptr::eq(*candidate, anchor))
            .map(|(_, found)| found)
            .filter(|(about, _)| about.not_before <= now && now <= about.not_after)
            .ok_or(RejectReason::AnchorValidity)?;
        policy.check_key(about.key)?;
        if about.path_length.is_some_and(|most| below > most as usize) {
            return Err(RejectReason::PathLength);
        }
        Ok(Anchor {
            not_before: about.not_before,
            not_after: about.not_after,
            issuer: revocation::Issuer {
                der,
                public_key: &about.public_key,
                key_id: about.key_id.as_deref(),
                may_sign_lists: about.may_sign_lists,
            },
        })
    }
}

fn anchor(der: &CertificateDer<'_>) -> Result<(TrustAnchor<'static>, Facts), RejectReason> {
    let certificate = svid_rules::parse(der)?;
    if certificate.version() != X509Version::V3 {
        return Err(RejectReason::SignerNotCa);
    }
    svid_rules::check_signer(&certificate)?;
    let facts = Facts {
        not_before: clock::from_asn1(certificate.validity().not_before),
        not_after: clock::from_asn1(certificate.validity().not_after),
        key: KeyKind::of(&certificate),
        public_key: certificate.public_key().raw.to_vec(),
        key_id: key_id(&certificate).map(<[u8]>::to_vec),
        path_length: svid_rules::path_length(&certificate)?,
        may_sign_lists: svid_rules::may_sign_lists(&certificate)?,
    };
    let anchor = webpki::anchor_from_trusted_cert(der)?.to_owned();
    Ok((anchor, facts))
}

/// Subject key identifier.
pub(super) fn key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    let mut extensions = certificate.extensions().iter();
    extensions.find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
        _ => None,
    })
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("trust_domain", &self.trust_domain)
            .field("certificates", &self.certificates().len())
            .field("revocation_lists", &self.lists.len())
            .field("earliest_not_after", &self.earliest_not_after())
            .finish()
    }
}

// === impl TrustBundles ===

impl TrustBundles {
    /// No bundles, and this policy for those to come.
    #[must_use]
    pub fn with_policy(policy: Arc<CryptoPolicy>) -> Self {
        Self {
            by_domain: BTreeMap::new(),
            policy,
        }
    }

    /// Whether a list of the trust domain revokes a certificate that was used.
    #[must_use]
    pub fn revoke(&self, trust_domain: &TrustDomain, used: &UsedCertificate) -> bool {
        let bundle = self.by_domain.get(trust_domain);
        bundle.is_some_and(|bundle| bundle.lists.iter().any(|list| list.revokes(used)))
    }

    /// The cryptography that chains must keep to.
    #[must_use]
    pub fn policy(&self) -> &Arc<CryptoPolicy> {
        &self.policy
    }
}

impl Default for TrustBundles {
    fn default() -> Self {
        Self::with_policy(CryptoPolicy::shared_default())
    }
}

impl Deref for TrustBundles {
    type Target = BTreeMap<TrustDomain, Arc<TrustBundle>>;

    fn deref(&self) -> &Self::Target {
        &self.by_domain
    }
}

impl DerefMut for TrustBundles {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.by_domain
    }
}

// === impl TrustStore ===

impl TrustStore {
    /// A store that begins with these bundles, and the default policy.
    #[must_use]
    pub fn new(bundles: impl IntoIterator<Item = TrustBundle>) -> Self {
        Self::with_policy(CryptoPolicy::shared_default(), bundles)
    }

    /// A store that begins with these bundles, for chains that keep to a policy.
    #[must_use]
    pub fn with_policy(
        policy: Arc<CryptoPolicy>,
        bundles: impl IntoIterator<Item = TrustBundle>,
    ) -> Self {
        let by_domain = |bundle: TrustBundle| (bundle.trust_domain.clone(), Arc::new(bundle));
        let mut all = TrustBundles::with_policy(policy);
        all.extend(bundles.into_iter().map(by_domain));
        Self(ArcSwap::from_pointee(all))
    }

    /// A store with one bundle.
    #[must_use]
    pub(super) fn of(policy: Arc<CryptoPolicy>, bundle: Arc<TrustBundle>) -> Self {
        let mut all = TrustBundles::with_policy(policy);
        all.insert(bundle.trust_domain.clone(), bundle);
        Self(ArcSwap::from_pointee(all))
    }

    /// The bundles in force now.
    #[must_use]
    pub fn current(&self) -> Arc<TrustBundles> {
        self.0.load_full()
    }

    /// Puts these in force, unless they say what those in force say: a value that is the same by
    /// its address is known to say the same. Returns whether anything is different now.
    pub(super) fn replace(&self, next: TrustBundles) -> bool {
        let different = !same(&self.0.load(), &next);
        if different {
            self.0.store(Arc::new(next));
        }
        different
    }

    /// Makes the bundles in force another value that says the same: time has changed what they
    /// mean, and who has judged by them is to judge again.
    pub(super) fn renew(&self) {
        self.0.rcu(|current| Arc::new(TrustBundles::clone(current)));
    }
}

fn same(one: &TrustBundles, other: &TrustBundles) -> bool {
    one.len() == other.len() && one.values().zip(other.values()).all(|(a, b)| a.same_as(b))
}
