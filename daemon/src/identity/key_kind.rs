//! Kinds of public keys.

use std::fmt;

use x509_parser::{certificate::X509Certificate, public_key::PublicKey};

/// A certificate's public key: its algorithm, and its size where that varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyKind {
    /// ECDSA with NIST P-256.
    EcdsaP256,
    /// ECDSA with NIST P-384.
    EcdsaP384,
    /// ECDSA with NIST P-521.
    EcdsaP521,
    /// Ed25519.
    Ed25519,
    /// RSA, with this many bits.
    Rsa(usize),
    /// Anything else.
    Other,
}

/// Object identifiers (RFC 5480, section 2.1.1.1; RFC 8410, section 3).
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";
const P521: &str = "1.3.132.0.35";
const ED25519: &str = "1.3.101.112";

impl KeyKind {
    /// The kind of a certificate's key.
    pub(super) fn of(certificate: &X509Certificate<'_>) -> Self {
        let key = certificate.public_key();
        match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => Self::Rsa(bits(rsa.modulus)),
            Ok(PublicKey::EC(_)) => {
                let parameters = key.algorithm.parameters.as_ref();
                let curve = parameters.and_then(|any| any.as_oid().ok());
                match curve.map(|oid| oid.to_id_string()).as_deref() {
                    Some(P256) => Self::EcdsaP256,
                    Some(P384) => Self::EcdsaP384,
                    Some(P521) => Self::EcdsaP521,
                    _ => Self::Other,
                }
            }
            _ if key.algorithm.algorithm.to_id_string() == ED25519 => Self::Ed25519,
            _ => Self::Other,
        }
    }
}

/// Length of a number that is written in bytes, most significant first.
fn bits(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let number = number.get(zeros..).unwrap_or_default();
    match number.first() {
        Some(first) => number.len() * 8 - first.leading_zeros() as usize,
        None => 0,
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EcdsaP256 => f.write_str("ecdsa-p256"),
            Self::EcdsaP384 => f.write_str("ecdsa-p384"),
            Self::EcdsaP521 => f.write_str("ecdsa-p521"),
            Self::Ed25519 => f.write_str("ed25519"),
            Self::Rsa(bits) => write!(f, "rsa-{bits}"),
            Self::Other => f.write_str("of a kind that is not known"),
        }
    }
}
