//! A value that remembers where it was written.

use std::{fmt, marker::PhantomData, ops::Deref};

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use super::NodeId;

/// Name by which the tree's deserializer recognises a [`Located`].
pub(super) const LOCATED: &str = "$reeve::Located";

/// A value and the node that it was read from, for checks that come after reading. Can only be
/// read from a [`super::Document`].
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The node.
    pub node: NodeId,
    /// The value.
    pub value: T,
}

struct LocatedVisitor<T>(PhantomData<T>);

// === impl Located ===

impl<T> Deref for Located<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Located<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(LOCATED, LocatedVisitor(PhantomData))
    }
}

// === impl LocatedVisitor ===

impl<'de, T: Deserialize<'de>> Visitor<'de> for LocatedVisitor<T> {
    type Value = Located<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value with its place")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Self::Value, A::Error> {
        let missing = || A::Error::custom("the reader keeps no places");
        let node = parts.next_element::<u32>()?.ok_or_else(missing)?;
        let value = parts.next_element()?.ok_or_else(missing)?;
        Ok(Located {
            node: NodeId(node),
            value,
        })
    }
}
