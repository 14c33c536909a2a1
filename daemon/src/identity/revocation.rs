//! Revocation lists, and what they say of the certificates of a path (RFC 5280, section 6.3).
//!
//! Every list of a certificate's issuer counts: a certificate that any of them names is revoked. The
//! newest list that covers the certificate says whether what is known is fresh. webpki looks at the
//! first list that has the issuer's name only, whoever's key has signed it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use webpki::{EndEntityCert, OwnedCertRevocationList};
use x509_parser::{
    asn1_rs::Any,
    certificate::X509Certificate,
    extensions::{DistributionPointName, GeneralName, ParsedExtension},
    prelude::FromDer,
    revocation_list::CertificateRevocationList,
};

use super::{RejectReason, UsedCertificate, clock, crypto};

/// A list of revoked certificates, read. Whether its issuer has signed it is seen when a certificate
/// of that issuer is checked.
pub struct RevocationList {
    der: CertificateRevocationListDer<'static>,
    /// What tells lists of one issuer from those of others, and their scopes from one another.
    series: Series,
    this_update: SystemTime,
    /// When it expires.
    next_update: SystemTime,
    /// Number of the list among those of its issuer, without leading zeros.
    number: Vec<u8>,
    /// Serial numbers of what is revoked, without leading zeros.
    revoked: HashSet<Vec<u8>>,
    /// Whether the holder of a public key has signed it, by the key: a list may have megabytes.
    signed_by: Mutex<HashMap<Vec<u8>, bool>>,
}

/// Lists of one issuer and of one scope, of which the newest replaces the others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Series {
    /// Distinguished name, DER.
    issuer: Vec<u8>,
    /// Authority key identifier: an issuer that got another key under the same name is another one.
    key_id: Option<Vec<u8>>,
    scope: Scope,
}

/// Which of an issuer's certificates a list covers: the issuing distribution point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Scope {
    only_users: bool,
    only_authorities: bool,
    /// Where the list is published; none where it covers certificates that name any place.
    places: Option<Vec<String>>,
}

/// The signer of a certificate, along a path that is right.
pub(super) struct Issuer<'a> {
    pub(super) der: &'a CertificateDer<'a>,
    pub(super) public_key: &'a [u8],
    /// Subject key identifier.
    pub(super) key_id: Option<&'a [u8]>,
    /// Whether its KeyUsage lets it sign lists.
    pub(super) may_sign_lists: bool,
}

// === impl RevocationList ===

impl RevocationList {
    /// Reads a list.
    ///
    /// # Errors
    /// When it cannot be read, is of a kind that is not supported, as a delta is, or does not say when
    /// it expires.
    pub fn parse(der: CertificateRevocationListDer<'static>) -> Result<Self, webpki::Error> {
        // Refuses every extension that would change what the list means.
        OwnedCertRevocationList::from_der(&der)?;
        let (_, parsed) =
            CertificateRevocationList::from_der(&der).map_err(|_| webpki::Error::BadDer)?;
        let next_update = parsed.next_update().ok_or(webpki::Error::BadDerTime)?;
        let series = Series {
            issuer: parsed.issuer().as_raw().to_vec(),
            key_id: key_id(&parsed),
            scope: scope(&parsed)?,
        };
        let revoked = parsed.iter_revoked_certificates();
        let revoked = revoked.map(|it| without_zeros(it.raw_serial()).to_vec());
        let (revoked, this_update) = (revoked.collect(), clock::from_asn1(parsed.last_update()));
        let number = parsed.crl_number().map(|number| number.to_bytes_be());
        Ok(Self {
            series,
            this_update,
            next_update: clock::from_asn1(next_update),
            number: number.map_or_else(Vec::new, |bytes| without_zeros(&bytes).to_vec()),
            revoked,
            signed_by: Mutex::default(),
            der,
        })
    }

    /// When it expires, and certificates that only it covers are refused.
    #[must_use]
    pub fn next_update(&self) -> SystemTime {
        self.next_update
    }

    /// When it was issued.
    #[must_use]
    pub fn this_update(&self) -> SystemTime {
        self.this_update
    }

    /// The list itself.
    #[must_use]
    pub fn der(&self) -> &CertificateRevocationListDer<'static> {
        &self.der
    }

    /// Whether it revokes a certificate that was used, and may not be at hand any more. Of two issuers
    /// of one name it is told by the key identifier.
    pub(super) fn revokes(&self, used: &UsedCertificate) -> bool {
        let other_key = matches!(
            (&self.series.key_id, &used.issuer_key_id),
            (Some(of_list), Some(of_issuer)) if of_list != of_issuer
        );
        self.series.issuer == used.issuer && !other_key && self.revoked.contains(&used.serial)
    }

    fn is_newer_than(&self, other: &Self) -> bool {
        let age = |list: &Self| (list.this_update, list.number.len(), list.number.clone());
        age(self) > age(other)
    }

    /// Whether the issuer's key has signed it.
    fn is_signed_by(&self, issuer: &Issuer<'_>) -> bool {
        let mut known = self
            .signed_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(signed) = known.get(issuer.public_key) {
            return *signed;
        }
        let signed = verify(&self.der, issuer.der).is_some();
        known.insert(issuer.public_key.to_vec(), signed);
        signed
    }

    /// Whether it says anything of a certificate of its issuer.
    fn covers(&self, certificate: &X509Certificate<'_>, is_signer: bool) -> bool {
        let scope = &self.series.scope;
        if (scope.only_users && is_signer) || (scope.only_authorities && !is_signer) {
            return false;
        }
        match (&scope.places, places(certificate)) {
            (Some(here), Some(named)) => named.iter().any(|place| here.contains(place)),
            _ => true,
        }
    }
}

impl fmt::Debug for RevocationList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocationList")
            .field("this_update", &self.this_update)
            .field("next_update", &self.next_update)
            .field("revoked", &self.revoked.len())
            .finish_non_exhaustive()
    }
}

/// The list that expires first, of those for which there is no newer one; none without lists.
pub(super) fn first_to_expire(lists: &[Arc<RevocationList>]) -> Option<&RevocationList> {
    let mut newest: HashMap<&Series, &RevocationList> = HashMap::new();
    for list in lists {
        let known = newest.entry(&list.series).or_insert(list);
        if list.is_newer_than(known) {
            *known = list;
        }
    }
    newest.into_values().min_by_key(|list| list.next_update)
}

/// Whether a certificate is revoked by any of these lists. With none, nothing is checked; with at
/// least one, a certificate that no list covers is refused.
pub(super) fn check(
    lists: &[Arc<RevocationList>],
    certificate: &X509Certificate<'_>,
    is_signer: bool,
    issuer: &Issuer<'_>,
    now: SystemTime,
) -> Result<(), RejectReason> {
    if lists.is_empty() {
        return Ok(());
    }
    let serial = without_zeros(certificate.raw_serial());
    let (mut newest, mut unsigned): (Option<&RevocationList>, bool) = (None, false);
    for list in lists {
        if list.series.issuer != certificate.issuer().as_raw() {
            continue;
        }
        // An issuer of the same name whose key is another one.
        let same_key = match (&list.series.key_id, issuer.key_id) {
            (Some(of_list), Some(of_issuer)) if of_list != of_issuer => continue,
            (Some(_), Some(_)) => true,
            _ => false,
        };
        if !list.is_signed_by(issuer) {
            if same_key {
                return Err(RejectReason::RevocationListInvalid);
            }
            unsigned = true;
            continue;
        }
        if list.revoked.contains(serial) {
            return Err(RejectReason::Revoked);
        }
        if list.covers(certificate, is_signer)
            && newest.is_none_or(|newest| list.is_newer_than(newest))
        {
            newest = Some(list);
        }
    }
    match newest {
        Some(_) if !issuer.may_sign_lists => Err(RejectReason::RevocationListInvalid),
        Some(list) if now >= list.next_update => Err(RejectReason::RevocationListExpired),
        Some(_) => Ok(()),
        None if unsigned => Err(RejectReason::RevocationListInvalid),
        None => Err(RejectReason::RevocationUnknown),
    }
}

/// Whether the key of a certificate has signed a list.
fn verify(list: &[u8], issuer: &CertificateDer<'_>) -> Option<()> {
    let (_, parsed) = CertificateRevocationList::from_der(list).ok()?;
    let (_, outer) = Any::from_der(list).ok()?;
    let (behind_contents, _) = Any::from_der(outer.data).ok()?;
    let (_, algorithm) = Any::from_der(behind_contents).ok()?;
    let issuer = EndEntityCert::try_from(issuer).ok()?;
    let algorithms = crypto::provider().signature_verification_algorithms.all;
    let signed = algorithms
        .iter()
        .filter(|candidate| candidate.signature_alg_id().as_ref() == algorithm.data)
        .any(|candidate| {
            let (contents, signature) = (parsed.tbs_cert_list.as_ref(), &parsed.signature_value);
            issuer
                .verify_signature(*candidate, contents, &signature.data)
                .is_ok()
        });
    signed.then_some(())
}

fn key_id(list: &CertificateRevocationList<'_>) -> Option<Vec<u8>> {
    list.extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(found) => {
                found.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        })
}

fn scope(list: &CertificateRevocationList<'_>) -> Result<Scope, webpki::Error> {
    let mut scope = Scope::default();
    for extension in list.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::IssuingDistributionPoint(found) => {
                scope.only_users = found.only_contains_user_certs;
                scope.only_authorities = found.only_contains_ca_certs;
                scope.places = found.distribution_point.as_ref().map(uris);
            }
            ParsedExtension::ParseError { .. } => return Err(webpki::Error::BadDer),
            _ => {}
        }
    }
    Ok(scope)
}

/// Where a certificate says that lists which cover it are published; none where it does not say.
fn places(certificate: &X509Certificate<'_>) -> Option<Vec<String>> {
    certificate.extensions().iter().find_map(|extension| {
        match extension.parsed_extension() {
            ParsedExtension::CRLDistributionPoints(points) => {
                let points = points.points.iter();
                // One that another issuer signs, or that is for some reasons only, is no such place.
                let whole = points.filter(|it| it.crl_issuer.is_none() && it.reasons.is_none());
                let names = whole.filter_map(|point| point.distribution_point.as_ref());
                Some(names.flat_map(uris).collect())
            }
            _ => None,
        }
    })
}

fn uris(name: &DistributionPointName<'_>) -> Vec<String> {
    match name {
        DistributionPointName::FullName(names) => names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            })
            .collect(),
        DistributionPointName::NameRelativeToCRLIssuer(_) => Vec::new(),
    }
}

/// A serial number is a number: DER puts a zero before one that would look negative.
pub(super) fn without_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}
