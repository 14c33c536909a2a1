//! The files of a small Debian with a systemd of its own, which the tests of the service boot in a
//! container. Kept in the workspace's target folder.

use std::{fs, process::Command};

use anyhow::{Context, Result};

use super::{mirror::Mirror, say};
use crate::{run, workspace::Workspace};

/// The newest stable Debian.
const SUITE: &str = "trixie";

pub(super) fn ensure(workspace: &Workspace) -> Result<()> {
    let machines = workspace.target.join("machines");
    let files = machines.join(SUITE);
    if files.is_dir() {
        return Ok(());
    }
    say(&format!(
        "installing Debian {SUITE} into {} for tests with a systemd of their own (about a minute)",
        files.display()
    ));
    fs::create_dir_all(&machines).with_context(|| format!("making {}", machines.display()))?;
    // Renamed when it is whole. What an earlier attempt left may be half of something.
    let unfinished = machines.join(format!("{SUITE}.new"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    let mirror = Mirror::of_this_machine()?;
    run::output(
        Command::new("debootstrap")
            .args(["--variant=minbase", "--include=systemd,systemd-sysv,dbus"])
            .arg(SUITE)
            .arg(&unfinished)
            .arg(&mirror.uri),
    )
    .context("installing a Debian for tests")?;
    fs::rename(&unfinished, &files).with_context(|| format!("placing {}", files.display()))
}
