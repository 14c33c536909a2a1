//! What is in a CA folder, for `reeve ca show`.

use std::{path::Path, time::SystemTime};

use serde::Serialize;

use super::{
    CaError,
    authority::Authority,
    folder::{Contents, Folder},
    lists,
};
use crate::identity::{CertificateSummary, clock, describe::rfc3339, hex};

/// A CA folder.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaStatus {
    /// Whose CA it is; none where the folder cannot be used.
    pub trust_domain: Option<String>,
    /// Why a daemon would not use it.
    pub problem: Option<String>,
    /// The certificate that signs, with those above it but the root.
    pub signer: Vec<CertificateSummary>,
    /// The roots that are trusted, and what they are for.
    pub roots: Vec<RootStatus>,
    /// The revocation lists; with none, revocation is not checked.
    pub revocation_lists: Vec<RevocationListStatus>,
}

/// A root that is trusted.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RootStatus {
    /// What it is for.
    pub role: Role,
    /// The root.
    #[serde(flatten)]
    pub certificate: CertificateSummary,
}

/// What a trusted root is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// It signs now.
    Signs,
    /// It signs after the next `reeve ca rotate --switch`.
    Next,
    /// What it signed before is accepted.
    Trusted,
}

/// A revocation list.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RevocationListStatus {
    /// Distinguished name of whose certificates it is about.
    pub issuer: String,
    /// When it was signed.
    #[serde(serialize_with = "rfc3339")]
    pub this_update: SystemTime,
    /// When it ends: after that, what its issuer signed is refused.
    pub next_update: Option<String>,
    /// What is revoked.
    pub revoked: Vec<RevokedStatus>,
}

/// A revoked certificate.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RevokedStatus {
    /// Serial number, lower case hexadecimal.
    pub serial: String,
    /// Since when.
    #[serde(serialize_with = "rfc3339")]
    pub since: SystemTime,
}

/// Looks at a CA folder.
///
/// # Errors
/// When there is no CA in it, or what is there cannot be read.
pub fn show(path: &Path) -> Result<CaStatus, CaError> {
    let folder = Folder::open(path)?;
    let contents = folder.contents()?;
    let status = CaStatus {
        trust_domain: None,
        problem: None,
        signer: contents
            .signer
            .chain
            .iter()
            .filter_map(|der| summary(der))
            .collect(),
        roots: roots(&contents),
        revocation_lists: contents.lists.iter().filter_map(list).collect(),
    };
    Ok(match Authority::check(path, contents, None) {
        Ok(authority) => CaStatus {
            trust_domain: Some(authority.trust_domain.to_string()),
            ..status
        },
        Err(error) => CaStatus {
            problem: Some(error.to_string()),
            ..status
        },
    })
}

fn roots(contents: &Contents) -> Vec<RootStatus> {
    let next = contents.next.as_ref().and_then(|next| next.chain.first());
    let signs = match contents.is_intermediate {
        true => None,
        false => contents.signer.chain.first(),
    };
    let entry = |root| {
        let role = match Some(root) {
            root if root == signs => Role::Signs,
            root if root == next => Role::Next,
            _ => Role::Trusted,
        };
        let certificate = summary(root)?;
        Some(RootStatus { role, certificate })
    };
    contents.trusted.iter().filter_map(entry).collect()
}

/// What cannot be read is the reason why the folder cannot be used.
fn summary(der: &[u8]) -> Option<CertificateSummary> {
    CertificateSummary::of(der).ok()
}

fn list(der: &lists::Crl) -> Option<RevocationListStatus> {
    let list = lists::parse(der).ok()?;
    let revoked = list
        .iter_revoked_certificates()
        .map(|revoked| RevokedStatus {
            serial: hex(lists::without_zeros(revoked.raw_serial())),
            since: clock::from_asn1(revoked.revocation_date),
        });
    Some(RevocationListStatus {
        issuer: list.issuer().to_string(),
        this_update: clock::from_asn1(list.last_update()),
        next_update: list
            .next_update()
            .map(|time| humantime::format_rfc3339_seconds(clock::from_asn1(time)).to_string()),
        revoked: revoked.collect(),
    })
}
