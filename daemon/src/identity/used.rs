//! What is kept of a certificate that has vouched for a tunnel, to find it in revocation lists.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use x509_parser::{certificate::X509Certificate, extensions::ParsedExtension};

use super::{RejectReason, Verified, clock, revocation::without_zeros, svid_rules};

/// A certificate as revocation lists name it, without the certificate itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedCertificate {
    /// Distinguished name of its issuer, DER.
    pub(super) issuer: Vec<u8>,
    /// Authority key identifier.
    pub(super) issuer_key_id: Option<Vec<u8>>,
    /// Without leading zeros.
    pub(super) serial: Vec<u8>,
    not_after: SystemTime,
}

impl UsedCertificate {
    /// The certificates of a chain along the path by which it was found to be right: the leaf, and its
    /// signers below the trust bundle.
    ///
    /// # Errors
    /// When one of them cannot be read, which after the verification cannot be.
    pub fn of_path(
        chain: &[CertificateDer<'_>],
        verified: &Verified,
    ) -> Result<Vec<Self>, RejectReason> {
        let (leaf, intermediates) = chain.split_first().ok_or(RejectReason::Malformed)?;
        let signers = verified.intermediates.iter();
        let signers = signers.filter_map(|place| intermediates.get(*place));
        std::iter::once(leaf)
            .chain(signers)
            .map(|der| svid_rules::parse(der).map(|parsed| Self::of(&parsed)))
            .collect()
    }

    fn of(certificate: &X509Certificate<'_>) -> Self {
        let mut extensions = certificate.extensions().iter();
        let issuer_key_id = extensions.find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(found) => {
                found.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        });
        Self {
            issuer: certificate.issuer().as_raw().to_vec(),
            issuer_key_id,
            serial: without_zeros(certificate.raw_serial()).to_vec(),
            not_after: clock::from_asn1(certificate.validity().not_after),
        }
    }

    /// Whether it has expired, after which nobody revokes it any more.
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.not_after < now
    }
}
