//! The folder that the tarball is made of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{archive, binary, files_below, inventory::Inventory, sbom, third_party};
use crate::{
    run,
    workspace::{Workspace, metadata},
};

/// What is taken from the sources as it is.
const FOLDERS: [&str; 3] = ["deploy", "docs", "examples"];
const FILES: [&str; 6] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
];

/// Shells, each with the file that it wants its completions in.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "reeve.bash"),
    ("zsh", "_reeve"),
    ("fish", "reeve.fish"),
];

const SBOM: &str = "reeve.cdx.json";

/// A release that is made.
#[derive(Debug)]
pub(super) struct Release {
    /// Of reeve.
    pub(super) version: String,
    /// The folder with all of its files.
    pub(super) folder: PathBuf,
    /// The same, packed.
    pub(super) tarball: PathBuf,
}

impl Release {
    /// Collects everything into a folder of `out`, and packs it.
    pub(super) fn make(
        workspace: &Workspace,
        binary: &Path,
        epoch: u64,
        out: &Path,
    ) -> Result<Self> {
        binary::is_static(binary)?;
        let version = version(workspace)?;
        let name = format!("reeve-{version}-linux-{}", std::env::consts::ARCH);
        let folder = out.join(&name);
        // What an earlier run left may have files that are no longer there.
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("removing {}", folder.display()))?;
        }
        let release = Self {
            version,
            tarball: out.join(format!("{name}.tar.gz")),
            folder,
        };
        release.put_binary(binary)?;
        release.put_sources(workspace)?;
        let inventory = Inventory::take(workspace)?;
        let texts = third_party::render(&inventory)?;
        release.put("THIRD-PARTY.md", &texts)?;
        let sbom = sbom::render(&inventory, &release.version, epoch)?;
        release.put(SBOM, &sbom)?;
        let files: Vec<_> = files_below(&release.folder)?
            .iter()
            .map(|path| release.folder.join(path))
            .collect();
        let sums = archive::checksums(&release.folder, &files)?;
        release.put("SHA256SUMS", &sums)?;
        archive::pack(&release.folder, epoch, &release.tarball)?;
        Ok(release)
    }

    /// Puts the bill of materials beside the tarball as well, and gives it.
    pub(super) fn publish_sbom(&self) -> Result<PathBuf> {
        let beside = self.tarball.with_extension("").with_extension("cdx.json");
        fs::copy(self.folder.join(SBOM), &beside)
            .with_context(|| format!("writing {}", beside.display()))?;
        Ok(beside)
    }

    /// The binary, and what it tells of itself.
    fn put_binary(&self, binary: &Path) -> Result<()> {
        let reeve = self.folder.join("bin/reeve");
        let manual = self.folder.join("share/man/man1");
        for folder in [&self.folder.join("bin"), &manual] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        fs::copy(binary, &reeve).with_context(|| format!("copying {}", binary.display()))?;
        run::output(Command::new(&reeve).args(["man", "--folder"]).arg(&manual))?;
        for (shell, file) in COMPLETIONS {
            let script = run::output(Command::new(&reeve).args(["completions", shell]))?;
            self.put(format!("share/completions/{file}"), &script)?;
        }
        Ok(())
    }

    fn put_sources(&self, workspace: &Workspace) -> Result<()> {
        let mut files: Vec<_> = FILES.map(PathBuf::from).into();
        for folder in FOLDERS {
            let below = files_below(&workspace.root.join(folder))?;
            files.extend(below.iter().map(|path| Path::new(folder).join(path)));
        }
        for path in files {
            let text = fs::read_to_string(workspace.root.join(&path))
                .with_context(|| format!("reading {}", path.display()))?;
            self.put(path, &text)?;
        }
        Ok(())
    }

    fn put(&self, path: impl AsRef<Path>, text: &str) -> Result<()> {
        let file = self.folder.join(path);
        let folder = file.parent().context("files are in folders")?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&file, text))
            .with_context(|| format!("writing {}", file.display()))
    }
}

fn version(workspace: &Workspace) -> Result<String> {
    let metadata = metadata(&workspace.root.join("daemon/Cargo.toml"), &["--no-deps"])?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let version = packages
        .filter(|package| package["name"] == "reeve")
        .find_map(|package| package["version"].as_str());
    Ok(version.context("cargo metadata has no reeve")?.to_owned())
}
