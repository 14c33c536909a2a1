//! What identities trust besides what their sources bring.

use std::{collections::BTreeMap, sync::Arc};

use super::RevocationLists;
use crate::identity::{CryptoPolicy, TrustBundle, TrustBundles, TrustDomain};

/// What is trusted besides what sources bring.
#[derive(Debug)]
pub(super) struct Configured {
    pub(super) policy: Arc<CryptoPolicy>,
    /// From files that the configuration names.
    pub(super) files: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    /// From elsewhere, for other trust domains.
    pub(super) fetched: BTreeMap<TrustDomain, Arc<TrustBundle>>,
    pub(super) lists: RevocationLists,
}

// === impl Configured ===

impl Configured {
    pub(super) fn new(policy: Arc<CryptoPolicy>) -> Self {
        Self {
            policy,
            files: BTreeMap::new(),
            fetched: BTreeMap::new(),
            lists: RevocationLists::new(),
        }
    }

    /// What an identity trusts that has these bundles of its own. A file says more than what is
    /// fetched, and that more than a source; revocation lists come in addition.
    pub(super) fn bundles(&self, own: &[Arc<TrustBundle>]) -> TrustBundles {
        let mut bundles = TrustBundles::with_policy(self.policy.clone());
        bundles.extend(by_domain(own));
        for (domain, bundle) in self.fetched.iter().chain(&self.files) {
            bundles.insert(domain.clone(), bundle.clone());
        }
        for (domain, lists) in &self.lists {
            if let Some(bundle) = bundles.get_mut(domain) {
                *bundle = Arc::new(bundle.with_lists(lists));
            }
        }
        bundles
    }
}

pub(super) fn by_domain(
    bundles: &[Arc<TrustBundle>],
) -> impl Iterator<Item = (TrustDomain, Arc<TrustBundle>)> {
    bundles
        .iter()
        .map(|bundle| (bundle.trust_domain().clone(), bundle.clone()))
}
