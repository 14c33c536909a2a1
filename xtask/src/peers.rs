//! `cargo xtask peers`: reeve with a real SPIRE, its server and agents.
//!
//! Apart from `cargo xtask test`, since SPIRE takes minutes to build.

use anyhow::Result;

use crate::{build, run, setup, workspace::Workspace};

/// What to test.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Passed on to the tests: a filter, `--nocapture`, …
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

/// Sets up, builds SPIRE and the daemon, and runs the tests that need SPIRE.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_running(&workspace)?;
    let spire = setup::for_peers(&workspace)?;
    let built = build::build(&workspace, &build::Options::default())?;
    let is_filter = |word: &String| !word.starts_with('-');
    let mut cargo = workspace.cargo()?;
    cargo
        .args(["test", "--locked", "--workspace", "--test", "e2e", "--"])
        .arg("--ignored")
        .args(&options.filter)
        .env("REEVE", &built.daemon)
        .env("REEVE_PEER", &built.peer)
        .env("REEVE_SPIRE_SERVER", &spire.server)
        .env("REEVE_SPIRE_AGENT", &spire.agent)
        // Most of the time they wait for SPIRE.
        .env("RUST_TEST_THREADS", "6");
    if !options.filter.iter().any(is_filter) {
        cargo.arg("peers::");
    }
    run::run(&mut cargo)
}
