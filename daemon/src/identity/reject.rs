//! Why a certificate is refused: one closed set for logs, status and metrics.

use std::io;

use reeve_common::Reason;
use rustls::{AlertDescription, CertificateError, Error, OtherError};

use super::clocks::refusal_in;
use crate::telemetry::HandshakeReason;

macro_rules! reject_reasons {
    ($($variant:ident = $name:literal, $handshake:ident, $message:literal;)+) => {
        /// Why a peer's certificate, or one of our own, is refused. The names are fields of logs
        /// and of `reeve status`: never renamed, only added to.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum RejectReason { $(#[doc = $message] #[error($message)] $variant,)+ }

        impl RejectReason {
            /// Every reason.
            pub const ALL: &'static [RejectReason] = &[$(RejectReason::$variant,)+];

            /// Name in logs and output.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(RejectReason::$variant => $name,)+ }
            }

            /// The metric's reason that it is counted under.
            #[must_use]
            pub const fn handshake_reason(self) -> HandshakeReason {
                match self { $(RejectReason::$variant => HandshakeReason::$handshake,)+ }
            }
        }
    };
}

reject_reasons! {
    Malformed = "malformed", InvalidSvid,
        "the certificate, or one that signed it, cannot be parsed";
    NoUri = "no_uri_san", InvalidSvid,
        "the certificate has no URI subject alternative name";
    SeveralUris = "several_uri_sans", InvalidSvid,
        "the certificate has more than one URI subject alternative name";
    InvalidId = "invalid_spiffe_id", InvalidSvid,
        "the certificate's URI is not a SPIFFE ID";
    IdWithoutPath = "id_without_path", InvalidSvid,
        "the certificate's SPIFFE ID names a trust domain, not a workload: it has no path";
    ChainReversed = "chain_reversed", InvalidSvid,
        "the chain begins with a CA's certificate, and the workload's comes later: put it first";
    LeafIsCa = "leaf_is_ca", InvalidSvid,
        "the certificate is a CA's";
    LeafKeyUsage = "leaf_key_usage", InvalidSvid,
        "the certificate has no KeyUsage, or one without digitalSignature";
    LeafMaySign = "leaf_may_sign", InvalidSvid,
        "the certificate's KeyUsage has keyCertSign or cRLSign";
    ExtendedKeyUsage = "extended_key_usage", InvalidSvid,
        "an ExtendedKeyUsage in the chain lacks clientAuth or serverAuth";
    KeyNotHeld = "key_not_held", InvalidSvid,
        "the peer did not prove that it holds the certificate's key";
    UnknownTrustDomain = "unknown_trust_domain", UnknownTrustDomain,
        "the SPIFFE ID's trust domain has no bundle here";
    TrustDomainRevoked = "trust_domain_revoked", Revoked,
        "the bundle of the SPIFFE ID's trust domain is empty";
    UntrustedChain = "untrusted_chain", UntrustedChain,
        "the chain does not lead to the bundle of the SPIFFE ID's trust domain";
    BadSignature = "bad_signature", UntrustedChain,
        "a signature in the chain is wrong";
    Algorithm = "algorithm", UntrustedChain,
        "a key or signature algorithm in the chain is not supported";
    PathLength = "path_length", UntrustedChain,
        "the chain is longer than a certificate in it allows";
    NameConstraint = "name_constraint", UntrustedChain,
        "a name constraint in the chain forbids the name";
    SignerNotCa = "signer_not_ca", UntrustedChain,
        "a certificate that signed is not a CA's";
    SignerKeyUsage = "signer_key_usage", UntrustedChain,
        "a certificate that signed has no KeyUsage, or one without keyCertSign";
    SignerIdHasPath = "signer_id_has_path", UntrustedChain,
        "a certificate that signed has a SPIFFE ID with a path";
    TooComplex = "too_complex", UntrustedChain,
        "the chain takes too much work to check";
    AnchorValidity = "anchor_validity", Validity,
        "the trust bundle's certificate has expired or is not yet valid";
    Expired = "expired", Validity,
        "a certificate in the chain has expired";
    NotYetValid = "not_yet_valid", Validity,
        "a certificate in the chain is not yet valid";
    Revoked = "revoked", Revoked,
        "a certificate in the chain is revoked";
    RevocationUnknown = "revocation_unknown", Revoked,
        "no revocation list speaks of a certificate in the chain";
    RevocationListExpired = "revocation_list_expired", Revoked,
        "the revocation list has expired";
    RevocationListInvalid = "revocation_list_invalid", Revoked,
        "the revocation list is not signed by the certificate's issuer, or cannot be used";
    KeyType = "key_type", InvalidSvid,
        "a key in the chain is of a kind that `tls.keyTypes` does not permit";
    KeySize = "key_size", InvalidSvid,
        "an RSA key in the chain is smaller than `tls.minRsaBits`";
    Lifetime = "lifetime", InvalidSvid,
        "the certificate's lifetime is longer than `tls.maxLifetime`";
    WrongIdentity = "wrong_identity", WrongIdentity,
        "the certificate is valid and holds another SPIFFE ID than the one expected";
}

impl RejectReason {
    /// The reason inside the error of a failed handshake, if the certificate was why it failed.
    #[must_use]
    pub fn of(error: &Error) -> Option<Self> {
        refusal_in(error).map(|refusal| refusal.reason)
    }

    /// Why a tunnel is closed whose peer's certificate would be refused for this reason now.
    #[must_use]
    pub fn closing_reason(self) -> Reason {
        match self.handshake_reason() {
            HandshakeReason::Revoked => Reason::PeerRevoked,
            HandshakeReason::Validity => Reason::CertificateExpired,
            _ => Reason::PeerUntrusted,
        }
    }

    /// What to tell an operator of a failed handshake: where the certificate was why, the rule
    /// that it breaks, by its name too, and what its dates tell of the clocks.
    #[must_use]
    pub fn explain(error: &io::Error) -> String {
        match tls_error(error).and_then(refusal_in) {
            Some(refusal) => refusal.to_string(),
            None if tls_error(error).is_some_and(says_no_certificate) => {
                "the peer has no valid certificate of the workload that was called (unrecognized_name)"
                    .to_owned()
            }
            None => error.to_string(),
        }
    }

    /// The same for the error that tokio-rustls gives.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Option<Self> {
        tls_error(error).and_then(Self::of)
    }
}

impl From<RejectReason> for Error {
    fn from(reason: RejectReason) -> Self {
        CertificateError::Other(OtherError(std::sync::Arc::new(reason))).into()
    }
}

impl From<webpki::Error> for RejectReason {
    fn from(error: webpki::Error) -> Self {
        use webpki::Error as E;
        match error {
            E::CertExpired { .. } | E::InvalidCertValidity => Self::Expired,
            E::CertNotValidYet { .. } => Self::NotYetValid,
            E::CertRevoked => Self::Revoked,
            E::UnknownRevocationStatus => Self::RevocationUnknown,
            E::CrlExpired { .. } => Self::RevocationListExpired,
            E::InvalidCrlSignatureForPublicKey
            | E::IssuerNotCrlSigner
            | E::UnsupportedCrlSignatureAlgorithmContext(_)
            | E::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => {
                Self::RevocationListInvalid
            }
            E::UnknownIssuer | E::CertDistrusted => Self::UntrustedChain,
            E::InvalidSignatureForPublicKey | E::SignatureAlgorithmMismatch => Self::BadSignature,
            E::UnsupportedSignatureAlgorithmContext(_)
            | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => Self::Algorithm,
            E::CaUsedAsEndEntity => Self::LeafIsCa,
            E::EndEntityUsedAsCa => Self::SignerNotCa,
            E::EmptyEkuExtension | E::RequiredEkuNotFoundContext(_) => Self::ExtendedKeyUsage,
            E::PathLenConstraintViolated => Self::PathLength,
            E::NameConstraintViolation => Self::NameConstraint,
            E::MaximumPathDepthExceeded
            | E::MaximumPathBuildCallsExceeded
            | E::MaximumSignatureChecksExceeded
            | E::MaximumNameConstraintComparisonsExceeded => Self::TooComplex,
            _ => Self::Malformed,
        }
    }
}

// === impl HandshakeReason ===

impl From<&Error> for HandshakeReason {
    fn from(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(_) => {
                RejectReason::of(error).map_or(Self::InvalidSvid, RejectReason::handshake_reason)
            }
            Error::AlertReceived(AlertDescription::UnrecognisedName) => Self::PeerNoCertificate,
            Error::AlertReceived(alert) if is_about_certificate(*alert) => Self::PeerAlert,
            _ => Self::Protocol,
        }
    }
}

/// What tokio-rustls gives for a failed handshake.
impl From<&io::Error> for HandshakeReason {
    fn from(error: &io::Error) -> Self {
        match tls_error(error) {
            Some(error) => error.into(),
            None if error.kind() == io::ErrorKind::TimedOut => Self::Timeout,
            None => Self::Transport,
        }
    }
}

fn says_no_certificate(error: &Error) -> bool {
    matches!(
        error,
        Error::AlertReceived(AlertDescription::UnrecognisedName)
    )
}

fn tls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

fn is_about_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
    )
}
