//! Looks at any chain with the verifier's own rules, and names every one that is broken, where the
//! verifier stops at the first.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use serde::Serialize;
use x509_parser::certificate::X509Certificate;

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
    /// Positions of certificates, counted from 1, that are presented and not needed: nobody judges them.
    pub unused: Vec<usize>,
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
/// of the bundles, and where `check_trust` is set by whether it leads to one of them. As a peer does,
/// it looks at the certificates along the path only, and not at others that are presented.
#[must_use]
pub fn inspect(
    chain: &[CertificateDer<'_>],
    bundles: &TrustBundles,
    check_trust: bool,
    now: SystemTime,
) -> Inspection {
    let mut found = Inspection {
        id: None,
        certificates: Vec::new(),
        unused: Vec::new(),
        broken: Vec::new(),
    };
    let mut parsed = Vec::new();
    for (der, position) in chain.iter().zip(1..) {
        match CertificateSummary::of(der) {
            Ok(summary) => found.certificates.push(summary),
            Err(rule) => found.breaks(rule, Some(position)),
        }
        parsed.push(svid_rules::parse(der).ok());
    }
    let Some((leaf, above)) = chain.split_first() else {
        found.breaks(RejectReason::Malformed, None);
        return found;
    };
    let first = parsed.first().and_then(Option::as_ref);
    if first.is_some_and(|first| svid_rules::is_reversed(first, above)) {
        found.breaks(RejectReason::ChainReversed, None);
        return found;
    }
    let verdict = check_trust.then(|| verify_chain(bundles, leaf, above, now));
    let path = match &verdict {
        Some(Ok(verified)) => on_path(&verified.intermediates),
        _ => linked(&parsed),
    };
    for (certificate, position) in parsed.iter().zip(1..) {
        match certificate {
            Some(certificate) if path.contains(&position) => {
                found.judge(certificate, position, bundles, now);
            }
            Some(_) => found.unused.push(position),
            None => {}
        }
    }
    match verdict {
        // What is presented besides harms nothing.
        Some(Ok(_)) => found.broken.clear(),
        Some(Err(rule)) if !found.broken.iter().any(|broken| broken.rule == rule) => {
            found.breaks(rule, None);
        }
        _ => {}
    }
    found
}

/// Positions, counted from 1, of the workload's certificate and of these above it.
fn on_path(intermediates: &[usize]) -> Vec<usize> {
    let above = intermediates.iter().map(|index| index + 2);
    std::iter::once(1).chain(above).collect()
}

/// Positions, counted from 1, of the certificates that the first one leads to by the names of issuers.
fn linked(parsed: &[Option<X509Certificate<'_>>]) -> Vec<usize> {
    let mut found = vec![1];
    let mut next = 0;
    while let Some(position) = found.get(next).copied() {
        next += 1;
        let Some(Some(certificate)) = parsed.get(position - 1) else {
            continue;
        };
        let issuer = certificate.issuer().as_raw();
        for (other, position) in parsed.iter().zip(1..) {
            let signs = other
                .as_ref()
                .is_some_and(|it| it.subject().as_raw() == issuer);
            if signs && !found.contains(&position) {
                found.push(position);
            }
        }
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

    fn judge(
        &mut self,
        certificate: &X509Certificate<'_>,
        position: usize,
        bundles: &TrustBundles,
        now: SystemTime,
    ) {
        let policy = bundles.policy();
        let validity = certificate.validity();
        if now < clock::from_asn1(validity.not_before) {
            self.breaks(RejectReason::NotYetValid, Some(position));
        } else if now > clock::from_asn1(validity.not_after) {
            self.breaks(RejectReason::Expired, Some(position));
        }
        let results = if position == 1 {
            match svid_rules::leaf_id(certificate) {
                Ok(id) => self.id = Some(id),
                Err(rule) => self.breaks(rule, Some(position)),
            }
            [
                svid_rules::check_leaf(certificate),
                policy.check_leaf(certificate),
            ]
        } else {
            [
                svid_rules::check_signer(certificate),
                policy.check_key(KeyKind::of(certificate)),
            ]
        };
        for rule in results.into_iter().filter_map(Result::err) {
            self.breaks(rule, Some(position));
        }
    }

    fn breaks(&mut self, rule: RejectReason, certificate: Option<usize>) {
        self.broken.push(BrokenRule { rule, certificate });
    }
}

fn name<S: serde::Serializer>(rule: &RejectReason, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.as_str())
}
