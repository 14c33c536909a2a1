//! `cargo xtask dist`: what is released.
//!
//! In: the sources. Out, in `artefacts/` of cargo's target folder: a tarball of the static binary and
//! all that belongs to it, checksums, and on demand the container image. The same sources, compiler and
//! C library give the same bytes, wherever and whenever they are built; `--verify` shows it.

mod archive;
mod binary;
mod image;
mod inventory;
mod release;
mod sbom;
mod third_party;
mod verify;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

pub(crate) use binary::{Profile, build as build_static};
use release::Release;

use crate::{run, setup, workspace::Workspace};

/// What is made.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// Where to put it; in the target folder otherwise
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Make the container image as well
    #[arg(long)]
    image: bool,
    /// Build all of it a second time, in another folder, and compare byte by byte
    #[arg(long)]
    verify: bool,
    /// Package this static binary, rather than build one
    #[arg(long, value_name = "FILE", conflicts_with = "verify")]
    binary: Option<PathBuf>,
}

/// Sets up, builds with optimisation, and packages.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    if options.image {
        setup::for_images()?;
    }
    let out = match &options.out {
        Some(folder) => folder.clone(),
        None => workspace.target.join("artefacts"),
    };
    let epoch = source_date(&workspace)?;
    let binary = match &options.binary {
        Some(file) => file.clone(),
        None => {
            setup::for_building(&workspace)?;
            build_static(&workspace, Profile::Dist { epoch })?
        }
    };
    let release = Release::make(&workspace, &binary, epoch, &out)?;
    if options.verify {
        verify::verify(&workspace, &release, epoch)?;
    }
    let mut files = vec![release.tarball.clone(), release.publish_sbom()?];
    if options.image {
        files.push(image::make(&workspace, &release, epoch)?);
    }
    let sums = archive::checksums(&out, &files)?;
    fs::write(out.join("SHA256SUMS"), &sums).context("writing SHA256SUMS")?;
    print!("in {}:\n{sums}", out.display());
    Ok(())
}

/// The time that everything released carries, in seconds since 1970: `SOURCE_DATE_EPOCH`, as other
/// build tools know it, else that of the newest commit.
fn source_date(workspace: &Workspace) -> Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => run::output(
            Command::new("git")
                .args(["log", "-1", "--format=%ct"])
                .current_dir(&workspace.root),
        )
        .context("these sources have no history with a date: set SOURCE_DATE_EPOCH")?,
    };
    text.trim().parse().with_context(|| {
        format!(
            "SOURCE_DATE_EPOCH is `{}`: not seconds since 1970",
            text.trim()
        )
    })
}

/// All files below a folder, with their paths in it, sorted. Hidden ones are an editor's.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    fn walk(folder: &Path, below: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
        let entries =
            fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let path = below.join(entry.file_name());
            match entry.file_type()?.is_dir() {
                true => walk(&entry.path(), &path, files)?,
                false => files.push(path),
            }
        }
        Ok(())
    }
    let mut files = Vec::new();
    walk(folder, Path::new(""), &mut files)?;
    files.sort();
    Ok(files)
}
