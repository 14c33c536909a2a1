//! `cargo xtask soak`: mixed traffic for hours, and what the daemons hold meanwhile.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::Soak;

use crate::{build, duration};

/// How long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// As in 90s, 20m or 1h
    #[arg(long = "for", default_value = "1h", value_parser = duration::parse)]
    duration: Duration,
    /// Use the build of the tests, which is not optimised
    #[arg(long)]
    debug: bool,
}

/// Sets up, builds, and fails if a connection did or something grew.
pub(crate) fn run(options: &Options) -> Result<()> {
    build::for_scenes(!options.debug)?;
    let soak = Soak::run(options.duration);
    print!("{soak}");
    ensure!(soak.wrong.is_empty(), "{}", soak.wrong.join("; "));
    println!("nothing failed, and nothing grew");
    Ok(())
}
