//! Random nodes and policies, as people think of them, and as documents.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::{identity::SpiffeId, workload::Attributes};

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

const PREFIXES: [&str; 14] = [
    "10.0.0.1/32",
    "10.0.0.2/32",
    "10.0.0.3/32",
    "10.0.0.0/30",
    "10.0.0.0/31",
    "10.0.0.0/16",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "0.0.0.0/1",
    "2001:db8::1/128",
    "2001:db8::2/128",
    "2001:db8::/32",
    "::/0",
    "::/1",
];

// === impl Draw ===

impl Draw {
    pub(super) fn new(choices: Vec<u8>) -> Self {
        Self {
            choices: choices.into_iter(),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::from(self.choices.next().unwrap_or(0)) % bound
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Nothing more often than not.
    fn maybe<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        (self.below(5) > 2).then(|| self.of(all))
    }

    fn list<T>(&mut self, most: usize, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| item(self)).collect()
    }

    fn prefix(&mut self) -> IpNet {
        self.of(&PREFIXES).parse().unwrap()
    }

    fn host(&mut self) -> IpNet {
        let hosts = ["10.0.0.1/32", "10.0.0.2/32", "2001:db8::1/128"];
        self.of(&hosts).parse().unwrap()
    }

    fn labels(&mut self) -> BTreeMap<&'static str, &'static str> {
        let labels = self.list(2, |draw| (draw.of(&["k", "l"]), draw.of(&["1", "2", ""])));
        labels.into_iter().collect()
    }

    fn who(&mut self) -> Attributes {
        let (namespace, account) = (self.of(&["a", "b", "ab"]), self.of(&["x", "y"]));
        let domain = self.of(&["example.org", "example.org", "example.org", "other.org"]);
        let id = match self.below(6) {
            0 => format!("spiffe://{domain}/else"),
            _ => format!("spiffe://{domain}/ns/{namespace}/sa/{account}"),
        };
        let labels = self.labels().into_iter();
        Attributes {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            spiffe_id: SpiffeId::parse(&id).unwrap(),
        }
    }

    fn place(&mut self, number: u32, local: bool) -> Place {
        let mut who = Some(self.who());
        if local {
            let who = who.as_mut().unwrap();
            let (ns, sa) = (&who.namespace, &who.service_account);
            who.spiffe_id =
                SpiffeId::parse(&format!("spiffe://example.org/ns/{ns}/sa/{sa}")).unwrap();
        } else if self.below(5) == 4 {
            who = None;
        }
        Place {
            number,
            name: format!("{}{number}", if local { "w" } else { "p" }),
            local,
            who,
            addresses: self.list(3, |draw| if local { draw.host() } else { draw.prefix() }),
            ports: self.list(2, |draw| draw.of(&[80, 8050])),
            exclusive: !local || self.below(3) > 0,
            named: {
                let named = self.list(2, |draw| {
                    let port = (draw.of(&[6, 6, 17]), draw.of(&[80, 81, 8050]));
                    (draw.of(&["web", "dns"]), port)
                });
                named.into_iter().collect()
            },
            permissive: local && self.below(4) == 3,
        }
    }

    fn kind(&mut self) -> Kind {
        Kind {
            namespace: self.maybe(&["a", "b", "ab"]),
            account: self.maybe(&["x", "y"]),
            labels: self.labels(),
            expressions: self.list(1, |draw| {
                let operator = draw.of(&["In", "NotIn", "Exists", "DoesNotExist"]);
                let mut values = Vec::new();
                if operator.ends_with("In") {
                    values.push(draw.of(&["1", "2", ""]));
                    values.extend(draw.maybe(&["1", "2"]));
                }
                Expression {
                    key: draw.of(&["k", "l"]),
                    operator,
                    values,
                }
            }),
        }
    }

    fn item(&mut self) -> Item {
        match self.below(8) {
            0 => Item::Any,
            1 => Item::Identity(self.of(&super::CLIENTS)),
            2 => Item::Prefix(self.of(&[
                "spiffe://example.org/",
                "spiffe://example.org/ns/a/",
                "spiffe://other.org/ns/",
            ])),
            3..=5 => {
                let mut kind = self.kind();
                if self.below(4) == 3 {
                    kind.namespace = Some("*");
                }
                Item::Kind(kind)
            }
            _ => self.block(),
        }
    }

    fn port(&mut self) -> Port {
        let protocol = self.maybe(&["TCP", "UDP", "SCTP", "ICMP", "Any"]);
        let mut port = None;
        let mut end = None;
        if !matches!(protocol, Some("ICMP" | "Any")) {
            port = self.maybe(&[1, 80, 8000, 8050]);
            if let Some(port) = port {
                end = self.maybe(&[81, 8100, 65535]).filter(|end| *end >= port);
            }
        }
        Port {
            protocol,
            port,
            end,
        }
    }

    fn label_selector(&mut self) -> Kind {
        let mut selector = self.kind();
        selector.namespace = None;
        selector.account = None;
        selector
    }

    fn network_peer(&mut self) -> NetworkPeer {
        match self.below(4) {
            0 => NetworkPeer::Pods(None, Some(self.label_selector())),
            1 => NetworkPeer::Pods(Some(self.label_selector()), None),
            2 => NetworkPeer::Pods(Some(self.label_selector()), Some(self.label_selector())),
            _ => match self.block() {
                Item::Cidr(block, except) => NetworkPeer::Block(block, except),
                _ => unreachable!(),
            },
        }
    }

    fn network_port(&mut self) -> NetworkPort {
        let protocol = self.maybe(&["TCP", "UDP", "SCTP"]);
        let port = self.maybe(&[1, 80, 8000, 8050]);
        let name = match port {
            None => self.maybe(&["web", "dns"]),
            Some(_) => None,
        };
        let end = port.and_then(|port| self.maybe(&[81, 8100, 65535]).filter(|end| *end >= port));
        NetworkPort {
            protocol,
            port,
            name,
            end,
        }
    }

    fn network_rule(&mut self) -> NetworkRule {
        NetworkRule {
            peers: self.list(3, Self::network_peer),
            ports: self.list(2, Self::network_port),
        }
    }

    fn network_policy(&mut self, number: usize) -> NetworkPolicy {
        NetworkPolicy {
            name: format!("network-{number}"),
            dry_run: self.below(5) == 4,
            namespace: self.of(&["a", "b"]),
            subjects: self.label_selector(),
            types: (self.below(2) == 1)
                .then(|| self.list(2, |draw| draw.of(&["Ingress", "Egress"]))),
            ingress: self.list(2, Self::network_rule),
            egress: self.list(2, Self::network_rule),
        }
    }

    fn block(&mut self) -> Item {
        let block = self.prefix();
        let mut except = self.list(2, Self::prefix);
        except.retain(|hole| *hole != block && block.contains(hole));
        Item::Cidr(block, except)
    }

    fn rule(&mut self) -> Rule {
        let mut items = self.list(3, Self::item);
        if items.is_empty() && self.below(4) > 0 {
            items.push(self.item());
        }
        Rule {
            items: (!items.is_empty()).then_some(items),
            ports: self.list(3, Self::port),
        }
    }
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

// === documents ===

impl Policy {
    /// A policy with a namespace cannot select in another.
    fn one_namespace(mut self) -> Self {
        if self.namespace.is_some() {
            self.subjects.namespace = None;
        }
        self
    }

    fn document(&self) -> Value {
        let mut metadata = json!({"name": self.name});
        if let Some(namespace) = self.namespace {
            metadata["namespace"] = json!(namespace);
        }
        let mut workloads = self.subjects.document("matchLabels");
        if !self.names.is_empty() {
            workloads["names"] = json!(self.names);
        }
        let rules = |rules: &[Rule], field: &str| -> Vec<Value> {
            rules.iter().map(|rule| rule.document(field)).collect()
        };
        json!({
            "apiVersion": "reeve.dev/v1alpha1",
            "kind": "ConnectionPolicy",
            "metadata": metadata,
            "spec": {
                "action": if self.deny { "Deny" } else { "Allow" },
                "mode": if self.dry_run { "DryRun" } else { "Enforce" },
                "workloads": workloads,
                "ingress": rules(&self.ingress, "from"),
                "egress": rules(&self.egress, "to"),
            },
        })
    }
}

impl NetworkPolicy {
    fn document(&self) -> Value {
        let mut metadata = json!({"name": self.name, "namespace": self.namespace});
        if self.dry_run {
            metadata["annotations"] = json!({"reeve.dev/mode": "DryRun"});
        }
        let rules = |rules: &[NetworkRule], field: &str| -> Vec<Value> {
            rules.iter().map(|rule| rule.document(field)).collect()
        };
        let mut spec = json!({
            "podSelector": self.subjects.document("matchLabels"),
            "ingress": rules(&self.ingress, "from"),
            "egress": rules(&self.egress, "to"),
        });
        if let Some(types) = &self.types {
            spec["policyTypes"] = json!(types);
        }
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": spec,
        })
    }
}

impl NetworkRule {
    fn document(&self, field: &str) -> Value {
        let peers = self.peers.iter().map(|peer| match peer {
            NetworkPeer::Pods(namespaces, pods) => {
                let mut map = Map::new();
                for (field, selector) in [("namespaceSelector", namespaces), ("podSelector", pods)]
                {
                    if let Some(selector) = selector {
                        map.insert(field.into(), selector.document("matchLabels"));
                    }
                }
                Value::Object(map)
            }
            NetworkPeer::Block(block, except) => {
                let except: Vec<_> = except.iter().map(ToString::to_string).collect();
                json!({"ipBlock": {"cidr": block.to_string(), "except": except}})
            }
        });
        let ports = self.ports.iter().map(|port| {
            let mut map = Map::new();
            if let Some(protocol) = port.protocol {
                map.insert("protocol".into(), json!(protocol));
            }
            if let Some(number) = port.port {
                map.insert("port".into(), json!(number));
            }
            if let Some(name) = port.name {
                map.insert("port".into(), json!(name));
            }
            if let Some(end) = port.end {
                map.insert("endPort".into(), json!(end));
            }
            Value::Object(map)
        });
        json!({field: peers.collect::<Vec<_>>(), "ports": ports.collect::<Vec<_>>()})
    }
}

impl Kind {
    fn everybody() -> Self {
        Self {
            namespace: None,
            account: None,
            labels: BTreeMap::new(),
            expressions: Vec::new(),
        }
    }

    fn document(&self, labels: &str) -> Value {
        let mut map = Map::new();
        if let Some(namespace) = self.namespace {
            map.insert("namespace".into(), json!(namespace));
        }
        if let Some(account) = self.account {
            map.insert("serviceAccount".into(), json!(account));
        }
        if !self.labels.is_empty() {
            map.insert(labels.into(), json!(self.labels));
        }
        if !self.expressions.is_empty() {
            let expressions = self.expressions.iter().map(|expression| {
                let mut value = json!({"key": expression.key, "operator": expression.operator});
                if !expression.values.is_empty() {
                    value["values"] = json!(expression.values);
                }
                value
            });
            map.insert("matchExpressions".into(), expressions.collect());
        }
        Value::Object(map)
    }
}

impl Rule {
    fn document(&self, field: &str) -> Value {
        let mut map = Map::new();
        if let Some(items) = &self.items {
            map.insert(field.into(), items.iter().map(Item::document).collect());
        }
        if !self.ports.is_empty() {
            map.insert(
                "ports".into(),
                self.ports.iter().map(Port::document).collect(),
            );
        }
        Value::Object(map)
    }
}

impl Item {
    fn document(&self) -> Value {
        match self {
            Self::Any => json!({"any": {}}),
            Self::Identity(id) => json!({"identity": id}),
            Self::Prefix(prefix) => json!({"identityPrefix": prefix}),
            Self::Kind(kind) => {
                let mut value = kind.document("labels");
                if value.as_object().unwrap().is_empty() {
                    value["labels"] = json!({});
                }
                value
            }
            Self::Cidr(block, except) => {
                let except: Vec<_> = except.iter().map(ToString::to_string).collect();
                json!({"cidr": block.to_string(), "except": except})
            }
        }
    }
}

impl Port {
    fn document(&self) -> Value {
        let mut map = Map::new();
        if let Some(protocol) = self.protocol {
            map.insert("protocol".into(), json!(protocol));
        }
        if let Some(port) = self.port {
            map.insert("port".into(), json!(port));
        }
        if let Some(end) = self.end {
            map.insert("endPort".into(), json!(end));
        }
        Value::Object(map)
    }
}
