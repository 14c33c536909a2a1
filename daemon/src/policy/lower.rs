//! From a `ConnectionPolicy` to rules, with every check that one document allows.

use std::{collections::BTreeSet, sync::Arc};

use reeve_common::{Direction, protocol};

use super::{
    document::{
        ConnectionPolicy, Expression, NamespaceText, RawFarEnd, RawOperator, RawPort, RawProtocol,
        RawSubjects, Spec,
    },
    population::Population,
    rule::{FarEnd, Origin, PortMatch, Rule, Subjects},
    selector::{AttributeSelector, Operator, Requirement},
};
use crate::yaml::{
    Document, Located, Mistake, Mistakes, NodeId, nearest,
    values::{Labels, Name},
};

/// What one document was brought to.
#[derive(Debug, Default)]
pub(super) struct Lowered {
    /// `namespace/name` or `name`, and where it stands. None where it has no name.
    pub(super) name: Option<(String, NodeId)>,
    pub(super) rules: Vec<Rule>,
    pub(super) warnings: Vec<Mistake>,
}

struct Lowering<'a> {
    document: &'a Document,
    /// Everybody known; none when the configuration could not be read.
    known: Option<&'a Population<'a>>,
    /// Namespace of the policy.
    namespace: Option<String>,
    mistakes: &'a mut Mistakes,
    lowered: Lowered,
}

/// Brings a document into the form of all rules. What comes with mistakes is not to be used.
pub(super) fn lower(
    document: &Document,
    policy: ConnectionPolicy,
    known: Option<&Population<'_>>,
    mistakes: &mut Mistakes,
) -> Lowered {
    let mut lowering = Lowering {
        document,
        known,
        namespace: None,
        mistakes,
        lowered: Lowered::default(),
    };
    let root = document.root();
    let metadata = lowering.require(root, "metadata", policy.metadata);
    let spec = lowering.require(root, "spec", policy.spec);
    let mut title = String::from("unnamed");
    if let Some(metadata) = metadata {
        lowering.namespace = metadata.namespace.as_ref().map(|n| n.as_str().to_owned());
        let name = metadata.value.name;
        if let Some(name) = lowering.require(metadata.node, "name", name) {
            title = match &lowering.namespace {
                Some(namespace) => format!("{namespace}/{}", name.as_str()),
                None => name.as_str().to_owned(),
            };
            lowering.lowered.name = Some((title.clone(), name.node));
        }
    }
    if let Some(spec) = spec {
        lowering.spec(&title, spec);
    }
    lowering.lowered
}

// === impl Lowering ===

impl Lowering<'_> {
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

    fn spec(&mut self, title: &str, spec: Located<Spec>) {
        let raw = &spec.value;
        let subjects = self.require(spec.node, "workloads", raw.workloads.as_ref());
        let subjects = Arc::new(subjects.map_or_else(Subjects::default, |s| self.subjects(s)));
        if raw.ingress.is_empty() && raw.egress.is_empty() {
            self.warn(spec.node, "has no rule, so it allows nothing");
        }
        for (index, rule) in raw.ingress.iter().enumerate() {
            let far_ends = self.far_ends(rule.node, "from", rule.from.as_ref(), Direction::Ingress);
            let ports = self.ports(rule.node, rule.ports.as_deref());
            let name = format!("{title}/ingress[{index}]");
            self.rule(
                name,
                rule.node,
                &subjects,
                Direction::Ingress,
                far_ends,
                ports,
            );
        }
        for (index, rule) in raw.egress.iter().enumerate() {
            let far_ends = self.far_ends(rule.node, "to", rule.to.as_ref(), Direction::Egress);
            let ports = self.ports(rule.node, rule.ports.as_deref());
            let name = format!("{title}/egress[{index}]");
            self.rule(
                name,
                rule.node,
                &subjects,
                Direction::Egress,
                far_ends,
                ports,
            );
        }
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
        });
    }

    fn subjects(&mut self, raw: &Located<RawSubjects>) -> Subjects {
        let before = self.mistakes.len();
        if let (Some(own), Some(written)) = (self.namespace.clone(), &raw.namespace)
            && written.as_str() != own
        {
            self.mistake(
                written.node,
                format!(
                    "`{}` is another namespace than the policy's own, `{own}`; leave one of \
                     them out",
                    written.as_str()
                ),
            );
        }
        let written = raw.namespace.as_ref().map(|n| n.as_str().to_owned());
        let subjects = Subjects {
            attributes: AttributeSelector {
                namespace: written.or_else(|| self.namespace.clone()),
                service_account: raw.service_account.as_ref().map(|a| a.as_str().to_owned()),
                labels: self.requirements(&raw.match_labels, &raw.match_expressions),
            },
            names: raw.names.iter().map(|n| n.as_str().to_owned()).collect(),
        };
        let Some(known) = self.known else {
            return subjects;
        };
        for name in raw
            .names
            .iter()
            .filter(|name| !known.has_name(name.as_str()))
        {
            self.unknown_name(known, name);
        }
        if self.mistakes.len() == before && !known.has_subject(&subjects) {
            self.mistake(
                raw.node,
                "selects no workload and no peer that is declared; correct it, or remove the \
                 policy",
            );
        }
        subjects
    }

    fn unknown_name(&mut self, known: &Population<'_>, name: &Located<Name>) {
        let mut what = format!("no workload and no peer has the name `{}`", name.as_str());
        match nearest(name.as_str(), known.names()) {
            Some(near) => what.push_str(&format!("; did you mean `{near}`?")),
            None => what.push_str("; correct it, or remove it"),
        }
        self.mistake(name.node, what);
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

    fn far_ends(
        &mut self,
        rule: NodeId,
        field: &str,
        raw: Option<&Located<Vec<Located<RawFarEnd>>>>,
        direction: Direction,
    ) -> Vec<FarEnd> {
        // What somebody emptied, by a comment for example, must not become everybody.
        if let Some(node) = self.document.child(rule, field)
            && (self.document.is_null(node) || self.document.items(node) == Some(0))
        {
            self.mistake(
                node,
                format!(
                    "is empty; name somebody, remove the rule, or write `{field}: [{{any: {{}}}}]` \
                     for anybody"
                ),
            );
        }
        let Some(raw) = raw else {
            return vec![FarEnd::Anybody];
        };
        raw.iter()
            .filter_map(|raw| self.far_end(raw, direction))
            .collect()
    }

    fn far_end(&mut self, raw: &Located<RawFarEnd>, direction: Direction) -> Option<FarEnd> {
        const KINDS: [&str; 5] = ["identity", "identityPrefix", "attributes", "cidr", "any"];
        let before = self.mistakes.len();
        let has = |field| self.document.child(raw.node, field).is_some();
        let attributes = ["namespace", "serviceAccount", "labels", "matchExpressions"];
        let given: Vec<_> = KINDS
            .into_iter()
            .filter(|kind| match *kind {
                "attributes" => attributes.into_iter().any(has),
                kind => has(kind),
            })
            .collect();
        if given.len() != 1 {
            let what = if given.is_empty() {
                "says nobody"
            } else {
                "says several things"
            };
            self.mistake(
                raw.node,
                format!(
                    "{what}; expected exactly one of `identity`, `identityPrefix`, `cidr`, `any`, \
                     or some of `namespace`, `serviceAccount`, `labels`, `matchExpressions`"
                ),
            );
            return None;
        }
        if has("except") && !has("cidr") {
            self.mistake(
                raw.node,
                "has `except` without `cidr`; it narrows only a `cidr`",
            );
        }
        let far_end = if let Some(id) = &raw.identity {
            FarEnd::Identity(id.clone())
        } else if let Some(prefix) = &raw.identity_prefix {
            FarEnd::IdentityPrefix(prefix.0.clone())
        } else if raw.any.is_some() {
            FarEnd::Anybody
        } else if let Some(block) = raw.cidr {
            self.cidr(raw, block.0)
        } else if given == ["attributes"] {
            FarEnd::Attributes(self.attributes(raw))
        } else {
            // What was given could not be read.
            return None;
        };
        // What is mistaken fits nobody, of course.
        if self.mistakes.len() == before {
            self.check_known(raw.node, &far_end, direction);
        }
        Some(far_end)
    }

    fn attributes(&mut self, raw: &Located<RawFarEnd>) -> AttributeSelector {
        AttributeSelector {
            namespace: match &raw.namespace {
                Some(NamespaceText::Every) => None,
                Some(NamespaceText::One(namespace)) => Some(namespace.clone()),
                None => self.namespace.clone(),
            },
            service_account: raw.service_account.as_ref().map(|a| a.as_str().to_owned()),
            labels: self.requirements(&raw.labels, &raw.match_expressions),
        }
    }

    fn cidr(&mut self, raw: &Located<RawFarEnd>, block: ipnet::IpNet) -> FarEnd {
        let mut except = BTreeSet::new();
        for hole in &raw.except {
            if hole.0 == block || !block.contains(&hole.0) {
                self.mistake(
                    hole.node,
                    format!(
                        "`{}` is not a smaller network in `{block}`; correct it",
                        hole.0
                    ),
                );
            }
            except.insert(hole.0);
        }
        FarEnd::Cidr {
            block,
            except: except.into_iter().collect(),
        }
    }

    /// Whom nobody declared may still come with a certificate, so only what can never match is
    /// a mistake.
    fn check_known(&mut self, node: NodeId, far_end: &FarEnd, direction: Direction) {
        let Some(known) = self.known else { return };
        match far_end {
            FarEnd::Identity(id) if !known.has_identity(id) => {
                self.warn(
                    node,
                    format!("no workload and no peer has the identity `{id}`"),
                );
            }
            FarEnd::IdentityPrefix(prefix) if known.matching(far_end).next().is_none() => {
                self.warn(
                    node,
                    format!("no workload and no peer has an identity below `{prefix}`"),
                );
            }
            FarEnd::Attributes(selector) if known.matching(far_end).next().is_none() => {
                let what = format!("no workload and no peer fits ({selector})");
                if direction == Direction::Ingress && selector.labels.is_empty() {
                    self.warn(node, what);
                } else {
                    self.mistake(node, format!("{what}; correct it, or remove it"));
                }
            }
            _ => {}
        }
    }

    fn ports(&mut self, rule: NodeId, raw: Option<&[Located<RawPort>]>) -> Vec<PortMatch> {
        if let Some(node) = self.document.child(rule, "ports")
            && self.document.is_null(node)
        {
            self.mistake(
                node,
                "is empty; name ports, or remove `ports` for every protocol and port",
            );
        }
        match raw {
            None | Some([]) => vec![PortMatch::Everything],
            Some(ports) => ports.iter().filter_map(|port| self.port(port)).collect(),
        }
    }

    fn port(&mut self, raw: &Located<RawPort>) -> Option<PortMatch> {
        let number = match raw.protocol {
            RawProtocol::Tcp => protocol::TCP,
            RawProtocol::Udp => protocol::UDP,
            RawProtocol::Sctp => protocol::SCTP,
            RawProtocol::Icmp | RawProtocol::Any => {
                if self.has(raw.node, "port") || self.has(raw.node, "endPort") {
                    self.mistake(
                        raw.node,
                        "has a port, which only TCP, UDP and SCTP have; remove the port, or \
                         write one item for each of these protocols",
                    );
                }
                return Some(match raw.protocol {
                    RawProtocol::Any => PortMatch::Everything,
                    _ => PortMatch::Protocol(protocol::ICMP),
                });
            }
        };
        match (raw.port, raw.end_port) {
            (None, None) => Some(PortMatch::Protocol(number)),
            (None, Some(_)) => {
                if !self.has(raw.node, "port") {
                    self.mistake(raw.node, "has `endPort` without `port`; add the first port");
                }
                None
            }
            (Some(first), None) => Some(PortMatch::Ports(number, first.0..=first.0)),
            (Some(first), Some(last)) => {
                if last < first {
                    self.mistake(
                        raw.node,
                        format!(
                            "`endPort` {} lies below `port` {}; swap them",
                            last.0, first.0
                        ),
                    );
                }
                Some(PortMatch::Ports(number, first.0..=last.0))
            }
        }
    }
}
