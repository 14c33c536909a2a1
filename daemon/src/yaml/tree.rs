//! The tree of a YAML document, whose nodes know where they stand.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use super::{
    Mistake, Mistakes,
    mistake::{NOT_RENDERED, is_template},
    scalar::Scalar,
    shown,
};

/// Deepest nesting of lists and mappings: twice what any field needs.
const MAX_DEPTH: usize = 24;
/// Most documents in one file.
const MAX_DOCUMENTS: usize = 10_000;

/// One node of a [`Document`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(super) u32);

/// One YAML document.
#[derive(Debug)]
pub struct Document {
    file: Arc<Path>,
    /// The first is the root. A parent stands before its children.
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    place: Place,
    parent: NodeId,
    step: Step,
    content: Content,
}

/// Line and column, both from 1.
#[derive(Clone, Copy, Debug)]
struct Place {
    line: usize,
    column: usize,
}

/// How a node is reached from its parent.
#[derive(Debug)]
enum Step {
    Root,
    Index(usize),
    Key(String),
}

#[derive(Debug)]
pub(super) enum Content {
    Scalar { text: String, plain: bool },
    Sequence(Vec<NodeId>),
    Mapping(Vec<Entry>),
}

/// One line of a mapping.
#[derive(Debug)]
pub(super) struct Entry {
    key: String,
    place: Place,
    pub(super) value: NodeId,
}

/// Parses a text into its documents. Documents that hold nothing are left out, and so is all that
/// follows a mistake in the syntax, from the beginning of its document.
pub(crate) fn parse(file: &Path, text: &str) -> (Vec<Document>, Mistakes) {
    let mut builder = Builder {
        file: file.into(),
        documents: Vec::new(),
        nodes: Vec::new(),
        open: Vec::new(),
        skipped: None,
        mistakes: Mistakes::default(),
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut parser = Parser::new_from_str(text);
    while let Some(next) = parser.next_event() {
        let (event, span) = match next {
            Ok(event) => event,
            Err(error) => {
                let place = Place::from(error.marker());
                let mut what = format!("is not YAML: {}; correct the syntax here", error.info());
                // The parser may notice it at the beginning of the next line.
                let mut lines = text.lines().skip(place.line.saturating_sub(2)).take(2);
                if lines.any(is_template) {
                    what.push_str(NOT_RENDERED);
                }
                builder.mistake(place, what);
                builder.nodes.clear();
                break;
            }
        };
        if !builder.event(event, Place::from(&span.start)) {
            break;
        }
    }
    builder.finish_document();
    (builder.documents, builder.mistakes)
}

struct Builder {
    file: Arc<Path>,
    documents: Vec<Document>,
    nodes: Vec<Node>,
    open: Vec<Open>,
    /// Depth inside something that is not kept.
    skipped: Option<usize>,
    mistakes: Mistakes,
}

/// A collection whose end has not come.
struct Open {
    node: NodeId,
    /// In a mapping: the key whose value comes next.
    key: Option<(String, Place)>,
    /// In a mapping: where each key stands first.
    keys: HashMap<String, Place>,
    mapping: bool,
}

// === impl Place ===

impl From<&Marker> for Place {
    fn from(marker: &Marker) -> Self {
        Self {
            line: marker.line(),
            column: marker.col() + 1,
        }
    }
}

// === impl Builder ===

impl Builder {
    /// Takes the next event; false to stop.
    fn event(&mut self, event: Event<'_>, place: Place) -> bool {
        match event {
            Event::Alias(_) => {
                self.mistake(
                    place,
                    "an alias (`*name`) is not supported; write the value out",
                );
                self.scalar(String::new(), true, place);
            }
            Event::Scalar(text, style, _, tag) => {
                self.refuse_tag(tag.is_some(), place);
                let plain = style == ScalarStyle::Plain && tag.is_none();
                self.scalar(text.into_owned(), plain, place);
            }
            Event::SequenceStart(_, tag) => {
                self.refuse_tag(tag.is_some(), place);
                return self.collection(false, place);
            }
            Event::MappingStart(_, tag) => {
                self.refuse_tag(tag.is_some(), place);
                return self.collection(true, place);
            }
            Event::SequenceEnd | Event::MappingEnd => match self.skipped {
                Some(0) => self.skipped = None,
                Some(depth) => self.skipped = Some(depth - 1),
                None => {
                    self.open.pop();
                }
            },
            Event::DocumentEnd => {
                self.finish_document();
                if self.documents.len() >= MAX_DOCUMENTS {
                    self.mistake(
                        place,
                        format!("has more than {MAX_DOCUMENTS} documents; split the file"),
                    );
                    return false;
                }
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) => {}
        }
        true
    }

    fn scalar(&mut self, text: String, plain: bool, place: Place) {
        if self.skipped.is_some() {
            return;
        }
        if let Some(open) = self
            .open
            .last_mut()
            .filter(|o| o.mapping && o.key.is_none())
        {
            open.key = Some((text, place));
        } else {
            self.add(Content::Scalar { text, plain }, place);
        }
    }

    /// Opens a list or a mapping; false when it lies too deep.
    fn collection(&mut self, mapping: bool, place: Place) -> bool {
        if let Some(depth) = &mut self.skipped {
            *depth += 1;
            return true;
        }
        if self.open.len() >= MAX_DEPTH {
            self.mistake(
                place,
                format!("is nested deeper than {MAX_DEPTH}; no field is that deep"),
            );
            return false;
        }
        if let Some(open) = self
            .open
            .last_mut()
            .filter(|o| o.mapping && o.key.is_none())
        {
            // The value belongs to this key and goes with it; the name cannot be in use.
            open.key = Some(("?".to_owned(), place));
            self.skipped = Some(0);
            self.mistake(
                place,
                "a list or a mapping cannot be a key; expected a name; if it is `{{ … }}`, the \
                 template was not rendered",
            );
            return true;
        }
        let content = if mapping {
            Content::Mapping(Vec::new())
        } else {
            Content::Sequence(Vec::new())
        };
        if let Some(node) = self.add(content, place) {
            self.open.push(Open {
                node,
                key: None,
                keys: HashMap::new(),
                mapping,
            });
        } else {
            self.skipped = Some(0);
        }
        true
    }

    /// Adds a node to the innermost open collection. None: it is a duplicate and not kept.
    fn add(&mut self, content: Content, place: Place) -> Option<NodeId> {
        // A file's size bounds the number of its nodes far below u32.
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        let mut parent = NodeId(0);
        let mut step = Step::Root;
        let mut duplicate = None;
        if let Some(open) = self.open.last_mut() {
            parent = open.node;
            let above = self.nodes.get_mut(parent.0 as usize)?;
            match &mut above.content {
                Content::Sequence(items) => {
                    step = Step::Index(items.len());
                    items.push(id);
                }
                Content::Mapping(entries) => {
                    let (key, place) = open.key.take()?;
                    if let Some(first) = open.keys.get(&key) {
                        duplicate = Some((key, place, *first));
                    } else {
                        open.keys.insert(key.clone(), place);
                        step = Step::Key(key.clone());
                        entries.push(Entry {
                            key,
                            place,
                            value: id,
                        });
                    }
                }
                Content::Scalar { .. } => return None,
            }
        }
        if let Some((key, place, first)) = duplicate {
            self.mistake(
                place,
                format!(
                    "`{}` stands here a second time, first on line {}; remove one of them",
                    shown(&key),
                    first.line
                ),
            );
            return None;
        }
        self.nodes.push(Node {
            place,
            parent,
            step,
            content,
        });
        Some(id)
    }

    fn refuse_tag(&mut self, tagged: bool, place: Place) {
        if tagged && self.skipped.is_none() {
            self.mistake(place, "a tag (`!name`) is not supported; remove it");
        }
    }

    fn mistake(&mut self, place: Place, what: impl Into<String>) {
        let field = self
            .open
            .last()
            .map_or_else(String::new, |open| path(&self.nodes, open.node));
        self.mistakes.push(Mistake {
            file: self.file.to_path_buf(),
            place: Some((place.line, place.column)),
            field,
            what: what.into(),
        });
    }

    fn finish_document(&mut self) {
        self.open.clear();
        self.skipped = None;
        let document = Document {
            file: Arc::clone(&self.file),
            nodes: std::mem::take(&mut self.nodes),
        };
        if !document.nodes.is_empty() && !document.is_null(document.root()) {
            self.documents.push(document);
        }
    }
}

fn path(nodes: &[Node], mut id: NodeId) -> String {
    let mut steps = Vec::new();
    while let Some(node) = nodes.get(id.0 as usize) {
        match &node.step {
            Step::Root => break,
            Step::Index(index) => steps.push(format!("[{index}]")),
            Step::Key(key) => steps.push(format!(".{}", shown(key))),
        }
        id = node.parent;
    }
    steps.reverse();
    let path = steps.concat();
    path.strip_prefix('.').map(str::to_owned).unwrap_or(path)
}

// === impl Document ===

impl Document {
    /// The file that it was read from.
    #[must_use]
    pub fn file(&self) -> &Arc<Path> {
        &self.file
    }

    /// The outermost node.
    #[must_use]
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// Line of a node, from 1.
    #[must_use]
    pub fn line(&self, node: NodeId) -> usize {
        self.nodes.get(node.0 as usize).map_or(1, |n| n.place.line)
    }

    /// Path of a node, as in `workloads[2].name`; empty for the root.
    #[must_use]
    pub fn path(&self, node: NodeId) -> String {
        path(&self.nodes, node)
    }

    /// The value of a key, where the node is a mapping that has it.
    #[must_use]
    pub fn child(&self, node: NodeId, key: &str) -> Option<NodeId> {
        self.entries(node)
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.value)
    }

    /// The text of a scalar.
    #[must_use]
    pub fn text(&self, node: NodeId) -> Option<&str> {
        match self.content(node)? {
            Content::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// A mistake at a node. `what` says what is wrong, what was expected and what to do.
    #[must_use]
    pub fn mistake(&self, node: NodeId, what: impl Into<String>) -> Mistake {
        let place = self.nodes.get(node.0 as usize).map(|n| n.place);
        self.mistake_at(place, self.path(node), what.into())
    }

    /// A mistake about a key rather than about its value.
    pub(super) fn mistake_at_key(&self, mapping: NodeId, entry: &Entry, what: String) -> Mistake {
        let mut field = self.path(mapping);
        if !field.is_empty() {
            field.push('.');
        }
        field.push_str(&shown(&entry.key));
        self.mistake_at(Some(entry.place), field, what)
    }

    fn mistake_at(&self, place: Option<Place>, field: String, what: String) -> Mistake {
        Mistake {
            file: PathBuf::from(&*self.file),
            place: place.map(|place| (place.line, place.column)),
            field,
            what,
        }
    }

    /// The paths of all nodes.
    #[cfg(test)]
    pub(super) fn paths(&self) -> impl Iterator<Item = String> {
        (0..self.nodes.len()).map(|index| self.path(NodeId(index as u32)))
    }

    pub(super) fn content(&self, node: NodeId) -> Option<&Content> {
        self.nodes.get(node.0 as usize).map(|node| &node.content)
    }

    pub(super) fn entries(&self, node: NodeId) -> &[Entry] {
        match self.content(node) {
            Some(Content::Mapping(entries)) => entries,
            _ => &[],
        }
    }

    pub(super) fn parent(&self, node: NodeId) -> NodeId {
        self.nodes
            .get(node.0 as usize)
            .map_or(NodeId(0), |n| n.parent)
    }

    /// How many items a list has.
    #[must_use]
    pub fn items(&self, node: NodeId) -> Option<usize> {
        match self.content(node)? {
            Content::Sequence(items) => Some(items.len()),
            _ => None,
        }
    }

    /// The items of a list; none where it is not a list.
    pub(crate) fn list(&self, node: NodeId) -> &[NodeId] {
        match self.content(node) {
            Some(Content::Sequence(items)) => items,
            _ => &[],
        }
    }

    /// How many keys a mapping has.
    pub(crate) fn entry_count(&self, node: NodeId) -> usize {
        self.entries(node).len()
    }

    /// Whether a node holds nothing: it is empty, `~` or `null`.
    #[must_use]
    pub fn is_null(&self, node: NodeId) -> bool {
        matches!(
            self.content(node),
            Some(Content::Scalar { text, plain })
                if Scalar::resolve(text, *plain) == Scalar::Null
        )
    }
}

// === impl Entry ===

impl Entry {
    pub(super) fn key(&self) -> &str {
        &self.key
    }
}
