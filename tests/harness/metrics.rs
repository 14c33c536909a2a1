//! Metrics as a Prometheus server would read them.

use std::collections::BTreeMap;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads Prometheus' text format.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines
            .map(|line| Sample::parse(line).unwrap_or_else(|| panic!("this is no metric: {line}")))
            .collect();
        Self { samples }
    }

    /// Sum over every series of this name that has these labels; 0 where there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples
            .iter()
            .filter(|sample| sample.name == name)
            .filter(|sample| {
                labels.iter().all(|(label, value)| {
                    sample
                        .labels
                        .get(*label)
                        .is_some_and(|found| found == value)
                })
            })
            .map(|sample| sample.value)
            // Not `sum`, which begins at minus zero.
            .fold(0.0, |sum, value| sum + value)
    }

    /// The series of this name that are not zero, with their labels, to say what there is.
    #[must_use]
    pub fn series(&self, name: &str) -> Vec<String> {
        self.samples
            .iter()
            .filter(|sample| sample.name == name && sample.value != 0.0)
            .map(|sample| format!("{:?} {}", sample.labels, sample.value))
            .collect()
    }

    /// Whether there is any series of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|sample| sample.name == name)
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let value = value.parse().ok()?;
        let Some((name, labels)) = series.split_once('{') else {
            return Some(Self {
                name: series.to_owned(),
                labels: BTreeMap::new(),
                value,
            });
        };
        let mut labels_left = labels.strip_suffix('}')?;
        let mut labels = BTreeMap::new();
        while !labels_left.is_empty() {
            let (label, rest) = labels_left.split_once("=\"")?;
            let (text, rest) = quoted(rest)?;
            labels.insert(label.to_owned(), text);
            labels_left = rest.strip_prefix(',').unwrap_or(rest);
        }
        Some(Self {
            name: name.to_owned(),
            labels,
            value,
        })
    }
}

/// The text up to the closing quote, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut read = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((read, text.get(at + 1..)?)),
            '\\' => read.push(match characters.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => read.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_selected_by_label_and_summed() {
        let metrics = Metrics::parse(
            "# HELP a_total A.\n# TYPE a_total counter\n\
             a_total{x=\"1\",y=\"say \\\"hi\\\", you\"} 2\na_total{x=\"1\",y=\"b\"} 3\na_total{x=\"2\",y=\"b\"} 4\nup 1\n",
        );
        assert_eq!(metrics.sum("a_total", &[("x", "1")]), 5.0);
        assert_eq!(metrics.sum("a_total", &[("y", "say \"hi\", you")]), 2.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("down", &[]), 0.0);
    }
}
