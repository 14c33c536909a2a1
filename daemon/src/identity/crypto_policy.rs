//! Which cryptography is accepted: keys and lifetimes of certificates, groups and cipher suites of
//! TLS.

use std::{
    fmt,
    sync::{Arc, LazyLock},
    time::Duration,
};

use rustls::{
    SupportedCipherSuite,
    crypto::{
        CryptoProvider, SupportedKxGroup,
        aws_lc_rs::{
            self,
            cipher_suite::{
                TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
            },
            kx_group::{SECP256R1, SECP256R1MLKEM768, SECP384R1, X25519, X25519MLKEM768},
        },
    },
};
use serde::Deserialize;
use x509_parser::certificate::X509Certificate;

use super::{KeyKind, RejectReason, clock};

/// What an RSA key needs at least, whatever is configured: webpki verifies no smaller one.
pub const SMALLEST_RSA_KEY: u32 = 2048;
/// The largest that webpki verifies.
pub const LARGEST_RSA_KEY: u32 = 8192;

/// Accepts nothing weaker than 112 bits; what is usual today.
const DEFAULT_RSA_BITS: u32 = 2048;
/// 128 bits of strength (NIST SP 800-57, part 1, table 2): less is disallowed after 2030.
const FIPS_RSA_BITS: u32 = 3072;
/// What cert-manager issues if nothing else is asked for, and the longest among the usual issuers of
/// workloads' certificates.
const MAX_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// A set of settings that belong together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CryptoProfile {
    /// What is strong and fast.
    #[default]
    Default,
    /// Of that, what FIPS 140-3 approves, with NIST's curves. The library is aws-lc in its ordinary
    /// build, which is not the validated module.
    Fips,
}

/// An algorithm of certificates' keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyType {
    /// ECDSA with NIST P-256.
    EcdsaP256,
    /// ECDSA with NIST P-384.
    EcdsaP384,
    /// ECDSA with NIST P-521.
    EcdsaP521,
    /// Ed25519.
    Ed25519,
    /// RSA.
    Rsa,
}

/// A key exchange of TLS 1.3, by the name that IANA gives it, in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyExchangeGroup {
    /// X25519 with ML-KEM-768: what is recorded today stays secret from a quantum computer.
    X25519Mlkem768,
    /// NIST P-256 with ML-KEM-768: likewise.
    Secp256r1Mlkem768,
    /// X25519.
    X25519,
    /// NIST P-256.
    Secp256r1,
    /// NIST P-384.
    Secp384r1,
}

/// A cipher suite of TLS 1.3, by the name that IANA gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum CipherSuite {
    /// AES-128 in GCM.
    #[serde(rename = "TLS_AES_128_GCM_SHA256")]
    Aes128Gcm,
    /// AES-256 in GCM.
    #[serde(rename = "TLS_AES_256_GCM_SHA384")]
    Aes256Gcm,
    /// ChaCha20 with Poly1305.
    #[serde(rename = "TLS_CHACHA20_POLY1305_SHA256")]
    Chacha20Poly1305,
}

/// What is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CryptoRules {
    /// Keys that certificates may have, a workload's and those above it.
    pub key_types: Vec<KeyType>,
    /// Least size of an RSA key, in bits.
    pub min_rsa_bits: u32,
    /// Longest time from the start to the end of a workload's certificate.
    pub max_lifetime: Duration,
    /// Key exchanges, the preferred one first.
    pub groups: Vec<KeyExchangeGroup>,
    /// Cipher suites, the preferred one first.
    pub cipher_suites: Vec<CipherSuite>,
}

/// [`CryptoRules`] in force: judges certificates, and provides TLS.
#[derive(Clone)]
pub struct CryptoPolicy {
    rules: CryptoRules,
    provider: Arc<CryptoProvider>,
}

static DEFAULT: LazyLock<Arc<CryptoPolicy>> =
    LazyLock::new(|| Arc::new(CryptoPolicy::new(CryptoRules::of(CryptoProfile::Default))));

// === impl CryptoRules ===

impl CryptoRules {
    /// The rules of a profile.
    #[must_use]
    pub fn of(profile: CryptoProfile) -> Self {
        match profile {
            // AES-128 first: it is the cheapest per byte where the processor has AES, which is
            // where the data path's time goes, and its key is not the weakest link beside P-256.
            // Istio's ztunnel takes both AES suites; ChaCha20 is for processors without AES. Of the
            // groups, the hybrid first.
            CryptoProfile::Default => Self {
                key_types: vec![
                    KeyType::EcdsaP256,
                    KeyType::EcdsaP384,
                    KeyType::EcdsaP521,
                    KeyType::Ed25519,
                    KeyType::Rsa,
                ],
                min_rsa_bits: DEFAULT_RSA_BITS,
                max_lifetime: MAX_LIFETIME,
                groups: vec![
                    KeyExchangeGroup::X25519Mlkem768,
                    KeyExchangeGroup::X25519,
                    KeyExchangeGroup::Secp256r1,
                    KeyExchangeGroup::Secp384r1,
                ],
                cipher_suites: vec![
                    CipherSuite::Aes128Gcm,
                    CipherSuite::Aes256Gcm,
                    CipherSuite::Chacha20Poly1305,
                ],
            },
            CryptoProfile::Fips => Self {
                key_types: vec![KeyType::EcdsaP256, KeyType::EcdsaP384, KeyType::Rsa],
                min_rsa_bits: FIPS_RSA_BITS,
                max_lifetime: MAX_LIFETIME,
                groups: vec![
                    KeyExchangeGroup::Secp256r1Mlkem768,
                    KeyExchangeGroup::Secp256r1,
                    KeyExchangeGroup::Secp384r1,
                ],
                cipher_suites: vec![CipherSuite::Aes128Gcm, CipherSuite::Aes256Gcm],
            },
        }
    }
}

impl Default for CryptoRules {
    fn default() -> Self {
        Self::of(CryptoProfile::Default)
    }
}

// === impl CryptoPolicy ===

impl CryptoPolicy {
    /// Puts rules in force.
    #[must_use]
    pub fn new(rules: CryptoRules) -> Self {
        let provider = CryptoProvider {
            cipher_suites: rules
                .cipher_suites
                .iter()
                .map(|suite| suite.tls())
                .collect(),
            kx_groups: rules.groups.iter().map(|group| group.tls()).collect(),
            ..aws_lc_rs::default_provider()
        };
        Self {
            rules,
            provider: Arc::new(provider),
        }
    }

    /// The default profile's.
    #[must_use]
    pub fn shared_default() -> Arc<Self> {
        DEFAULT.clone()
    }

    /// Suites and groups of every handshake, over aws-lc-rs.
    #[must_use]
    pub fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// What a workload's certificate must keep to besides the standard.
    pub(super) fn check_leaf(&self, certificate: &X509Certificate<'_>) -> Result<(), RejectReason> {
        self.check_key(KeyKind::of(certificate))?;
        let validity = certificate.validity();
        let (start, end) = (validity.not_before, validity.not_after);
        let lifetime = clock::from_asn1(end)
            .duration_since(clock::from_asn1(start))
            .unwrap_or(Duration::ZERO);
        match lifetime <= self.rules.max_lifetime {
            true => Ok(()),
            false => Err(RejectReason::Lifetime),
        }
    }

    /// Whether a key is of a permitted kind and size.
    pub(super) fn check_key(&self, key: KeyKind) -> Result<(), RejectReason> {
        let (kind, bits) = match key {
            KeyKind::EcdsaP256 => (KeyType::EcdsaP256, None),
            KeyKind::EcdsaP384 => (KeyType::EcdsaP384, None),
            KeyKind::EcdsaP521 => (KeyType::EcdsaP521, None),
            KeyKind::Ed25519 => (KeyType::Ed25519, None),
            KeyKind::Rsa(bits) => (KeyType::Rsa, Some(bits)),
            KeyKind::Other => return Err(RejectReason::KeyType),
        };
        if !self.rules.key_types.contains(&kind) {
            return Err(RejectReason::KeyType);
        }
        match bits {
            Some(bits) if bits < self.rules.min_rsa_bits as usize => Err(RejectReason::KeySize),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for CryptoPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rules.fmt(f)
    }
}

// === names of TLS ===

impl KeyExchangeGroup {
    fn tls(self) -> &'static dyn SupportedKxGroup {
        match self {
            Self::X25519Mlkem768 => X25519MLKEM768,
            Self::Secp256r1Mlkem768 => SECP256R1MLKEM768,
            Self::X25519 => X25519,
            Self::Secp256r1 => SECP256R1,
            Self::Secp384r1 => SECP384R1,
        }
    }
}

impl CipherSuite {
    fn tls(self) -> SupportedCipherSuite {
        match self {
            Self::Aes128Gcm => TLS13_AES_128_GCM_SHA256,
            Self::Aes256Gcm => TLS13_AES_256_GCM_SHA384,
            Self::Chacha20Poly1305 => TLS13_CHACHA20_POLY1305_SHA256,
        }
    }
}
