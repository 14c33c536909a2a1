//! Selectors of workloads by what they are: namespace, service account, labels, SPIFFE ID.

use std::{collections::BTreeSet, fmt};

use crate::{identity::SpiffeId, workload::Attributes};

/// Workloads that fit everything that is given. The default selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct AttributeSelector {
    /// Namespace; none is any.
    pub(crate) namespace: Option<String>,
    /// Service account; none is any.
    pub(crate) service_account: Option<String>,
    /// What the labels have to fit, each of them; sorted, none twice.
    pub(crate) labels: Vec<Requirement>,
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IdentityPrefix(String);

// === impl AttributeSelector ===

impl AttributeSelector {
    pub(crate) fn matches(&self, attributes: &Attributes) -> bool {
        let same = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|w| w == is);
        same(&self.namespace, &attributes.namespace)
            && same(&self.service_account, &attributes.service_account)
            && self.labels.iter().all(|requirement| {
                requirement.matches(attributes.labels.get(&requirement.key).map(String::as_str))
            })
    }
}

impl fmt::Display for AttributeSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "namespace {} service account {}",
            self.namespace.as_deref().unwrap_or("*"),
            self.service_account.as_deref().unwrap_or("*"),
        )?;
        for label in &self.labels {
            write!(f, ", {label}")?;
        }
        Ok(())
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
        match SpiffeId::parse(&format!("{text}x")) {
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
}

impl fmt::Display for IdentityPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
