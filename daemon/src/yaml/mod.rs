//! YAML read strictly: every mistake of a file is found in one go, each with its place.
//!
//! In: text, and types that derive serde's `Deserialize`. Out: values, and [`Mistakes`].
//!
//! A text becomes a tree whose nodes know where they stand ([`Document`]); types are read from the
//! tree. What serde would stop at is noted, taken out of the tree, and the reading starts again, so
//! that one mistake does not hide the next. Checks that come later name a node, which
//! [`Located`] values keep.
//!
//! What the values of fields look like, from names to networks, is in `values`.
//!
//! The language is YAML 1.2 without aliases, tags and keys that are not scalars. A text is never
//! a number or a truth value by accident: where a text is expected, `80` and `true` need quotes.

mod de;
mod error;
mod located;
mod mistake;
mod scalar;
mod tree;
pub(crate) mod values;
mod whole;

pub use located::Located;
pub use mistake::{Mistake, Mistakes};
pub use tree::{Document, NodeId};

pub(crate) use de::{read, read_at};
pub(crate) use mistake::{nearest, shown};
pub(crate) use tree::parse;
pub(crate) use whole::read_file;

#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
