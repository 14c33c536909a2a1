//! SPIRE, built from Go modules: the server and the agent that `cargo xtask peers` runs.
//!
//! `spire/go.mod` has the version, `spire/go.sum` the checksums of all modules.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use super::{go::Go, say};
use crate::{run, workspace::Workspace};

const PACKAGES: [&str; 2] = [
    "github.com/spiffe/spire/cmd/spire-server",
    "github.com/spiffe/spire/cmd/spire-agent",
];

/// SPIRE's programs.
#[derive(Debug)]
pub(crate) struct Spire {
    pub(crate) server: PathBuf,
    pub(crate) agent: PathBuf,
}

/// Builds what is not there for these checksums.
pub(crate) fn ensure(workspace: &Workspace) -> Result<Spire> {
    let folder = workspace.tools().join("spire");
    let spire = Spire {
        server: folder.join("spire-server"),
        agent: folder.join("spire-agent"),
    };
    let module = workspace.root.join("xtask/src/setup/spire");
    let sums = fs::read(module.join("go.sum")).context("reading SPIRE's checksums")?;
    // Written last.
    let built = folder.join("go.sum");
    if fs::read(&built).is_ok_and(|built| built == sums) {
        return Ok(spire);
    }
    let go = Go::ensure(workspace)?;
    say(&format!(
        "building SPIRE into {} (about 7 minutes on 2 cores, and 4 GB of memory)",
        folder.display()
    ));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    run::run(
        go.command()
            .current_dir(&module)
            // The server's database is SQLite.
            .env("CGO_ENABLED", "1")
            .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false"])
            .args(["-ldflags", "-s -w", "-o"])
            .arg(&folder)
            .args(PACKAGES),
    )
    .context("building SPIRE; Go needs its module proxy and a C compiler for this")?;
    fs::write(&built, sums).with_context(|| format!("writing {}", built.display()))?;
    Ok(spire)
}
