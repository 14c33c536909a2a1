//! Whom nobody declared: the selectors that match an authenticated identity alone.

use std::collections::HashMap;

use super::{rule::FarEnd, sets::SelectorId};
use crate::identity::{SpiffeId, TrustDomain};

/// Selectors by what an identity shows.
///
/// A client that is not declared has no labels that anybody vouches for, so no selector that asks
/// for labels matches it, not even for their absence. Namespace and service account are read from
/// an ID of the usual form, and believed only of the trust domain of the workload that is asked
/// for: another domain gives out names as it likes.
#[derive(Clone, Debug, Default)]
pub(super) struct Identities {
    exact: HashMap<SpiffeId, SelectorId>,
    prefixes: HashMap<String, SelectorId>,
    /// By namespace and service account, none for any.
    names: HashMap<(Option<String>, Option<String>), SelectorId>,
}

// === impl Identities ===

impl Identities {
    pub(super) fn new(selectors: &[FarEnd]) -> Self {
        let mut identities = Self::default();
        for (selector, id) in selectors.iter().zip(0..) {
            match selector {
                FarEnd::Identity(identity) => {
                    identities.exact.insert(identity.clone(), id);
                }
                FarEnd::IdentityPrefix(prefix) => {
                    identities.prefixes.insert(prefix.as_str().to_owned(), id);
                }
                FarEnd::Attributes(selector) if selector.labels.is_empty() => {
                    let names = (selector.namespace.clone(), selector.service_account.clone());
                    identities.names.insert(names, id);
                }
                FarEnd::Attributes(_) | FarEnd::Anybody | FarEnd::Cidr { .. } => {}
            }
        }
        identities
    }

    /// The selectors that match `client`, for a workload of `domain`.
    pub(super) fn matching(&self, client: &SpiffeId, domain: &TrustDomain) -> Vec<SelectorId> {
        let mut matching: Vec<_> = self.exact.get(client).copied().into_iter().collect();
        if !self.prefixes.is_empty() {
            let text = client.as_str();
            let slashes = text.match_indices('/').map(|(place, _)| place);
            let prefixes = slashes.filter_map(|place| text.get(..=place));
            matching.extend(prefixes.filter_map(|prefix| self.prefixes.get(prefix)));
        }
        if client.trust_domain() == domain && !self.names.is_empty() {
            let owned = |name: &str| Some(name.to_owned());
            let mut names = vec![(None, None)];
            if let Some((namespace, account)) = client.service_account() {
                names.push((owned(namespace), None));
                names.push((None, owned(account)));
                names.push((owned(namespace), owned(account)));
            }
            matching.extend(names.iter().filter_map(|names| self.names.get(names)));
        }
        matching
    }
}
