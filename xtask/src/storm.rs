//! `cargo xtask storm`: certificates that rotate every second, for as long as it is wanted.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::Storm;

use crate::build;

/// How long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Minutes of connections and transfers
    #[arg(long, default_value_t = 10)]
    minutes: u64,
}

/// Sets up, builds with optimisation, and fails if a single connection did.
pub(crate) fn run(options: &Options) -> Result<()> {
    build::for_scenes(true)?;
    let storm = Storm::run(Duration::from_secs(options.minutes * 60));
    println!(
        "{} rotations, {} certificates in force one after the other, {} connections, {} transfers",
        storm.rotations, storm.accepted, storm.connections, storm.transfers
    );
    ensure!(
        storm.failed == 0 && storm.wrong.is_empty(),
        "{} connections failed; {}",
        storm.failed,
        storm.wrong.join("; ")
    );
    println!("nothing failed");
    Ok(())
}
