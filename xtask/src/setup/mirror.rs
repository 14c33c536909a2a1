//! The Debian mirror that the machine is configured for: derived, so that no host is named here.

use std::process::Command;

use anyhow::{Context, Result};

use crate::run;

/// The machine's own Debian mirror.
pub(crate) struct Mirror {
    /// Where it is.
    pub(crate) uri: String,
    /// The machine's own release.
    pub(crate) codename: String,
}

impl Mirror {
    pub(crate) fn of_this_machine() -> Result<Self> {
        let targets = run::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(CODENAME)",
            "Created-By: Packages",
        ]))?;
        targets
            .lines()
            .filter_map(|line| line.strip_prefix("Debian|Debian|")?.split_once('|'))
            // bookworm-updates and the like are parts of bookworm.
            .min_by_key(|(_, codename)| codename.len())
            .map(|(uri, codename)| Self {
                uri: uri.to_owned(),
                codename: codename.to_owned(),
            })
            .context("apt knows no Debian mirror; `apt-get update` may help")
    }
}
