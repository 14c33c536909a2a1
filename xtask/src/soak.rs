//! `cargo xtask soak`: mixed traffic for hours, and what the daemons hold meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::{Programs, Soak};

use crate::{build, setup, workspace::Workspace};

/// How long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// As in 90s, 20m or 1h
    #[arg(long = "for", default_value = "1h", value_parser = duration)]
    duration: Duration,
    /// Use the build of the tests, which is not optimised
    #[arg(long)]
    debug: bool,
}

/// Sets up, builds, and fails if a connection did or something grew.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_running(&workspace)?;
    let release = !options.debug;
    let built = build::build(&workspace, &build::Options { release })?;
    Programs {
        reeve: built.daemon,
        peer: built.peer,
    }
    .set();
    let soak = Soak::run(options.duration);
    print!("{soak}");
    ensure!(soak.wrong.is_empty(), "{}", soak.wrong.join("; "));
    println!("nothing failed, and nothing grew");
    Ok(())
}

fn duration(text: &str) -> Result<Duration> {
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
