//! From documents of every kind to rules, with every check that one document allows.

mod connection;
mod group;
mod network;

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use reeve_common::Direction;

use super::{
    document::{Expression, NamespaceText, RawOperator},
    population::Population,
    rule::{Effect, FarEnd, Isolation, Mode, Origin, PortMatch, Rule, Subjects},
    selector::{NamespaceSelector, Operator, Requirement},
};
use crate::yaml::{
    Document, Located, Mistake, Mistakes, NodeId,
    values::{Labels, Name, Port},
};

pub(super) use connection::connection_policy;
pub(super) use group::{Groups, identity_group};
pub(super) use network::network_policy;

/// What one document was brought to.
#[derive(Debug, Default)]
pub(super) struct Lowered {
    /// `namespace/name` or `name`, and where it stands. None where it has no name.
    pub(super) name: Option<(String, NodeId)>,
    /// Whom it is for.
    pub(super) subjects: Arc<Subjects>,
    pub(super) rules: Vec<Rule>,
    /// What it closes.
    pub(super) isolation: Option<Isolation>,
    pub(super) warnings: Vec<Mistake>,
    /// Rules that mean everybody, where that is probably not meant.
    pub(super) emptied: Vec<Mistake>,
}

/// Where a document stands and what can be said of it.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) document: &'a Document,
    /// The document itself, or an item of a list of them.
    pub(super) root: NodeId,
    /// Everybody known; none when the configuration could not be read.
    pub(super) known: Option<&'a Population<'a>>,
}

struct Lowering<'a> {
    document: &'a Document,
    known: Option<&'a Population<'a>>,
    /// Namespace of the policy.
    namespace: Option<String>,
    /// What its rules do.
    effect: Effect,
    mode: Mode,
    mistakes: &'a mut Mistakes,
    lowered: Lowered,
}

// === impl Lowered ===

impl Lowered {
    /// Has all rules of the policy `name` bear another name, and gives it.
    pub(super) fn rename(&mut self, name: &str, title: String) -> String {
        for rule in &mut self.rules {
            if let Some(rest) = rule.origin.name.strip_prefix(name) {
                rule.origin.name = format!("{title}{rest}");
            }
        }
        title
    }
}

// === impl Lowering ===

impl<'a> Lowering<'a> {
    fn new(context: Context<'a>, mistakes: &'a mut Mistakes) -> Self {
        Self {
            document: context.document,
            known: context.known,
            namespace: None,
            effect: Effect::Allow,
            mode: Mode::Enforce,
            mistakes,
            lowered: Lowered::default(),
        }
    }

    /// Notes what the policy is called.
    fn name(&mut self, metadata: NodeId, name: Option<Located<Name>>) -> String {
        let Some(name) = self.require(metadata, "name", name) else {
            return String::from("unnamed");
        };
        let title = match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", name.as_str()),
            None => name.as_str().to_owned(),
        };
        self.lowered.name = Some((title.clone(), name.node));
        title
    }

    fn mistake(&mut self, node: NodeId, what: impl Into<String>) {
        self.mistakes.push(self.document.mistake(node, what));
    }

    fn warn(&mut self, node: NodeId, what: impl Into<String>) {
        let warning = self.document.mistake(node, what);
        self.lowered.warnings.push(warning);
    }

    fn require<T>(&mut self, mapping: NodeId, field: &str, value: Option<T>) -> Option<T> {
        if value.is_none() && !self.has(mapping, field) {
            self.mistake(mapping, format!("`{field}` is missing; add it"));
        }
        value
    }

    fn has(&self, mapping: NodeId, field: &str) -> bool {
        let value = self.document.child(mapping, field);
        value.is_some_and(|value| !self.document.is_null(value))
    }

    fn rule(
        &mut self,
        name: String,
        node: NodeId,
        subjects: &Arc<Subjects>,
        direction: Direction,
        far_ends: Vec<FarEnd>,
        ports: Vec<PortMatch>,
    ) {
        self.lowered.rules.push(Rule {
            origin: Origin {
                name,
                file: Arc::clone(self.document.file()),
                line: self.document.line(node),
            },
            subjects: Arc::clone(subjects),
            direction,
            far_ends,
            ports,
            effect: self.effect,
            mode: self.mode,
        });
    }

    /// The namespaces that a text means, or the policy's own.
    fn namespace_of(&self, raw: Option<&NamespaceText>) -> NamespaceSelector {
        match raw {
            Some(NamespaceText::Every) => NamespaceSelector::Any,
            Some(NamespaceText::One(namespace)) => NamespaceSelector::Named(namespace.clone()),
            None => self
                .namespace
                .clone()
                .map_or(NamespaceSelector::Any, NamespaceSelector::Named),
        }
    }

    fn requirements(
        &mut self,
        labels: &Labels,
        expressions: &[Located<Expression>],
    ) -> Vec<Requirement> {
        let mut requirements = BTreeSet::new();
        for (key, value) in &labels.0 {
            requirements.insert(Requirement {
                key: key.clone(),
                operator: Operator::In(BTreeSet::from([value.clone()])),
            });
        }
        for expression in expressions {
            requirements.extend(self.requirement(expression));
        }
        requirements.into_iter().collect()
    }

    fn requirement(&mut self, raw: &Located<Expression>) -> Option<Requirement> {
        let key = self.require(raw.node, "key", raw.key.as_ref());
        let operator = self.require(raw.node, "operator", raw.operator)?;
        let values: BTreeSet<_> = raw.values.iter().map(|value| value.0.clone()).collect();
        let needs_values = matches!(operator, RawOperator::In | RawOperator::NotIn);
        if needs_values && values.is_empty() && !self.has_items(raw.node, "values") {
            self.mistake(raw.node, format!("`{operator:?}` needs `values`; add them"));
        }
        if !needs_values && self.has_items(raw.node, "values") {
            self.mistake(
                raw.node,
                format!("`{operator:?}` takes no `values`; remove them"),
            );
        }
        Some(Requirement {
            key: key?.0.clone(),
            operator: match operator {
                RawOperator::In => Operator::In(values),
                RawOperator::NotIn => Operator::NotIn(values),
                RawOperator::Exists => Operator::Exists,
                RawOperator::DoesNotExist => Operator::DoesNotExist,
            },
        })
    }

    fn has_items(&self, mapping: NodeId, field: &str) -> bool {
        let list = self.document.child(mapping, field);
        list.and_then(|list| self.document.items(list))
            .is_some_and(|items| items > 0)
    }

    fn cidr(&mut self, block: IpNet, holes: impl IntoIterator<Item = (NodeId, IpNet)>) -> FarEnd {
        let mut except = BTreeSet::new();
        for (node, hole) in holes {
            if hole == block || !block.contains(&hole) {
                self.mistake(
                    node,
                    format!("`{hole}` is not a smaller network in `{block}`; correct it"),
                );
            }
            except.insert(hole);
        }
        FarEnd::Cidr {
            block,
            except: except.into_iter().collect(),
        }
    }

    /// The ports of a protocol from `first` to `last`, where it is given.
    fn range(
        &mut self,
        node: NodeId,
        protocol: u8,
        first: Option<u16>,
        last: Option<Port>,
    ) -> Option<PortMatch> {
        match (first, last) {
            (None, None) => Some(PortMatch::Protocol(protocol)),
            (None, Some(_)) => {
                if !self.has(node, "port") {
                    self.mistake(node, "has `endPort` without `port`; add the first port");
                }
                None
            }
            (Some(first), None) => Some(PortMatch::Ports(protocol, first..=first)),
            (Some(first), Some(last)) => {
                if last.0 < first {
                    self.mistake(
                        node,
                        format!("`endPort` {} lies below `port` {first}; swap them", last.0),
                    );
                }
                Some(PortMatch::Ports(protocol, first..=last.0))
            }
        }
    }
}
