//! The static binary: no library of the machine that it runs on, and no path of the machine that it
//! was built on.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{run, workspace::Workspace};

/// What it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// A release: optimised, and the same bytes from every machine.
    Dist {
        /// The time that it carries.
        epoch: u64,
    },
    /// Tests: what was built for them already, linked once more.
    Tests,
}

/// Builds it, and gives the file.
///
/// Only the binary itself is compiled for a static C library: the standard library decides at link
/// time, and macros, which the compiler loads, need a dynamic one.
pub(crate) fn build(workspace: &Workspace, profile: Profile) -> Result<PathBuf> {
    let mut cargo = workspace.cargo()?;
    cargo.args(["rustc", "--locked", "--package", "reeve", "--bin", "reeve"]);
    let folder = match profile {
        Profile::Dist { epoch } => {
            cargo
                .args(["--profile", "dist"])
                .env("CARGO_ENCODED_RUSTFLAGS", flags(workspace)?)
                .env("CFLAGS", c_flags()?)
                .env("SOURCE_DATE_EPOCH", epoch.to_string());
            "dist"
        }
        Profile::Tests => "debug",
    };
    cargo.args(["--", "-Ctarget-feature=+crt-static", "-Cstrip=debuginfo"]);
    run::run(cargo.env("CARGO_TARGET_DIR", &workspace.target))?;
    let built = workspace.target.join(folder).join("reeve");
    // Cargo puts the dynamic one in the same place, for those who want that.
    let place = workspace.target.join(folder).join("static");
    fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
    let binary = place.join("reeve");
    let unfinished = place.join("reeve.new");
    fs::copy(&built, &unfinished)
        .and_then(|_| fs::rename(&unfinished, &binary))
        .with_context(|| format!("copying {} to {}", built.display(), binary.display()))?;
    if profile != Profile::Tests {
        names_no_place(workspace, &binary)?;
    }
    Ok(binary)
}

/// Refuses a binary that needs anything of the machine that it will run on.
pub(super) fn is_static(binary: &Path) -> Result<()> {
    let headers = run::output(Command::new("readelf").arg("-lW").arg(binary))
        .with_context(|| format!("{} is no program", binary.display()))?;
    if headers.contains("INTERP") {
        bail!(
            "{} is linked dynamically, and would need this machine's libraries where it is run",
            binary.display()
        );
    }
    Ok(())
}

/// The folders of this machine that sources are read from, and what they are called instead.
fn places(workspace: &Workspace) -> Result<Vec<(PathBuf, String)>> {
    let verbose = run::output(Command::new("rustc").arg("-vV"))?;
    let commit = verbose
        .lines()
        .find_map(|line| line.strip_prefix("commit-hash: "))
        .context("`rustc -vV` says no commit")?;
    // What was compiled from the standard library's sources elsewhere is called so already.
    let sources = sysroot()?.join("lib/rustlib/src/rust");
    Ok(vec![
        (cargo_home()?, "/cargo".to_owned()),
        (sources, format!("/rustc/{commit}")),
        (workspace.target.clone(), "/reeve/target".to_owned()),
        (workspace.root.clone(), "/reeve".to_owned()),
    ])
}

fn flags(workspace: &Workspace) -> Result<OsString> {
    let mut flags = OsString::new();
    // The last one that fits counts, so the narrower come later.
    let mut places = places(workspace)?;
    places.sort_by_key(|(folder, _)| folder.components().count());
    for (folder, name) in places {
        if !flags.is_empty() {
            flags.push("\u{1f}");
        }
        flags.push("--remap-path-prefix=");
        flags.push(folder);
        flags.push("=");
        flags.push(name);
    }
    Ok(flags)
}

/// For the C of cryptography.
fn c_flags() -> Result<OsString> {
    let mut flags = OsString::from("-ffile-prefix-map=");
    flags.push(cargo_home()?);
    flags.push("=/cargo");
    Ok(flags)
}

/// Refuses a binary that tells where it was built.
fn names_no_place(workspace: &Workspace, binary: &Path) -> Result<()> {
    let bytes = fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
    let mut folders: Vec<_> = places(workspace)?
        .into_iter()
        .map(|(folder, _)| folder)
        .collect();
    folders.extend(env::var_os("HOME").map(PathBuf::from));
    folders.push(sysroot()?);
    for folder in folders {
        // Of root's own folder, or of a build in `/`, the name alone says nothing.
        let name = format!("{}/", folder.display());
        if folder.components().count() > 1
            && let Some(at) = bytes
                .windows(name.len())
                .position(|window| window == name.as_bytes())
        {
            let rest = &bytes[at..bytes.len().min(at + 120)];
            bail!(
                "{} names a folder of this machine: {}",
                binary.display(),
                String::from_utf8_lossy(rest).escape_debug()
            );
        }
    }
    Ok(())
}

fn sysroot() -> Result<PathBuf> {
    let printed = run::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(printed.trim()))
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(folder) = env::var_os("CARGO_HOME") {
        return Ok(folder.into());
    }
    let home = env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}
