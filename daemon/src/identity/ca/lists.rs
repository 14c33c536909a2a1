//! The CA's own revocation list, among those of others.

use std::{collections::BTreeSet, time::SystemTime};

use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, RevokedCertParams, SerialNumber,
};
use rustls_pki_types::CertificateRevocationListDer;
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use super::{CaError, authority::CaKey};
pub(super) use crate::identity::revocation::without_zeros;

pub(super) type Crl = CertificateRevocationListDer<'static>;

/// One serial number that is revoked, and since when.
pub(super) type Entry = (Vec<u8>, SystemTime);

/// What the list of one issuer says, and the lists of all others.
pub(super) struct Split {
    pub(super) own: Option<Vec<Entry>>,
    pub(super) others: Vec<Crl>,
}

/// Parses one list, with nothing behind it.
pub(super) fn parse(list: &[u8]) -> Result<CertificateRevocationList<'_>, String> {
    match CertificateRevocationList::from_der(list) {
        Ok(([], list)) => Ok(list),
        Ok(_) => Err("there is something behind a list".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Takes out the list of the issuer whose distinguished name, as DER, this is.
pub(super) fn split(lists: Vec<Crl>, issuer: &[u8]) -> Result<Split, String> {
    let mut split = Split {
        own: None,
        others: Vec::new(),
    };
    for der in lists {
        let list = parse(&der)?;
        if list.issuer().as_raw() != issuer {
            split.others.push(der);
            continue;
        }
        let entries = list.iter_revoked_certificates().map(|revoked| {
            let since = crate::identity::clock::from_asn1(revoked.revocation_date);
            (without_zeros(revoked.raw_serial()).to_vec(), since)
        });
        split.own.get_or_insert_default().extend(entries);
    }
    Ok(split)
}

/// Whether a list of the same issuer among `lists` revokes all that this one does.
pub(super) fn contain(lists: &[Crl], list: &Crl) -> Result<bool, String> {
    let revoked = |list: &CertificateRevocationList<'_>| -> BTreeSet<Vec<u8>> {
        let revoked = list.iter_revoked_certificates();
        revoked
            .map(|it| without_zeros(it.raw_serial()).to_vec())
            .collect()
    };
    let list = parse(list)?;
    for other in lists {
        let other = parse(other)?;
        if other.issuer().as_raw() == list.issuer().as_raw()
            && revoked(&other).is_superset(&revoked(&list))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Signs a list that counts until `next_update`.
pub(super) fn sign(
    issuer: &Issuer<'_, CaKey>,
    entries: &[Entry],
    next_update: SystemTime,
) -> Result<Crl, CaError> {
    let now = SystemTime::now();
    // Only has to grow from one list to the next.
    let number = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        });
    let list = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: next_update.into(),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: entries
            .iter()
            .map(|(serial, since)| RevokedCertParams {
                serial_number: SerialNumber::from_slice(serial),
                revocation_time: (*since).into(),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(list.signed_by(issuer)?.into())
}
