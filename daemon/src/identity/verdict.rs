//! A handshake in which our verifier refuses the peer's certificate: the peer is told why by the TLS
//! alert that says it best, and our own side keeps the exact reason.
//!
//! The TLS library chooses the alert by the error that a verifier gives, and none of its errors has
//! both the right alert and room for a reason of ours.

use std::{cell::Cell, future::Future, io};

use rustls::{CertificateError, Error};

use super::{RejectReason, clocks::Refusal};

tokio::task_local! {
    /// What the verifier has found in the handshake that this task is at.
    static FOUND: Cell<Option<Refusal>>;
}

/// Shakes hands. Where our verifier refuses the peer, the error holds the [`RejectReason`].
///
/// # Errors
/// Those of the handshake.
pub async fn judged<T>(handshake: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let handshake = async {
        let result = handshake.await;
        let found = FOUND.with(Cell::take);
        result.map_err(|error| match found {
            Some(refusal) => io::Error::new(error.kind(), Error::from(refusal)),
            None => error,
        })
    };
    FOUND.scope(Cell::new(None), handshake).await
}

/// The error for a verifier to give. Outside of [`judged`] it holds the reason itself, and the peer is
/// told `certificate_unknown`.
pub(super) fn refusal(why: impl Into<Refusal>) -> Error {
    let why = why.into();
    match FOUND.try_with(|found| found.set(Some(why))) {
        Ok(()) => Error::InvalidCertificate(alert(why.reason)),
        Err(_) => why.into(),
    }
}

/// The library's error whose alert says it best (RFC 8446, section 6.2).
fn alert(reason: RejectReason) -> CertificateError {
    use RejectReason as R;
    match reason {
        // certificate_expired
        R::Expired | R::NotYetValid | R::AnchorValidity => CertificateError::Expired,
        // certificate_revoked
        R::Revoked => CertificateError::Revoked,
        // unknown_ca
        R::UnknownTrustDomain
        | R::TrustDomainRevoked
        | R::UntrustedChain
        | R::RevocationUnknown
        | R::RevocationListExpired
        | R::RevocationListInvalid => CertificateError::UnknownIssuer,
        // decrypt_error, for the handshake's own signature (section 4.4.3)
        R::KeyNotHeld => CertificateError::BadSignature,
        // access_denied
        R::WrongIdentity => CertificateError::ApplicationVerificationFailure,
        // unsupported_certificate
        R::LeafIsCa
        | R::LeafKeyUsage
        | R::LeafMaySign
        | R::ExtendedKeyUsage
        | R::Algorithm
        | R::KeyType
        | R::KeySize => CertificateError::InvalidPurpose,
        // certificate_unknown
        R::Lifetime | R::TooComplex => reason_itself(reason),
        // bad_certificate
        R::Malformed
        | R::NoUri
        | R::SeveralUris
        | R::InvalidId
        | R::IdWithoutPath
        | R::ChainReversed
        | R::BadSignature
        | R::PathLength
        | R::NameConstraint
        | R::SignerNotCa
        | R::SignerKeyUsage
        | R::SignerIdHasPath => CertificateError::BadEncoding,
    }
}

fn reason_itself(reason: RejectReason) -> CertificateError {
    CertificateError::Other(rustls::OtherError(std::sync::Arc::new(reason)))
}
