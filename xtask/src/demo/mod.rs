//! `cargo xtask demo`: shows what reeve does, with real programs, and proves it.
//!
//! Two groups of namespaces and cgroups stand for two nodes. Each has a daemon of its own, which
//! sees nothing but its group. What the acts claim is checked, and one claim that does not hold
//! makes the demo fail.

mod acts;
mod counted;
mod scene;
mod show;
mod stage;

use std::{panic, path::PathBuf};

use anyhow::{Result, bail};
use harness::Programs;
use scene::Scene;
use stage::Stage;

use crate::build;

/// How to show it.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Show the optimised daemon, as it is shipped
    #[arg(long)]
    release: bool,
    /// Stop after each act until Enter is pressed
    #[arg(long)]
    pause: bool,
    /// Show this daemon, rather than build one; needs --peer
    #[arg(
        long,
        value_name = "FILE",
        requires = "peer",
        conflicts_with = "release"
    )]
    daemon: Option<PathBuf>,
    /// The program of the tests that belongs to --daemon
    #[arg(long, value_name = "FILE", requires = "daemon")]
    peer: Option<PathBuf>,
}

/// Sets up, builds, plays, and cleans up.
pub(crate) fn run(options: &Options) -> Result<()> {
    match (&options.daemon, &options.peer) {
        (Some(daemon), Some(peer)) => Programs {
            reeve: daemon.clone(),
            peer: peer.clone(),
        }
        .set(),
        _ => {
            build::for_scenes(options.release)?;
        }
    }

    // What breaks is told like the rest; where in the source it broke helps nobody here.
    panic::set_hook(Box::new(|panic| {
        let why = panic.payload_as_str().unwrap_or("for no reason given");
        eprintln!("\nThe demo broke off: {why}");
    }));
    let mut stage = Stage::new(options.pause);
    let scene = Scene::set(&mut stage);
    for act in acts::ALL {
        act(&mut stage, &scene);
    }
    drop(scene);
    let failed = stage.finish();
    if failed > 0 {
        bail!("{failed} of the demo's claims did not hold");
    }
    Ok(())
}
