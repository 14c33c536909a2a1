//! What a certificate says, for people and programs that look at it. Nothing is judged here.

use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Serialize, Serializer};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

use super::{KeyKind, RejectReason, clock, hex, svid_rules};

/// What a certificate says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateSummary {
    /// Serial number, lower case hexadecimal.
    pub serial: String,
    /// Distinguished name; empty where its only name is an alternative one.
    pub subject: String,
    /// Distinguished name of whoever signed it.
    pub issuer: String,
    /// Alternative names that are URIs: of an X.509-SVID, its SPIFFE ID.
    pub uris: Vec<String>,
    /// Start of validity.
    #[serde(serialize_with = "rfc3339")]
    pub not_before: SystemTime,
    /// End of validity.
    #[serde(serialize_with = "rfc3339")]
    pub not_after: SystemTime,
    /// Whether it may sign certificates.
    pub ca: bool,
    /// Its key.
    #[serde(serialize_with = "text")]
    pub key: KeyKind,
    /// SHA-256 of it, lower case hexadecimal.
    pub sha256: String,
}

impl CertificateSummary {
    /// Reads a certificate.
    ///
    /// # Errors
    /// [`RejectReason::Malformed`] when it is none.
    pub fn of(der: &[u8]) -> Result<Self, RejectReason> {
        let certificate = svid_rules::parse(der)?;
        Ok(Self {
            serial: hex(certificate.raw_serial()),
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            uris: uris(&certificate),
            not_before: clock::from_asn1(certificate.validity().not_before),
            not_after: clock::from_asn1(certificate.validity().not_after),
            ca: certificate.is_ca(),
            key: KeyKind::of(&certificate),
            sha256: hex(digest(&SHA256, der).as_ref()),
        })
    }
}

fn uris(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let names = names.value.general_names.iter();
    names
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        })
        .collect()
}

pub(super) fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

fn text<S: Serializer>(value: &KeyKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
