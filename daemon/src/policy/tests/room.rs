//! What a policy takes of the kernel's maps, and what becomes of a change that has no room.

use std::collections::HashSet;

use reeve_common::{Action, Direction, Reason};

use super::world::{TCP, World, connection_policy as policy, policies};
use crate::policy::{Inputs, Snapshot};

const NODE: &str = "
trustDomain: example.org
workloads:
- {name: web, cgroup: /web, addresses: [10.0.0.1]}
- {name: job, cgroup: /job, addresses: [10.0.0.2]}
";

/// Items that allow blocks of addresses, from one number on.
fn blocks(numbers: std::ops::Range<u32>) -> String {
    let block = |number: u32| {
        let [_, _, third, fourth] = number.to_be_bytes();
        format!("{{cidr: 10.9.{third}.{fourth}/32}}")
    };
    let items: Vec<_> = numbers.map(block).collect();
    items.join(", ")
}

fn egress(rules: &str) -> World {
    let spec = format!("workloads: {{names: [web, job]}}, egress: [{rules}]");
    World::new(NODE, &policy("p", &spec))
}

fn allowing(numbers: std::ops::Range<u32>) -> World {
    egress(&format!(
        "{{to: [{}], ports: [{{protocol: TCP, port: 80}}]}}",
        blocks(numbers)
    ))
}

#[test]
fn peers_that_stand_in_the_same_rules_are_one_class() {
    let (few, many) = (allowing(0..2), allowing(0..5000));
    let tables = many.snapshot.kernel_tables();
    assert_eq!(tables.peers.len(), 5000 + 2);
    assert_eq!(
        tables.verdicts.len(),
        few.snapshot.kernel_tables().verdicts.len(),
        "a peer more takes no verdict"
    );
    assert_eq!(many.egress("web", TCP, "10.9.19.135:80"), "p/egress[0]");
    assert_eq!(many.egress("web", TCP, "10.9.19.136:80"), "no");
}

#[test]
fn who_stands_in_one_rule_more_is_told_apart() {
    let world = egress(&format!(
        "{{to: [{}], ports: [{{protocol: TCP, port: 80}}]}}, {{to: [{{cidr: 10.9.0.3/32}}], \
         ports: [{{protocol: TCP, port: 81}}]}}",
        blocks(0..10)
    ));
    let tables = world.snapshot.kernel_tables();
    let classes: HashSet<u32> = tables.peers.iter().map(|(.., entry)| entry.class).collect();
    assert_eq!(classes.len(), 1 + 2, "and the workloads themselves");
    assert_eq!(world.egress("web", TCP, "10.9.0.3:81"), "p/egress[1]");
    assert_eq!(world.egress("web", TCP, "10.9.0.4:81"), "no");
}

#[test]
fn a_peer_that_is_added_to_a_rule_changes_nothing_else() {
    let (one, other) = (allowing(0..100), allowing(0..101));
    let (one, other) = (one.snapshot.kernel_tables(), other.snapshot.kernel_tables());
    assert_eq!(one.verdicts, other.verdicts);
    let known: HashSet<_> = one.peers.iter().map(|peer| format!("{peer:?}")).collect();
    let new = other
        .peers
        .iter()
        .filter(|peer| !known.contains(&format!("{peer:?}")));
    assert_eq!(new.count(), 1);
}

/// The directions in which a change of policies may take something away from `web` or `job`.
fn narrowed(old: &str, new: &str) -> usize {
    let (old, new) = (World::new(NODE, old), World::new(NODE, new));
    old.snapshot.narrowed_by(&new.snapshot).len()
}

#[test]
fn more_far_ends_or_ports_take_nothing_away() {
    let of = |rules: &str| policy("p", &format!("workloads: {{names: [web]}}, {rules}"));
    let base = of("egress: [{to: [{cidr: 10.0.0.0/24}], ports: [{protocol: TCP, port: 80}]}]");
    for wider in [
        "egress: [{to: [{cidr: 10.0.0.0/24}, {cidr: 10.1.0.0/24}], ports: [{protocol: TCP, port: 80}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/16}], ports: [{protocol: TCP, port: 80}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/24}], ports: [{protocol: TCP, port: 80, endPort: 90}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/24}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/24}], ports: [{protocol: TCP, port: 80}]}], ingress: [{from: [{cidr: 10.0.0.7/32}]}]",
    ] {
        assert_eq!(narrowed(&base, &of(wider)), 0, "{wider}");
    }
    for narrower in [
        "egress: [{to: [{cidr: 10.0.0.0/25}], ports: [{protocol: TCP, port: 80}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/24}], ports: [{protocol: TCP, port: 81}]}]",
        "egress: [{to: [{cidr: 10.0.0.0/24}], ports: [{protocol: UDP, port: 80}]}]",
    ] {
        assert_eq!(narrowed(&base, &of(narrower)), 1, "{narrower}");
    }
}

#[test]
fn a_deny_takes_away_and_one_that_goes_does_not() {
    let allow = policy(
        "p",
        "workloads: {names: [web]}, ingress: [{from: [{cidr: 10.0.0.0/24}]}]",
    );
    let deny = policy(
        "q",
        "action: Deny, workloads: {names: [web]}, ingress: [{from: [{cidr: 10.0.0.7/32}]}]",
    );
    let both = format!("{allow}{deny}");
    assert_eq!(narrowed(&allow, &both), 1);
    assert_eq!(narrowed(&both, &allow), 0);
}

#[test]
fn a_workload_that_is_closed_for_want_of_room_takes_one_entry() {
    let text = policy(
        "p",
        "workloads: {names: [web, job]}, egress: [{to: [{cidr: 10.9.0.0/16}], \
         ports: [{protocol: TCP, port: 80}, {protocol: UDP, port: 53}]}]",
    );
    let world = World::new(NODE, &text);
    let closing = policies(&world.config, &text)
        .unwrap()
        .closing([("web", Direction::Egress)]);
    let snapshot = Snapshot::compile(&Inputs {
        workloads: &world.workloads,
        peers: &world.config.peers,
        namespaces: &world.config.namespaces,
        policies: &closing,
        unselected: world.config.unselected,
        node_addresses: &world.config.node.addresses,
        tunnel_port: world.config.ports.tunnel,
    });
    super::kernel::check(snapshot.kernel_tables());
    let [web, job] = ["web", "job"].map(|name| {
        let found = world.workloads.iter().find(|it| it.workload.name == name);
        found.unwrap().workload.id
    });
    let of = |id| {
        let verdicts = snapshot.kernel_tables().verdicts.iter();
        verdicts.filter(|(_, key, _)| key.workload == id).count()
    };
    assert_eq!(of(web), 1);
    assert!(of(job) > 1);
    let address = "10.9.0.1:80".parse().unwrap();
    let decision = snapshot.judge_egress(web, address, TCP);
    assert_eq!(
        (decision.action, decision.reason),
        (Action::NoRoom, Reason::MapFailure)
    );
    assert!(!decision.allows());
    assert!(snapshot.judge_egress(job, address, TCP).allows());
}
