//! The container image, from `deploy/Containerfile`: what a cluster runs.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use super::release::Release;
use crate::{run, workspace::Workspace};

/// Builds it of a release, and gives an OCI archive that `podman load` and `ctr image import` take.
pub(super) fn make(workspace: &Workspace, release: &Release, epoch: u64) -> Result<PathBuf> {
    let name = format!("localhost/reeve:{}", release.version);
    let archive = release.tarball.with_extension("").with_extension("oci.tar");
    // Beside the machine's own images, which stay as they are.
    let storage = workspace.target.join("images");
    let buildah = || {
        let mut command = Command::new("buildah");
        command
            .arg("--root")
            .arg(storage.join("root"))
            .arg("--runroot")
            .arg(storage.join("run"))
            .args(["--storage-driver", "vfs"]);
        command
    };
    run::output(
        buildah()
            .args(["build", "--quiet", "--layers=false", "--tag", &name])
            .args(["--timestamp", &epoch.to_string(), "--file"])
            .arg(release.folder.join("deploy/Containerfile"))
            .arg(&release.folder),
    )
    .context("building the image")?;
    if archive.exists() {
        fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    }
    let pushed = run::output(
        buildah()
            .args(["push", "--quiet", &name])
            .arg(format!("oci-archive:{}:{name}", archive.display())),
    );
    run::output(buildah().args(["rmi", "--all", "--force"]))?;
    pushed.context("writing the image")?;
    Ok(archive)
}
