//! What the certificates of this CA look like.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, SanType, SerialNumber,
};

use super::CaError;
use crate::identity::{SpiffeId, TrustDomain, hex};

/// How far another node's clock may be behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// Of random in a serial number; RFC 5280 allows 20, CAs are asked for at least 8.
const SERIAL_BYTES: usize = 16;

/// A root.
pub(super) fn root(
    trust_domain: &TrustDomain,
    lifetime: Duration,
) -> Result<CertificateParams, CaError> {
    let constraints = BasicConstraints::Unconstrained;
    authority(
        trust_domain,
        "root",
        constraints,
        SystemTime::now() + lifetime,
    )
}

/// An intermediate that signs workloads' certificates and no further intermediate. It has no name
/// constraints: of a URI they could only tell the host, and webpki refuses every URI below one.
pub(super) fn intermediate(
    trust_domain: &TrustDomain,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let constraints = BasicConstraints::Constrained(0);
    let mut params = authority(trust_domain, "intermediate", constraints, not_after)?;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// A workload's certificate.
pub(super) fn leaf(
    id: &SpiffeId,
    lifetime: Duration,
    latest: SystemTime,
) -> Result<CertificateParams, CaError> {
    let now = SystemTime::now();
    // The subject stays empty, which makes the alternative name critical: it is the only name.
    let mut leaf = params(id.as_str(), DistinguishedName::new())?;
    // A lifetime of seconds, as tests have, is not to be over before it begins.
    leaf.not_before = (now - CLOCK_SKEW.min(lifetime)).into();
    leaf.not_after = (now + lifetime).min(latest).into();
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    leaf.use_authority_key_identifier_extension = true;
    Ok(leaf)
}

fn authority(
    trust_domain: &TrustDomain,
    kind: &str,
    constraints: BasicConstraints,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "reeve");
    // Tells one from another: for people, and for revocation lists, which name their issuer.
    let distinct = hex(&random::<4>()?);
    name.push(DnType::CommonName, format!("reeve {kind} {distinct}"));
    let mut params = params(&format!("spiffe://{trust_domain}"), name)?;
    params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
    params.not_after = not_after.into();
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// What every certificate has: one URI, and a random serial number.
fn params(uri: &str, name: DistinguishedName) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&random::<SERIAL_BYTES>()?));
    params.distinguished_name = name;
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    Ok(params)
}

fn random<const N: usize>() -> Result<[u8; N], CaError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| CaError::Random)?;
    Ok(bytes)
}
