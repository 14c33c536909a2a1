//! Everybody known, indexed by what selectors ask for, so that a selector looks at few of them.

use std::collections::{BTreeMap, HashMap};

use super::{
    named_ports,
    rule::{FarEnd, PortMatch, Subjects},
    selector::{AttributeSelector, NamespaceSelector, Operator},
};
use crate::{
    identity::SpiffeId,
    workload::{Attributes, NamedPorts, Namespaces},
};

/// One who is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member<'a> {
    pub(super) name: &'a str,
    /// None for a peer without identity.
    pub(super) attributes: Option<&'a Attributes>,
    pub(super) ports: &'a NamedPorts,
}

/// An index over members. Results are positions in the list that it was made of.
#[derive(Debug)]
pub(super) struct Population<'a> {
    members: Vec<Member<'a>>,
    namespaces: &'a Namespaces,
    identified: Vec<usize>,
    by_name: HashMap<&'a str, usize>,
    by_identity: BTreeMap<&'a str, Vec<usize>>,
    by_namespace: HashMap<&'a str, Vec<usize>>,
    by_account: HashMap<&'a str, Vec<usize>>,
    by_label: HashMap<&'a str, HashMap<&'a str, Vec<usize>>>,
}

// === impl Population ===

impl<'a> Population<'a> {
    pub(super) fn new(
        members: impl IntoIterator<Item = Member<'a>>,
        namespaces: &'a Namespaces,
    ) -> Self {
        let mut population = Self {
            members: Vec::new(),
            namespaces,
            identified: Vec::new(),
            by_name: HashMap::new(),
            by_identity: BTreeMap::new(),
            by_namespace: HashMap::new(),
            by_account: HashMap::new(),
            by_label: HashMap::new(),
        };
        for (index, member) in members.into_iter().enumerate() {
            population.by_name.insert(member.name, index);
            if let Some(attributes) = member.attributes {
                population.index(index, attributes);
            }
            population.members.push(member);
        }
        population
    }

    fn index(&mut self, index: usize, attributes: &'a Attributes) {
        self.identified.push(index);
        let id = attributes.spiffe_id.as_str();
        self.by_identity.entry(id).or_default().push(index);
        let namespace = self.by_namespace.entry(&attributes.namespace);
        namespace.or_default().push(index);
        let account = self.by_account.entry(&attributes.service_account);
        account.or_default().push(index);
        for (key, value) in &attributes.labels {
            let values = self.by_label.entry(key).or_default();
            values.entry(value).or_default().push(index);
        }
    }

    pub(super) fn has_name(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.members.iter().map(|member| member.name)
    }

    pub(super) fn has_identity(&self, id: &SpiffeId) -> bool {
        self.by_identity.contains_key(id.as_str())
    }

    /// Whether anybody is meant by the subjects of a policy.
    pub(super) fn has_subject(&self, subjects: &Subjects) -> bool {
        let fits = |index: &usize| self.fits(*index, &subjects.attributes);
        if subjects.names.is_empty() {
            return self
                .candidates(&subjects.attributes)
                .any(|index| fits(&index));
        }
        let mut named = subjects.names.iter();
        named.any(|name| self.by_name.get(name.as_str()).is_some_and(fits))
    }

    /// Those whom a far end that needs an identity means.
    pub(super) fn matching<'b>(
        &'b self,
        far_end: &'b FarEnd,
    ) -> Box<dyn Iterator<Item = usize> + 'b> {
        match far_end {
            FarEnd::Identity(id) => {
                let found = self.by_identity.get(id.as_str());
                Box::new(found.into_iter().flatten().copied())
            }
            FarEnd::IdentityPrefix(prefix) if prefix.is_of_every_domain() => {
                let below = |index: &usize| {
                    let member = self.members.get(*index);
                    member
                        .and_then(|member| member.attributes)
                        .is_some_and(|attributes| prefix.contains(&attributes.spiffe_id))
                };
                Box::new(self.identified.iter().copied().filter(below))
            }
            FarEnd::IdentityPrefix(prefix) => Box::new(
                self.by_identity
                    .range(prefix.as_str()..)
                    .take_while(|(id, _)| id.starts_with(prefix.as_str()))
                    .flat_map(|(_, members)| members.iter().copied()),
            ),
            FarEnd::Attributes(selector) => {
                let fits = |index: &usize| self.fits(*index, selector);
                Box::new(self.candidates(selector).filter(fits))
            }
            FarEnd::Anybody | FarEnd::Cidr { .. } | FarEnd::Both(..) => {
                Box::new(std::iter::empty())
            }
        }
    }

    /// Whether anybody whom a policy is for has a port of this name.
    pub(super) fn subject_has(&self, subjects: &Subjects, port: &PortMatch) -> bool {
        let mut fitting = self.candidates(&subjects.attributes);
        fitting.any(|index| self.fits(index, &subjects.attributes) && self.has(index, port))
    }

    /// Whether anybody whom these mean has a port of this name. Of addresses nothing is known.
    pub(super) fn any_has(&self, far_ends: &[FarEnd], port: &PortMatch) -> bool {
        far_ends.iter().any(|far_end| match far_end {
            FarEnd::Anybody => (0..self.members.len()).any(|index| self.has(index, port)),
            FarEnd::Cidr { .. } | FarEnd::Both(..) => true,
            _ => self.matching(far_end).any(|index| self.has(index, port)),
        })
    }

    fn has(&self, index: usize, port: &PortMatch) -> bool {
        let member = self.members.get(index);
        member.is_some_and(|member| named_ports::at(port, member.ports).is_some())
    }

    fn fits(&self, index: usize, selector: &AttributeSelector) -> bool {
        self.members.get(index).is_some_and(|member| {
            member.attributes.is_some_and(|attributes| {
                selector.matches(attributes, member.ports, self.namespaces)
            })
        })
    }

    /// The shortest list that holds all whom a selector means, and more.
    fn candidates<'b>(
        &'b self,
        selector: &AttributeSelector,
    ) -> Box<dyn Iterator<Item = usize> + 'b> {
        const NOBODY: &[usize] = &[];
        let mut shortest: &[usize] = &self.identified;
        let namespace = match &selector.namespace {
            NamespaceSelector::Named(name) => Some(name.as_str()),
            NamespaceSelector::Any | NamespaceSelector::Labels(_) => None,
        };
        let account = selector.service_account.as_deref();
        let lists = namespace
            .map(|namespace| self.by_namespace.get(namespace))
            .into_iter()
            .chain(account.map(|account| self.by_account.get(account)))
            .chain(selector.labels.iter().filter_map(|label| {
                let Operator::In(values) = &label.operator else {
                    return None;
                };
                let mut values = values.iter();
                let (value, None) = (values.next()?, values.next()) else {
                    return None;
                };
                let labelled = self.by_label.get(label.key.as_str());
                Some(labelled.and_then(|labelled| labelled.get(value.as_str())))
            }));
        for list in lists {
            let list = list.map_or(NOBODY, Vec::as_slice);
            if list.len() < shortest.len() {
                shortest = list;
            }
        }
        if matches!(selector.namespace, NamespaceSelector::Labels(_)) {
            let fitting = self.by_namespace.iter();
            let fitting =
                fitting.filter(|(name, _)| selector.namespace.matches(name, self.namespaces));
            let lists: Vec<_> = fitting.map(|(_, list)| list.as_slice()).collect();
            if lists.iter().map(|list| list.len()).sum::<usize>() < shortest.len() {
                return Box::new(lists.into_iter().flatten().copied());
            }
        }
        Box::new(shortest.iter().copied())
    }
}
