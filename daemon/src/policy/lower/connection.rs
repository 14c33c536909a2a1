//! From a `ConnectionPolicy` to rules.

use std::sync::Arc;

use reeve_common::{Direction, protocol};

use super::{Context, Groups, Lowered, Lowering};
use crate::{
    policy::{
        document::{
            ConnectionPolicy, RawAction, RawFarEnd, RawMode, RawPort, RawProtocol, RawSubjects,
            Spec,
        },
        population::Population,
        rule::{Effect, FarEnd, Isolation, Mode, PortMatch, Subjects},
        selector::{AttributeSelector, NamespaceSelector},
    },
    yaml::{Located, Mistakes, NodeId, nearest, values::Name},
};

/// Brings a document into the form of all rules. What comes with mistakes is not to be used.
pub(in crate::policy) fn connection_policy(
    context: Context<'_>,
    policy: ConnectionPolicy,
    groups: &Groups,
    mistakes: &mut Mistakes,
) -> Lowered {
    let mut lowering = Lowering::new(context, mistakes);
    let metadata = lowering.require(context.root, "metadata", policy.metadata);
    let spec = lowering.require(context.root, "spec", policy.spec);
    let mut title = String::from("unnamed");
    if let Some(metadata) = metadata {
        lowering.namespace = metadata.namespace.as_ref().map(|n| n.as_str().to_owned());
        title = lowering.name(metadata.node, metadata.value.name);
    }
    if let Some(spec) = spec {
        lowering.spec(&title, spec, groups);
    }
    lowering.lowered
}

impl Lowering<'_> {
    fn spec(&mut self, title: &str, spec: Located<Spec>, groups: &Groups) {
        let raw = &spec.value;
        self.effect = match raw.action {
            RawAction::Allow => Effect::Allow,
            RawAction::Deny => Effect::Deny,
        };
        self.mode = match raw.mode {
            RawMode::Enforce => Mode::Enforce,
            RawMode::DryRun => Mode::DryRun,
        };
        let subjects = self.require(spec.node, "workloads", raw.workloads.as_ref());
        let subjects = Arc::new(subjects.map_or_else(Subjects::default, |s| self.subjects(s)));
        self.lowered.subjects = Arc::clone(&subjects);
        if raw.ingress.is_empty() && raw.egress.is_empty() {
            self.warn(spec.node, "has no rule, so it allows and denies nothing");
        }
        if self.effect == Effect::Allow {
            self.lowered.isolation = Some(Isolation {
                subjects: Arc::clone(&subjects),
                ingress: !raw.ingress.is_empty(),
                egress: !raw.egress.is_empty(),
                mode: self.mode,
            });
        }
        for (index, rule) in raw.ingress.iter().enumerate() {
            let far_ends = self.far_ends(rule.node, "from", rule.from.as_ref(), groups);
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
            let far_ends = self.far_ends(rule.node, "to", rule.to.as_ref(), groups);
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
                namespace: written
                    .or_else(|| self.namespace.clone())
                    .map_or(NamespaceSelector::Any, NamespaceSelector::Named),
                port: None,
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

    fn far_ends(
        &mut self,
        rule: NodeId,
        field: &str,
        raw: Option<&Located<Vec<Located<RawFarEnd>>>>,
        groups: &Groups,
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
        let direction = if field == "from" {
            Direction::Ingress
        } else {
            Direction::Egress
        };
        let mut far_ends = Vec::new();
        for raw in raw.iter() {
            match &raw.group {
                Some(group) => far_ends.extend(self.group(raw, group, groups)),
                None => far_ends.extend(self.far_end(raw, direction)),
            }
        }
        far_ends
    }

    /// The members of a group that is named.
    fn group(
        &mut self,
        raw: &Located<RawFarEnd>,
        group: &Located<Name>,
        groups: &Groups,
    ) -> Vec<FarEnd> {
        if self.document.entry_count(raw.node) > 1 {
            self.mistake(
                raw.node,
                "says more than a `group`; make the rest an item of its own",
            );
        }
        if let Some(members) = groups.members(group.as_str()) {
            return members.to_vec();
        }
        let mut what = format!("there is no IdentityGroup `{}`", group.as_str());
        match nearest(group.as_str(), groups.names()) {
            Some(near) => what.push_str(&format!("; did you mean `{near}`?")),
            None => what.push_str("; add one, or correct the name"),
        }
        self.mistake(group.node, what);
        Vec::new()
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
                    "{what}; expected exactly one of `group`, `identity`, `identityPrefix`, \
                     `cidr`, `any`, or some of `namespace`, `serviceAccount`, `labels`, `matchExpressions`"
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
            let holes = raw.except.iter().map(|hole| (hole.node, hole.0));
            self.cidr(block.0, holes)
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
            namespace: self.namespace_of(raw.namespace.as_ref()),
            service_account: raw.service_account.as_ref().map(|a| a.as_str().to_owned()),
            labels: self.requirements(&raw.labels, &raw.match_expressions),
            port: None,
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
            RawProtocol::Icmp | RawProtocol::Esp | RawProtocol::Ah | RawProtocol::Any => {
                if self.has(raw.node, "port") || self.has(raw.node, "endPort") {
                    self.mistake(
                        raw.node,
                        "has a port, which only TCP, UDP and SCTP have; remove the port, or \
                         write one item for each of these protocols",
                    );
                }
                return Some(match raw.protocol {
                    RawProtocol::Any => PortMatch::Everything,
                    RawProtocol::Esp => PortMatch::Protocol(protocol::ESP),
                    RawProtocol::Ah => PortMatch::Protocol(protocol::AH),
                    _ => PortMatch::Protocol(protocol::ICMP),
                });
            }
        };
        self.range(raw.node, number, raw.port.map(|port| port.0), raw.end_port)
    }
}
