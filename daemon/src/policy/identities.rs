//! Whom nobody declared: the selectors that match an authenticated identity alone.

use std::collections::HashMap;

use super::{
    compile::Selector,
    rule::FarEnd,
    selector::{AttributeSelector, IdentityPrefix, NamespaceSelector},
    sets::SelectorId,
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    workload::Namespaces,
};

/// Selectors by what an identity shows.
///
/// A client that is not declared has no labels that anybody vouches for, so no selector that asks
/// for labels matches it, not even for their absence. Namespace and service account are read from
/// an ID of the usual form, and believed only of the trust domain of the workload that is asked
/// for: another domain gives out names as it likes.
///
/// For rules that deny, the other way round: a selector of theirs matches unless what the ID shows
/// speaks against it.
#[derive(Clone, Debug, Default)]
pub(super) struct Identities {
    exact: HashMap<SpiffeId, Vec<SelectorId>>,
    prefixes: HashMap<String, Vec<SelectorId>>,
    /// By namespace and service account, none for any.
    names: HashMap<(Option<String>, Option<String>), Vec<SelectorId>>,
    /// By the labels of namespaces.
    by_labels: Vec<(SelectorId, AttributeSelector)>,
    /// Of rules that deny.
    possible: Vec<(SelectorId, AttributeSelector)>,
    namespaces: Namespaces,
}

// === impl Identities ===

impl Identities {
    pub(super) fn new(selectors: &[Selector], namespaces: &Namespaces) -> Self {
        let mut identities = Self {
            namespaces: namespaces.clone(),
            ..Self::default()
        };
        for (selector, id) in selectors.iter().zip(0..) {
            match &selector.far_end {
                FarEnd::Identity(identity) => {
                    let ids = identities.exact.entry(identity.clone());
                    ids.or_default().push(id);
                }
                FarEnd::IdentityPrefix(prefix) => {
                    let ids = identities.prefixes.entry(prefix.as_str().to_owned());
                    ids.or_default().push(id);
                }
                FarEnd::Attributes(attributes) if selector.possible => {
                    identities.possible.push((id, attributes.clone()));
                }
                FarEnd::Attributes(attributes) => identities.add(id, attributes),
                FarEnd::Anybody | FarEnd::Cidr { .. } | FarEnd::Both(..) => {}
            }
        }
        identities
    }

    pub(super) fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    fn add(&mut self, id: SelectorId, selector: &AttributeSelector) {
        if !selector.labels.is_empty() || selector.port.is_some() {
            return;
        }
        let namespace = match &selector.namespace {
            NamespaceSelector::Any => None,
            NamespaceSelector::Named(name) => Some(name.clone()),
            NamespaceSelector::Labels(_) => {
                self.by_labels.push((id, selector.clone()));
                return;
            }
        };
        let names = (namespace, selector.service_account.clone());
        self.names.entry(names).or_default().push(id);
    }

    /// The selectors that match `client`, for a workload of `domain`.
    pub(super) fn matching(&self, client: &SpiffeId, domain: &TrustDomain) -> Vec<SelectorId> {
        let mut matching: Vec<_> = self.exact.get(client).cloned().unwrap_or_default();
        if !self.prefixes.is_empty() {
            let prefixes = IdentityPrefix::all_of(client);
            let found = prefixes.filter_map(|prefix| self.prefixes.get(&prefix));
            matching.extend(found.flatten());
        }
        let names = client.service_account();
        if client.trust_domain() == domain {
            self.believed(names, &mut matching);
        }
        let could_be = |selector: &AttributeSelector| {
            names.is_none_or(|(namespace, account)| self.fits(selector, namespace, account))
        };
        let possible = self.possible.iter();
        matching.extend(possible.filter_map(|(id, selector)| could_be(selector).then_some(*id)));
        matching
    }

    fn believed(&self, client: Option<(&str, &str)>, matching: &mut Vec<SelectorId>) {
        let owned = |name: &str| Some(name.to_owned());
        let mut names = vec![(None, None)];
        if let Some((namespace, account)) = client {
            names.push((owned(namespace), None));
            names.push((None, owned(account)));
            names.push((owned(namespace), owned(account)));
            let by_labels = self.by_labels.iter();
            let fitting = by_labels.filter(|(_, s)| self.fits(s, namespace, account));
            matching.extend(fitting.map(|(id, _)| *id));
        }
        let found = names.iter().filter_map(|names| self.names.get(names));
        matching.extend(found.flatten());
    }

    fn fits(&self, selector: &AttributeSelector, namespace: &str, account: &str) -> bool {
        selector.namespace.matches(namespace, &self.namespaces) && selector.matches_account(account)
    }
}
