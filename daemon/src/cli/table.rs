//! Columns of text.

use std::fmt::{self, Display};

/// Between two columns.
const GAP: usize = 2;

/// Rows under a line of titles, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(titles: [&str; N]) -> Self {
        Self {
            rows: vec![titles.map(str::to_owned)],
        }
    }

    pub(super) fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }
}

impl<const N: usize> Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let mut line = String::from("  ");
            for (cell, width) in row.iter().zip(widths) {
                let blanks = (width + GAP).saturating_sub(cell.chars().count());
                line.push_str(cell);
                // The formatter's own padding panics beyond 65,535 characters.
                line.extend(std::iter::repeat_n(' ', blanks));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_may_be_longer_than_any_column_that_the_formatter_pads() {
        let long = "x".repeat(usize::from(u16::MAX) + 1);
        let mut table = Table::new(["NAME", "STATE"]);
        table.push([long.clone(), "up".into()]);
        table.push(["b".into(), "down".into()]);
        let text = table.to_string();
        assert!(text.contains(&format!("{long}  up\n")));
        assert_eq!(text.lines().last().unwrap().len(), 2 + long.len() + 2 + 4);
    }

    #[test]
    fn columns_line_up_and_lines_have_no_blanks_at_their_end() {
        let mut table = Table::new(["NAME", "STATE"]);
        table.push(["a-long-name".into(), "up".into()]);
        table.push(["b".into(), String::new()]);
        assert_eq!(
            table.to_string(),
            "  NAME         STATE\n  a-long-name  up\n  b\n"
        );
    }
}
