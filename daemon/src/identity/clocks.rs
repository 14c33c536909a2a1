//! What a failed handshake tells of clocks that differ: from the dates of the certificate that was
//! refused, ours or the peer's.

use std::{error::Error as StdError, fmt, io, time::Duration, time::SystemTime};

use rustls::{AlertDescription, Error};
use rustls_pki_types::CertificateDer;

use super::{CertificateSummary, RejectReason, Svid, TrustBundles, verify_chain};

/// A peer's chain that was refused, with what its dates tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: RejectReason,
    dates: Option<Dates>,
}

/// A certificate whose dates do not fit the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dates {
    /// The start of one that is not yet valid, the end of one that has expired.
    turn: SystemTime,
    now: SystemTime,
    /// The chain would be right at its start: it is no stranger's invention.
    vouched: bool,
}

// === impl Refusal ===

impl Refusal {
    /// A chain that the bundles refuse now.
    pub(super) fn of(
        reason: RejectReason,
        bundles: &TrustBundles,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Self {
        let now = SystemTime::now();
        let dates = || {
            let chain = std::iter::once(leaf).chain(intermediates);
            let known = chain.filter_map(|der| CertificateSummary::of(der).ok());
            match reason {
                RejectReason::NotYetValid => {
                    let turn = known.map(|it| it.not_before).max()?;
                    let then = verify_chain(bundles, leaf, intermediates, turn);
                    Some((turn, turn > now, then.is_ok()))
                }
                RejectReason::Expired => {
                    let turn = known.map(|it| it.not_after).min()?;
                    Some((turn, turn < now, false))
                }
                _ => None,
            }
        };
        let dates = dates().filter(|(_, fits, _)| *fits);
        Self {
            reason,
            dates: dates.map(|(turn, _, vouched)| Dates { turn, now, vouched }),
        }
    }
}

impl From<RejectReason> for Refusal {
    fn from(reason: RejectReason) -> Self {
        Self {
            reason,
            dates: None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, self.reason.as_str())?;
        let Some(Dates { turn, now, .. }) = self.dates else {
            return Ok(());
        };
        let gap = apart(turn, now);
        let turn = humantime::format_rfc3339_seconds(turn);
        if self.reason == RejectReason::NotYetValid {
            write!(
                f,
                ": it begins at {turn}, {gap} from now by this node's clock, which is at least that slow \
                 or its issuer's that fast"
            )
        } else {
            write!(
                f,
                ": it ended at {turn}, {gap} ago by this node's clock: the peer has not renewed it, or \
                 this clock is at least that fast"
            )
        }
    }
}

impl StdError for Refusal {}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        rustls::CertificateError::Other(rustls::OtherError(std::sync::Arc::new(refusal))).into()
    }
}

/// By how much the clocks of both ends differ at least, where a failed handshake proves that they do:
/// a certificate that a trusted authority has signed, and that begins in the future.
#[must_use]
pub fn least_skew(error: &io::Error) -> Option<Duration> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    let refusal = refusal_in(error)?;
    let dates = refusal.dates.filter(|dates| dates.vouched)?;
    dates.turn.duration_since(dates.now).ok()
}

/// The refusal that an error holds.
pub(super) fn refusal_in(error: &Error) -> Option<Refusal> {
    let Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(inner))) =
        error
    else {
        return None;
    };
    let reason = || inner.downcast_ref::<RejectReason>().copied();
    inner
        .downcast_ref()
        .copied()
        .or_else(|| reason().map(Refusal::from))
}

/// By how much the peer's clock differs from ours at least, where the peer says that our certificate
/// is out of date and it is not: with words for the log.
#[must_use]
pub fn skew_by_alert(error: &Error, own: &Svid, now: SystemTime) -> Option<(Duration, String)> {
    if !matches!(
        error,
        Error::AlertReceived(AlertDescription::CertificateExpired)
    ) {
        return None;
    }
    let since = now.duration_since(own.not_before).ok()?;
    let left = own.not_after.duration_since(now).ok()?;
    let least = since.min(left);
    let said = format!(
        "the peer says that our certificate is out of date; by this node's clock it is valid from {} to \
         {}: the clocks differ by at least {}, or an authority that the peer trusts has expired",
        humantime::format_rfc3339_seconds(own.not_before),
        humantime::format_rfc3339_seconds(own.not_after),
        humantime::format_duration(Duration::from_secs(least.as_secs())),
    );
    Some((least, said))
}

fn apart(one: SystemTime, other: SystemTime) -> humantime::FormattedDuration {
    let apart = one
        .duration_since(other)
        .or_else(|_| other.duration_since(one));
    let seconds = apart.unwrap_or_default().as_secs();
    humantime::format_duration(Duration::from_secs(seconds))
}
