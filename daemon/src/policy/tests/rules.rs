//! What policies mean.

use std::sync::Arc;

use super::world::{TCP, UDP, World, config, connection_policy as policy, netns, running};

const NODE: &str = "
trustDomain: example.org
node: {addresses: [192.168.0.1]}
workloads:
- {name: web, namespace: shop, labels: {app: web}, cgroup: /web, addresses: [10.0.0.1]}
- {name: job, namespace: shop, cgroup: /job, addresses: [10.0.0.2]}
peers:
- {name: db, namespace: shop, labels: {app: db}, addresses: [10.1.0.1, '2001:db8::1']}
- {name: log, namespace: ops, labels: {app: log}, addresses: [10.1.0.2]}
- {name: cache, namespace: shop, serviceAccount: db, addresses: [10.1.0.3]}
- {name: other, spiffeId: spiffe://other.org/ns/shop/sa/db, labels: {app: db}, addresses: [10.1.0.4]}
- {name: printer, addresses: [10.1.0.9]}
";

const DB: &str = "spiffe://example.org/ns/shop/sa/db";
const LOG: &str = "spiffe://example.org/ns/ops/sa/log";

/// A policy `p` with these lists of rules.
fn world(spec: &str) -> World {
    World::new(NODE, &policy("p", spec))
}

fn egress(rules: &str) -> World {
    world(&format!("workloads: {{names: [web]}}, egress: [{rules}]"))
}

fn ingress(rules: &str) -> World {
    world(&format!("workloads: {{names: [web]}}, ingress: [{rules}]"))
}

#[test]
fn nothing_is_allowed_that_no_policy_allows() {
    let world = World::new(NODE, "");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "no");
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 80), "no");
    assert_eq!(world.tunnel("web", DB, "10.1.0.1", 80), "no");
    assert_eq!(world.snapshot.rule_name(0), "default deny");
}

#[test]
fn the_node_itself_is_let_in() {
    let world = World::new(NODE, "");
    assert_eq!(world.plaintext("web", TCP, "192.168.0.1", 80), "node");
    assert_eq!(world.plaintext("web", UDP, "192.168.0.1", 80), "node");
    assert_eq!(world.tunnel("web", DB, "192.168.0.1", 80), "node");
    assert_eq!(world.egress("web", TCP, "192.168.0.1:80"), "no");
}

#[test]
fn a_rule_is_for_the_workloads_that_its_policy_selects() {
    let world = egress("{to: [{namespace: shop}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("job", TCP, "10.1.0.1:80"), "no");
}

#[test]
fn a_rule_is_for_one_direction() {
    let world = egress("{to: [{namespace: shop}]}");
    assert_eq!(world.tunnel("web", DB, "10.1.0.1", 80), "no");
    assert_eq!(world.plaintext("web", UDP, "10.1.0.1", 80), "no");
}

#[test]
fn an_identity_is_exact() {
    let world = egress("{to: [{identity: 'spiffe://example.org/ns/shop/sa/db'}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "[2001:db8::1]:80"), "p/egress[0]");
    // `cache` has the same service account, and so the same identity.
    assert_eq!(world.egress("web", TCP, "10.1.0.3:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.4:80"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.9:80"), "no");
}

#[test]
fn a_prefix_selects_what_lies_below() {
    let world = egress("{to: [{identityPrefix: 'spiffe://example.org/ns/shop/'}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.0.0.2:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.4:80"), "no");
}

#[test]
fn inside_an_item_everything_must_fit_and_between_items_anything() {
    let world = egress("{to: [{namespace: shop, labels: {app: db}}, {serviceAccount: log}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.3:80"), "no");
}

#[test]
fn a_label_that_is_absent_is_not_in_any_list() {
    let world = egress("{to: [{matchExpressions: [{key: app, operator: NotIn, values: [db]}]}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.3:80"), "p/egress[0]");
    // Without an identity there is nothing that could be said of its labels.
    assert_eq!(world.egress("web", TCP, "10.1.0.9:80"), "no");
}

#[test]
fn a_block_selects_addresses_and_its_exceptions_narrow_only_it() {
    let world =
        egress("{to: [{cidr: 10.1.0.0/24, except: [10.1.0.2/31]}]}, {to: [{cidr: 10.1.0.3}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.200:80"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.3:80"), "p/egress[1]");
    assert_eq!(world.egress("web", TCP, "10.2.0.1:80"), "no");
}

#[test]
fn a_block_of_one_family_says_nothing_of_the_other() {
    let six = egress("{to: [{cidr: '::/0'}]}");
    assert_eq!(six.egress("web", TCP, "[2001:db8::7]:80"), "p/egress[0]");
    assert_eq!(six.egress("web", TCP, "10.1.0.1:80"), "no");
    assert_eq!(six.egress("web", TCP, "9.9.9.9:80"), "no");
    let four = egress("{to: [{cidr: 0.0.0.0/0}]}");
    assert_eq!(four.egress("web", TCP, "9.9.9.9:80"), "p/egress[0]");
    assert_eq!(four.egress("web", TCP, "[2001:db8::7]:80"), "no");
}

#[test]
fn anybody_is_anybody() {
    for rules in ["{}", "{to: [{any: {}}]}", "{ports: []}"] {
        let world = egress(rules);
        assert_eq!(world.egress("web", TCP, "9.9.9.9:80"), "p/egress[0]");
        assert_eq!(world.egress("web", 1, "10.1.0.1:0"), "p/egress[0]");
    }
    for rules in ["{}", "{from: [{any: {}}]}"] {
        let world = ingress(rules);
        assert_eq!(world.plaintext("web", TCP, "9.9.9.9", 80), "p/ingress[0]");
        assert_eq!(
            world.tunnel("web", "spiffe://x.y/z", "9.9.9.9", 80),
            "p/ingress[0]"
        );
    }
}

#[test]
fn ports_are_those_of_the_destination() {
    let world = egress(
        "{to: [{any: {}}], ports: [{port: 80}, {port: 8000, endPort: 8100}, {protocol: UDP, port: 53}]}",
    );
    for allowed in [80, 8000, 8050, 8100] {
        assert_eq!(
            world.egress("web", TCP, &format!("9.9.9.9:{allowed}")),
            "p/egress[0]"
        );
    }
    for refused in [79, 81, 7999, 8101, 53] {
        assert_eq!(
            world.egress("web", TCP, &format!("9.9.9.9:{refused}")),
            "no"
        );
    }
    assert_eq!(world.egress("web", UDP, "9.9.9.9:53"), "p/egress[0]");
    assert_eq!(world.egress("web", UDP, "9.9.9.9:80"), "no");
    assert_eq!(world.egress("web", 1, "9.9.9.9:0"), "no");
}

#[test]
fn a_protocol_without_a_port_is_all_of_it() {
    let world = egress("{ports: [{}, {protocol: ICMP}]}");
    assert_eq!(world.egress("web", TCP, "9.9.9.9:1"), "p/egress[0]");
    assert_eq!(world.egress("web", UDP, "9.9.9.9:1"), "no");
    assert_eq!(world.egress("web", 1, "9.9.9.9:0"), "p/egress[0]");
    assert_eq!(world.egress("web", 58, "[2001:db8::9]:0"), "p/egress[0]");
    let any = egress("{ports: [{protocol: Any}]}");
    assert_eq!(any.egress("web", 47, "9.9.9.9:0"), "p/egress[0]");
}

#[test]
fn tcp_from_an_identity_must_come_through_a_tunnel() {
    let world = ingress("{from: [{labels: {app: db}}]}");
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 80), "tunnel only");
    assert_eq!(world.plaintext("web", UDP, "10.1.0.1", 80), "p/ingress[0]");
    assert_eq!(world.plaintext("web", 1, "10.1.0.1", 0), "p/ingress[0]");
    assert_eq!(world.tunnel("web", DB, "10.1.0.1", 80), "p/ingress[0]");
    assert_eq!(world.plaintext("web", UDP, "10.1.0.2", 80), "no");
}

#[test]
fn a_block_lets_plaintext_in() {
    let world = ingress(
        "{from: [{namespace: shop}], ports: [{port: 80}]}, {from: [{cidr: 10.1.0.1}], ports: [{port: 81}]}",
    );
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 80), "tunnel only");
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 81), "p/ingress[1]");
    assert_eq!(world.tunnel("web", LOG, "10.1.0.1", 81), "p/ingress[1]");
    assert_eq!(world.tunnel("web", LOG, "10.1.0.2", 81), "no");
}

#[test]
fn rules_add_up_and_what_allows_more_wins() {
    let world =
        ingress("{from: [{namespace: shop}]}, {from: [{cidr: 10.1.0.0/16}], ports: [{port: 80}]}");
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 80), "p/ingress[1]");
    assert_eq!(world.plaintext("web", TCP, "10.1.0.1", 81), "tunnel only");
    assert_eq!(world.plaintext("web", UDP, "10.1.0.1", 80), "p/ingress[0]");
}

#[test]
fn a_rule_for_all_does_not_hide_a_rule_for_one() {
    let world =
        egress("{ports: [{port: 443}]}, {to: [{labels: {app: db}}], ports: [{port: 5432}]}");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:443"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.1:5432"), "p/egress[1]");
    assert_eq!(world.egress("web", TCP, "9.9.9.9:443"), "p/egress[0]");
    assert_eq!(world.egress("web", TCP, "9.9.9.9:5432"), "no");
}

#[test]
fn a_client_that_nobody_declared_shows_its_namespace_but_no_labels() {
    let new = "spiffe://example.org/ns/shop/sa/new";
    let by = |item: &str| ingress(&format!("{{from: [{item}]}}"));
    assert_eq!(
        by("{namespace: shop}").tunnel("web", new, "10.5.0.1", 80),
        "p/ingress[0]"
    );
    assert_eq!(
        by("{namespace: '*'}").tunnel("web", new, "10.5.0.1", 80),
        "p/ingress[0]"
    );
    assert_eq!(
        by("{serviceAccount: new}").tunnel("web", new, "10.5.0.1", 80),
        "p/ingress[0]"
    );
    assert_eq!(
        by("{namespace: ops}").tunnel("web", new, "10.5.0.1", 80),
        "no"
    );
    let unlabelled = "{namespace: shop, matchExpressions: [{key: app, operator: DoesNotExist}]}";
    assert_eq!(by(unlabelled).tunnel("web", new, "10.5.0.1", 80), "no");
    assert_eq!(
        by("{labels: {app: db}}").tunnel("web", DB, "10.5.0.1", 80),
        "no"
    );
    assert_eq!(
        by("{labels: {app: db}}").tunnel("web", DB, "10.1.0.1", 80),
        "p/ingress[0]"
    );
}

#[test]
fn another_trust_domain_cannot_claim_a_namespace() {
    let world = ingress("{from: [{namespace: shop}]}");
    let stranger = "spiffe://other.org/ns/shop/sa/web";
    assert_eq!(world.tunnel("web", stranger, "10.5.0.1", 80), "no");
    // This one is declared, with that namespace.
    let declared = "spiffe://other.org/ns/shop/sa/db";
    assert_eq!(
        world.tunnel("web", declared, "10.1.0.4", 80),
        "p/ingress[0]"
    );
    assert_eq!(world.tunnel("web", declared, "10.1.0.1", 80), "no");
}

#[test]
fn a_policy_with_a_namespace_means_its_own_where_none_is_said() {
    let text = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: p, namespace: shop}
spec:
  workloads: {}
  egress:
  - {to: [{matchExpressions: [{key: app, operator: Exists}]}], ports: [{port: 1}]}
  - {to: [{namespace: '*', matchExpressions: [{key: app, operator: Exists}]}], ports: [{port: 2}]}
";
    let world = World::new(NODE, text);
    assert_eq!(world.egress("web", TCP, "10.1.0.1:1"), "shop/p/egress[0]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:1"), "no");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:2"), "shop/p/egress[1]");
}

#[test]
fn local_workloads_are_peers_of_each_other() {
    let world = egress("{to: [{serviceAccount: job}]}");
    assert_eq!(world.egress("web", TCP, "10.0.0.2:80"), "p/egress[0]");
    let job = world.snapshot.peer(2).unwrap();
    assert_eq!((job.name.as_str(), job.tunnel_port), ("job", Some(15008)));
}

#[test]
fn at_a_shared_address_the_port_says_who_is_meant() {
    let text = "
trustDomain: example.org
workloads: [{name: web, cgroup: /w, addresses: [10.0.0.1]}]
peers:
- {name: a, addresses: [10.1.0.1], ports: [80], labels: {of: a}}
- {name: b, addresses: [10.1.0.1], ports: [81], labels: {of: b, any: one}}
- {name: c, addresses: [10.1.0.2], ports: [80], labels: {of: c}}
";
    let rules = |direction: &str, rules: &str| {
        World::new(
            text,
            &policy("p", &format!("workloads: {{}}, {direction}: [{rules}]")),
        )
    };
    let to_a = rules("egress", "{to: [{labels: {of: a}}, {labels: {of: c}}]}");
    assert_eq!(to_a.egress("web", TCP, "10.1.0.1:80"), "p/egress[0]");
    assert_eq!(to_a.egress("web", TCP, "10.1.0.1:81"), "no");
    assert_eq!(to_a.egress("web", TCP, "10.1.0.1:82"), "no");
    // Not shared: all ports are its own.
    assert_eq!(to_a.egress("web", TCP, "10.1.0.2:82"), "p/egress[0]");

    // A source's port says nothing, so only what holds for both is believed.
    let from_b = rules("ingress", "{from: [{labels: {of: b}}]}");
    assert_eq!(from_b.plaintext("web", UDP, "10.1.0.1", 9), "no");
    let from_both = rules("ingress", "{from: [{namespace: default}]}");
    assert_eq!(
        from_both.plaintext("web", UDP, "10.1.0.1", 9),
        "p/ingress[0]"
    );
}

#[test]
fn in_a_shared_namespace_a_workload_has_its_ports_only() {
    let config = config(
        "{trustDomain: a, workloads: [{name: w, cgroup: /w, ports: [80]}, {name: x, cgroup: /x, ports: [81]}]}",
    );
    let shared = netns(7);
    let workloads = running(&config)
        .iter()
        .map(|w| {
            let mut w = (**w).clone();
            w.netns = Some(Arc::clone(&shared));
            w.owns_netns = false;
            w.addresses = vec!["10.0.0.1".parse().unwrap()];
            Arc::new(w)
        })
        .collect();
    let world = World::with(
        config,
        workloads,
        &policy(
            "p",
            "workloads: {}, egress: [{to: [{serviceAccount: w}]}], ingress: [{from: [{serviceAccount: w}]}]",
        ),
    );
    assert_eq!(world.egress("x", TCP, "10.0.0.1:80"), "p/egress[0]");
    assert_eq!(world.egress("x", TCP, "10.0.0.1:22"), "no");
    // Anything on the host could have sent it.
    assert_eq!(world.plaintext("x", UDP, "10.0.0.1", 9), "no");
    let at = |ip: &str, port| {
        let found = world.snapshot.workload_at(7, ip.parse().unwrap(), port);
        found.map(|w| w.workload.name.as_str())
    };
    assert_eq!(at("10.0.0.1", 80), Some("w"));
    assert_eq!(at("::ffff:10.0.0.1", 81), Some("x"));
    assert_eq!(at("10.0.0.1", 22), None);
    assert_eq!(at("10.0.0.2", 80), None);
    assert!(
        world
            .snapshot
            .workload_at(8, "10.0.0.1".parse().unwrap(), 80)
            .is_none()
    );
    let id = "spiffe://a/ns/default/sa/x".parse().unwrap();
    assert_eq!(
        world
            .snapshot
            .workload_with_id(7, &id)
            .unwrap()
            .workload
            .name,
        "x"
    );
    assert!(world.snapshot.workload_with_id(8, &id).is_none());
}

#[test]
fn a_peer_that_is_a_local_workload_is_that_workload() {
    let text = "
trustDomain: a
workloads: [{name: w, cgroup: /w, addresses: [10.0.0.1], labels: {here: 'yes'}}]
peers: [{name: w-too, serviceAccount: w, addresses: [10.0.0.1], tunnel: false}]
";
    let world = World::new(
        text,
        &policy(
            "p",
            "workloads: {}, egress: [{to: [{labels: {here: 'yes'}}]}]",
        ),
    );
    assert_eq!(world.egress("w", TCP, "10.0.0.1:80"), "p/egress[0]");
    let tables = world.snapshot.kernel_tables();
    assert_eq!(tables.peers[0].2.peer, 1);
    assert_eq!(tables.peers[0].2.flags, reeve_common::PEER_TUNNEL);
}

#[test]
fn numbers_outlive_a_change_elsewhere() {
    let one = policy("p", "workloads: {}, egress: [{to: [{labels: {app: db}}]}]");
    let before = World::new(NODE, &one);
    let more = policy(
        "o",
        "workloads: {}, egress: [{to: [{cidr: 172.16.0.0/12}]}]",
    );
    let after = World::new(NODE, &format!("{more}{one}"));
    let old = before.snapshot.kernel_tables();
    let new = after.snapshot.kernel_tables();
    assert!(old.peers.iter().all(|entry| new.peers.contains(entry)));
    assert!(
        old.verdicts
            .iter()
            .all(|entry| new.verdicts.contains(entry))
    );
}

#[test]
fn a_rule_can_be_found_in_its_file() {
    let world = egress("{}");
    let decision = world
        .snapshot
        .judge_egress(1, "9.9.9.9:80".parse().unwrap(), TCP);
    assert_eq!(
        world
            .snapshot
            .rule_place(decision.rule)
            .unwrap()
            .to_string(),
        "policy.yaml:5"
    );
    assert_eq!(world.snapshot.rule_place(0), None);
    assert_eq!(
        world.config.workloads.len(),
        world.snapshot.workloads().count()
    );
}

#[test]
fn who_is_not_declared_is_judged_by_nobody_s_rules() {
    let world = egress("{}");
    let decision = world
        .snapshot
        .judge_egress(99, "9.9.9.9:80".parse().unwrap(), TCP);
    assert_eq!(decision.rule, 0);
    assert!(world.snapshot.workload(99).is_none());
    assert_eq!(world.snapshot.rule_name(12345), "unknown rule");
}

#[test]
fn a_service_of_the_host_is_not_believed_by_its_address_though_it_is_alone_there() {
    const TEXT: &str = "{trustDomain: a, workloads: [\
        {name: w, cgroup: /w, addresses: [10.0.0.1]}, \
        {name: x, cgroup: /x, addresses: [10.0.0.2]}]}";
    let from_w = policy(
        "p",
        "workloads: {}, ingress: [{from: [{serviceAccount: w}]}]",
    );
    let world = |alone: bool| {
        let config = config(TEXT);
        let workloads = running(&config).into_iter().map(|running| {
            let mut running = (*running).clone();
            running.owns_netns = alone;
            Arc::new(running)
        });
        let workloads = workloads.collect();
        World::with(config, workloads, &from_w)
    };
    assert_eq!(
        world(true).plaintext("x", UDP, "10.0.0.1", 9),
        "p/ingress[0]"
    );
    assert_eq!(world(false).plaintext("x", UDP, "10.0.0.1", 9), "no");
}

#[test]
fn an_address_in_the_other_notation_is_the_same() {
    let world = egress("{to: [{labels: {app: db}}], ports: [{port: 80}]}");
    for to in ["10.1.0.1:80", "[::ffff:10.1.0.1]:80"] {
        assert_eq!(world.egress("web", TCP, to), "p/egress[0]", "{to}");
    }
    let world = ingress("{from: [{cidr: 10.7.0.0/16}]}");
    for from in ["10.7.0.1", "::ffff:10.7.0.1"] {
        assert_eq!(world.plaintext("web", TCP, from, 80), "p/ingress[0]");
        assert_eq!(world.tunnel("web", LOG, from, 80), "p/ingress[0]");
    }
}
