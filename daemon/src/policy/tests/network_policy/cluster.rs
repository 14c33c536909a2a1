//! Nine pods in three namespaces, and who of them reaches whom.

use std::{collections::BTreeSet, fmt};

use super::super::world::{TCP, UDP, World};

pub(super) const SCTP: u8 = reeve_common::protocol::SCTP;
pub(super) const NAMESPACES: [&str; 3] = ["x", "y", "z"];
pub(super) const PODS: [&str; 3] = ["a", "b", "c"];
pub(super) const PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];
pub(super) const PORTS: [u16; 4] = [80, 81, 7981, 8180];
/// An address outside the cluster.
pub(super) const OUTSIDE: &str = "192.0.2.9";
pub(super) const NODE: &str = "192.168.0.1";

/// A pod: its namespace, its own name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pod(pub(super) &'static str, pub(super) &'static str);

/// One connection that somebody may try.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Call {
    pub(super) from: Pod,
    pub(super) to: Pod,
    pub(super) protocol: u8,
    pub(super) port: u16,
}

pub(super) struct Cluster {
    pub(super) world: World,
}

// === impl Pod ===

impl Pod {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let pods = |namespace| PODS.map(|pod| Self(namespace, pod));
        NAMESPACES.into_iter().flat_map(pods)
    }

    pub(super) fn name(self) -> String {
        format!("{}-{}", self.0, self.1)
    }

    pub(super) fn address(self) -> String {
        let place = |all: [&str; 3], name| all.iter().position(|own| *own == name).unwrap() + 1;
        format!("10.0.{}.{}", place(NAMESPACES, self.0), place(PODS, self.1))
    }

    pub(super) fn id(self) -> String {
        format!("spiffe://example.org/ns/{}/sa/{}", self.0, self.name())
    }

    /// As the configuration has it. The names of ports are swapped in pod `c`.
    pub(super) fn declared(self) -> String {
        let ports = if self.1 == "c" {
            "web: 81, web-udp: 81/UDP, other: 80"
        } else {
            "web: 80, web-udp: 80/UDP, other: 81"
        };
        let tier = if self.1 == "b" { "" } else { ", tier: front" };
        format!(
            "- {{name: {name}, namespace: {}, labels: {{pod: {}{tier}}}, cgroup: /{name}, addresses: [{}], namedPorts: {{{ports}}}}}\n",
            self.0,
            self.1,
            self.address(),
            name = self.name(),
        )
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            protocol,
            port,
        } = self;
        write!(f, "{from:?}->{to:?} {protocol}/{port}")
    }
}

// === impl Cluster ===

impl Cluster {
    /// Nine pods under these policies; what no policy is about is open.
    pub(super) fn new(policies: &str) -> Self {
        Self::with("policies: {unselected: allow}", policies)
    }

    pub(super) fn with(settings: &str, policies: &str) -> Self {
        Self {
            world: World::new(&configuration(settings), policies),
        }
    }

    pub(super) fn egress(&self, call: Call) -> bool {
        let to = format!("{}:{}", call.to.address(), call.port);
        allows(self.world.egress(&call.from.name(), call.protocol, &to))
    }

    pub(super) fn ingress(&self, call: Call) -> bool {
        let (to, from) = (call.to.name(), call.from.address());
        allows(if call.protocol == TCP {
            self.world.tunnel(&to, &call.from.id(), &from, call.port)
        } else {
            self.world.plaintext(&to, call.protocol, &from, call.port)
        })
    }

    pub(super) fn reaches(&self, call: Call) -> bool {
        self.egress(call) && self.ingress(call)
    }

    /// Compares every connection with what is expected of it.
    #[track_caller]
    pub(super) fn expect(&self, expected: impl Fn(Call) -> bool) {
        let wrong: Vec<_> = calls()
            .filter(|call| self.reaches(*call) != expected(*call))
            .collect();
        assert!(wrong.is_empty(), "{} are wrong: {wrong:?}", wrong.len());
    }

    /// What differs from another cluster.
    pub(super) fn differences(&self, other: &Self) -> BTreeSet<Call> {
        calls()
            .filter(|call| self.reaches(*call) != other.reaches(*call))
            .collect()
    }
}

pub(super) fn configuration(settings: &str) -> String {
    let pods: String = Pod::all().map(Pod::declared).collect();
    format!(
        "trustDomain: example.org\nnode: {{addresses: [{NODE}]}}\nnamespaces:\n- {{name: x, labels: {{ns: x, team: one}}}}\n- {{name: y, labels: {{ns: y, team: one}}}}\nworkloads:\n{pods}{settings}\n"
    )
}

pub(super) fn allows(told: &str) -> bool {
    !["no", "tunnel only"].contains(&told)
}

/// Every connection between two different pods.
pub(super) fn calls() -> impl Iterator<Item = Call> {
    let pairs = Pod::all().flat_map(|from| Pod::all().map(move |to| (from, to)));
    pairs
        .filter(|(from, to)| from != to)
        .flat_map(|(from, to)| {
            PROTOCOLS.into_iter().flat_map(move |protocol| {
                PORTS.map(|port| Call {
                    from,
                    to,
                    protocol,
                    port,
                })
            })
        })
}

/// A policy in namespace `x`.
pub(super) fn policy(name: &str, spec: &str) -> String {
    policy_of("x", name, spec)
}

pub(super) fn policy_of(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

pub(super) const A: &str = "podSelector: {matchLabels: {pod: a}}";
pub(super) const XA: Pod = Pod("x", "a");

// === isolation ===
