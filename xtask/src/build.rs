//! `cargo xtask build`: the daemon with its kernel programs embedded.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
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

/// Builds a daemon whose kernel maps have another layout, which tests of upgrades take over from, and leaves
/// it beside where [`build`] will put the other one. What neither of the two changes is built once for both.
pub(crate) fn other_layout(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = command(workspace)?;
    cargo.args(["--features", "reeve/other-layout"]);
    run::run(&mut cargo)?;
    let built = workspace.target.join("debug/reeve");
    let kept = built.with_file_name(Programs::OTHER_LAYOUT);
    fs::copy(&built, &kept).with_context(|| format!("making {}", kept.display()))?;
    Ok(kept)
}

fn command(workspace: &Workspace) -> Result<Command> {
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
    Ok(cargo)
}

/// Builds the daemon and the programs of the tests.
pub(crate) fn build(workspace: &Workspace, options: &Options) -> Result<Built> {
    let mut cargo = command(workspace)?;
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
