//! `cargo xtask setup`: makes a Debian-like machine ready. Looks first, says what it does, and
//! does nothing where nothing is lacking.
//!
//! Everything that a build needs goes into the workspace's target folder, except the compiler's
//! own library sources: cargo looks for those beside the compiler only.

mod apt;
mod go;
mod host;
mod machine;
mod mirror;
mod packages;
mod rust_src;
mod spire;
mod tools;

use anyhow::Result;

pub(crate) use apt::Suite;
pub(crate) use mirror::Mirror;
pub(crate) use spire::Spire;

use crate::workspace::Workspace;

/// `cargo xtask setup`.
pub(crate) fn everything() -> Result<()> {
    for_running(&Workspace::find()?)?;
    println!("ready: try `cargo xtask demo` or `cargo xtask test`");
    Ok(())
}

/// What building lacks.
pub(crate) fn for_building(workspace: &Workspace) -> Result<()> {
    rust_src::ensure(workspace)?;
    tools::ensure(workspace)
}

/// What making container images lacks.
pub(crate) fn for_images() -> Result<()> {
    packages::ensure(&packages::IMAGES)
}

/// What building and running lack. The host is looked at first: nobody should wait for a build
/// to learn that the kernel is too old.
pub(crate) fn for_running(workspace: &Workspace) -> Result<()> {
    host::ensure()?;
    packages::ensure(&packages::TESTS)?;
    for_images()?;
    tools::ensure_kubernetes_validate(workspace)?;
    tools::ensure_cyclonedx(workspace)?;
    machine::ensure(workspace)?;
    for_building(workspace)
}

/// What booting other kernels lacks.
pub(crate) fn for_kernels() -> Result<()> {
    packages::ensure(&packages::KERNELS)
}

/// What running reeve with other implementations lacks.
pub(crate) fn for_peers(workspace: &Workspace) -> Result<Spire> {
    spire::ensure(workspace)
}

/// Says what is being done.
pub(crate) fn say(what: &str) {
    println!("setup: {what}");
}
