//! Random nodes and policies, as people think of them, and as documents.

mod documents;
mod draw;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::workload::Attributes;

/// Choices, made beforehand.
pub(super) struct Draw {
    choices: std::vec::IntoIter<u8>,
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) node: Vec<IpAddr>,
    /// Workloads first.
    pub(super) places: Vec<Place>,
    pub(super) policies: Vec<Policy>,
    pub(super) network_policies: Vec<NetworkPolicy>,
    /// Labels of the namespaces that are declared.
    pub(super) namespaces: BTreeMap<&'static str, BTreeMap<&'static str, &'static str>>,
    /// Whether what no policy is about is open.
    pub(super) open: bool,
}

/// A workload or a peer.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) number: u32,
    pub(super) name: String,
    pub(super) local: bool,
    pub(super) who: Option<Attributes>,
    pub(super) addresses: Vec<IpNet>,
    pub(super) ports: Vec<u16>,
    /// Whether nobody else can use its addresses.
    pub(super) exclusive: bool,
    /// Protocol and port by name.
    pub(super) named: BTreeMap<&'static str, (u8, u16)>,
    pub(super) permissive: bool,
}

#[derive(Debug)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) deny: bool,
    pub(super) dry_run: bool,
    pub(super) namespace: Option<&'static str>,
    pub(super) names: Vec<String>,
    pub(super) subjects: Kind,
    pub(super) ingress: Vec<Rule>,
    pub(super) egress: Vec<Rule>,
}

/// A policy of Kubernetes.
#[derive(Debug)]
pub(super) struct NetworkPolicy {
    pub(super) name: String,
    pub(super) dry_run: bool,
    pub(super) namespace: &'static str,
    /// Labels only, as in all selectors here.
    pub(super) subjects: Kind,
    pub(super) types: Option<Vec<&'static str>>,
    pub(super) ingress: Vec<NetworkRule>,
    pub(super) egress: Vec<NetworkRule>,
}

#[derive(Debug)]
pub(super) struct NetworkRule {
    /// None is anybody.
    pub(super) peers: Vec<NetworkPeer>,
    pub(super) ports: Vec<NetworkPort>,
}

#[derive(Debug)]
pub(super) enum NetworkPeer {
    /// Selectors of namespaces and of pods, one of them at least.
    Pods(Option<Kind>, Option<Kind>),
    Block(IpNet, Vec<IpNet>),
}

#[derive(Debug)]
pub(super) struct NetworkPort {
    pub(super) protocol: Option<&'static str>,
    pub(super) port: Option<u16>,
    pub(super) name: Option<&'static str>,
    pub(super) end: Option<u16>,
}

/// What `namespace`, `serviceAccount` and labels say.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) namespace: Option<&'static str>,
    pub(super) account: Option<&'static str>,
    pub(super) labels: BTreeMap<&'static str, &'static str>,
    pub(super) expressions: Vec<Expression>,
}

#[derive(Debug)]
pub(super) struct Expression {
    pub(super) key: &'static str,
    pub(super) operator: &'static str,
    pub(super) values: Vec<&'static str>,
}

#[derive(Debug)]
pub(super) struct Rule {
    /// None for anybody.
    pub(super) items: Option<Vec<Item>>,
    pub(super) ports: Vec<Port>,
}

#[derive(Debug)]
pub(super) enum Item {
    Any,
    Identity(&'static str),
    Prefix(&'static str),
    Kind(Kind),
    Cidr(IpNet, Vec<IpNet>),
}

#[derive(Debug)]
pub(super) struct Port {
    pub(super) protocol: Option<&'static str>,
    pub(super) port: Option<u16>,
    pub(super) end: Option<u16>,
}

// === impl Model ===

impl Model {
    pub(super) fn draw(draw: &mut Draw) -> Self {
        let workloads = 1..2 + draw.below(3);
        let peers = 0x10000..0x10000 + draw.below(6);
        let mut places = Vec::new();
        for (numbers, local) in [(workloads, true), (peers, false)] {
            places.extend(numbers.map(|number| draw.place(number.try_into().unwrap(), local)));
        }
        let policies = 0..draw.below(4);
        Self {
            node: draw
                .maybe(&["10.9.0.0", "10.0.0.2"])
                .iter()
                .map(|a| a.parse().unwrap())
                .collect(),
            policies: policies
                .map(|number| Policy {
                    name: format!("policy-{number}"),
                    deny: draw.below(4) == 3,
                    dry_run: draw.below(5) == 4,
                    namespace: draw.maybe(&["a", "b"]),
                    names: draw.list(2, |draw| format!("w{}", 1 + draw.below(3))),
                    subjects: if draw.below(2) == 0 {
                        Kind::everybody()
                    } else {
                        draw.kind()
                    },
                    ingress: draw.list(3, Draw::rule),
                    egress: draw.list(3, Draw::rule),
                })
                .map(Policy::one_namespace)
                .collect(),
            network_policies: (0..draw.below(3))
                .map(|number| draw.network_policy(number))
                .collect(),
            namespaces: {
                let named = draw.list(2, |draw| (draw.of(&["a", "b"]), draw.labels()));
                named.into_iter().collect()
            },
            open: draw.below(3) == 2,
            places,
        }
    }

    pub(super) fn documents(&self) -> String {
        let own = self.policies.iter().map(Policy::document);
        let network = self.network_policies.iter().map(NetworkPolicy::document);
        own.chain(network)
            .map(|document| format!("---\n{document}\n"))
            .collect()
    }
}
