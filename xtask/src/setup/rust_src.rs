//! The compiler's own library sources, of exactly its version: the kernel programs' `core` is
//! compiled from them.
//!
//! rustup is asked first. Where it has no server to reach, Debian's package `rust-src` of the same
//! version holds the same files; it is looked for with lists of our own, on the mirror that the
//! machine is configured for, so that the machine's sources stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::{mirror::Mirror, say};
use crate::{run, workspace::Workspace};

/// rustup answers in seconds or has no server; it must not hold up the fallback.
const RUSTUP: Duration = Duration::from_secs(60);

/// Debian's suites, by the order in which they are tried: `$` is the machine's own release.
const SUITES: [&str; 6] = [
    "$-backports",
    "$",
    "trixie-backports",
    "stable-backports",
    "testing",
    "unstable",
];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

pub(super) fn ensure(workspace: &Workspace) -> Result<()> {
    let sysroot =
        PathBuf::from(run::output(Command::new("rustc").args(["--print", "sysroot"]))?.trim());
    let library = sysroot.join("lib/rustlib/src/rust/library");
    // The file that cargo itself looks for.
    if library.join("Cargo.lock").is_file() {
        return Ok(());
    }
    let version = compiler_version()?;
    say(&format!(
        "adding the library sources of rustc {version} with rustup"
    ));
    let asked = run::within(
        RUSTUP,
        Command::new("rustup")
            .args(["component", "add", "rust-src"])
            .current_dir(&workspace.root)
            .env("RUSTUP_MAX_RETRIES", "0"),
    );
    if asked.is_ok() && library.join("Cargo.lock").is_file() {
        return Ok(());
    }
    say("rustup could not; looking for Debian's package of the same version");
    from_debian(workspace, &version, &library).with_context(|| {
        format!(
            "no library sources of rustc {version}: put them at {}",
            library.display()
        )
    })
}

fn compiler_version() -> Result<String> {
    let verbose = run::output(Command::new("rustc").arg("-vV"))?;
    verbose
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .map(str::to_owned)
        .context("`rustc -vV` says no release")
}

fn from_debian(workspace: &Workspace, version: &str, library: &Path) -> Result<()> {
    if run::find("apt-get").is_none() || run::find("dpkg").is_none() {
        bail!("this machine has no apt-get, and rustup no server");
    }
    let mirror = Mirror::of_this_machine()?;
    let folder = workspace.target.join("setup");
    for suite in SUITES {
        let suite = suite.replace('$', &mirror.codename);
        match package(&mirror, &suite, version, &folder) {
            Ok(package) => {
                say(&format!("unpacking {} of {suite}", package.display()));
                return unpack(&package, version, &folder, library);
            }
            Err(_) => say(&format!("it is not in {suite}")),
        }
    }
    bail!("no suite of the machine's Debian mirror has rust-src {version}")
}

/// Downloads the package from one suite.
fn package(mirror: &Mirror, suite: &str, version: &str, folder: &Path) -> Result<PathBuf> {
    let folder = folder.join(suite);
    // What an earlier attempt left may be half of something.
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    for part in ["lists/partial", "cache/archives/partial", "package"] {
        fs::create_dir_all(folder.join(part))?;
    }
    let list = folder.join("sources.list");
    fs::write(
        &list,
        format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror.uri),
    )?;
    let apt_get = || {
        let mut command = Command::new("apt-get");
        command.current_dir(folder.join("package"));
        for (option, value) in [
            ("Dir::Etc::sourcelist", list.clone()),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", folder.join("lists")),
            ("Dir::Cache", folder.join("cache")),
            // apt would give its downloads to a user who may not enter our folder.
            ("APT::Sandbox::User", PathBuf::from("root")),
            ("Acquire::Languages", PathBuf::from("none")),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", value.display()));
        }
        command
    };
    run::output(apt_get().args(["--error-on=any", "update"]))?;
    run::output(apt_get().args(["download", &format!("rust-src={version}*")]))?;
    fs::read_dir(folder.join("package"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded nothing")
}

fn unpack(package: &Path, version: &str, folder: &Path, library: &Path) -> Result<()> {
    let unpacked = folder.join("unpacked");
    run::output(
        Command::new("dpkg")
            .arg("-x")
            .args([package, unpacked.as_path()]),
    )?;
    let source = unpacked.join(format!("usr/src/rustc-{version}/library"));
    let above = library.parent().context("the sysroot has no parent")?;
    fs::create_dir_all(above).with_context(|| format!("making {}", above.display()))?;
    // Copied to a neighbour and renamed: cargo sees all of it or nothing.
    let neighbour = library.with_extension("new");
    run::output(
        Command::new("cp")
            .args(["-r", "-T"])
            .args([source.as_path(), neighbour.as_path()]),
    )?;
    fs::rename(&neighbour, library).with_context(|| format!("placing {}", library.display()))?;
    fs::remove_dir_all(folder).context("removing what is no longer needed")
}
