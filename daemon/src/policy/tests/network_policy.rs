//! Truth tables of Kubernetes' NetworkPolicy: for each policy, who of nine pods in three namespaces
//! reaches whom, by protocol and port. A connection needs the egress of its source and the ingress
//! of its destination.

mod cluster;
mod documents;

use std::sync::Arc;

use self::cluster::{
    A, Call, Cluster, NODE, OUTSIDE, PROTOCOLS, Pod, SCTP, XA, configuration, policy, policy_of,
};
use super::world::{TCP, UDP, World, config, connection_policy, netns, running};
use crate::workload::RunningWorkload;

#[test]
fn without_policies_every_pod_is_open_or_closed_as_it_is_set() {
    Cluster::new("").expect(|_| true);
    Cluster::with("policies: {unselected: deny}", "").expect(|_| false);
    Cluster::with("", "").expect(|_| false);
}

#[test]
fn ingress_is_closed_for_the_selected_pods_only() {
    for spec in [
        "podSelector: {}",
        "podSelector: {}, policyTypes: [Ingress]",
        "podSelector: {}, ingress: []",
        "podSelector: {}, policyTypes: [Ingress], ingress: []",
        // Without policyTypes, ingress always.
        "podSelector: {}, egress: []",
        "",
    ] {
        let cluster = Cluster::new(&policy("p", spec));
        cluster.expect(|call| call.to.0 != "x");
    }
    Cluster::new(&policy("p", A)).expect(|call| call.to != XA);
}

#[test]
fn egress_is_closed_by_its_type_or_by_rules() {
    let deny = Cluster::new(&policy("p", "podSelector: {}, policyTypes: [Egress]"));
    deny.expect(|call| call.from.0 != "x");
    let rules = Cluster::new(&policy(
        "p",
        "podSelector: {}, egress: [{ports: [{port: 80}]}]",
    ));
    // Egress rules without policyTypes are about both directions.
    rules.expect(|call| {
        call.to.0 != "x" && (call.from.0 != "x" || (call.protocol == TCP && call.port == 80))
    });
    let both = Cluster::new(&policy(
        "p",
        "podSelector: {}, policyTypes: [Ingress, Egress]",
    ));
    both.expect(|call| call.to.0 != "x" && call.from.0 != "x");
    // A type that is left out makes its rules say nothing.
    let ingress = "podSelector: {}, policyTypes: [Ingress], egress: [{}]";
    Cluster::new(&policy("p", ingress)).expect(|call| call.to.0 != "x");
}

#[test]
fn an_empty_rule_allows_everything_and_so_do_empty_lists_in_it() {
    for rule in [
        "{}",
        "{from: [], ports: []}",
        "{from: []}",
        "{ports: []}",
        "{from: null}",
    ] {
        let spec = format!("podSelector: {{}}, ingress: [{rule}]");
        Cluster::new(&policy("p", &spec)).expect(|_| true);
    }
    let spec = "podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]";
    Cluster::with("", &policy("p", spec)).expect(|call| call.from.0 == "x" && call.to.0 == "x");
}

#[test]
fn a_connection_needs_both_ends() {
    let text = policy(
        "out",
        &format!(
            "{A}, policyTypes: [Egress], egress: [{{to: [{{namespaceSelector: {{matchLabels: {{ns: y}}}}}}]}}]"
        ),
    ) + &policy_of(
        "y",
        "in",
        "podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}}]}]",
    );
    Cluster::new(&text).expect(|call| {
        let out = call.from != XA || call.to.0 == "y";
        let into = call.to != Pod("y", "b") || call.from.0 == "x";
        out && into
    });
}

// === adding up ===

#[test]
fn policies_add_up_in_any_order() {
    let deny = policy("deny", "podSelector: {}");
    let one = policy(
        "one",
        &format!("{A}, ingress: [{{from: [{{podSelector: {{matchLabels: {{pod: b}}}}}}]}}]"),
    );
    let two = policy(
        "two",
        &format!(
            "{A}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{ns: y}}}}}}], ports: [{{port: 80}}]}}]"
        ),
    );
    let expected = |call: Call| {
        let y = call.from.0 == "y" && call.protocol == TCP && call.port == 80;
        call.to.0 != "x" || (call.to == XA && (call.from == Pod("x", "b") || y))
    };
    for text in [
        format!("{deny}{one}{two}"),
        format!("{two}{one}{deny}"),
        format!("{one}{deny}{two}"),
    ] {
        Cluster::new(&text).expect(expected);
    }
}

#[test]
fn a_deleted_policy_gives_back_what_it_took() {
    let one = policy("one", &format!("{A}, ingress: [{{ports: [{{port: 80}}]}}]"));
    let two = policy("two", "podSelector: {}, policyTypes: [Egress]");
    let before = Cluster::new(&one);
    let during = Cluster::new(&format!("{one}{two}"));
    assert!(!during.differences(&before).is_empty());
    assert!(Cluster::new(&one).differences(&before).is_empty());
}

#[test]
fn changed_labels_are_judged_again() {
    let text = policy(
        "p",
        &format!(
            "{A}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{team: one}}}}, podSelector: {{matchLabels: {{pod: b}}}}}}]}}]"
        ),
    );
    Cluster::new(&text)
        .expect(|call| call.to != XA || (["x", "y"].contains(&call.from.0) && call.from.1 == "b"));
    // The namespace's label is another, then the pod's.
    let node = configuration("policies: {unselected: allow}");
    for (old, new, gone) in [
        ("{ns: y, team: one}", "{ns: y, team: two}", Pod("y", "b")),
        (
            "namespace: x, labels: {pod: b}",
            "namespace: x, labels: {pod: bb}",
            Pod("x", "b"),
        ),
    ] {
        let changed = node.replacen(old, new, 1);
        assert_ne!(changed, node);
        let world = World::new(&changed, &text);
        let changed = Cluster { world };
        let differences = changed.differences(&Cluster::new(&text));
        assert!(!differences.is_empty());
        assert!(
            differences
                .iter()
                .all(|call| call.to == XA && call.from == gone),
            "{differences:?}"
        );
    }
}

// === peers ===

#[test]
fn selectors_mean_the_namespaces_that_they_say() {
    for (peer, expected) in [
        // The policy's own.
        (
            "{podSelector: {}}",
            (|from: Pod| from.0 == "x") as fn(Pod) -> bool,
        ),
        ("{podSelector: {matchLabels: {pod: b}}}", |from| {
            from == Pod("x", "b")
        }),
        // Every one.
        ("{namespaceSelector: {}}", |_| true),
        (
            "{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}",
            |from| from.1 == "b",
        ),
        // By labels, by the implicit one too; `z` has no labels and is not declared.
        ("{namespaceSelector: {matchLabels: {team: one}}}", |from| {
            from.0 != "z"
        }),
        (
            "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}",
            |from| from.0 == "z",
        ),
        (
            "{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [x, z]}]}}",
            |from| from.0 != "y",
        ),
        (
            "{namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}}",
            |from| from.0 == "z",
        ),
        (
            "{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}}",
            |from| from.0 != "x",
        ),
        // Both is AND, two items are OR.
        (
            "{namespaceSelector: {matchLabels: {ns: y}}, podSelector: {matchLabels: {pod: b}}}",
            |from| from == Pod("y", "b"),
        ),
        (
            "{namespaceSelector: {matchLabels: {ns: y}}}, {podSelector: {matchLabels: {pod: b}}}",
            |from| from.0 == "y" || from == Pod("x", "b"),
        ),
        // An absent key is not in any list, and is no empty value.
        (
            "{podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [front, '']}]}}",
            |from| from == Pod("x", "b"),
        ),
        (
            "{podSelector: {matchExpressions: [{key: tier, operator: In, values: ['']}]}}",
            |_| false,
        ),
        (
            "{podSelector: {matchExpressions: [{key: tier, operator: Exists}, {key: pod, operator: In, values: [b, c]}]}}",
            |from| from == Pod("x", "c"),
        ),
        (
            "{podSelector: {matchLabels: {pod: a}, matchExpressions: [{key: tier, operator: DoesNotExist}]}}",
            |_| false,
        ),
    ] {
        let spec = format!("{A}, ingress: [{{from: [{peer}]}}]");
        let ingress = Cluster::new(&policy("p", &spec));
        ingress.expect(|call| call.to != XA || expected(call.from));
        let spec = format!("{A}, policyTypes: [Egress], egress: [{{to: [{peer}]}}]");
        let egress = Cluster::new(&policy("p", &spec));
        egress.expect(|call| call.from != XA || expected(call.to));
    }
}

#[test]
fn a_pod_selector_never_means_an_address_outside_and_a_block_may_mean_a_pod() {
    let all = "podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{namespaceSelector: {}}]}], egress: [{to: [{namespaceSelector: {}}]}]";
    let world = Cluster::new(&policy("p", all)).world;
    for protocol in PROTOCOLS {
        assert_eq!(
            world.egress("x-a", protocol, &format!("{OUTSIDE}:80")),
            "no"
        );
        assert_eq!(world.plaintext("x-a", protocol, OUTSIDE, 80), "no");
    }
    let block =
        "podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.0.2.0/24}}]}]";
    Cluster::new(&policy("p", block)).expect(|call| call.from.0 != "x" || call.to.0 == "y");
    let block = "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.2.3/24}}]}]";
    Cluster::new(&policy("p", block)).expect(|call| call.to.0 != "x" || call.from.0 == "y");
}

#[test]
fn an_exception_narrows_its_own_block_only() {
    let item = "{ipBlock: {cidr: 10.0.0.0/16, except: [10.0.2.0/24, 10.0.3.1/32]}}";
    let spec = format!("{A}, policyTypes: [Egress], egress: [{{to: [{item}]}}]");
    let narrow = |to: Pod| to.0 != "y" && to != Pod("z", "a");
    Cluster::new(&policy("p", &spec)).expect(|call| call.from != XA || narrow(call.to));
    let spec = format!(
        "{A}, policyTypes: [Egress], egress: [{{to: [{item}]}}, {{to: [{{ipBlock: {{cidr: 10.0.2.2/32}}}}]}}]"
    );
    Cluster::new(&policy("p", &spec))
        .expect(|call| call.from != XA || narrow(call.to) || call.to == Pod("y", "b"));
}

#[test]
fn the_node_reaches_its_pods_whatever_the_policies_say() {
    let world = Cluster::new(&policy("p", "podSelector: {}")).world;
    for protocol in PROTOCOLS {
        assert_eq!(world.plaintext("x-a", protocol, NODE, 80), "node");
        assert_eq!(world.plaintext("x-a", protocol, OUTSIDE, 80), "no");
    }
}

// === ports ===

#[test]
fn pods_in_a_hosts_network_are_told_apart_by_proof_and_those_of_the_node_are_the_nodes_address() {
    const ELSEWHERE: &str = "192.168.0.2";
    let hosted = ["agent", "proxy"].map(|name| {
        format!(
            "- {{name: {name}, namespace: z, labels: {{pod: {name}}}, unit: {name}.service, addresses: [{NODE}]}}\n"
        )
    });
    let elsewhere = [("agent", 9000), ("proxy", 9001)].map(|(name, port)| {
        format!(
            "- {{name: {name}-2, namespace: z, labels: {{pod: {name}}}, addresses: [{ELSEWHERE}], ports: [{port}]}}\n"
        )
    });
    let settings = format!(
        "{}peers:\n{}policies: {{unselected: allow}}",
        hosted.concat(),
        elsewhere.concat()
    );
    let from_agent = policy(
        "p",
        "podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: agent}}}]}]",
    );
    let own = policy_of("z", "q", "podSelector: {matchLabels: {pod: agent}}");
    let config = config(&configuration(&settings));
    let shared = netns(99);
    let workloads = running(&config).into_iter().map(|running| {
        if !["agent", "proxy"].contains(&running.workload.name.as_str()) {
            return running;
        }
        Arc::new(RunningWorkload {
            netns: Some(Arc::clone(&shared)),
            owns_netns: false,
            ..RunningWorkload::clone(&running)
        })
    });
    let world = World::with(config, workloads.collect(), &format!("{from_agent}{own}"));
    let id = |name: &str| format!("spiffe://example.org/ns/z/sa/{name}");
    let tunnel = |name: &str, from: &str| world.tunnel("x-a", &id(name), from, 80);
    assert_eq!(tunnel("agent-2", ELSEWHERE), "x/p/ingress[0]");
    assert_eq!(tunnel("proxy-2", ELSEWHERE), "no");
    // Without proof nobody of those who share the address is the one that is meant.
    assert_eq!(world.plaintext("x-a", UDP, ELSEWHERE, 80), "no");
    // The pod's own node reaches it, and so does whoever has the node's address.
    for name in ["agent", "proxy"] {
        assert_eq!(tunnel(name, NODE), "node");
    }
    assert_eq!(world.plaintext("x-a", UDP, NODE, 80), "node");
    // What isolates one of them isolates none of the others.
    assert_eq!(world.plaintext("agent", UDP, "10.0.1.1", 80), "no");
    assert_eq!(world.plaintext("proxy", UDP, "10.0.1.1", 80), "unselected");
}

#[test]
fn ports_are_of_a_protocol_which_is_tcp_where_none_is_said() {
    for (port, expected) in [
        (
            "{port: 80}",
            (|_, protocol, port| protocol == TCP && port == 80) as fn(Pod, u8, u16) -> bool,
        ),
        ("{protocol: UDP, port: 80}", |_, protocol, port| {
            protocol == UDP && port == 80
        }),
        ("{protocol: SCTP, port: 80}", |_, protocol, port| {
            protocol == SCTP && port == 80
        }),
        // Without a port, all of the protocol.
        ("{}", |_, protocol, _| protocol == TCP),
        ("{protocol: UDP}", |_, protocol, _| protocol == UDP),
        (
            "{port: 80}, {protocol: UDP, port: 81}",
            |_, protocol, port| (protocol == TCP && port == 80) || (protocol == UDP && port == 81),
        ),
        ("{port: 81, endPort: 8000}", |_, protocol, port| {
            protocol == TCP && (81..=8000).contains(&port)
        }),
        (
            "{protocol: UDP, port: 80, endPort: 80}",
            |_, protocol, port| protocol == UDP && port == 80,
        ),
        // A name is each destination's own, and so is its protocol.
        ("{port: web}", |to, protocol, port| {
            protocol == TCP && port == if to.1 == "c" { 81 } else { 80 }
        }),
        ("{protocol: UDP, port: web-udp}", |to, protocol, port| {
            protocol == UDP && port == if to.1 == "c" { 81 } else { 80 }
        }),
        ("{protocol: UDP, port: web}", |_, _, _| false),
        ("{port: nowhere}", |_, _, _| false),
        ("{port: web}, {port: other}", |_, protocol, port| {
            protocol == TCP && port <= 81
        }),
        ("{port: web}, {port: 8180}", |to, protocol, port| {
            protocol == TCP && (port == 8180 || port == if to.1 == "c" { 81 } else { 80 })
        }),
    ] {
        let spec = format!("podSelector: {{}}, ingress: [{{ports: [{port}]}}]");
        Cluster::new(&policy("p", &spec))
            .expect(|call| call.to.0 != "x" || expected(call.to, call.protocol, call.port));
        let spec =
            format!("podSelector: {{}}, policyTypes: [Egress], egress: [{{ports: [{port}]}}]");
        Cluster::new(&policy("p", &spec))
            .expect(|call| call.from.0 != "x" || expected(call.to, call.protocol, call.port));
    }
}

#[test]
fn a_named_port_goes_with_every_kind_of_peer() {
    let web =
        |call: Call| call.protocol == TCP && call.port == if call.to.1 == "c" { 81 } else { 80 };
    for (peer, expected) in [
        (
            "{podSelector: {}}",
            (|to: Pod| to.0 == "x") as fn(Pod) -> bool,
        ),
        ("{namespaceSelector: {matchLabels: {ns: y}}}", |to| {
            to.0 == "y"
        }),
        (
            "{ipBlock: {cidr: 10.0.2.0/24, except: [10.0.2.1/32]}}",
            |to| to.0 == "y" && to.1 != "a",
        ),
    ] {
        let spec = format!(
            "{A}, policyTypes: [Egress], egress: [{{to: [{peer}], ports: [{{port: web}}]}}]"
        );
        Cluster::new(&policy("p", &spec))
            .expect(|call| call.from != XA || (expected(call.to) && web(call)));
    }
}

#[test]
fn rules_of_one_protocol_close_the_others_too() {
    for (name, number) in [("UDP", UDP), ("SCTP", SCTP)] {
        let spec = format!("podSelector: {{}}, ingress: [{{ports: [{{protocol: {name}}}]}}]");
        Cluster::new(&policy("p", &spec))
            .expect(|call| call.to.0 != "x" || call.protocol == number);
    }
}

// === documents ===

#[test]
fn a_policy_without_a_namespace_is_of_the_default_one() {
    let text = policy("p", "podSelector: {}").replace(", namespace: x", "");
    Cluster::new(&text).expect(|_| true);
}

#[test]
fn an_annotation_makes_a_policy_a_dry_run() {
    let text = policy("p", "podSelector: {}, policyTypes: [Ingress, Egress]").replace(
        "namespace: x",
        "namespace: x, annotations: {reeve.dev/mode: DryRun}",
    );
    let cluster = Cluster::new(&text);
    cluster.expect(|_| true);
    let would = cluster.world.dry_egress("x-a", TCP, "10.0.2.1:80");
    assert_eq!(would.0, reeve_common::DryRun::Deny);
}

#[test]
fn a_connection_policy_adds_to_it_and_denies() {
    let own = |spec: &str| connection_policy("own", spec);
    let closed = policy("p", "podSelector: {}");
    let add = own("workloads: {namespace: x}, ingress: [{from: [{namespace: y}]}]");
    Cluster::new(&format!("{closed}{add}")).expect(|call| call.to.0 != "x" || call.from.0 == "y");
    // By itself it closes what it has rules for.
    Cluster::new(&add).expect(|call| call.to.0 != "x" || call.from.0 == "y");
    let deny = own(
        "action: Deny, workloads: {}, ingress: [{from: [{namespace: y}], ports: [{port: 80}]}]",
    );
    let open = policy("q", "podSelector: {}, ingress: [{}]");
    for text in [format!("{open}{deny}"), deny] {
        Cluster::new(&text)
            .expect(|call| !(call.from.0 == "y" && call.protocol == TCP && call.port == 80));
    }
}
