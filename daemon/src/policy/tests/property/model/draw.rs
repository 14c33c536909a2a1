//! Choices.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{
    Draw, Expression, Item, Kind, NetworkPeer, NetworkPolicy, NetworkPort, NetworkRule, Place,
    Port, Rule,
};
use crate::{identity::SpiffeId, workload::Attributes};

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
    pub(in super::super) fn new(choices: Vec<u8>) -> Self {
        Self {
            choices: choices.into_iter(),
        }
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::from(self.choices.next().unwrap_or(0)) % bound
    }

    pub(super) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Nothing more often than not.
    pub(super) fn maybe<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        (self.below(5) > 2).then(|| self.of(all))
    }

    pub(super) fn list<T>(&mut self, most: usize, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| item(self)).collect()
    }

    pub(super) fn prefix(&mut self) -> IpNet {
        self.of(&PREFIXES).parse().unwrap()
    }

    pub(super) fn host(&mut self) -> IpNet {
        let hosts = ["10.0.0.1/32", "10.0.0.2/32", "2001:db8::1/128"];
        self.of(&hosts).parse().unwrap()
    }

    pub(super) fn labels(&mut self) -> BTreeMap<&'static str, &'static str> {
        let labels = self.list(2, |draw| (draw.of(&["k", "l"]), draw.of(&["1", "2", ""])));
        labels.into_iter().collect()
    }

    pub(super) fn who(&mut self) -> Attributes {
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

    pub(super) fn place(&mut self, number: u32, local: bool) -> Place {
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

    pub(super) fn kind(&mut self) -> Kind {
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

    pub(super) fn item(&mut self) -> Item {
        match self.below(8) {
            0 => Item::Any,
            1 => Item::Identity(self.of(&super::super::CLIENTS)),
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

    pub(super) fn port(&mut self) -> Port {
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

    pub(super) fn label_selector(&mut self) -> Kind {
        let mut selector = self.kind();
        selector.namespace = None;
        selector.account = None;
        selector
    }

    pub(super) fn network_peer(&mut self) -> NetworkPeer {
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

    pub(super) fn network_port(&mut self) -> NetworkPort {
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

    pub(super) fn network_rule(&mut self) -> NetworkRule {
        NetworkRule {
            peers: self.list(3, Self::network_peer),
            ports: self.list(2, Self::network_port),
        }
    }

    pub(super) fn network_policy(&mut self, number: usize) -> NetworkPolicy {
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

    pub(super) fn block(&mut self) -> Item {
        let block = self.prefix();
        let mut except = self.list(2, Self::prefix);
        except.retain(|hole| *hole != block && block.contains(hole));
        Item::Cidr(block, except)
    }

    pub(super) fn rule(&mut self) -> Rule {
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
