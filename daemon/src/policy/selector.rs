//! Selectors of workloads by what they are: namespace, service account, labels, SPIFFE ID.

use std::{collections::BTreeSet, fmt};

use crate::{
    identity::SpiffeId,
    workload::{Attributes, NamedPort, NamedPorts, Namespaces},
};

/// Workloads that fit everything that is given. The default selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct AttributeSelector {
    /// Namespace.
    pub(crate) namespace: NamespaceSelector,
    /// Service account; none is any.
    pub(crate) service_account: Option<String>,
    /// What the labels have to fit, each of them; sorted, none twice.
    pub(crate) labels: Vec<Requirement>,
    /// A port that has this name; none where none is asked for.
    pub(crate) port: Option<(String, NamedPort)>,
}

/// Namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum NamespaceSelector {
    /// Every one.
    #[default]
    Any,
    /// The one of this name.
    Named(String),
    /// Those whose labels fit all of these; sorted, none twice.
    Labels(Vec<Requirement>),
}

/// What a label has to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Requirement {
    /// Key of the label.
    pub(crate) key: String,
    /// What is asked of it.
    pub(crate) operator: Operator,
}

/// What is asked of a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Operator {
    /// It is there, with one of these values.
    In(BTreeSet<String>),
    /// It is not there, or has another value.
    NotIn(BTreeSet<String>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

/// The beginning of SPIFFE IDs, with a slash at its end, so that it ends between two segments.
/// With `*` in the place of the trust domain it is that of any.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IdentityPrefix(String);

/// Begins the prefixes that are for every trust domain.
const EVERY_DOMAIN: &str = "spiffe://*/";

// === impl AttributeSelector ===

impl AttributeSelector {
    pub(crate) fn matches(
        &self,
        attributes: &Attributes,
        ports: &NamedPorts,
        namespaces: &Namespaces,
    ) -> bool {
        self.namespace.matches(&attributes.namespace, namespaces)
            && self.matches_account(&attributes.service_account)
            && self
                .port
                .as_ref()
                .is_none_or(|(name, port)| ports.get(name) == Some(port))
            && self.labels.iter().all(|requirement| {
                requirement.matches(attributes.labels.get(&requirement.key).map(String::as_str))
            })
    }

    pub(crate) fn matches_account(&self, service_account: &str) -> bool {
        self.service_account
            .as_deref()
            .is_none_or(|wanted| wanted == service_account)
    }
}

impl fmt::Display for AttributeSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "namespace {} service account {}",
            self.namespace,
            self.service_account.as_deref().unwrap_or("*"),
        )?;
        for label in &self.labels {
            write!(f, ", {label}")?;
        }
        if let Some((name, NamedPort { protocol, port })) = &self.port {
            write!(f, ", port {name} {protocol}/{port}")?;
        }
        Ok(())
    }
}

// === impl NamespaceSelector ===

impl NamespaceSelector {
    pub(crate) fn matches(&self, namespace: &str, namespaces: &Namespaces) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => name == namespace,
            Self::Labels(labels) => labels
                .iter()
                .all(|label| label.matches(namespaces.label(namespace, &label.key))),
        }
    }
}

impl fmt::Display for NamespaceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Named(name) => f.write_str(name),
            Self::Labels(labels) => {
                f.write_str("with")?;
                for label in labels {
                    write!(f, " ({label})")?;
                }
                Ok(())
            }
        }
    }
}

// === impl Requirement ===

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &BTreeSet<String>| {
            let values: Vec<_> = values.iter().map(String::as_str).collect();
            values.join(" ")
        };
        match &self.operator {
            Operator::In(values) => write!(f, "{} in ({})", self.key, list(values)),
            Operator::NotIn(values) => write!(f, "{} not in ({})", self.key, list(values)),
            Operator::Exists => write!(f, "{} exists", self.key),
            Operator::DoesNotExist => write!(f, "{} does not exist", self.key),
        }
    }
}

// === impl IdentityPrefix ===

impl IdentityPrefix {
    /// Parses a prefix, as in `spiffe://example.org/ns/shop/`.
    ///
    /// # Errors
    /// What to tell the operator.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if !text.ends_with('/') {
            return Err(format!(
                "`{}` has no slash at its end, which makes whole segments match; write `{}/`",
                crate::yaml::shown(text),
                crate::yaml::shown(text)
            ));
        }
        // Any ID below must be one.
        let example = match text.strip_prefix(EVERY_DOMAIN) {
            Some(path) => format!("spiffe://any/{path}x"),
            None => format!("{text}x"),
        };
        match SpiffeId::parse(&example) {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(error) => Err(format!(
                "`{}` is not the beginning of a SPIFFE ID: {error}",
                crate::yaml::shown(text)
            )),
        }
    }

    /// The prefix, with its slash.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is for every trust domain.
    pub(crate) fn is_of_every_domain(&self) -> bool {
        self.0.starts_with(EVERY_DOMAIN)
    }

    /// Whether an ID lies below.
    pub(crate) fn contains(&self, id: &SpiffeId) -> bool {
        match self.0.strip_prefix(EVERY_DOMAIN) {
            Some(path) => below_domain(id).starts_with(path),
            None => id.as_str().starts_with(&self.0),
        }
    }

    /// Every prefix that an ID lies below.
    pub(crate) fn all_of(id: &SpiffeId) -> impl Iterator<Item = String> {
        let own = id.as_str();
        let slashes = own.match_indices('/').map(|(place, _)| place);
        let exact = slashes.filter_map(|place| own.get(..=place));
        let path = below_domain(id);
        let slashes = path.match_indices('/').map(|(place, _)| place + 1);
        let of_every = std::iter::once(0).chain(slashes);
        let of_every = of_every.filter_map(|end| path.get(..end));
        exact
            .map(str::to_owned)
            .chain(of_every.map(|path| format!("{EVERY_DOMAIN}{path}")))
    }
}

impl fmt::Display for IdentityPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The path of an ID without its first slash.
fn below_domain(id: &SpiffeId) -> &str {
    id.path().strip_prefix('/').unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_every_trust_domain_begins_with_a_star() {
        let prefix = IdentityPrefix::parse("spiffe://*/ns/shop/").unwrap();
        for (id, below) in [
            ("spiffe://example.org/ns/shop/sa/cart", true),
            ("spiffe://other.org/ns/shop/sa/cart", true),
            ("spiffe://other.org/ns/shopping/sa/cart", false),
            ("spiffe://other.org/x/ns/shop/sa", false),
        ] {
            let id = SpiffeId::parse(id).unwrap();
            assert_eq!(prefix.contains(&id), below, "{id}");
            let found = IdentityPrefix::all_of(&id).any(|found| found == prefix.as_str());
            assert_eq!(found, below, "{id}");
        }
        let all = IdentityPrefix::parse("spiffe://*/").unwrap();
        let id = SpiffeId::parse("spiffe://a/b").unwrap();
        assert!(all.contains(&id) && IdentityPrefix::all_of(&id).any(|p| p == all.as_str()));
        assert!(IdentityPrefix::parse("spiffe://*.org/").is_err());
        assert!(IdentityPrefix::parse("spiffe://*").is_err());
    }

    fn requirement(operator: Operator) -> Requirement {
        Requirement {
            key: "app".into(),
            operator,
        }
    }

    #[test]
    fn an_absent_label_is_not_an_empty_one() {
        let values = BTreeSet::from([String::new(), "web".into()]);
        let within = requirement(Operator::In(values.clone()));
        let without = requirement(Operator::NotIn(values));
        assert!(within.matches(Some("web")) && within.matches(Some("")));
        assert!(!within.matches(None) && !within.matches(Some("db")));
        assert!(without.matches(None) && without.matches(Some("db")));
        assert!(!without.matches(Some("")));
        assert!(requirement(Operator::Exists).matches(Some("")));
        assert!(!requirement(Operator::Exists).matches(None));
        assert!(requirement(Operator::DoesNotExist).matches(None));
        assert!(!requirement(Operator::DoesNotExist).matches(Some("")));
    }

    #[test]
    fn a_prefix_ends_between_segments() {
        let prefix = IdentityPrefix::parse("spiffe://example.org/ns/shop/").unwrap();
        let matches = |id: &str| id.starts_with(prefix.as_str());
        assert!(matches("spiffe://example.org/ns/shop/sa/cart"));
        assert!(!matches("spiffe://example.org/ns/shopping/sa/cart"));
        assert!(!matches("spiffe://example.org/ns/shop"));
        assert!(!matches("spiffe://example.organisation/ns/shop/sa/cart"));
        assert!(IdentityPrefix::parse("spiffe://example.org/").is_ok());
        for bad in [
            "spiffe://example.org/ns/shop",
            "spiffe:///",
            "example.org/",
            "spiffe://a//",
            "",
        ] {
            assert!(IdentityPrefix::parse(bad).is_err(), "{bad}");
        }
    }
}
