//! What is tried in the guests: the daemon, the tests, the shipped units.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Plan;
use crate::{build, dist, run, workspace::Workspace};

/// Puts it all into a folder.
pub(super) fn gather(workspace: &Workspace, folder: &Path, plan: &Plan) -> Result<PathBuf> {
    let built = build::build(workspace, &build::Options::default())?;
    // The units allow one static program.
    let daemon = dist::build_static(workspace, dist::Profile::Tests)?;
    let payload = folder.join("payload");
    if payload.exists() {
        fs::remove_dir_all(&payload)?;
    }
    fs::create_dir_all(&payload)?;
    let place = |from: &Path, name: &str| {
        // Without what only a debugger reads, which is most of it.
        run::output(
            Command::new("strip")
                .arg("-g")
                .arg("-o")
                .args([&payload.join(name), from]),
        )
    };
    place(&daemon, "reeve")?;
    place(&built.peer, "peer")?;
    place(&env::current_exe()?, "xtask")?;
    for name in ["datapath", "e2e"] {
        place(&test(workspace, name)?, name)?;
    }
    for (name, text) in [
        ("plan", plan.for_guest().as_str()),
        ("run.sh", include_str!("guest/run.sh")),
        ("load.sh", include_str!("guest/load.sh")),
        ("units.sh", include_str!("guest/units.sh")),
    ] {
        fs::write(payload.join(name), text)?;
    }
    for unit in ["reeve.service", "reeve-guard.service"] {
        fs::copy(workspace.root.join("deploy").join(unit), payload.join(unit))
            .with_context(|| format!("copying deploy/{unit}"))?;
    }
    Ok(payload)
}

/// Builds a test, and gives its program. With fewer packages than `cargo xtask test` has, others of their
/// features would be on, and nearly everything would be compiled again.
fn test(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    let printed = run::output(
        workspace
            .cargo()?
            .args(["test", "--locked", "--workspace", "--no-run"])
            .args(["--message-format", "json", "--test", name])
            .stderr(std::process::Stdio::inherit()),
    )?;
    for line in printed.lines() {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        if message["target"]["name"] == name
            && let Some(program) = message["executable"].as_str()
        {
            return Ok(program.into());
        }
    }
    bail!("cargo built no test {name}")
}
