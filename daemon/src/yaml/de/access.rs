//! What serde asks for piece by piece: items, entries, the parts of a located value, variants.

use serde::{
    Deserializer,
    de::{
        DeserializeSeed, EnumAccess, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
        value::{StrDeserializer, U32Deserializer},
    },
};

use super::{Entry, Error, NodeId, Reader, Session};

pub(super) struct Items<'s, 'd> {
    pub(super) session: &'s Session<'d>,
    pub(super) items: std::slice::Iter<'d, NodeId>,
}

pub(super) struct Entries<'s, 'd> {
    pub(super) session: &'s Session<'d>,
    pub(super) entries: std::slice::Iter<'d, Entry>,
    /// Where only these keys are known.
    pub(super) known: Option<&'static [&'static str]>,
    pub(super) value: Option<NodeId>,
}

/// The two parts of a [`Located`](super::super::Located).
pub(super) struct LocatedParts<'s, 'd> {
    pub(super) reader: Reader<'s, 'd>,
    pub(super) given: usize,
}

/// A variant's name and what stands beside it.
pub(super) struct Variant<'s, 'd> {
    pub(super) reader: Reader<'s, 'd>,
    pub(super) name: &'d str,
    pub(super) value: Option<NodeId>,
}

// === impl Items ===

impl<'de> SeqAccess<'de> for Items<'_, '_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let session = self.session;
        let Some(node) = self.items.find(|node| !session.is_pruned(**node)) else {
            return Ok(None);
        };
        let reader = Reader {
            session,
            node: *node,
        };
        reader.with(seed.deserialize(reader)).map(Some)
    }
}

// === impl Entries ===

impl<'de> MapAccess<'de> for Entries<'_, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let (session, known) = (self.session, self.known);
        let wanted = |entry: &&Entry| {
            known.is_none_or(|known| known.contains(&entry.key()))
                && !session.is_pruned(entry.value)
        };
        let Some(entry) = self.entries.find(wanted) else {
            return Ok(None);
        };
        self.value = Some(entry.value);
        seed.deserialize(StrDeserializer::new(entry.key()))
            .map(Some)
            .map_err(|error: Error| error.or_at(entry.value))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some(node) = self.value.take() else {
            return Err(serde::de::Error::invalid_type(
                Unexpected::Unit,
                &"a key first",
            ));
        };
        let reader = Reader {
            session: self.session,
            node,
        };
        reader.with(seed.deserialize(reader))
    }
}

// === impl LocatedParts ===

impl<'de> SeqAccess<'de> for LocatedParts<'_, '_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        self.given += 1;
        match self.given {
            1 => seed
                .deserialize(U32Deserializer::new(self.reader.node.0))
                .map(Some),
            2 => seed.deserialize(self.reader).map(Some),
            _ => Ok(None),
        }
    }
}

// === impl Variant ===

impl<'de> EnumAccess<'de> for Variant<'_, '_> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name = seed.deserialize(StrDeserializer::new(self.name));
        Ok((self.reader.with(name)?, self))
    }
}

impl<'s, 'd> Variant<'s, 'd> {
    fn content(&self) -> Result<Reader<'s, 'd>, Error> {
        let node = self.value.ok_or_else(|| {
            Error::new(
                self.reader.node,
                format!("`{0}` has settings; write `{0}: {{}}`", self.name),
            )
        })?;
        Ok(Reader {
            session: self.reader.session,
            node,
        })
    }
}

impl<'de> VariantAccess<'de> for Variant<'_, '_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.value {
            None => Ok(()),
            Some(node) => Err(Error::new(
                node,
                format!("`{}` has no settings; write the name alone", self.name),
            )),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        let reader = self.content()?;
        reader.with(seed.deserialize(reader))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        self.content()?.deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.content()?.deserialize_struct("", fields, visitor)
    }
}
