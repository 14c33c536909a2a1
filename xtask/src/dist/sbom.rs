//! The bill of materials, in CycloneDX's JSON.
//!
//! Written here: cargo-cyclonedx describes what a manifest could be built of, features that are off
//! included, and knows neither the kernel programs nor what no manifest names.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::inventory::{Inventory, Part};

/// Renders it, with the time that the release carries and no serial number, which would differ
/// each time.
pub(super) fn render(inventory: &Inventory, version: &str, epoch: u64) -> Result<String> {
    let time = UNIX_EPOCH
        .checked_add(Duration::from_secs(epoch))
        .context("SOURCE_DATE_EPOCH is too far in the future")?;
    let (main, others): (Vec<_>, Vec<_>) = inventory
        .parts
        .values()
        .partition(|part| part.own && part.name == "reeve");
    let main = main.first().context("the daemon is part of itself")?;
    let mut component = component(main, "application");
    component["version"] = version.into();
    let described = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": humantime::format_rfc3339_seconds(time).to_string(),
            "tools": {"components": [
                {"type": "application", "name": "cargo xtask dist", "version": version},
            ]},
            "component": component,
        },
        "components": others
            .iter()
            .map(|part| self::component(part, "library"))
            .collect::<Vec<_>>(),
        "dependencies": inventory.parts.values().map(needs).collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&described)? + "\n")
}

fn component(part: &Part, kind: &str) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": part.key(),
        "name": part.name,
        "version": part.version,
        "licenses": [{"expression": part.licence}],
    });
    if let Some(checksum) = &part.checksum {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        component["purl"] = format!("pkg:cargo/{}@{}", part.name, part.version).into();
    }
    if let Some(repository) = &part.repository {
        component["externalReferences"] = json!([{"type": "vcs", "url": repository}]);
    }
    component
}

fn needs(part: &Part) -> Value {
    json!({"ref": part.key(), "dependsOn": part.needs})
}
