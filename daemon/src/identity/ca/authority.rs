//! A CA that was found in order: what it signs is accepted by whoever trusts its roots.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use x509_parser::certificate::X509Certificate;
use zeroize::{Zeroize, Zeroizing};

use super::{
    CaError,
    folder::{Contents, Pair},
    template,
};
use crate::identity::{
    BundleError, Material, RejectReason, SpiffeId, TrustBundle, TrustBundles, TrustDomain, clock,
    svid_rules, verify_chain,
};

/// Lifetime of the certificate that is signed and thrown away to see whether it would be accepted.
const PROBE_LIFETIME: Duration = Duration::from_secs(60);

/// Who signs, and what peers need in order to trust it.
pub(super) struct Authority {
    pub(super) trust_domain: TrustDomain,
    pub(super) issuer: Issuer<'static, CaKey>,
    /// The signing certificate, with those above it but the root.
    pub(super) signer: Vec<CertificateDer<'static>>,
    pub(super) is_intermediate: bool,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) bundle: Arc<TrustBundle>,
}

/// A CA's key, which is wiped from memory with the CA.
pub(super) struct CaKey(KeyPair);

// === impl Authority ===

impl Authority {
    /// Checks what is in a folder as a whole.
    ///
    /// # Errors
    /// When key and certificates do not fit each other, are of another trust domain than the one
    /// that is `wanted`, or nobody would accept what is signed.
    pub(super) fn check(
        folder: &Path,
        contents: Contents,
        wanted: Option<&TrustDomain>,
    ) -> Result<Self, CaError> {
        let Contents {
            signer,
            is_intermediate,
            trusted,
            lists,
            ..
        } = contents;
        let Signer {
            trust_domain,
            issuer,
            chain,
            path,
            not_before,
            not_after,
        } = Signer::check(signer, wanted)?;
        if not_after < SystemTime::now() {
            let reason = RejectReason::Expired;
            return Err(CaError::Useless { path, reason });
        }
        let bundle = bundle(folder, &trust_domain, trusted, lists)?;
        let authority = Self {
            trust_domain,
            issuer,
            signer: chain,
            is_intermediate,
            not_before,
            not_after,
            bundle: Arc::new(bundle),
        };
        authority.probe(path)?;
        Ok(authority)
    }

    /// Signs a certificate with a new key.
    pub(super) fn issue(&self, id: &SpiffeId, lifetime: Duration) -> Result<Material, CaError> {
        if *id.trust_domain() != self.trust_domain {
            return Err(CaError::OtherTrustDomain {
                trust_domain: self.trust_domain.clone(),
                id: id.clone(),
            });
        }
        let leaf = template::leaf(id, lifetime, self.not_after)?;
        let mut key = KeyPair::generate()?;
        let certificate = leaf.signed_by(&key, &self.issuer);
        let der = PrivatePkcs8KeyDer::from(key.serialize_der());
        key.zeroize();
        let key: Zeroizing<PrivateKeyDer<'static>> = Zeroizing::new(der.into());
        let mut chain = vec![certificate?.into()];
        if self.is_intermediate {
            chain.extend_from_slice(&self.signer);
        }
        Ok(Material {
            chain,
            key,
            bundles: vec![self.bundle.clone()],
        })
    }

    /// Whether peers would accept what is signed: everything that can be wrong with the chain above
    /// a workload's certificate shows here.
    fn probe(&self, path: PathBuf) -> Result<(), CaError> {
        let useless = |reason| CaError::Useless { path, reason };
        let Ok(id) = SpiffeId::parse(&format!("spiffe://{}/probe", self.trust_domain)) else {
            return Err(useless(RejectReason::InvalidId));
        };
        let material = self.issue(&id, PROBE_LIFETIME)?;
        let Some((leaf, intermediates)) = material.chain.split_first() else {
            return Err(useless(RejectReason::Malformed));
        };
        let mut bundles = TrustBundles::default();
        bundles.insert(self.trust_domain.clone(), self.bundle.clone());
        verify_chain(&bundles, leaf, intermediates, SystemTime::now())
            .map(drop)
            .map_err(useless)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .field("is_intermediate", &self.is_intermediate)
            .field("not_after", &self.not_after)
            .field("bundle", &self.bundle)
            .finish_non_exhaustive()
    }
}

/// A key that can sign, with the certificate that says so.
pub(super) struct Signer {
    pub(super) trust_domain: TrustDomain,
    pub(super) issuer: Issuer<'static, CaKey>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) path: PathBuf,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

// === impl Signer ===

impl Signer {
    /// Checks that key and certificate fit each other, and that the certificate is the trust
    /// domain's.
    pub(super) fn check(pair: Pair, wanted: Option<&TrustDomain>) -> Result<Self, CaError> {
        let Pair {
            key,
            key_path,
            chain,
            chain_path,
        } = pair;
        let unreadable = |error: String| CaError::Unreadable {
            path: chain_path.clone(),
            what: "certificate",
            error,
        };
        let Some(der) = chain.first() else {
            return Err(unreadable("it is empty".to_owned()));
        };
        let certificate =
            svid_rules::parse(der).map_err(|reason| unreadable(reason.to_string()))?;
        let found = svid_rules::only_uri(&certificate).ok();
        let domain = found
            .and_then(|uri| uri.strip_prefix("spiffe://"))
            .and_then(|name| TrustDomain::parse(name).ok());
        let trust_domain = match (domain, wanted) {
            (Some(domain), None) => domain,
            (Some(domain), Some(wanted)) if domain == *wanted => domain,
            (_, Some(wanted)) => {
                return Err(CaError::TrustDomain {
                    found: found.map(str::to_owned),
                    wanted: wanted.clone(),
                    path: chain_path,
                });
            }
            (None, None) => return Err(unreadable("it has no trust domain's ID".to_owned())),
        };
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(CaError::KeyMismatch {
                key: key_path,
                certificate: chain_path,
            });
        }
        let not_before = clock::from_asn1(certificate.validity().not_before);
        let not_after = clock::from_asn1(certificate.validity().not_after);
        let issuer = Issuer::from_ca_cert_der(der, CaKey(key))
            .map_err(|error| unreadable(error.to_string()))?;
        Ok(Self {
            trust_domain,
            issuer,
            chain,
            path: chain_path,
            not_before,
            not_after,
        })
    }

    /// Distinguished name, as DER: what names the issuer in certificates and lists.
    pub(super) fn subject(&self) -> Result<Vec<u8>, CaError> {
        Ok(self.certificate()?.subject().as_raw().to_vec())
    }

    /// The same for people.
    pub(super) fn name(&self) -> Result<String, CaError> {
        Ok(self.certificate()?.subject().to_string())
    }

    fn certificate(&self) -> Result<X509Certificate<'_>, CaError> {
        let der = self.chain.first().map_or(&[][..], |der| der.as_ref());
        svid_rules::parse(der).map_err(|reason| CaError::Unreadable {
            path: self.path.clone(),
            what: "certificate",
            error: reason.to_string(),
        })
    }
}

fn bundle(
    folder: &Path,
    trust_domain: &TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    lists: Vec<CertificateRevocationListDer<'static>>,
) -> Result<TrustBundle, CaError> {
    let wrong = |error: BundleError| CaError::Bundle {
        folder: folder.to_owned(),
        error,
    };
    TrustBundle::new(trust_domain.clone(), roots, lists).map_err(wrong)
}

// === impl CaKey ===

impl CaKey {
    pub(super) fn new(key: KeyPair) -> Self {
        Self(key)
    }

    pub(super) fn pair(&self) -> &KeyPair {
        &self.0
    }
}

impl rcgen::SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl Drop for CaKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}
