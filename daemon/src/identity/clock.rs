//! The notions of time that certificates and libraries bring along, as [`SystemTime`].

use std::time::{Duration, SystemTime};

use rustls_pki_types::UnixTime;
use x509_parser::time::ASN1Time;

/// Seconds are the certificate's grain. What lies before 1970 is given as 1970.
pub(super) fn from_asn1(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Cuts off what is less than a second, so that a time which is over can seem not to be: for webpki
/// only. What lies before 1970 is given as 1970: a clock that is so wrong makes every check fail.
pub(super) fn to_unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        time.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO),
    )
}
