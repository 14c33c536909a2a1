//! The rules that nobody writes: for the node's own agent, for permissive workloads, and for what
//! no policy is about.

use std::{collections::HashMap, net::IpAddr, path::Path, sync::Arc};

use ipnet::IpNet;
use reeve_common::Direction;

use super::{
    Inputs,
    rule::{Effect, FarEnd, Mode, Origin, PortMatch, Rule, Subjects, Unselected},
    verdicts::RuleIndex,
};
use crate::workload::Workload;

/// Name of the rule that lets the node's own agent in.
const NODE: &str = "node";
/// Name of the rule that lets plaintext in to a permissive workload.
const PERMISSIVE: &str = "permissive";
/// Name of the rule for a direction that no policy is about.
const UNSELECTED: &str = "unselected";

/// The rules, each made when it is first needed.
pub(super) struct Implicit {
    node: Option<RuleIndex>,
    others: HashMap<(Direction, Effect, Mode), RuleIndex>,
}

// === impl Implicit ===

impl Implicit {
    pub(super) fn new(node_addresses: &[IpAddr], rules: &mut Vec<Rule>) -> Self {
        let block = |address: &IpAddr| FarEnd::Cidr {
            block: IpNet::from(address.to_canonical()),
            except: Vec::new(),
        };
        let node = (!node_addresses.is_empty()).then(|| {
            let far_ends = node_addresses.iter().map(block).collect();
            let (direction, mode) = (Direction::Ingress, Mode::Enforce);
            add(rules, NODE, direction, far_ends, Effect::Node, mode)
        });
        Self {
            node,
            others: HashMap::new(),
        }
    }

    /// Adds the rules of a workload to those that the policies have for it.
    pub(super) fn add(
        &mut self,
        inputs: &Inputs<'_>,
        workload: &Workload,
        rules: &mut Vec<Rule>,
        egress: &mut Vec<RuleIndex>,
        ingress: &mut Vec<RuleIndex>,
    ) {
        ingress.extend(self.node);
        if workload.permissive {
            let (direction, mode) = (Direction::Ingress, Mode::Enforce);
            ingress.push(self.rule(rules, PERMISSIVE, direction, Effect::Permissive, mode));
        }
        if inputs.unselected == Unselected::Deny {
            return;
        }
        for (direction, list) in [(Direction::Egress, egress), (Direction::Ingress, ingress)] {
            if let Some(mode) = open(inputs, workload, direction) {
                list.push(self.rule(rules, UNSELECTED, direction, Effect::Allow, mode));
            }
        }
    }

    fn rule(
        &mut self,
        rules: &mut Vec<Rule>,
        name: &str,
        direction: Direction,
        effect: Effect,
        mode: Mode,
    ) -> RuleIndex {
        let key = (direction, effect, mode);
        *self
            .others
            .entry(key)
            .or_insert_with(|| add(rules, name, direction, vec![FarEnd::Anybody], effect, mode))
    }
}

/// Whether no policy is about this direction of a workload, now or if the dry runs were in force.
fn open(inputs: &Inputs<'_>, workload: &Workload, direction: Direction) -> Option<Mode> {
    let isolated = |mode: Mode| {
        inputs.policies.isolations.iter().any(|isolation| {
            let about = match direction {
                Direction::Egress => isolation.egress,
                Direction::Ingress => isolation.ingress,
            };
            about
                && isolation.mode == mode
                && isolation.subjects.matches(workload, inputs.namespaces)
        })
    };
    if isolated(Mode::Enforce) {
        return None;
    }
    Some(if isolated(Mode::DryRun) {
        Mode::NotInDryRun
    } else {
        Mode::Enforce
    })
}

fn add(
    rules: &mut Vec<Rule>,
    name: &str,
    direction: Direction,
    far_ends: Vec<FarEnd>,
    effect: Effect,
    mode: Mode,
) -> RuleIndex {
    // The sizes of the files bound the number of rules far below u32.
    let index = RuleIndex::try_from(rules.len()).unwrap_or(RuleIndex::MAX);
    rules.push(Rule {
        origin: Origin {
            name: name.to_owned(),
            file: Path::new("").into(),
            line: 0,
        },
        subjects: Arc::new(Subjects::default()),
        direction,
        far_ends,
        ports: vec![PortMatch::Everything],
        effect,
        mode,
    });
    index
}
