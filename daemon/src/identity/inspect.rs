//! Looks at any chain with the verifier's own rules, and names every one that is broken, where the
//! verifier stops at the first.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use serde::Serialize;

use super::{
    CertificateSummary, KeyKind, RejectReason, SpiffeId, TrustBundles, clock, svid_rules,
    verify_chain,
};

/// What a chain was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The ID that its first certificate holds, proven or not.
    pub id: Option<SpiffeId>,
    /// Its certificates in their order; those that cannot be read are left out.
    pub certificates: Vec<CertificateSummary>,
    /// The rules that are broken; each once for each certificate.
    pub broken: Vec<BrokenRule>,
}

/// A rule that a chain breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BrokenRule {
    /// Which rule.
    #[serde(serialize_with = "name")]
    pub rule: RejectReason,
    /// Which certificate breaks it, counted from 1; none where it is the chain as a whole.
    pub certificate: Option<usize>,
}

/// Judges a chain, the workload's certificate first, by the rules of the standard and by the policy
/// of the bundles, and where `check_trust` is set by whether it leads to one of them.
#[must_use]
pub fn inspect(
    chain: &[CertificateDer<'_>],
    bundles: &TrustBundles,
    check_trust: bool,
    now: SystemTime,
) -> Inspection {
    let policy = bundles.policy();
    let mut found = Inspection {
        id: None,
        certificates: Vec::new(),
        broken: Vec::new(),
    };
    for (der, position) in chain.iter().zip(1..) {
        match CertificateSummary::of(der) {
            Ok(summary) => found.certificates.push(summary),
            Err(rule) => found.breaks(rule, Some(position)),
        }
        let Ok(certificate) = svid_rules::parse(der) else {
            continue;
        };
        let validity = certificate.validity();
        if now < clock::from_asn1(validity.not_before) {
            found.breaks(RejectReason::NotYetValid, Some(position));
        } else if now > clock::from_asn1(validity.not_after) {
            found.breaks(RejectReason::Expired, Some(position));
        }
        if position == 1 {
            match svid_rules::leaf_id(&certificate) {
                Ok(id) => found.id = Some(id),
                Err(rule) => found.breaks(rule, Some(position)),
            }
            for result in [
                svid_rules::check_leaf(&certificate),
                policy.check_leaf(&certificate),
            ] {
                if let Err(rule) = result {
                    found.breaks(rule, Some(position));
                }
            }
        } else {
            for result in [
                svid_rules::check_signer(&certificate),
                policy.check_key(KeyKind::of(&certificate)),
            ] {
                if let Err(rule) = result {
                    found.breaks(rule, Some(position));
                }
            }
        }
    }
    match chain.split_first() {
        None => found.breaks(RejectReason::Malformed, None),
        Some((leaf, above)) if check_trust => {
            let verdict = verify_chain(bundles, leaf, above, clock::to_unix(now));
            if let Err(rule) = verdict
                && !found.broken.iter().any(|broken| broken.rule == rule)
            {
                found.breaks(rule, None);
            }
        }
        Some(_) => {}
    }
    found
}

// === impl Inspection ===

impl Inspection {
    /// Notes that the chain's ID is not the one that was expected. A second step, after the chain.
    pub fn expect(&mut self, expected: &SpiffeId) {
        if self.id.as_ref().is_some_and(|id| id != expected) {
            self.breaks(RejectReason::WrongIdentity, Some(1));
        }
    }

    fn breaks(&mut self, rule: RejectReason, certificate: Option<usize>) {
        self.broken.push(BrokenRule { rule, certificate });
    }
}

fn name<S: serde::Serializer>(rule: &RejectReason, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.as_str())
}
