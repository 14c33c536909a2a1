//! What the X.509-SVID standard asks of a certificate by itself, and webpki does not look at.

use rustls_pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, KeyUsage},
    prelude::FromDer,
};

use super::{RejectReason, SpiffeId, SpiffeIdError, TrustDomain};

/// Tag of a URI among a certificate's alternative names (RFC 5280, section 4.2.1.6).
const URI_TAG: u32 = 6;

/// Parses one certificate, with nothing behind it.
pub(super) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, RejectReason> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(RejectReason::Malformed),
    }
}

/// The SPIFFE ID of a workload's certificate: its only URI.
pub(super) fn leaf_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, RejectReason> {
    SpiffeId::parse(only_uri(certificate)?).map_err(|error| match error {
        SpiffeIdError::NoPath => RejectReason::IdWithoutPath,
        _ => RejectReason::InvalidId,
    })
}

/// The certificate's only URI.
pub(super) fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, RejectReason> {
    match uris(certificate)?.as_slice() {
        [] => Err(RejectReason::NoUri),
        [uri] => Ok(uri),
        _ => Err(RejectReason::SeveralUris),
    }
}

/// Rules for a workload's certificate. BasicConstraints may be missing, as Vault and step-ca leave
/// them out: cA is then false (RFC 5280, section 4.2.1.9).
pub(super) fn check_leaf(certificate: &X509Certificate<'_>) -> Result<(), RejectReason> {
    let constraints = certificate.basic_constraints();
    let constraints = constraints.map_err(|_| RejectReason::Malformed)?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(RejectReason::LeafIsCa);
    }
    let usage = key_usage(certificate)?.ok_or(RejectReason::LeafKeyUsage)?;
    if !usage.digital_signature() {
        return Err(RejectReason::LeafKeyUsage);
    }
    if usage.key_cert_sign() || usage.crl_sign() {
        return Err(RejectReason::LeafMaySign);
    }
    Ok(())
}

/// Rules for a certificate that signs others, trust anchors among them.
pub(super) fn check_signer(certificate: &X509Certificate<'_>) -> Result<(), RejectReason> {
    let constraints = certificate.basic_constraints();
    let constraints = constraints.map_err(|_| RejectReason::Malformed)?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(RejectReason::SignerNotCa);
    }
    if !key_usage(certificate)?.is_some_and(KeyUsage::key_cert_sign) {
        return Err(RejectReason::SignerKeyUsage);
    }
    // A signing certificate need not be an SVID, and may stand in another trust domain than what
    // it signs; where it does have an ID, it is a trust domain's (X509-SVID, section 3.2).
    for uri in uris(certificate)? {
        if let Some(rest) = uri.strip_prefix("spiffe://") {
            TrustDomain::parse(rest).map_err(|_| RejectReason::SignerIdHasPath)?;
        }
    }
    Ok(())
}

/// Whether a chain that begins with `first` has its certificates in the wrong order: the workload's
/// comes first, then those above it.
pub(super) fn is_reversed(first: &X509Certificate<'_>, others: &[CertificateDer<'_>]) -> bool {
    let is_workloads = |der| parse(der).is_ok_and(|other| !other.is_ca());
    first.is_ca() && others.iter().any(|der| is_workloads(der))
}

/// How many CAs a CA's certificate allows below itself; none where it sets no bound.
pub(super) fn path_length(certificate: &X509Certificate<'_>) -> Result<Option<u32>, RejectReason> {
    let constraints = certificate.basic_constraints();
    let constraints = constraints.map_err(|_| RejectReason::Malformed)?;
    Ok(constraints.and_then(|constraints| constraints.value.path_len_constraint))
}

/// Whether a CA's certificate may sign revocation lists.
pub(super) fn may_sign_lists(certificate: &X509Certificate<'_>) -> Result<bool, RejectReason> {
    Ok(key_usage(certificate)?.is_some_and(KeyUsage::crl_sign))
}

fn key_usage<'a>(
    certificate: &'a X509Certificate<'_>,
) -> Result<Option<&'a KeyUsage>, RejectReason> {
    let usage = certificate.key_usage();
    Ok(usage
        .map_err(|_| RejectReason::Malformed)?
        .map(|usage| usage.value))
}

/// Every URI among the alternative names; an unreadable one is an error, so that it cannot hide.
fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, RejectReason> {
    let names = certificate.subject_alternative_name();
    let Some(names) = names.map_err(|_| RejectReason::Malformed)? else {
        return Ok(Vec::new());
    };
    let uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(Ok(*uri)),
            GeneralName::Invalid(tag, _) if tag.0 == URI_TAG => Some(Err(RejectReason::InvalidId)),
            _ => None,
        });
    uris.collect()
}
