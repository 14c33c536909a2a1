//! The embedded CA: a root of one's own, for a node or a small fleet that has no other.
//!
//! In: a folder that holds the root's key and certificate, made at the first start. Out: a
//! short-lived certificate for whichever identity of the trust domain is asked for.

mod folder;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, future::BoxFuture};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use zeroize::{Zeroize, Zeroizing};

use super::{
    BundleError, CertificateSource, Material, RejectReason, SourceError, SpiffeId, TrustBundle,
    TrustDomain, clock, svid_rules,
};

/// Ten years: replacing a root means visiting every node.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// How far another node's clock may be behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// Of random in a serial number; RFC 5280 allows 20, CAs are asked for at least 8.
const SERIAL_BYTES: usize = 16;

/// A CA whose key is in a file of this machine.
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    leaf_lifetime: Duration,
    issuer: Issuer<'static, CaKey>,
    root_not_after: SystemTime,
    bundle: Arc<TrustBundle>,
    changes: watch::Sender<u64>,
}

/// Why the embedded CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Something could not be done to a file or folder.
    #[error("cannot {action} {path}: {error}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// Others than the owner may get at the CA's key.
    #[error(
        "{path} has mode {mode:04o}: whoever can read it can forge every identity. \
         If nobody else had access to it, `chmod {wanted:04o} {path}`; otherwise make a new CA",
        path = path.display()
    )]
    Permissions {
        /// File or folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The widest that is accepted.
        wanted: u32,
    },
    /// The folder or the key belongs to somebody else.
    #[error(
        "{path} belongs to user {owner}, and this process runs as user {user}: \
         make it this user's own", path = path.display()
    )]
    Owner {
        /// File or folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Effective user of this process.
        user: u32,
    },
    /// Only one of key and certificate is there.
    #[error(
        "{missing} is missing and {present} is there: put back the one that belongs to it, \
         or remove the other to have a new CA made",
        missing = missing.display(), present = present.display()
    )]
    Half {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable {what}: {error}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What is wrong.
        error: String,
    },
    /// The certificate may not be a root.
    #[error("{path} cannot be the root certificate: {error}", path = path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// Which rule it breaks.
        error: BundleError,
    },
    /// The certificate is another trust domain's.
    #[error(
        "{path} is the root of {found}, and the configuration's trust domain is {wanted}: \
         give this trust domain a CA folder of its own", path = path.display(),
        found = found.as_deref().unwrap_or("no SPIFFE trust domain")
    )]
    TrustDomain {
        /// The file.
        path: PathBuf,
        /// The trust domain's ID that the certificate holds.
        found: Option<String>,
        /// The one that it should be.
        wanted: TrustDomain,
    },
    /// The key is another certificate's.
    #[error(
        "the key in {key} does not fit the certificate in {certificate}: \
         put back the one that belongs to the other",
        key = key.display(), certificate = certificate.display()
    )]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// No key or certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// No random numbers.
    #[error("cannot make a certificate: the operating system gives no random numbers")]
    Random,
}

/// The root's key, which is wiped from memory with the CA.
struct CaKey(KeyPair);

// === impl EmbeddedCa ===

impl EmbeddedCa {
    /// Opens the CA in `folder`, or makes a new one where the folder is empty or not there.
    /// Several daemons may share the folder, or have copies of it: they then have the same root.
    /// Leaves are valid for `leaf_lifetime`, and never longer than the root.
    ///
    /// # Errors
    /// When the folder or the key can be reached by others, when only half of the CA is there, or
    /// when it is not the CA of `trust_domain`. Nothing is repaired: a CA replaced by mistake cuts
    /// the node off from all others.
    pub fn open(
        folder: &Path,
        trust_domain: &TrustDomain,
        leaf_lifetime: Duration,
    ) -> Result<Self, CaError> {
        let files = folder::open(folder, || new_root(trust_domain))?;
        let bundle = TrustBundle::new(
            trust_domain.clone(),
            vec![files.certificate.clone()],
            vec![],
        )
        .map_err(|error| CaError::Root {
            path: files.certificate_path.clone(),
            error,
        })?;
        let unreadable = |error: String| CaError::Unreadable {
            path: files.certificate_path.clone(),
            what: "certificate",
            error,
        };
        let root = svid_rules::parse(&files.certificate)
            .map_err(|reason| unreadable(reason.to_string()))?;
        let wanted = format!("spiffe://{trust_domain}");
        let found = svid_rules::only_uri(&root).ok();
        if found != Some(&wanted) {
            return Err(CaError::TrustDomain {
                found: found.map(str::to_owned),
                wanted: trust_domain.clone(),
                path: files.certificate_path,
            });
        }
        if root.public_key().raw != files.key.subject_public_key_info() {
            return Err(CaError::KeyMismatch {
                key: files.key_path,
                certificate: files.certificate_path,
            });
        }
        let root_not_after = clock::from_asn1(root.validity().not_after);
        if root_not_after < SystemTime::now() {
            return Err(CaError::Root {
                error: BundleError::Certificate {
                    trust_domain: trust_domain.clone(),
                    position: 1,
                    reason: RejectReason::Expired,
                },
                path: files.certificate_path,
            });
        }
        let issuer = Issuer::from_ca_cert_der(&files.certificate, CaKey(files.key))
            .map_err(|error| unreadable(error.to_string()))?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            leaf_lifetime,
            issuer,
            root_not_after,
            bundle: Arc::new(bundle),
            changes: watch::Sender::new(0),
        })
    }

    /// The bundle that peers need in order to trust what this CA issues.
    #[must_use]
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// Issues a certificate with a new key.
    ///
    /// # Errors
    /// When the identity is of another trust domain, or nothing could be generated.
    pub fn issue(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        if *id.trust_domain() != self.trust_domain {
            return Err(SourceError::Unavailable(format!(
                "the embedded CA issues for trust domain {} only, not for {id}",
                self.trust_domain
            )));
        }
        let issued = self.sign(id);
        let (certificate, key) = issued.map_err(|e| SourceError::Unavailable(e.to_string()))?;
        Ok(Material {
            chain: vec![certificate],
            key,
            bundles: vec![self.bundle.clone()],
        })
    }

    fn sign(
        &self,
        id: &SpiffeId,
    ) -> Result<(CertificateDer<'static>, Zeroizing<PrivateKeyDer<'static>>), CaError> {
        let now = SystemTime::now();
        // The subject stays empty, which makes the alternative name critical: it is the only name.
        let mut leaf = params(id.as_str(), DistinguishedName::new())?;
        // A lifetime of seconds, as tests have, is not to be over before it begins.
        leaf.not_before = (now - CLOCK_SKEW.min(self.leaf_lifetime)).into();
        leaf.not_after = (now + self.leaf_lifetime).min(self.root_not_after).into();
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        leaf.use_authority_key_identifier_extension = true;

        let mut key = KeyPair::generate()?;
        let certificate = leaf.signed_by(&key, &self.issuer);
        let der = PrivatePkcs8KeyDer::from(key.serialize_der());
        key.zeroize();
        Ok((certificate?.into(), Zeroizing::new(der.into())))
    }
}

/// A root's certificate and key.
fn new_root(trust_domain: &TrustDomain) -> Result<(rcgen::Certificate, KeyPair), CaError> {
    let mut serial = [0; 4];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| CaError::Random)?;
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "reeve");
    // Tells one root from another for people; verifiers go by the key.
    name.push(
        DnType::CommonName,
        format!("reeve root {}", super::hex(&serial)),
    );
    let mut root = params(&format!("spiffe://{trust_domain}"), name)?;
    let now = SystemTime::now();
    root.not_before = (now - CLOCK_SKEW).into();
    root.not_after = (now + ROOT_LIFETIME).into();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = root.self_signed(&key)?;
    Ok((certificate, key))
}

/// What every certificate has: one URI, and a random serial number.
fn params(uri: &str, name: DistinguishedName) -> Result<CertificateParams, CaError> {
    let mut serial = [0; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| CaError::Random)?;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = name;
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    Ok(params)
}

impl CertificateSource for EmbeddedCa {
    fn name(&self) -> &'static str {
        "embedded_ca"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready(self.issue(id)).boxed()
    }

    fn changes(&self, _id: &SpiffeId) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("trust_domain", &self.trust_domain)
            .field("leaf_lifetime", &self.leaf_lifetime)
            .field("root_not_after", &self.root_not_after)
            .finish_non_exhaustive()
    }
}

// === impl CaKey ===

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
