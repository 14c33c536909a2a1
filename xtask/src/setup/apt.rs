//! Packages of a Debian suite, with lists of our own on the mirror that the machine is configured
//! for, so that the machine's sources stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{mirror::Mirror, say};
use crate::run;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites by the order in which they are tried: `$` is the machine's own release.
const SUITES: [&str; 6] = [
    "$-backports",
    "$",
    "trixie-backports",
    "stable-backports",
    "testing",
    "unstable",
];

/// Downloads packages from the first suite that has all of them, into folders below `folder`.
pub(super) fn from_the_first_suite(folder: &Path, packages: &[String]) -> Result<Vec<PathBuf>> {
    if run::find("apt-get").is_none() || run::find("dpkg").is_none() {
        bail!("this machine has no apt-get and dpkg");
    }
    let mirror = Mirror::of_this_machine()?;
    let names = packages.join(" ");
    for suite in SUITES {
        let suite = suite.replace('$', &mirror.codename);
        let downloaded = Suite::open(&mirror, &suite, &folder.join(&suite))
            .and_then(|suite| packages.iter().map(|it| suite.download(it)).collect());
        match downloaded {
            Ok(files) => {
                say(&format!("taking {names} from {suite}"));
                return Ok(files);
            }
            Err(_) => say(&format!("{names} is not in {suite}")),
        }
    }
    bail!("no suite of the machine's Debian mirror has {names}")
}

/// Unpacks packages into a folder, without installing them.
pub(super) fn unpack(packages: &[PathBuf], folder: &Path) -> Result<()> {
    for package in packages {
        run::output(Command::new("dpkg").arg("-x").arg(package).arg(folder))?;
    }
    Ok(())
}

/// A suite, with its lists.
pub(crate) struct Suite {
    folder: PathBuf,
}

impl Suite {
    /// Fetches the lists of a suite into an empty folder.
    pub(crate) fn open(mirror: &Mirror, name: &str, folder: &Path) -> Result<Self> {
        // What an earlier attempt left may be half of something.
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let suite = Self {
            folder: folder.to_owned(),
        };
        fs::write(
            suite.sources(),
            format!("deb [signed-by={KEYRING}] {} {name} main\n", mirror.uri),
        )?;
        run::output(suite.apt("apt-get").args(["--error-on=any", "update"]))?;
        Ok(suite)
    }

    /// Packages that a package depends on.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let printed = run::output(self.apt("apt-cache").args(["depends", package]))?;
        Ok(printed
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads a package, and gives its file.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf> {
        run::output(self.apt("apt-get").args(["download", package]))?;
        let name = package.split('=').next().unwrap_or(package);
        fs::read_dir(self.folder.join("packages"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                file.starts_with(&format!("{name}_")) && file.ends_with(".deb")
            })
            .context("apt-get downloaded nothing")
    }

    fn sources(&self) -> PathBuf {
        self.folder.join("sources.list")
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.join("packages"));
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.sources()),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::Cache", self.folder.join("cache")),
            // apt would give its downloads to a user who may not enter our folder.
            ("APT::Sandbox::User", PathBuf::from("root")),
            ("Acquire::Languages", PathBuf::from("none")),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", value.display()));
        }
        command
    }
}
