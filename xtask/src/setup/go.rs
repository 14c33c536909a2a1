//! Go, which builds the programs of others that reeve is tested with.
//!
//! The machine's own where it is new enough. Otherwise Debian's packages, unpacked into the workspace's
//! target folder, so that the machine stays as it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{apt, say};
use crate::{run, workspace::Workspace};

/// The oldest release that builds all modules.
const OLDEST: (u32, u32) = (1, 26);

/// A Go distribution.
pub(super) struct Go {
    program: PathBuf,
    /// Where its own files are; none of the machine's own, which knows.
    root: Option<PathBuf>,
}

impl Go {
    /// The machine's Go, or Debian's.
    pub(super) fn ensure(workspace: &Workspace) -> Result<Self> {
        if let Some(program) = run::find("go") {
            let go = Self {
                program,
                root: None,
            };
            if go.is_new_enough() {
                return Ok(go);
            }
        }
        let release = format!("{}.{}", OLDEST.0, OLDEST.1);
        let folder = workspace.tools().join(format!("go-{release}"));
        let root = folder.join(format!("usr/lib/go-{release}"));
        let go = Self {
            program: root.join("bin/go"),
            root: Some(root),
        };
        if !folder.is_dir() {
            from_debian(workspace, &release, &folder).with_context(|| {
                format!("no Go {release} or later: install it, so that `go` is found in PATH")
            })?;
        }
        if !go.is_new_enough() {
            bail!(
                "{} does not run: remove {}",
                go.program.display(),
                folder.display()
            );
        }
        Ok(go)
    }

    /// A command of `go` that uses this release and no other.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("GOTOOLCHAIN", "local");
        if let Some(root) = &self.root {
            command.env("GOROOT", root);
        }
        command
    }

    fn is_new_enough(&self) -> bool {
        let said = run::output(self.command().args(["env", "GOVERSION"]));
        said.is_ok_and(|said| release(&said).is_some_and(|found| found >= OLDEST))
    }
}

fn from_debian(workspace: &Workspace, release: &str, folder: &Path) -> Result<()> {
    say(&format!("unpacking Go {release} into {}", folder.display()));
    let downloads = workspace.target.join("setup");
    let packages = ["go", "src"].map(|part| format!("golang-{release}-{part}"));
    let packages = apt::from_the_first_suite(&downloads, &packages)?;
    // Renamed when it is whole. What an earlier attempt left may be half of something.
    let unfinished = folder.with_extension("new");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    apt::unpack(&packages, &unfinished)?;
    fs::rename(&unfinished, folder).with_context(|| format!("placing {}", folder.display()))?;
    fs::remove_dir_all(downloads).context("removing what is no longer needed")
}

/// Major and minor number of a release such as `go1.26.8`.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.trim().strip_prefix("go")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_go_release_is_compared_by_number() {
        assert_eq!(release("go1.26.8\n"), Some((1, 26)));
        assert!(release("go1.9.7").unwrap() < OLDEST);
        assert_eq!(release("devel +abc"), None);
    }
}
