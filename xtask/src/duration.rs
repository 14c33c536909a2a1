//! Durations on the command line.

use std::time::Duration;

use anyhow::{Context, Result};

/// Reads a number and its unit, as in 90s, 20m or 1h.
pub(crate) fn parse(text: &str) -> Result<Duration> {
    let seconds = |unit| match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    text.split_at_checked(text.len().saturating_sub(1))
        .and_then(|(number, unit)| number.parse::<u64>().ok()?.checked_mul(seconds(unit)?))
        .map(Duration::from_secs)
        .context("a number and its unit are expected, as in 90s, 20m or 1h")
}
