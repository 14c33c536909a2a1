//! `cargo xtask lint`: clippy on all of it, the kernel programs included.

use anyhow::Result;

use crate::{run, setup, workspace::Workspace};

/// Runs clippy on the workspace and on the kernel programs.
pub(crate) fn run() -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_building(&workspace)?;
    run::run(workspace.cargo()?.args([
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))?;
    // Its own .cargo/config.toml says the target; std is compiled as in daemon/build.rs.
    let ebpf = workspace.root.join("ebpf");
    run::run(
        workspace
            .cargo()?
            .current_dir(&ebpf)
            .args([
                "clippy",
                "--locked",
                "--release",
                "--target",
                "bpfel-unknown-none",
            ])
            .args(["-Z", "build-std=core", "--", "--deny", "warnings"])
            // Lets the stable compiler take `-Z`.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", workspace.target.join("ebpf")),
    )
}
