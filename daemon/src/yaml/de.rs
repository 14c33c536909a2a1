//! Reads serde types from a [`Document`], and goes on after a mistake.

mod access;

use std::{cell::RefCell, collections::HashSet};

use serde::{Deserialize, Deserializer, de::Visitor, forward_to_deserialize_any};

use self::access::{Entries, Items, LocatedParts, Variant};
use super::{
    Document, Mistakes, NodeId,
    error::Error,
    located::LOCATED,
    mistake::{NOT_RENDERED, is_template},
    nearest, shown,
    tree::{Content, Entry},
};

/// Mistakes of one document after which the reading stops: a file of another kind has thousands.
const MAX_MISTAKES: usize = 100;

/// What one document's readings found so far.
struct Session<'d> {
    document: &'d Document,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    mistakes: Mistakes,
    /// Nodes that could not be read, and are read no more.
    pruned: HashSet<NodeId>,
    /// Mappings whose unknown keys are noted already.
    checked: HashSet<NodeId>,
    /// Every field of every mapping that was read, for comparing with the reference.
    fields: std::collections::BTreeSet<String>,
}

/// Reads a whole document. None when not even a part of it could be read. A value that comes
/// with mistakes lacks what was mistaken.
pub(crate) fn read<T: for<'de> Deserialize<'de>>(
    document: &Document,
    mistakes: &mut Mistakes,
) -> Option<T> {
    read_at(document, document.root(), mistakes)
}

/// As [`read`], for a part of a document.
pub(crate) fn read_at<T: for<'de> Deserialize<'de>>(
    document: &Document,
    node: NodeId,
    mistakes: &mut Mistakes,
) -> Option<T> {
    let (value, state) = run(document, node);
    mistakes.extend(state.mistakes);
    value
}

/// As [`read`], and with the path of every field that could have been written in the mappings
/// that were read.
#[cfg(test)]
pub(crate) fn read_tracing<T: for<'de> Deserialize<'de>>(
    document: &Document,
    mistakes: &mut Mistakes,
) -> (Option<T>, std::collections::BTreeSet<String>) {
    let (value, state) = run(document, document.root());
    mistakes.extend(state.mistakes);
    (value, state.fields)
}

fn run<T: for<'de> Deserialize<'de>>(document: &Document, root: NodeId) -> (Option<T>, State) {
    let session = Session {
        document,
        state: RefCell::default(),
    };
    loop {
        let result = T::deserialize(Reader {
            session: &session,
            node: root,
        });
        let error = match result {
            Ok(value) => return (Some(value), session.state.into_inner()),
            Err(error) => error,
        };
        let node = error.node.unwrap_or(root);
        let mut state = session.state.borrow_mut();
        let State {
            mistakes, pruned, ..
        } = &mut *state;
        // A mapping or list that cannot be read because of what was pruned from it adds nothing.
        let consequence =
            error.what.is_empty() || pruned.iter().any(|child| document.parent(*child) == node);
        if !consequence {
            let mut what = error.what;
            if document.text(node).is_some_and(is_template) {
                what.push_str(NOT_RENDERED);
            }
            mistakes.push(document.mistake(node, what));
        }
        if node == root || !pruned.insert(node) || mistakes.len() >= MAX_MISTAKES {
            drop(state);
            return (None, session.state.into_inner());
        }
    }
}

/// Reads one node.
#[derive(Clone, Copy)]
struct Reader<'s, 'd> {
    session: &'s Session<'d>,
    node: NodeId,
}

// === impl Session ===

impl<'d> Session<'d> {
    fn is_pruned(&self, node: NodeId) -> bool {
        self.state.borrow().pruned.contains(&node)
    }

    /// Notes the keys of a mapping that no field has, and the fields that it could have.
    fn check_keys(&self, mapping: NodeId, known: &'static [&'static str]) {
        let mut state = self.state.borrow_mut();
        if !state.checked.insert(mapping) {
            return;
        }
        let path = self.document.path(mapping);
        let pattern = without_indices(&path);
        for field in known {
            state.fields.insert(if pattern.is_empty() {
                (*field).to_owned()
            } else {
                format!("{pattern}.{field}")
            });
        }
        for entry in self.document.entries(mapping) {
            if known.contains(&entry.key()) || state.mistakes.len() >= MAX_MISTAKES {
                continue;
            }
            let mut what = "there is no such field".to_owned();
            match nearest(entry.key(), known.iter().copied()) {
                Some(near) => what.push_str(&format!("; did you mean `{near}`?")),
                None => what.push_str(&format!("; expected one of {}", known.join(", "))),
            }
            let mistake = self.document.mistake_at_key(mapping, entry, what);
            state.mistakes.push(mistake);
        }
    }
}

/// `workloads[2].name` as `workloads[].name`.
pub(super) fn without_indices(path: &str) -> String {
    let mut inside = false;
    path.chars()
        .filter(|c| {
            inside = match c {
                '[' => true,
                ']' => false,
                _ => inside,
            };
            !inside || *c == '['
        })
        .collect()
}

// === impl Reader ===

impl<'d> Reader<'_, 'd> {
    fn document(&self) -> &'d Document {
        self.session.document
    }

    fn scalar(&self) -> Option<super::scalar::Scalar<'d>> {
        match self.document().content(self.node)? {
            Content::Scalar { text, plain } => Some(super::scalar::Scalar::resolve(text, *plain)),
            _ => None,
        }
    }

    fn unexpected(&self) -> &'static str {
        match self.document().content(self.node) {
            Some(Content::Sequence(_)) => "a list",
            Some(Content::Mapping(_)) => "a mapping",
            _ if self.document().is_null(self.node) => "nothing",
            _ => "a single value",
        }
    }

    fn wrong(&self, expected: &str) -> Error {
        Error::new(
            self.node,
            format!("found {}; expected {expected}", self.unexpected()),
        )
    }

    /// YAML 1.1, which other tools read, takes a number that begins with a zero for an octal one.
    fn leading_zero(&self) -> Error {
        let text = self.document().text(self.node).unwrap_or_default();
        let digits = text.trim_start_matches(['-', '+']).trim_start_matches('0');
        let sign = if text.starts_with('-') { "-" } else { "" };
        let digits = if digits.is_empty() { "0" } else { digits };
        Error::new(
            self.node,
            format!(
                "`{}` has a zero in front, and other tools read that as an octal number; write \
                 {sign}{digits}",
                shown(text)
            ),
        )
    }

    fn with<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|error| error.or_at(self.node))
    }
}

impl<'s, 'd> Reader<'s, 'd> {
    fn visit_entries<'de, V: Visitor<'de>>(
        self,
        known: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Some(Content::Mapping(entries)) = self.document().content(self.node) else {
            return Err(self.wrong("a mapping (`key: value`)"));
        };
        let access: Entries<'s, 'd> = Entries {
            session: self.session,
            entries: entries.iter(),
            known,
            value: None,
        };
        self.with(visitor.visit_map(access))
    }
}

impl<'de> Deserializer<'de> for Reader<'_, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        use super::scalar::Scalar;
        let result = match self.document().content(self.node) {
            Some(Content::Mapping(_)) => return self.visit_entries(None, visitor),
            Some(Content::Sequence(_)) => return self.deserialize_seq(visitor),
            _ => match self.scalar().unwrap_or(Scalar::Null) {
                Scalar::Null => visitor.visit_unit(),
                Scalar::Bool(value) => visitor.visit_bool(value),
                Scalar::Unsigned(value) => visitor.visit_u64(value),
                Scalar::Signed(value) => visitor.visit_i64(value),
                Scalar::Float(value) => visitor.visit_f64(value),
                Scalar::Text(text) => visitor.visit_str(text),
                Scalar::LeadingZero => return Err(self.leading_zero()),
            },
        };
        self.with(result)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        use super::scalar::Scalar;
        match self.scalar() {
            Some(Scalar::Text(text)) => self.with(visitor.visit_str(text)),
            None | Some(Scalar::Null) => Err(self.wrong("a text")),
            Some(_) => {
                let text = shown(self.document().text(self.node).unwrap_or_default());
                Err(Error::new(
                    self.node,
                    format!("`{text}` is not a text; write it in quotes: \"{text}\""),
                ))
            }
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        use super::scalar::Scalar;
        match self.scalar() {
            Some(Scalar::Bool(value)) => self.with(visitor.visit_bool(value)),
            Some(Scalar::Text(text)) => Err(Error::new(
                self.node,
                format!(
                    "found the text `{}`; expected `true` or `false`, without quotes",
                    shown(text)
                ),
            )),
            _ => Err(self.wrong("`true` or `false`")),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.document().is_null(self.node) {
            self.with(visitor.visit_none())
        } else {
            self.with(visitor.visit_some(self))
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        if name == LOCATED {
            let parts = LocatedParts {
                reader: self,
                given: 0,
            };
            return self.with(visitor.visit_seq(parts));
        }
        self.with(visitor.visit_newtype_struct(self))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Some(Content::Sequence(items)) = self.document().content(self.node) else {
            return Err(self.wrong("a list (`- item` lines, or `[item, item]`)"));
        };
        self.with(visitor.visit_seq(Items {
            session: self.session,
            items: items.iter(),
        }))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.visit_entries(None, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if let Some(Content::Mapping(_)) = self.document().content(self.node) {
            self.session.check_keys(self.node, fields);
        }
        self.visit_entries(Some(fields), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        use super::scalar::Scalar;
        let (name, value) = match self.document().content(self.node) {
            Some(Content::Mapping(entries)) => {
                self.session.check_keys(self.node, variants);
                let known: Vec<_> = entries
                    .iter()
                    .filter(|entry| variants.contains(&entry.key()))
                    .filter(|entry| !self.session.is_pruned(entry.value))
                    .collect();
                let [entry] = known[..] else {
                    if known.is_empty() && !entries.is_empty() {
                        // The unknown names are mistakes already.
                        return Err(Error::new(self.node, ""));
                    }
                    return Err(Error::new(
                        self.node,
                        format!("expected exactly one of {}", variants.join(", ")),
                    ));
                };
                (entry.key(), Some(entry.value))
            }
            _ => match self.scalar() {
                Some(Scalar::Text(text)) => (text, None),
                _ => {
                    return Err(self.wrong(&format!("one of {}", variants.join(", "))));
                }
            },
        };
        self.with(visitor.visit_enum(Variant {
            reader: self,
            name,
            value,
        }))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct
        tuple tuple_struct identifier
    }
}
