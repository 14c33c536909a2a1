//! What is said of rules that do not allow a connection, held against what is decided.

use std::net::IpAddr;

use reeve_common::{Action, Direction, Reason};

use super::world::{TCP, UDP, World};
use crate::{
    identity::SpiffeId,
    policy::{Part, Question},
};

const NODE: &str = "
trustDomain: example.org
workloads:
- {name: web, namespace: shop, labels: {app: web}, cgroup: /web, addresses: [10.0.0.1]}
- {name: job, namespace: shop, cgroup: /job, addresses: [10.0.0.2]}
peers:
- {name: db, namespace: shop, labels: {app: db}, addresses: [10.1.0.1, '2001:db8::1']}
- {name: log, namespace: ops, labels: {app: log}, addresses: [10.1.0.2]}
- {name: printer, addresses: [10.1.0.9]}
";

const POLICIES: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: web}
spec:
  workloads: {names: [web]}
  egress:
    - {to: [{labels: {app: db}}], ports: [{port: 5432}]}
    - {to: [{identityPrefix: spiffe://example.org/ns/ops/}]}
    - {to: [{cidr: 10.1.0.0/28, except: [10.1.0.2]}], ports: [{protocol: UDP, port: 500, endPort: 600}]}
  ingress:
    - {from: [{identity: spiffe://example.org/ns/shop/sa/db}], ports: [{port: 80}]}
    - {from: [{namespace: ops}]}
    - {from: [{any: {}}], ports: [{protocol: ICMP}]}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: job}
spec:
  workloads: {namespace: shop, matchExpressions: [{key: app, operator: DoesNotExist}]}
  egress:
    - {to: [{cidr: 10.1.0.9}], ports: [{port: 9100}]}
";

/// The rules that come nearest, each with the parts that do not fit.
fn nearest(question: &Question<'_>) -> Vec<(String, Vec<Part>)> {
    let world = World::new(NODE, POLICIES);
    let near = world.snapshot.nearest(question, 3).into_iter();
    near.map(|near| {
        let parts = near.misfits.iter().map(|misfit| misfit.part).collect();
        (near.rule.to_owned(), parts)
    })
    .collect()
}

fn egress(to: &str, protocol: u8, port: u16) -> Question<'static> {
    Question {
        workload: 1,
        direction: Direction::Egress,
        address: to.parse().unwrap(),
        client: None,
        protocol,
        port,
    }
}

#[test]
fn the_rule_that_misses_by_least_comes_first() {
    let first = |question: &Question<'_>| nearest(question).remove(0);
    assert_eq!(
        first(&egress("10.1.0.1", TCP, 5433)),
        ("web/egress[0]".into(), vec![Part::Port])
    );
    assert_eq!(
        first(&egress("2001:db8::1", UDP, 5432)),
        ("web/egress[0]".into(), vec![Part::Protocol])
    );
    assert_eq!(
        first(&egress("10.1.0.9", UDP, 700)),
        ("web/egress[2]".into(), vec![Part::Port])
    );
    assert_eq!(
        first(&egress("10.1.0.9", TCP, 9100)),
        ("web/egress[2]".into(), vec![Part::Protocol])
    );
    assert_eq!(
        nearest(&egress("10.1.0.9", TCP, 9100))[1..2],
        [("job/egress[0]".into(), vec![Part::Subject])]
    );
    let stranger = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
    let through_tunnel = Question {
        direction: Direction::Ingress,
        client: Some(&stranger),
        ..egress("10.7.0.1", TCP, 80)
    };
    assert_eq!(
        first(&through_tunnel),
        ("web/ingress[2]".into(), vec![Part::Protocol])
    );
    assert_eq!(
        nearest(&through_tunnel)[1],
        ("web/ingress[0]".into(), vec![Part::FarEnd])
    );
}

#[test]
fn what_does_not_fit_is_said_with_what_there_is() {
    let world = World::new(NODE, POLICIES);
    let near = world.snapshot.nearest(&egress("10.1.0.1", TCP, 5433), 1);
    assert_eq!(near[0].place.unwrap().to_string(), "policy.yaml:8");
    assert_eq!(
        near[0].misfits[0].why,
        "is about tcp 5432; this is tcp 5433"
    );
    let near = world.snapshot.nearest(&egress("10.1.0.9", TCP, 9100), 2);
    let why = &near[1].misfits[0].why;
    for text in [
        "namespace shop",
        "app does not exist",
        "web is spiffe://",
        "app=web",
    ] {
        assert!(why.contains(text), "{text} is not in {why}");
    }
}

/// Two pods whose ports of the same name are others, and one without.
const NAMED_NODE: &str = "
trustDomain: example.org
workloads:
- {name: a, namespace: x, cgroup: /a, addresses: [10.1.0.1], namedPorts: {http: 80, dns: 53/UDP}}
- {name: b, namespace: x, cgroup: /b, addresses: [10.1.0.2], namedPorts: {http: 8080}}
- {name: c, namespace: x, cgroup: /c, addresses: [10.2.0.1]}
peers:
- {name: front, namespace: y, addresses: [10.1.0.9]}
";

const NAMED_POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: named, namespace: x}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{namespaceSelector: {}}]
    ports: [{port: http}, {port: 9100}, {protocol: UDP, port: dns}]
  egress:
  - to: [{podSelector: {}}]
    ports: [{port: http}]
";

#[test]
fn a_named_port_of_an_ingress_rule_is_what_it_is_at_the_workload() {
    let world = World::new(NAMED_NODE, NAMED_POLICY);
    let front = SpiffeId::parse("spiffe://example.org/ns/y/sa/front").unwrap();
    let stranger = SpiffeId::parse("spiffe://other.org/ns/y/sa/x").unwrap();
    let near = |workload: &str, client: &SpiffeId, port| {
        let running = world.workloads.iter();
        let mut running = running.filter(|running| running.workload.name == workload);
        let question = Question {
            workload: running.next().unwrap().workload.id,
            direction: Direction::Ingress,
            client: Some(client),
            ..egress("10.1.0.9", TCP, port)
        };
        let near = world.snapshot.nearest(&question, 9).into_iter();
        near.flat_map(|near| near.misfits)
            .map(|misfit| (misfit.part, misfit.why))
            .collect::<Vec<_>>()
    };
    // The port that `http` is elsewhere.
    for (workload, port, there) in [("a", 8080, "80 at a"), ("b", 80, "8080 at b")] {
        let why = format!(
            "is about tcp http ({there}), or tcp 9100, or udp dns ({}); this is tcp {port}",
            if workload == "a" {
                "53 at a"
            } else {
                "no port of b"
            }
        );
        assert_eq!(near(workload, &front, port), [(Part::Port, why)]);
    }
    let without = near("c", &front, 80);
    assert!(
        without[0].1.contains("tcp http (no port of c)"),
        "{without:?}"
    );
    // The right port is no misfit of one who may not come.
    let parts = |found: Vec<(Part, String)>| -> Vec<_> {
        found.into_iter().map(|(part, _)| part).collect()
    };
    assert_eq!(parts(near("a", &stranger, 80)), [Part::FarEnd]);
    assert_eq!(parts(near("b", &stranger, 9100)), [Part::FarEnd]);
}

#[test]
fn what_is_said_of_a_rule_never_contradicts_the_verdict() {
    never_contradicts(NODE, POLICIES);
}

#[test]
fn nor_does_what_is_said_of_named_ports() {
    never_contradicts(NAMED_NODE, NAMED_POLICY);
}

fn never_contradicts(node: &str, policies: &str) {
    let world = World::new(node, policies);
    let clients = [
        None,
        Some("spiffe://example.org/ns/shop/sa/db"),
        Some("spiffe://example.org/ns/x/sa/a"),
        Some("spiffe://example.org/ns/ops/sa/log"),
        Some("spiffe://example.org/ns/ops/sa/undeclared"),
        Some("spiffe://other.org/ns/ops/sa/log"),
    ]
    .map(|client| client.map(|client| SpiffeId::parse(client).unwrap()));
    let (mut allowed, mut denied) = (0, 0);
    for address in [
        "10.1.0.1",
        "10.1.0.2",
        "10.1.0.9",
        "10.2.0.1",
        "10.9.0.1",
        "2001:db8::1",
        "10.0.0.2",
    ] {
        let address: IpAddr = address.parse().unwrap();
        for (workload, protocol, port) in [(1, TCP), (1, UDP), (1, 1), (2, TCP)]
            .into_iter()
            .flat_map(|(w, p)| [53, 80, 500, 600, 601, 5432, 8080, 9100].map(|port| (w, p, port)))
        {
            let ingress = clients
                .iter()
                .map(|client| (Direction::Ingress, client.as_ref()));
            for (direction, client) in ingress.chain([(Direction::Egress, None)]) {
                if client.is_some() && protocol != TCP {
                    continue;
                }
                let question = Question {
                    workload,
                    direction,
                    address,
                    client,
                    protocol,
                    port,
                };
                let decision = world.snapshot.judge(&question);
                let measured = world.snapshot.measured(&question);
                let fits: Vec<_> = measured
                    .iter()
                    .filter(|near| near.misfits.is_empty())
                    .map(|near| near.rule)
                    .collect();
                let named = world.snapshot.rule_name(decision.rule);
                match decision.action {
                    Action::Allow => {
                        allowed += 1;
                        assert!(fits.contains(&named), "{question:?}: {named} {fits:?}");
                    }
                    Action::Deny => {
                        denied += 1;
                        assert_eq!(decision.reason, Reason::NoPolicy);
                        assert!(fits.is_empty(), "{question:?}: {fits:?}");
                    }
                    Action::Permissive | Action::NoRoom => {
                        unreachable!("no workload is permissive, and no map full")
                    }
                    Action::TunnelOnly => {
                        let near = measured.iter().find(|near| near.rule == named).unwrap();
                        assert_eq!(near.misfits[0].part, Part::Proof, "{question:?}");
                    }
                }
            }
        }
    }
    assert!(
        allowed > 50 && denied > 50,
        "{allowed} allowed, {denied} denied"
    );
}
