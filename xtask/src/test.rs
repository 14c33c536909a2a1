//! `cargo xtask test`: unit tests, then real daemons in real namespaces, then the oldest kernel.

use std::time::Instant;

use anyhow::Result;

use crate::{build, dist, kernels, run, setup, workspace::Workspace};

/// What to test.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Passed on to the tests: a filter, `--nocapture`, …
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

/// Sets up, builds the daemon, and runs all tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_running(&workspace)?;
    let started = Instant::now();
    let other_layout = build::other_layout(&workspace)?;
    let built = build::build(&workspace, &build::Options::default())?;
    // What is released is linked in another way; the tests of a release run that.
    let released = dist::build_static(&workspace, dist::Profile::Tests)?;
    let mut cargo = workspace.cargo()?;
    cargo
        // One run tells of all that is wrong.
        .args(["test", "--locked", "--workspace", "--no-fail-fast", "--"])
        .args(&options.filter)
        .env("REEVE", &built.daemon)
        .env("REEVE_PEER", &built.peer)
        .env("REEVE_STATIC", &released)
        .env("REEVE_OTHER_LAYOUT", &other_layout);
    run::run(&mut cargo)?;
    // Who asks for some tests does not ask for a virtual machine.
    if options.filter.is_empty() {
        kernels::quick(&workspace)?;
    }
    println!(
        "all tests passed in {} s, building included",
        started.elapsed().as_secs()
    );
    Ok(())
}
