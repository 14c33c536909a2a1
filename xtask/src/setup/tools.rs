//! The linker of the kernel programs, kept in the workspace's target folder.

use std::process::Command;

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
