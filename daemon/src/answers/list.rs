//! The policies in force.

use serde::{Deserialize, Serialize};

use crate::{
    policy::{Effect, Mode, Ports, Snapshot},
    telemetry::direction_name,
};

/// One policy. Fields of its JSON are never renamed, only added to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyRow {
    /// `namespace/name`, or `name`.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// File and line.
    pub at: String,
    /// The workloads of this node that it is for.
    pub workloads: Vec<String>,
    /// Its rules.
    pub rules: Vec<RuleRow>,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleRow {
    /// `policy/rule`.
    pub name: String,
    /// File and line.
    pub at: String,
    /// `egress` or `ingress`.
    pub direction: String,
    /// `allow` or `deny`.
    pub effect: String,
    /// It is only reported, and not enforced.
    pub dry_run: bool,
    /// Far ends, for people.
    pub far_ends: Vec<String>,
    /// Ports, for people.
    pub ports: Vec<String>,
}

/// The policies of a snapshot, in the order of their files.
#[must_use]
pub fn list(snapshot: &Snapshot) -> Vec<PolicyRow> {
    let mut rows: Vec<_> = snapshot
        .policies()
        .iter()
        .map(|policy| PolicyRow {
            name: policy.name.clone(),
            kind: policy.kind.to_owned(),
            at: format!("{}:{}", policy.file.display(), policy.line),
            workloads: snapshot
                .workloads()
                .filter(|running| snapshot.is_for(&policy.subjects, &running.workload))
                .map(|running| running.workload.name.clone())
                .collect(),
            rules: Vec::new(),
        })
        .collect();
    for rule in snapshot.rules_of_policies() {
        let name = &rule.origin.name;
        let policy = name.rsplit_once('/').map_or("", |(policy, _)| policy);
        let Some(row) = rows.iter_mut().find(|row| row.name == policy) else {
            continue;
        };
        // What the compiler made several of is one to people.
        if row.rules.iter().any(|other| other.name == *name) {
            continue;
        }
        row.rules.push(RuleRow {
            name: name.clone(),
            at: rule
                .origin
                .place()
                .map_or_else(String::new, |place| place.to_string()),
            direction: direction_name(rule.direction).to_owned(),
            effect: match rule.effect {
                Effect::NoRoom | Effect::Deny => "deny".to_owned(),
                Effect::Node | Effect::Allow | Effect::Permissive => "allow".to_owned(),
            },
            dry_run: rule.mode == Mode::DryRun,
            far_ends: rule.far_ends.iter().map(ToString::to_string).collect(),
            ports: rule
                .ports
                .iter()
                .map(|ports| Ports(ports).to_string())
                .collect(),
        });
    }
    rows
}
