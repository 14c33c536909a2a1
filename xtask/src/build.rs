//! `cargo xtask build`: the daemon with its kernel programs embedded.

use std::path::PathBuf;

use anyhow::Result;
use harness::Programs;

use crate::{run, setup, workspace::Workspace};

/// What to build.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Optimised, as it is shipped
    #[arg(long)]
    pub(crate) release: bool,
}

/// Builds the daemon and says where it is.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_building(&workspace)?;
    let built = build(&workspace, options)?;
    println!("built {}", built.daemon.display());
    Ok(())
}

/// What [`build`] leaves.
#[derive(Debug)]
pub(crate) struct Built {
    /// The daemon.
    pub(crate) daemon: PathBuf,
    /// The program that launches and plays clients and servers in tests.
    pub(crate) peer: PathBuf,
}

/// Builds the daemon and the programs of the tests.
pub(crate) fn build(workspace: &Workspace, options: &Options) -> Result<Built> {
    let mut cargo = workspace.cargo()?;
    cargo.args([
        "build",
        "--locked",
        "--package",
        "reeve",
        "--package",
        "reeve-tests",
        "--bins",
    ]);
    if options.release {
        cargo.arg("--release");
    }
    run::run(&mut cargo)?;
    let folder = workspace
        .target
        .join(if options.release { "release" } else { "debug" });
    Ok(Built {
        daemon: folder.join("reeve"),
        peer: folder.join("peer"),
    })
}

/// Sets up and builds what a scene with real daemons needs, and has all scenes of this process run
/// that.
pub(crate) fn for_scenes(release: bool) -> Result<Workspace> {
    let workspace = Workspace::find()?;
    setup::for_running(&workspace)?;
    let built = build(&workspace, &Options { release })?;
    Programs {
        reeve: built.daemon,
        peer: built.peer,
    }
    .set();
    Ok(workspace)
}
