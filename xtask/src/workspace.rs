//! Where things are: the workspace's root and its target folder.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::run;

/// The workspace's folders.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The folder of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Cargo's target folder, wherever configuration or environment put it.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo, so that `CARGO_TARGET_DIR` and its configuration are obeyed.
    pub(crate) fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let metadata = metadata(&manifest, &["--no-deps"])?;
        let folder = |key: &str| {
            metadata[key]
                .as_str()
                .map(PathBuf::from)
                .with_context(|| format!("cargo metadata has no {key}"))
        };
        Ok(Self {
            root: folder("workspace_root")?,
            target: folder("target_directory")?,
        })
    }

    /// Where `cargo install` puts the tools of the build.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// `PATH` with the tools of the build in front.
    pub(crate) fn path(&self) -> Result<std::ffi::OsString> {
        let before = env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.tools().join("bin")).chain(env::split_paths(&before));
        env::join_paths(folders).context("PATH or the target folder's name cannot be part of PATH")
    }

    /// A cargo command in the workspace, with the tools on its PATH.
    pub(crate) fn cargo(&self) -> Result<std::process::Command> {
        let mut command = cargo();
        command.current_dir(&self.root).env("PATH", self.path()?);
        Ok(command)
    }
}

/// The cargo that runs this.
pub(crate) fn cargo() -> std::process::Command {
    std::process::Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// What `cargo metadata` says about a manifest.
pub(crate) fn metadata(manifest: &Path, arguments: &[&str]) -> Result<serde_json::Value> {
    let mut command = cargo();
    command
        .args(["metadata", "--format-version", "1", "--manifest-path"])
        .arg(manifest)
        .args(arguments);
    let output = run::output(&mut command)?;
    serde_json::from_str(&output).context("reading what cargo metadata printed")
}
