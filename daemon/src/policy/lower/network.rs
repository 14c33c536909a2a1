//! From a Kubernetes `NetworkPolicy` to rules.

use std::sync::Arc;

use reeve_common::{Direction, protocol};

use super::{Context, Lowered, Lowering};
use crate::{
    policy::{
        document::network::{
            LabelSelector, NetworkPeer, NetworkPolicy, NetworkPolicySpec, NetworkPort,
            NetworkProtocol, ObjectMeta, PolicyType, PortOrName,
        },
        population::Population,
        rule::{FarEnd, Isolation, Mode, PortMatch, Subjects},
        selector::{AttributeSelector, NamespaceSelector, Requirement},
    },
    yaml::{Located, Mistakes, NodeId},
};

/// Namespace of an object that says none, as `kubectl` has it.
const DEFAULT_NAMESPACE: &str = "default";
/// Annotation that says what [`crate::policy::document::RawMode`] says in a `ConnectionPolicy`.
const MODE_ANNOTATION: &str = "reeve.dev/mode";

/// Brings a document into the form of all rules. What comes with mistakes is not to be used.
pub(in crate::policy) fn network_policy(
    context: Context<'_>,
    policy: NetworkPolicy,
    mistakes: &mut Mistakes,
) -> Lowered {
    let mut lowering = Lowering::new(context, mistakes);
    let metadata = lowering.require(context.root, "metadata", policy.metadata);
    let spec = lowering.require(context.root, "spec", policy.spec);
    let mut title = String::from("unnamed");
    if let Some(metadata) = metadata {
        title = lowering.metadata(metadata);
    }
    if let Some(spec) = spec {
        lowering.network_spec(&title, &spec);
    }
    lowering.lowered
}

impl Lowering<'_> {
    fn metadata(&mut self, metadata: Located<ObjectMeta>) -> String {
        let Located { node, value } = metadata;
        let namespace = value.namespace.as_ref();
        let namespace = namespace.map_or(DEFAULT_NAMESPACE, |namespace| namespace.as_str());
        self.namespace = Some(namespace.to_owned());
        let mode = value.annotations.as_ref();
        if let Some(mode) = mode.and_then(|annotations| annotations.get(MODE_ANNOTATION)) {
            match mode.as_str() {
                "Enforce" => {}
                "DryRun" => self.mode = Mode::DryRun,
                other => self.mistake(
                    mode.node,
                    format!(
                        "`{}` is not known here; expected `Enforce` or `DryRun`",
                        crate::yaml::shown(other)
                    ),
                ),
            }
        }
        self.name(node, value.name)
    }

    fn network_spec(&mut self, title: &str, spec: &Located<NetworkPolicySpec>) {
        let raw = &spec.value;
        let labels = match &raw.pod_selector {
            Some(selector) => self.label_selector(selector),
            None => Vec::new(),
        };
        let namespace = self.namespace.clone();
        let subjects = Arc::new(Subjects {
            attributes: AttributeSelector {
                namespace: namespace.map_or(NamespaceSelector::Any, NamespaceSelector::Named),
                labels,
                ..AttributeSelector::default()
            },
            ..Subjects::default()
        });
        self.lowered.subjects = Arc::clone(&subjects);
        if self
            .known
            .is_some_and(|known| !known.has_subject(&subjects))
        {
            self.warn(
                spec.node,
                "selects no workload and no peer that is declared",
            );
        }
        let ingress = raw.ingress.as_deref().unwrap_or_default();
        let egress = raw.egress.as_deref().unwrap_or_default();
        let about = |kind, otherwise| {
            let types = raw.policy_types.as_deref().unwrap_or_default();
            if types.is_empty() {
                otherwise
            } else {
                types.contains(&kind)
            }
        };
        let isolation = Isolation {
            subjects: Arc::clone(&subjects),
            ingress: about(PolicyType::Ingress, true),
            egress: about(PolicyType::Egress, !egress.is_empty()),
            mode: self.mode,
        };
        for (name, about, rules) in [
            ("ingress", isolation.ingress, raw.ingress.is_some()),
            ("egress", isolation.egress, !egress.is_empty()),
        ] {
            if rules && !about {
                let node = self.document.child(spec.node, name).unwrap_or(spec.node);
                self.warn(
                    node,
                    format!(
                        "counts for nothing, since `policyTypes` does not name {}",
                        if name == "egress" {
                            "Egress"
                        } else {
                            "Ingress"
                        }
                    ),
                );
            }
        }
        // Rules of a direction that the policy is not about say nothing.
        for (index, rule) in ingress.iter().enumerate().filter(|_| isolation.ingress) {
            let name = format!("{title}/ingress[{index}]");
            let far_ends = self.network_peers(rule.node, "from", rule.from.as_deref());
            let ports = self.network_ports(rule.ports.as_deref());
            let direction = Direction::Ingress;
            self.check_names(rule.node, &ports, |known, port| {
                known.subject_has(&subjects, port)
            });
            self.rule(name, rule.node, &subjects, direction, far_ends, ports);
        }
        for (index, rule) in egress.iter().enumerate().filter(|_| isolation.egress) {
            let name = format!("{title}/egress[{index}]");
            let far_ends = self.network_peers(rule.node, "to", rule.to.as_deref());
            let ports = self.network_ports(rule.ports.as_deref());
            let direction = Direction::Egress;
            self.check_names(rule.node, &ports, |known, port| {
                known.any_has(&far_ends, port)
            });
            self.rule(name, rule.node, &subjects, direction, far_ends, ports);
        }
        self.lowered.isolation = Some(isolation);
    }

    /// What labels have to fit; nothing where the selector is for all.
    fn label_selector(&mut self, selector: &LabelSelector) -> Vec<Requirement> {
        let none = Default::default();
        self.requirements(
            selector.match_labels.as_ref().unwrap_or(&none),
            selector.match_expressions.as_deref().unwrap_or_default(),
        )
    }

    /// Warns of names of ports that nobody has who could be called by them.
    fn check_names(
        &mut self,
        rule: NodeId,
        ports: &[PortMatch],
        has: impl Fn(&Population<'_>, &PortMatch) -> bool,
    ) {
        let Some(known) = self.known else { return };
        for port in ports {
            if let PortMatch::Named(_, name) = port
                && !has(known, port)
            {
                let what = format!(
                    "names the port `{name}`, which nobody has who is declared, or has of another protocol"
                );
                self.warn(rule, what);
            }
        }
    }

    /// No peer is anybody.
    fn network_peers(
        &mut self,
        rule: NodeId,
        field: &str,
        raw: Option<&[Located<NetworkPeer>]>,
    ) -> Vec<FarEnd> {
        if raw.is_none_or(<[_]>::is_empty)
            && let Some(node) = self.document.child(rule, field)
        {
            let what = format!(
                "`{field}` is there and empty, which means everybody; name peers, or remove `{field}` where \
                 everybody is meant"
            );
            let emptied = self.document.mistake(node, what);
            self.lowered.emptied.push(emptied);
        }
        match raw {
            None | Some([]) => vec![FarEnd::Anybody],
            Some(peers) => peers
                .iter()
                .filter_map(|peer| self.network_peer(peer))
                .collect(),
        }
    }

    fn network_peer(&mut self, raw: &Located<NetworkPeer>) -> Option<FarEnd> {
        let selects = raw.pod_selector.is_some() || raw.namespace_selector.is_some();
        let Some(block) = &raw.ip_block else {
            if selects {
                let pods = FarEnd::Attributes(self.pods(raw));
                let fits = |known: &Population<'_>| known.matching(&pods).next().is_some();
                if let Some(known) = self.known
                    && !fits(known)
                {
                    self.warn(raw.node, format!("no workload and no peer fits ({pods})"));
                }
                return Some(pods);
            }
            let written = ["podSelector", "namespaceSelector", "ipBlock"];
            if !written.into_iter().any(|field| self.has(raw.node, field)) {
                self.mistake(
                    raw.node,
                    "says nobody; expected `podSelector`, `namespaceSelector`, both, or `ipBlock`",
                );
            }
            return None;
        };
        if selects {
            self.mistake(
                raw.node,
                "has an `ipBlock` and a selector; make them two items",
            );
        }
        let cidr = self.require(block.node, "cidr", block.cidr)?;
        let except = block.except.as_deref().unwrap_or_default();
        let holes = except.iter().map(|hole| (hole.node, hole.0));
        Some(self.cidr(cidr.0, holes))
    }

    fn pods(&mut self, raw: &NetworkPeer) -> AttributeSelector {
        let namespace = match &raw.namespace_selector {
            None => self.namespace_of(None),
            Some(selector) => match self.label_selector(selector) {
                labels if labels.is_empty() => NamespaceSelector::Any,
                labels => NamespaceSelector::Labels(labels),
            },
        };
        let labels = match &raw.pod_selector {
            Some(selector) => self.label_selector(selector),
            None => Vec::new(),
        };
        AttributeSelector {
            namespace,
            labels,
            ..AttributeSelector::default()
        }
    }

    /// No port is every protocol and port.
    fn network_ports(&mut self, raw: Option<&[Located<NetworkPort>]>) -> Vec<PortMatch> {
        match raw {
            None | Some([]) => vec![PortMatch::Everything],
            Some(ports) => ports
                .iter()
                .filter_map(|port| self.network_port(port.node, port))
                .collect(),
        }
    }

    fn network_port(&mut self, node: NodeId, raw: &NetworkPort) -> Option<PortMatch> {
        let protocol = match raw.protocol.unwrap_or(NetworkProtocol::Tcp) {
            NetworkProtocol::Tcp => protocol::TCP,
            NetworkProtocol::Udp => protocol::UDP,
            NetworkProtocol::Sctp => protocol::SCTP,
        };
        let first = match &raw.port {
            None => None,
            Some(PortOrName::Port(port)) => Some(*port),
            Some(PortOrName::Name(name)) => {
                if raw.end_port.is_some() {
                    self.mistake(
                        node,
                        "has `endPort` with a `port` that is a name; give its number",
                    );
                }
                return Some(PortMatch::Named(protocol, name.clone()));
            }
        };
        self.range(node, protocol, first, raw.end_port)
    }
}
