//! THIRD-PARTY.md: whose work the binary holds, and under which terms.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context, Result};
use spdx::Expression;

use super::inventory::{Inventory, Part};

/// How names of files begin that hold terms, in capitals.
const TERMS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"];

const HEAD: &str = "\
# Third-party software

`bin/reeve` is one static program. It holds what is listed here, each under the terms that its authors
chose; where they leave a choice, reeve takes one that `deny.toml` allows.

The GNU C library is linked in under the LGPL 2.1. Its sources are at the place below and in Debian's
package `glibc` of this version. To use another one, build reeve from its sources where that one is
installed: `cargo xtask dist`.

| part | version | licence | sources |
| --- | --- | --- | --- |
";

/// Renders it: a table, then every text once, with the parts that it is for.
pub(super) fn render(inventory: &Inventory) -> Result<String> {
    let mut page = HEAD.to_owned();
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for part in inventory.foreign() {
        let sources = part.repository.as_deref().unwrap_or("");
        writeln!(
            page,
            "| {} | {} | {} | {sources} |",
            part.name, part.version, part.licence
        )?;
        for text in terms(part)? {
            let text = text.trim_end().replace("\r\n", "\n");
            let name = format!("{} {}", part.name, part.version);
            texts.entry(text).or_default().insert(name);
        }
    }
    // By who comes first, so that a new version of one part moves nothing else.
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by(|(_, one), (_, other)| one.cmp(other));
    for (text, parts) in texts {
        let parts: Vec<_> = parts.into_iter().collect();
        // Longer than any fence that a text may hold.
        writeln!(
            page,
            "\n## {}\n\n~~~~~~text\n{text}\n~~~~~~",
            parts.join(", ")
        )?;
    }
    Ok(page)
}

/// The texts that a part comes with, else the usual ones of its licence.
fn terms(part: &Part) -> Result<Vec<String>> {
    let own = match &part.folder {
        Some(folder) => shipped(folder)?,
        None => Vec::new(),
    };
    if own.is_empty() {
        return usual(&part.licence);
    }
    Ok(own)
}

fn shipped(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.to_uppercase();
            path.is_file() && TERMS.iter().any(|terms| name.starts_with(terms))
        })
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| {
            let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })
        .collect()
}

/// The text of each licence and exception that an expression names.
fn usual(licence: &str) -> Result<Vec<String>> {
    let expression =
        Expression::parse(licence).with_context(|| format!("reading the licence `{licence}`"))?;
    let mut texts = Vec::new();
    for required in expression.requirements() {
        let required = &required.req;
        if let Some(id) = required.license.id() {
            texts.push(id.text().to_owned());
        }
        if let Some(spdx::AdditionItem::Spdx(exception)) = &required.addition {
            texts.push(exception.text().to_owned());
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_without_a_text_of_its_own_gets_the_usual_ones() {
        let texts = usual("GPL-3.0-or-later WITH GCC-exception-3.1").unwrap();
        assert_eq!(texts.len(), 2);
        assert!(texts[0].contains("GNU GENERAL PUBLIC LICENSE"));
        assert!(texts[1].contains("GCC RUNTIME LIBRARY EXCEPTION"));
        assert_eq!(usual("MIT OR Apache-2.0").unwrap().len(), 2);
    }
}
