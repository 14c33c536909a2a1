//! What is wrong with a file, and where.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Longest piece of somebody's text that a message repeats, in characters.
const SHOWN_LENGTH: usize = 60;

/// How alike two names must be, from 0 to 1, for one to be proposed for the other.
const ALIKE: f64 = 0.84;

/// Shortest name in which one slip of the fingers is as good as [`ALIKE`].
const SLIP_LENGTH: usize = 3;

/// One thing that is wrong, with its place.
///
/// Shown as `file:line:column: field: what; expected …; do …`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// Line and column, both from 1; none where the whole file is meant.
    pub place: Option<(usize, usize)>,
    /// Path of the field, as in `workloads[2].name`; empty for the whole document.
    pub field: String,
    /// What is wrong, what was expected, what to do.
    pub what: String,
}

/// Every mistake that was found, in the order of the files and lines. Never empty when it is
/// returned as an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Mistakes(Vec<Mistake>);

/// The candidate that `name` was probably meant to be.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let plain = |text: &str| -> String {
        text.chars()
            .filter(|c| c.is_alphanumeric())
            .flat_map(char::to_lowercase)
            .take(SHOWN_LENGTH)
            .collect()
    };
    let name = plain(name);
    let likeness = |candidate: &str| {
        let candidate = plain(candidate);
        let slip =
            name.chars().count() >= SLIP_LENGTH && strsim::osa_distance(&name, &candidate) <= 1;
        let likeness = strsim::jaro_winkler(&name, &candidate);
        if slip { likeness.max(ALIKE) } else { likeness }
    };
    candidates
        .into_iter()
        .map(|candidate| (likeness(candidate), candidate))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Said of a value that Helm, or a tool like it, should have replaced.
pub(super) const NOT_RENDERED: &str =
    "; this is a template that was not rendered, so render it first";

/// Whether a text has a placeholder of a template in it.
pub(super) fn is_template(text: &str) -> bool {
    let holds = |open: &str, close: &str| {
        text.split_once(open)
            .is_some_and(|(_, after)| after.contains(close))
    };
    holds("{{", "}}") || holds("${", "}") || holds("<%", "%>")
}

/// A text of a file as it may stand in a message: short, on one line, without control characters, and
/// never a private key.
pub(crate) fn shown(text: &str) -> String {
    if text.contains("-----BEGIN ") {
        // Perhaps a key, where its file's name should be.
        return "-----BEGIN …".to_owned();
    }
    let mut shown: String = text
        .chars()
        .take(SHOWN_LENGTH)
        .flat_map(|c| {
            let escape = c.is_control();
            escape
                .then(|| c.escape_default())
                .into_iter()
                .flatten()
                .chain((!escape).then_some(c))
        })
        .collect();
    if text.chars().nth(SHOWN_LENGTH).is_some() {
        shown.push('…');
    }
    shown
}

// === impl Mistakes ===

impl Mistakes {
    /// Notes a mistake about a whole file.
    pub(crate) fn file(&mut self, file: &Path, what: impl Into<String>) {
        self.push(Mistake {
            file: file.to_owned(),
            place: None,
            field: String::new(),
            what: what.into(),
        });
    }

    /// Notes a mistake.
    pub(crate) fn push(&mut self, mistake: Mistake) {
        self.0.push(mistake);
    }

    /// Takes over what another check found.
    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Mistake> {
        self.0.iter()
    }

    /// `Ok` when there is none; else all of them, in order and each once.
    ///
    /// # Errors
    /// The mistakes.
    pub(crate) fn into_result(mut self) -> Result<(), Self> {
        if self.0.is_empty() {
            return Ok(());
        }
        self.0.sort();
        self.0.dedup();
        Err(self)
    }
}

// === impl Display ===

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        if !self.field.is_empty() {
            write!(f, " {}:", self.field)?;
        }
        write!(f, " {}", self.what)
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{mistake}")?;
        }
        Ok(())
    }
}
