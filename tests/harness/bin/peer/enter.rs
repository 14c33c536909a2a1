//! `peer enter`: becomes another program somewhere else. A program of its own, so that the test
//! process needs nothing between fork and exec.

use std::{
    ffi::OsString,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
};

/// Where to run what.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder of the cgroup
    #[arg(long)]
    cgroup: PathBuf,
    /// File of the network namespace
    #[arg(long)]
    netns: Option<PathBuf>,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    words: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    // Nothing outlives the test that started it.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    join(&options.cgroup)?;
    if let Some(netns) = &options.netns {
        let file = File::open(netns).with_context(|| format!("opening {}", netns.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
    }
    let (program, arguments) = options.words.split_first().context("no program")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("running {}", program.to_string_lossy()))
}

/// Moves this process into a cgroup.
pub(crate) fn join(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("joining {}", cgroup.display()))
}
