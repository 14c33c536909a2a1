//! Why a value could not be read: serde's error, with the node at fault.

use std::fmt;

use serde::de::{Expected, Unexpected};

use super::{NodeId, nearest, shown};

/// The innermost node that could not be read, and why.
#[derive(Debug)]
pub(super) struct Error {
    pub(super) node: Option<NodeId>,
    pub(super) what: String,
}

// === impl Error ===

impl Error {
    pub(super) fn new(node: NodeId, what: impl Into<String>) -> Self {
        Self {
            node: Some(node),
            what: what.into(),
        }
    }

    /// Gives the error a place, unless a node further in already has.
    pub(super) fn or_at(mut self, node: NodeId) -> Self {
        self.node.get_or_insert(node);
        self
    }

    fn unplaced(what: String) -> Self {
        Self { node: None, what }
    }
}

fn found(unexpected: &Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Bool(value) => format!("found `{value}`"),
        Unexpected::Unsigned(value) => format!("found the number {value}"),
        Unexpected::Signed(value) => format!("found the number {value}"),
        Unexpected::Float(value) => format!("found the number {value}"),
        Unexpected::Str(value) => format!("found the text `{}`", shown(value)),
        Unexpected::Unit | Unexpected::Option => "found nothing".to_owned(),
        Unexpected::Seq => "found a list".to_owned(),
        Unexpected::Map => "found a mapping".to_owned(),
        other => format!("found {other}"),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(what: T) -> Self {
        Self::unplaced(what.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::unplaced(format!("{}; expected {expected}", found(&unexpected)))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let list: Vec<_> = expected.iter().map(|name| format!("`{name}`")).collect();
        let mut what = format!(
            "`{}` is not known here; expected {}",
            shown(variant),
            list.join(" or ")
        );
        if let Some(near) = nearest(variant, expected.iter().copied()) {
            what.push_str(&format!("; did you mean `{near}`?"));
        }
        Self::unplaced(what)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::unplaced(format!("`{field}` is missing; add it"))
    }
}
