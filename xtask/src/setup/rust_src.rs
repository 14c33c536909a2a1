//! The compiler's own library sources, of exactly its version: the kernel programs' `core` is
//! compiled from them.
//!
//! rustup is asked first. Where it has no server to reach, Debian's package `rust-src` of the same
//! version holds the same files; it is looked for with lists of our own, on the mirror that the
//! machine is configured for, so that the machine's sources stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{apt, say};
use crate::{run, workspace::Workspace};

/// rustup answers in seconds or has no server; it must not hold up the fallback.
const RUSTUP: Duration = Duration::from_secs(60);

pub(super) fn ensure(workspace: &Workspace) -> Result<()> {
    let sysroot =
        PathBuf::from(run::output(Command::new("rustc").args(["--print", "sysroot"]))?.trim());
    let library = sysroot.join("lib/rustlib/src/rust/library");
    // The file that cargo itself looks for.
    if library.join("Cargo.lock").is_file() {
        return Ok(());
    }
    let version = compiler_version()?;
    say(&format!(
        "adding the library sources of rustc {version} with rustup"
    ));
    let asked = run::within(
        RUSTUP,
        Command::new("rustup")
            .args(["component", "add", "rust-src"])
            .current_dir(&workspace.root)
            .env("RUSTUP_MAX_RETRIES", "0"),
    );
    if asked.is_ok() && library.join("Cargo.lock").is_file() {
        return Ok(());
    }
    say("rustup could not; looking for Debian's package of the same version");
    from_debian(workspace, &version, &library).with_context(|| {
        format!(
            "no library sources of rustc {version}: put them at {}",
            library.display()
        )
    })
}

fn compiler_version() -> Result<String> {
    let verbose = run::output(Command::new("rustc").arg("-vV"))?;
    verbose
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .map(str::to_owned)
        .context("`rustc -vV` says no release")
}

fn from_debian(workspace: &Workspace, version: &str, library: &Path) -> Result<()> {
    let folder = workspace.target.join("setup");
    let packages = apt::from_the_first_suite(&folder, &[format!("rust-src={version}*")])?;
    unpack(&packages, version, &folder, library)
}

fn unpack(packages: &[PathBuf], version: &str, folder: &Path, library: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    apt::unpack(packages, &unpacked)?;
    let source = unpacked.join(format!("usr/src/rustc-{version}/library"));
    let above = library.parent().context("the sysroot has no parent")?;
    fs::create_dir_all(above).with_context(|| format!("making {}", above.display()))?;
    // Copied to a neighbour and renamed: cargo sees all of it or nothing.
    let neighbour = library.with_extension("new");
    run::output(
        Command::new("cp")
            .args(["-r", "-T"])
            .args([source.as_path(), neighbour.as_path()]),
    )?;
    fs::rename(&neighbour, library).with_context(|| format!("placing {}", library.display()))?;
    fs::remove_dir_all(folder).context("removing what is no longer needed")
}
