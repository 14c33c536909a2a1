//! Tools of the build and the tests, kept in the workspace's target folder.

use std::{fs, process::Command};

use anyhow::{Context, Result};

use super::say;
use crate::{
    run,
    workspace::{Workspace, cargo},
};

/// The last release that loads the LLVM which rustc ships; later ones want one of the system's.
const BPF_LINKER: &str = "0.10.3";

pub(super) fn ensure(workspace: &Workspace) -> Result<()> {
    let tools = workspace.tools();
    let linker = tools.join("bin/bpf-linker");
    let wanted = format!("bpf-linker {BPF_LINKER}");
    if run::output(Command::new(&linker).arg("--version"))
        .is_ok_and(|version| version.trim() == wanted)
    {
        return Ok(());
    }
    say(&format!(
        "installing {wanted} into {} (about a minute)",
        tools.display()
    ));
    run::run(
        cargo()
            .args([
                "install",
                &format!("bpf-linker@{BPF_LINKER}"),
                "--locked",
                "--force",
                "--root",
            ])
            .arg(&tools)
            // In a temporary folder: nobody needs it a second time.
            .env_remove("CARGO_TARGET_DIR"),
    )
    .context("installing the linker of the kernel programs; cargo needs its registry for this")
}

/// Kubernetes' schemas, and what checks a file against them.
const KUBERNETES_VALIDATE: &str = "1.37.0";

pub(super) fn ensure_kubernetes_validate(workspace: &Workspace) -> Result<()> {
    ensure_python(workspace, "kubernetes-validate", KUBERNETES_VALIDATE, "")
}

/// CycloneDX's schemas, and what checks a bill of materials against them.
const CYCLONEDX: &str = "11.12.0";

pub(super) fn ensure_cyclonedx(workspace: &Workspace) -> Result<()> {
    let extra = "[json-validation]";
    ensure_python(workspace, "cyclonedx-python-lib", CYCLONEDX, extra)
}

/// A package of Python, in a folder of its own.
fn ensure_python(workspace: &Workspace, name: &str, version: &str, extra: &str) -> Result<()> {
    let folder = workspace.tools().join(name);
    if folder.is_dir() {
        return Ok(());
    }
    say(&format!(
        "installing {name} {version} into {}",
        folder.display()
    ));
    // Renamed when it is whole. What an earlier attempt left may be half of something.
    let unfinished = folder.with_extension("new");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    run::output(
        Command::new("pip3")
            .args(["install", "--quiet", "--target"])
            .arg(&unfinished)
            .arg(format!("{name}{extra}=={version}")),
    )
    .with_context(|| format!("installing {name}; pip needs its registry for this"))?;
    fs::rename(&unfinished, &folder).with_context(|| format!("placing {}", folder.display()))
}
