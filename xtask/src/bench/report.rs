//! What was measured: medians, ratios, and whether what is wanted was reached.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::scene::Way;

/// What is wanted of a figure.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    /// The tunnel's figure divided by plain TCP's is at least this.
    Ratio(f64),
    /// The figure divided by what it is compared with is at most this.
    RatioAtMost(f64),
    /// The figure is at most this.
    AtMost(f64),
}

/// The figures that something is wanted of.
const WANTED: [(&str, Wanted); 11] = [
    ("bulk_1_gbit_per_second", Wanted::Ratio(0.40)),
    ("bulk_8_gbit_per_second", Wanted::Ratio(0.38)),
    ("connections_per_second", Wanted::Ratio(0.42)),
    ("requests_per_second", Wanted::Ratio(0.31)),
    // 15,000 where plain TCP does 130,000.
    ("mixed_requests_per_second", Wanted::Ratio(0.115)),
    ("mixed_requests_p99_ms", Wanted::AtMost(4.0)),
    ("resident_idle_mb_of_client_daemon", Wanted::AtMost(15.0)),
    ("resident_idle_mb_of_server_daemon", Wanted::AtMost(15.0)),
    (
        "resident_kib_per_idle_connection_of_client_daemon",
        Wanted::AtMost(12.0),
    ),
    (
        "resident_kib_per_idle_connection_of_server_daemon",
        Wanted::AtMost(12.0),
    ),
    // However many rules there are, the programs look up the same number of entries.
    ("scale_connect_ns", Wanted::RatioAtMost(1.3)),
];

/// Everything measured, in the order in which it was first measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    order: Vec<String>,
    samples: BTreeMap<String, BTreeMap<&'static str, Vec<f64>>>,
}

/// One line of the result.
struct Row {
    name: String,
    /// Plain TCP, or without hooks; none where there is nothing to compare with.
    base: Option<f64>,
    /// The tunnel, or with hooks, or the figure alone.
    value: f64,
    wanted: Option<Wanted>,
}

impl Report {
    /// A figure of one way.
    pub(crate) fn add(&mut self, name: &str, way: Way, value: f64) {
        self.insert(name, way.name(), value);
    }

    /// A figure of a bystander, `with` hooks or `without`.
    pub(crate) fn add_hooks(&mut self, name: &str, hooks: &'static str, value: f64) {
        self.insert(name, hooks, value);
    }

    /// A figure of a node with `few` rules or with `many`.
    pub(crate) fn add_rules(&mut self, name: &str, rules: &'static str, value: f64) {
        self.insert(name, rules, value);
    }

    /// A figure that stands alone.
    pub(crate) fn note(&mut self, name: &str, value: f64) {
        self.insert(name, "value", value);
    }

    fn insert(&mut self, name: &str, column: &'static str, value: f64) {
        if !self.samples.contains_key(name) {
            self.order.push(name.to_owned());
        }
        self.samples
            .entry(name.to_owned())
            .or_default()
            .entry(column)
            .or_default()
            .push(value);
    }

    fn rows(&self) -> Vec<Row> {
        let row = |name: &String| {
            let columns = self.samples.get(name)?;
            let of = |column: &str| columns.get(column).map(|samples| median(samples));
            let wanted = WANTED
                .iter()
                .find(|(wanted, _)| wanted == name)
                .map(|(_, wanted)| *wanted);
            Some(Row {
                name: name.clone(),
                base: of("plain").or_else(|| of("without")).or_else(|| of("few")),
                value: of("tunnel")
                    .or_else(|| of("with"))
                    .or_else(|| of("many"))
                    .or_else(|| of("value"))?,
                wanted,
            })
        };
        self.order.iter().filter_map(row).collect()
    }

    /// The table.
    pub(crate) fn print(&self) {
        println!(
            "\n{:<52} {:>10} {:>10} {:>7}  wanted",
            "median", "plain", "reeve", "ratio"
        );
        for row in self.rows() {
            let number = |value: Option<f64>| value.map_or_else(String::new, shown);
            let ratio = row
                .ratio()
                .map_or_else(String::new, |ratio| format!("{ratio:.2}"));
            println!(
                "{:<52} {:>10} {:>10} {ratio:>7}  {}",
                row.name,
                number(row.base),
                number(Some(row.value)),
                row.verdict()
            );
        }
        println!(
            "\n`hooks_…`: without and with reeve's programs above a process that is not enrolled; \
             `scale_connect_…`: with 10 rules and with 10,000"
        );
    }

    /// Medians, ratios and every sample.
    pub(crate) fn json(&self) -> String {
        let rows: serde_json::Map<String, Value> = self
            .rows()
            .into_iter()
            .map(|row| {
                let samples = &self.samples[&row.name];
                let entry = json!({
                    "plain": row.base,
                    "reeve": row.value,
                    "ratio": row.ratio(),
                    "reached": row.reached(),
                    "samples": samples,
                });
                (row.name, entry)
            })
            .collect();
        format!("{:#}\n", Value::Object(rows))
    }

    /// # Errors
    /// When something that is wanted was not reached.
    pub(crate) fn check(&self) -> Result<()> {
        let missed: Vec<_> = self
            .rows()
            .into_iter()
            .filter(|row| row.reached() == Some(false))
            .map(|row| row.name)
            .collect();
        if !missed.is_empty() {
            bail!("not reached: {}", missed.join(", "));
        }
        Ok(())
    }
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        let base = self.base.filter(|base| *base != 0.0)?;
        Some(self.value / base)
    }

    fn reached(&self) -> Option<bool> {
        Some(match self.wanted? {
            Wanted::Ratio(least) => self.ratio()? >= least,
            Wanted::RatioAtMost(most) => self.ratio()? <= most,
            Wanted::AtMost(most) => self.value <= most,
        })
    }

    fn verdict(&self) -> String {
        let Some((wanted, reached)) = self.wanted.zip(self.reached()) else {
            return String::new();
        };
        let mark = if reached { "✔" } else { "✘" };
        match wanted {
            Wanted::Ratio(least) => format!("{mark} ratio ≥ {least}"),
            Wanted::RatioAtMost(most) => format!("{mark} ratio ≤ {most}"),
            Wanted::AtMost(most) => format!("{mark} ≤ {}", shown(most)),
        }
    }
}

/// The middle sample, or the mean of the two in the middle.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        at(middle)
    } else {
        (at(middle.wrapping_sub(1)) + at(middle)) / 2.0
    }
}

/// A number with as many digits as mean something.
fn shown(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_compared() {
        let mut report = Report::default();
        for (plain, tunnel) in [(10.0, 4.0), (11.0, 5.0), (30.0, 1.0)] {
            report.add("bulk_1_gbit_per_second", Way::Plain, plain);
            report.add("bulk_1_gbit_per_second", Way::Tunnel, tunnel);
        }
        let rows = report.rows();
        assert_eq!(rows[0].ratio(), Some(4.0 / 11.0));
        assert_eq!(rows[0].reached(), Some(false));
        assert!(report.check().is_err());
    }

    #[test]
    fn the_median_of_an_even_number_is_between() {
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
