//! `cargo xtask soak`: long connections and mixed traffic for hours, while two nodes live through what
//! nodes live through, and what the daemons hold meanwhile.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::Soak;

use crate::{build, duration};

/// How long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// As in 90s, 20m or 1h; what happens meanwhile scales with it
    #[arg(long = "for", default_value = "1h", value_parser = duration::parse)]
    duration: Duration,
    /// Use the build of the tests, which is not optimised
    #[arg(long)]
    debug: bool,
}

/// Sets up, builds, and fails if reeve ended what plain TCP keeps, anything else failed, or something grew.
pub(crate) fn run(options: &Options) -> Result<()> {
    build::for_scenes(!options.debug)?;
    let soak = Soak::run(options.duration);
    print!("{soak}");
    ensure!(
        soak.wrong.is_empty(),
        "{} things went wrong:\n{}",
        soak.wrong.len(),
        soak.wrong.join("\n")
    );
    println!("nothing failed, nothing grew, and reeve kept what plain TCP kept");
    Ok(())
}
