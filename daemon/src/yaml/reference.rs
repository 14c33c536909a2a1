//! For tests that compare a reference in `docs` with the code.

use std::{collections::BTreeSet, path::Path};

use serde::Deserialize;

use super::{
    Mistakes,
    de::{read_tracing, without_indices},
    parse,
};

/// One row of a reference's tables: `| field | type | default | meaning |`.
pub(crate) struct Row<'a> {
    pub(crate) field: &'a str,
    pub(crate) default: &'a str,
}

/// The rows of the tables whose first cell is a field in backticks.
pub(crate) fn rows(reference: &str) -> Vec<Row<'_>> {
    let cells = |line| -> Option<Row<'_>> {
        let mut cells = str::strip_prefix(line, "| `")?.splitn(4, " | ");
        let field = cells.next()?.strip_suffix('`')?;
        let _kind = cells.next()?;
        let default = cells.next()?;
        cells.next().filter(|meaning| meaning.len() > "|".len())?;
        Some(Row { field, default })
    };
    reference.lines().filter_map(cells).collect()
}

/// The first example of a text in YAML.
pub(crate) fn example(reference: &str) -> &str {
    let (_, rest) = reference.split_once("```yaml\n").unwrap();
    rest.split_once("```").unwrap().0
}

/// Checks that the first example of a reference reads as `T` with every field written, and that
/// the tables describe the same fields.
pub(crate) fn compare<T: for<'de> Deserialize<'de>>(reference: &str) {
    compare_part::<T>(reference, |_| true);
}

/// As [`compare`], for those fields that are described here and not elsewhere.
pub(crate) fn compare_part<T: for<'de> Deserialize<'de>>(
    reference: &str,
    is_described_here: impl Fn(&str) -> bool,
) {
    let mut mistakes = Mistakes::default();
    let (documents, syntax) = parse(Path::new("example"), example(reference));
    mistakes.extend(syntax);
    let mut fields = BTreeSet::new();
    let mut written = BTreeSet::new();
    for document in &documents {
        let (value, known) = read_tracing::<T>(document, &mut mistakes);
        assert!(value.is_some(), "{mistakes}");
        fields.extend(known);
        written.extend(document.paths().map(|path| without_indices(&path)));
    }
    assert_eq!(mistakes, Mistakes::default());
    fields.retain(|field| is_described_here(field));
    let unwritten: Vec<_> = fields.difference(&written).collect();
    assert!(unwritten.is_empty(), "not in the example: {unwritten:?}");
    let described: BTreeSet<_> = rows(reference)
        .iter()
        .map(|row| row.field.to_owned())
        .collect();
    let missing: Vec<_> = fields.difference(&described).collect();
    let extra: Vec<_> = described.difference(&fields).collect();
    assert!(missing.is_empty(), "fields without a row: {missing:?}");
    assert!(extra.is_empty(), "rows without a field: {extra:?}");
}
