//! What a change of policies takes away: asked where the change has no room in the kernel's maps, since
//! the old policies may stay only where that allows nobody more than the new ones do.

use std::collections::HashSet;

use reeve_common::{Direction, WorkloadId};

use super::{
    Snapshot,
    rule::{Effect, FarEnd, Mode, PortMatch, Rule},
    verdicts::RuleList,
};

impl Snapshot {
    /// The workloads and directions in which this snapshot may allow something that `new` does not. Both
    /// are of the same workloads and peers. Where that cannot be seen from the rules alone, they count.
    #[must_use]
    pub(crate) fn narrowed_by(&self, new: &Self) -> Vec<(WorkloadId, Direction)> {
        let mut narrowed = Vec::new();
        for running in self.workloads() {
            let id = running.workload.id;
            for direction in [Direction::Egress, Direction::Ingress] {
                let rules = |snapshot: &'_ Self| -> Vec<Rule> {
                    snapshot.rules_in_force(id, direction).cloned().collect()
                };
                if takes_away(&rules(self), &rules(new)) {
                    narrowed.push((id, direction));
                }
            }
        }
        narrowed
    }
}

/// The rules of a list, each once.
pub(super) fn of_list<'a>(list: &RuleList, rules: &'a [Rule]) -> impl Iterator<Item = &'a Rule> {
    let rules = list
        .rules()
        .into_iter()
        .filter_map(|rule| rules.get(rule as usize));
    rules.filter(|rule| rule.mode != Mode::DryRun)
}

/// Whether the new rules allow less than the old ones, or may do so.
fn takes_away(old: &[Rule], new: &[Rule]) -> bool {
    let refuses = |rule: &&Rule| matches!(rule.effect, Effect::NoRoom | Effect::Deny);
    let is_covered = |rule: &Rule, by: &[Rule]| {
        by.iter()
            .any(|other| other.effect == rule.effect && covers(other, rule))
    };
    let loses = old
        .iter()
        .filter(|rule| !refuses(rule))
        .any(|rule| !is_covered(rule, new));
    let refused = new
        .iter()
        .filter(refuses)
        .any(|rule| !is_covered(rule, old));
    loses || refused
}

/// Whether a rule is about everything that another one is about.
fn covers(wide: &Rule, narrow: &Rule) -> bool {
    let ports = narrow
        .ports
        .iter()
        .all(|port| wide.ports.iter().any(|wide| covers_port(wide, port)));
    if !ports {
        return false;
    }
    let known: HashSet<&FarEnd> = wide.far_ends.iter().collect();
    narrow.far_ends.iter().all(|far_end| {
        known.contains(far_end)
            || wide
                .far_ends
                .iter()
                .any(|wide| covers_far_end(wide, far_end))
    })
}

fn covers_port(wide: &PortMatch, narrow: &PortMatch) -> bool {
    match (wide, narrow) {
        (PortMatch::Everything, _) => true,
        (
            PortMatch::Protocol(protocol),
            PortMatch::Protocol(other) | PortMatch::Ports(other, _),
        ) => protocol == other,
        (PortMatch::Ports(protocol, ports), PortMatch::Ports(other, narrow)) => {
            protocol == other && ports.contains(narrow.start()) && ports.contains(narrow.end())
        }
        _ => wide == narrow,
    }
}

fn covers_far_end(wide: &FarEnd, narrow: &FarEnd) -> bool {
    match (wide, narrow) {
        (FarEnd::Anybody, _) => true,
        (FarEnd::Cidr { block, except }, FarEnd::Cidr { block: other, .. }) => {
            except.is_empty() && block.contains(other)
        }
        _ => false,
    }
}
