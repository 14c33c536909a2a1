//! Logs: to standard error, as text or as JSON, one line for each event.

use std::io::{self, IsTerminal};

use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use super::journal::Lines;
use crate::config::{Log, LogFormat};

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter from the environment is not one.
    #[error(
        "`{FILTER}` is not understood: {0}; write levels for parts of the daemon, as in `info,reeve::tunnel=debug`"
    )]
    Filter(tracing_subscriber::filter::ParseError),
    /// Something has set up logging before.
    #[error("logging was set up twice")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Environment variable with levels for parts of the daemon, in place of the configured level.
const FILTER: &str = "REEVE_LOG";

/// Starts logging for the whole process. The environment variable `REEVE_LOG`, as in
/// `info,reeve::tunnel=debug`, takes the place of the configured level.
///
/// # Errors
/// When `REEVE_LOG` cannot be parsed, or logging was started before.
pub fn start(log: &Log) -> Result<(), LogError> {
    let filter = std::env::var(FILTER).unwrap_or_else(|_| log.level.as_str().to_owned());
    let registry = tracing_subscriber::registry().with(parse_filter(&filter)?);
    match log.format {
        LogFormat::Text => registry
            .with(
                fmt::layer()
                    .with_writer(Lines)
                    .with_ansi(io::stderr().is_terminal()),
            )
            .try_init()?,
        LogFormat::Json => registry
            .with(
                fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_current_span(false)
                    .with_span_list(false)
                    .with_writer(Lines),
            )
            .try_init()?,
    }
    Ok(())
}

/// A level alone is reeve's own; what libraries say at that level helps nobody. HTTP/2 warns of
/// each odd frame that a peer sends, and peers may send many.
fn parse_filter(filter: &str) -> Result<Targets, LogError> {
    if let Ok(level) = filter.parse::<LevelFilter>() {
        return Ok(Targets::new()
            .with_default(LevelFilter::WARN)
            .with_target("h2", LevelFilter::ERROR)
            .with_target("reeve", level));
    }
    filter.parse().map_err(LogError::Filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_is_none_is_refused_with_what_is_meant() {
        assert!(parse_filter("info,reeve::tunnel=debug").is_ok());
        let error = parse_filter("info,reeve=loud").unwrap_err();
        assert!(error.to_string().contains("REEVE_LOG"), "{error}");
    }

    #[test]
    fn a_level_is_that_of_reeve_alone() {
        let filter = parse_filter("debug").unwrap().to_string();
        assert!(filter.contains("reeve=debug"), "{filter}");
        assert!(filter.contains("warn"), "{filter}");
    }
}
