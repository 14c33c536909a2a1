//! `--verify`: the release once more, from a copy of the sources at another place, in a target folder
//! of its own, compared byte by byte.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};

use super::{Profile, build_static, files_below, release::Release};
use crate::{run, workspace::Workspace};

/// Builds the other one, and names every file that differs.
pub(super) fn verify(workspace: &Workspace, release: &Release, epoch: u64) -> Result<()> {
    let started = Instant::now();
    let place = workspace.target.join("verify");
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("removing {}", place.display()))?;
    }
    let other = Workspace {
        root: place.join("elsewhere/sources"),
        target: place.join("built"),
    };
    copy_sources(workspace, &other.root)?;
    // The tools are no part of what is compared.
    fs::create_dir_all(&other.target)?;
    std::os::unix::fs::symlink(workspace.tools(), other.tools())?;
    println!(
        "building all of it a second time, in {}",
        other.root.display()
    );
    let binary = build_static(&other, Profile::Dist { epoch })?;
    let again = Release::make(&other, &binary, epoch, &place.join("artefacts"))?;
    compare(release, &again)?;
    println!(
        "two builds in two folders are the same, byte by byte ({} s for the second)",
        started.elapsed().as_secs()
    );
    fs::remove_dir_all(&place).with_context(|| format!("removing {}", place.display()))
}

/// Copies what git knows, or would if it were told, as it is now.
fn copy_sources(workspace: &Workspace, to: &Path) -> Result<()> {
    let listed = run::output(
        Command::new("git")
            .args([
                "ls-files",
                "-z",
                "--cached",
                "--others",
                "--exclude-standard",
            ])
            .current_dir(&workspace.root),
    )?;
    for path in listed.split('\0').filter(|path| !path.is_empty()) {
        let (from, to) = (workspace.root.join(path), to.join(path));
        let folder = to.parent().context("files are in folders")?;
        // What is listed may have been removed.
        if from.exists() {
            fs::create_dir_all(folder)
                .and_then(|()| fs::copy(&from, &to))
                .with_context(|| format!("copying {path}"))?;
        }
    }
    Ok(())
}

fn compare(one: &Release, other: &Release) -> Result<()> {
    let files: BTreeSet<PathBuf> = files_below(&one.folder)?
        .into_iter()
        .chain(files_below(&other.folder)?)
        .collect();
    let differ: Vec<_> = files
        .iter()
        .filter(|path| {
            fs::read(one.folder.join(path)).ok() != fs::read(other.folder.join(path)).ok()
        })
        .map(|path| path.display().to_string())
        .collect();
    if !differ.is_empty() {
        bail!(
            "two builds of the same sources differ in {}; they are at {} and {}",
            differ.join(", "),
            one.folder.display(),
            other.folder.display()
        );
    }
    if fs::read(&one.tarball)? != fs::read(&other.tarball)? {
        bail!(
            "the files are the same, and {} and {} differ",
            one.tarball.display(),
            other.tarball.display()
        );
    }
    Ok(())
}
