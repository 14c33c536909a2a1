//! `cargo xtask licences`: dependencies against `deny.toml`, which cargo-deny reads as well. Done
//! here because building cargo-deny takes longer than all of reeve, and this needs no network.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use spdx::{Expression, LicenseReq, ParseMode};

use crate::{
    run,
    workspace::{Workspace, cargo},
};

/// The manifests whose dependencies end up in what is built.
const MANIFESTS: [&str; 2] = ["Cargo.toml", "ebpf/Cargo.toml"];

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
struct Banned {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

/// Checks every dependency, and reports all that break a rule.
pub(crate) fn check() -> Result<()> {
    let workspace = Workspace::find()?;
    let rules =
        fs::read_to_string(workspace.root.join("deny.toml")).context("reading deny.toml")?;
    let rules: Rules = toml::from_str(&rules).context("reading deny.toml")?;
    let mut wrong = BTreeSet::new();
    let mut checked = BTreeSet::new();
    for manifest in MANIFESTS {
        let manifest = workspace.root.join(manifest);
        if !manifest.exists() {
            continue;
        }
        let tree = dependencies(&manifest)?;
        // Members are set apart by empty lines, and what was listed before ends in `(*)`.
        for line in tree
            .lines()
            .filter(|line| !line.is_empty() && !line.ends_with("(*)"))
        {
            let mut words = line.split('|');
            let (Some(name), Some(licence)) = (words.next(), words.next()) else {
                bail!("cargo tree printed what cannot be read: {line}");
            };
            let problem = banned(&rules.bans, name).or_else(|| refused(&rules.licenses, licence));
            if let Some(problem) = problem {
                wrong.insert(format!("{name}: {problem}"));
            }
            checked.insert(line.to_owned());
        }
    }
    if !wrong.is_empty() {
        let wrong: Vec<_> = wrong.into_iter().collect();
        bail!(
            "dependencies break deny.toml:\n  - {}",
            wrong.join("\n  - ")
        );
    }
    println!(
        "{} packages checked: licences and bans are as deny.toml says",
        checked.len()
    );
    Ok(())
}

/// What a manifest's packages are really built from, one a line: `cargo metadata` would also name
/// what features that are off would need.
fn dependencies(manifest: &Path) -> Result<String> {
    let mut tree = cargo();
    tree.args([
        "tree",
        "--locked",
        "--workspace",
        "--edges",
        "normal,build,dev",
    ])
    .args([
        "--no-dedupe",
        "--prefix",
        "none",
        "--format",
        "{p}|{l}",
        "--manifest-path",
    ])
    .arg(manifest);
    run::output(&mut tree)
}

fn banned(bans: &Bans, package: &str) -> Option<String> {
    let name = package.split(' ').next()?;
    let banned = bans.deny.iter().find(|banned| banned.name == name)?;
    Some(format!("banned: {}", banned.reason))
}

/// What is wrong with a licence expression, if anything.
fn refused(licenses: &Licenses, expression: &str) -> Option<String> {
    // Lax: `MIT/Apache-2.0` is an older way to write `MIT OR Apache-2.0`.
    let Ok(parsed) = Expression::parse_mode(expression, ParseMode::LAX) else {
        return Some(format!("its licence `{expression}` cannot be read"));
    };
    let allowed = |required: &LicenseReq| licenses.allow.contains(&required.to_string());
    (!parsed.evaluate(allowed)).then(|| format!("its licence `{expression}` is not allowed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_is_allowed_when_one_choice_is() {
        let licenses = Licenses {
            allow: ["MIT", "Apache-2.0"].map(str::to_owned).into(),
        };
        assert_eq!(refused(&licenses, "MIT/Apache-2.0"), None);
        assert_eq!(refused(&licenses, "GPL-2.0-only OR MIT"), None);
        assert!(refused(&licenses, "MIT AND ISC").is_some());
        assert!(refused(&licenses, "").is_some());
    }
}
