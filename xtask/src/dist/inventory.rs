//! What the binary is made of: the packages of the daemon and of its kernel programs, the standard
//! library, and the C library that is linked in.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use spdx::Expression;

use crate::{
    run,
    workspace::{Workspace, cargo, metadata},
};

/// One part of the binary.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) version: String,
    /// An SPDX expression.
    pub(super) licence: String,
    /// Where its sources are, as its authors say.
    pub(super) repository: Option<String>,
    /// Of the package in the registry.
    pub(super) checksum: Option<String>,
    /// Its sources on this machine, where licences may be.
    pub(super) folder: Option<PathBuf>,
    /// Whether it is of this project.
    pub(super) own: bool,
    /// What it needs itself, by [`Part::key`].
    pub(super) needs: BTreeSet<String>,
}

impl Part {
    /// Tells it from all others.
    pub(super) fn key(&self) -> String {
        key(&self.name, &self.version)
    }
}

fn key(name: &str, version: &str) -> String {
    format!("{name}@{version}")
}

/// All parts, the daemon among them, by [`Part::key`].
#[derive(Debug)]
pub(super) struct Inventory {
    pub(super) parts: BTreeMap<String, Part>,
}

/// A manifest, what is built of it, and for which machine; none is this one.
const BUILT: [(&str, &str, Option<&str>); 2] = [
    ("Cargo.toml", "reeve", None),
    ("ebpf/Cargo.toml", "reeve-ebpf", Some("bpfel-unknown-none")),
];

impl Inventory {
    /// Asks cargo and the compilers.
    pub(super) fn take(workspace: &Workspace) -> Result<Self> {
        let mut parts = BTreeMap::new();
        for (manifest, package, target) in BUILT {
            let manifest = workspace.root.join(manifest);
            let built = built_of(&manifest, package, target)?;
            for part in packages(&manifest, &built)? {
                parts.entry(part.key()).or_insert(part);
            }
        }
        for part in [standard_library()?, c_library()?, unwinder()?] {
            parts.insert(part.key(), part);
        }
        Ok(Self { parts })
    }

    /// Those of others.
    pub(super) fn foreign(&self) -> impl Iterator<Item = &Part> {
        self.parts.values().filter(|part| !part.own)
    }
}

/// What a package is really built of, features that are off left out: keys.
fn built_of(manifest: &Path, package: &str, target: Option<&str>) -> Result<BTreeSet<String>> {
    let mut tree = cargo();
    tree.args(["tree", "--locked", "--package", package])
        .args(["--edges", "normal,build", "--prefix", "none"])
        .args(["--no-dedupe", "--format", "{p}", "--manifest-path"])
        .arg(manifest);
    if let Some(target) = target {
        tree.args(["--target", target]);
    }
    let tree = run::output(&mut tree)?;
    let keys = tree.lines().filter_map(|line| {
        // As in `aya v0.14.0`, perhaps with a place or a remark behind.
        let mut words = line.split(' ');
        Some(key(words.next()?, words.next()?.strip_prefix('v')?))
    });
    Ok(keys.collect())
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    dependencies: Vec<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// What cargo knows of these packages.
fn packages(manifest: &Path, wanted: &BTreeSet<String>) -> Result<Vec<Part>> {
    let metadata: Metadata = serde_json::from_value(metadata(manifest, &["--locked"])?)
        .context("reading what cargo metadata printed")?;
    let lock = manifest.with_extension("lock");
    let lock: Lock = toml::from_str(&fs::read_to_string(&lock)?)
        .with_context(|| format!("reading {}", lock.display()))?;
    let mut checksums: BTreeMap<_, _> = lock
        .package
        .into_iter()
        .filter_map(|locked| Some((key(&locked.name, &locked.version), locked.checksum?)))
        .collect();
    let keys: BTreeMap<_, _> = metadata
        .packages
        .iter()
        .map(|package| (package.id.clone(), key(&package.name, &package.version)))
        .collect();
    let mut needs: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for node in metadata.resolve.nodes {
        let of_it = node.dependencies.iter().filter_map(|id| keys.get(id));
        let of_it = of_it.filter(|key| wanted.contains(*key)).cloned();
        needs.insert(node.id, of_it.collect());
    }
    let mut parts = Vec::new();
    for package in metadata.packages {
        let key = key(&package.name, &package.version);
        if !wanted.contains(&key) {
            continue;
        }
        let licence = package
            .license
            .with_context(|| format!("{key} names no licence"))?;
        parts.push(Part {
            licence: canonical(&licence)?,
            repository: package.repository,
            checksum: checksums.remove(&key),
            folder: package.manifest_path.parent().map(Path::to_owned),
            own: package.source.is_none(),
            needs: needs.remove(&package.id).unwrap_or_default(),
            name: package.name,
            version: package.version,
        });
    }
    Ok(parts)
}

/// `MIT/Apache-2.0` is an older way to write `MIT OR Apache-2.0`.
fn canonical(licence: &str) -> Result<String> {
    let canonical = Expression::canonicalize(licence)
        .with_context(|| format!("reading the licence `{licence}`"))?;
    Ok(canonical.unwrap_or_else(|| licence.to_owned()))
}

// === what no manifest names ===

fn of_the_toolchain(name: &str, version: &str, licence: &str, repository: &str) -> Part {
    Part {
        name: name.to_owned(),
        version: version.to_owned(),
        licence: licence.to_owned(),
        repository: Some(repository.to_owned()),
        checksum: None,
        folder: None,
        own: false,
        needs: BTreeSet::new(),
    }
}

fn standard_library() -> Result<Part> {
    let verbose = run::output(Command::new("rustc").arg("-vV"))?;
    let release = verbose
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .context("`rustc -vV` says no release")?;
    Ok(of_the_toolchain(
        "rust-std",
        release,
        "MIT OR Apache-2.0",
        "https://github.com/rust-lang/rust",
    ))
}

fn c_library() -> Result<Part> {
    let version = run::output(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
    let version = version
        .trim()
        .strip_prefix("glibc ")
        .context("this machine's C library is not the GNU one")?;
    Ok(of_the_toolchain(
        "glibc",
        version,
        "LGPL-2.1-or-later",
        "https://sourceware.org/git/glibc.git",
    ))
}

/// What unwinds the stack of a thread that panics.
fn unwinder() -> Result<Part> {
    let version = run::output(Command::new("gcc").arg("-dumpfullversion"))?;
    Ok(of_the_toolchain(
        "libgcc",
        version.trim(),
        "GPL-3.0-or-later WITH GCC-exception-3.1",
        "https://gcc.gnu.org/git/gcc.git",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inventory_has_what_is_linked_and_not_what_tests_need() {
        let inventory = Inventory::take(&Workspace::find().unwrap()).unwrap();
        let has = |name: &str| inventory.parts.values().any(|part| part.name == name);
        for name in ["reeve", "rustls", "aya", "aya-ebpf", "rust-std", "glibc"] {
            assert!(has(name), "{name}");
        }
        for name in ["proptest", "reeve-tests", "xtask"] {
            assert!(!has(name), "{name}");
        }
        for part in inventory.foreign() {
            assert!(Expression::parse(&part.licence).is_ok(), "{part:?}");
        }
        let daemon = inventory.parts.values().find(|part| part.name == "reeve");
        assert!(
            daemon
                .unwrap()
                .needs
                .iter()
                .any(|key| key.starts_with("rustls@"))
        );
    }
}
