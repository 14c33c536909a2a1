//! What a `ConnectionPolicy` can say beside whom it allows: deny, dry runs, groups, and the modes
//! of workloads.

use std::path::Path;

use reeve_common::{Action, DryRun, Reason};

use super::world::{
    TCP, UDP, World, are_the_mistakes, config, connection_policy as policy, policies,
};
use crate::policy::PolicySet;

const NODE: &str = "
trustDomain: example.org
node: {addresses: [192.168.0.1]}
workloads:
- {name: web, namespace: shop, labels: {app: web}, cgroup: /web, addresses: [10.0.0.1]}
- {name: job, namespace: shop, cgroup: /job, addresses: [10.0.0.2], permissive: true}
peers:
- {name: db, namespace: shop, labels: {app: db}, addresses: [10.1.0.1]}
- {name: log, namespace: ops, labels: {app: log}, addresses: [10.1.0.2]}
- {name: a, namespace: shop, addresses: [10.1.0.3], ports: [80]}
- {name: b, namespace: ops, addresses: [10.1.0.3], ports: [81]}
- {name: away, spiffeId: spiffe://other.org/ns/shop/sa/away, addresses: [10.1.0.4]}
";

const DB: &str = "spiffe://example.org/ns/shop/sa/db";

const ALL: &str = "workloads: {}, egress: [{}], ingress: [{}]";

fn with(spec: &str) -> World {
    World::new(NODE, &(policy("all", ALL) + &policy("p", spec)))
}

#[test]
fn a_deny_goes_before_every_allow_wherever_it_is_written() {
    let deny = policy(
        "deny",
        "action: Deny, workloads: {}, egress: [{to: [{namespace: ops}], ports: [{port: 80}]}]",
    );
    for text in [
        deny.clone() + &policy("all", ALL),
        policy("all", ALL) + &deny,
    ] {
        let world = World::new(NODE, &text);
        assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "no");
        assert_eq!(world.egress("web", TCP, "10.1.0.2:81"), "all/egress[0]");
        assert_eq!(world.egress("web", UDP, "10.1.0.2:80"), "all/egress[0]");
        assert_eq!(world.egress("web", TCP, "10.1.0.1:80"), "all/egress[0]");
        let denied = world
            .snapshot
            .judge_egress(1, "10.1.0.2:80".parse().unwrap(), TCP);
        assert_eq!(
            (denied.action, denied.reason),
            (Action::Deny, Reason::PolicyDeny)
        );
        assert_eq!(world.snapshot.rule_name(denied.rule), "deny/egress[0]");
    }
}

#[test]
fn the_node_itself_is_let_in_whatever_is_denied() {
    let world = with("action: Deny, workloads: {}, ingress: [{}]");
    assert_eq!(world.plaintext("web", TCP, "192.168.0.1", 80), "node");
    assert_eq!(world.plaintext("web", TCP, "9.9.9.9", 80), "no");
    assert_eq!(world.tunnel("web", DB, "10.1.0.1", 80), "no");
}

#[test]
fn whoever_could_be_meant_is_denied() {
    let world = with(
        "action: Deny, workloads: {}, egress: [{to: [{namespace: ops}]}], ingress: [{from: [{namespace: ops}]}]",
    );
    // A source's port says nothing of which of the two it is.
    assert_eq!(world.plaintext("web", UDP, "10.1.0.3", 5), "no");
    assert_eq!(world.egress("web", UDP, "10.1.0.3:80"), "all/egress[0]");
    assert_eq!(world.egress("web", UDP, "10.1.0.3:81"), "no");
    // Either may have a port that nobody owns.
    assert_eq!(world.egress("web", UDP, "10.1.0.3:82"), "no");
    // A certificate tells them apart.
    let id = |name: &str| format!("spiffe://example.org/ns/{name}");
    assert_eq!(
        world.tunnel("web", &id("shop/sa/a"), "10.1.0.3", 5),
        "all/ingress[0]"
    );
    assert_eq!(world.tunnel("web", &id("ops/sa/b"), "10.1.0.3", 5), "no");
    // Nobody declared them: what the ID shows counts, of whatever domain, and no ID shows nothing.
    assert_eq!(world.tunnel("web", &id("ops/sa/new"), "10.5.0.1", 5), "no");
    assert_eq!(
        world.tunnel("web", "spiffe://other.org/ns/ops/sa/new", "10.5.0.1", 5),
        "no"
    );
    assert_eq!(
        world.tunnel("web", &id("shop/sa/new"), "10.5.0.1", 5),
        "all/ingress[0]"
    );
    assert_eq!(
        world.tunnel("web", "spiffe://other.org/x", "10.5.0.1", 5),
        "no"
    );
    // At an address of which nothing is known there is nobody with an identity.
    assert_eq!(world.plaintext("web", UDP, "10.5.0.1", 5), "all/ingress[0]");
}

#[test]
fn unknown_labels_count_against_a_client_that_nobody_declared() {
    let world = with("action: Deny, workloads: {}, ingress: [{from: [{labels: {app: log}}]}]");
    assert_eq!(world.tunnel("web", DB, "10.1.0.1", 5), "all/ingress[0]");
    assert_eq!(world.tunnel("web", DB, "10.5.0.1", 5), "no");
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_it_would_change() {
    let world =
        with("mode: DryRun, action: Deny, workloads: {}, egress: [{to: [{namespace: ops}]}]");
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "all/egress[0]");
    let would = world.dry_egress("web", TCP, "10.1.0.2:80");
    assert_eq!(would, (DryRun::Deny, "p/egress[0]"));
    let same = world.dry_egress("web", TCP, "10.1.0.1:80");
    assert_eq!(same.0, DryRun::Same);

    let spec =
        "mode: DryRun, workloads: {}, egress: [{to: [{namespace: ops}], ports: [{port: 80}]}]";
    let world = World::new(NODE, &policy("p", spec));
    assert_eq!(world.egress("web", TCP, "10.1.0.2:80"), "no");
    let would = world.dry_egress("web", TCP, "10.1.0.2:80");
    assert_eq!(would, (DryRun::Allow, "p/egress[0]"));
    assert_eq!(world.dry_egress("web", TCP, "10.1.0.2:81").0, DryRun::Same);
}

#[test]
fn a_deny_in_dry_run_takes_away_what_a_dry_run_would_allow_anybody() {
    let allow = "mode: DryRun, workloads: {}, egress: [{ports: [{port: 80}]}]";
    let deny = "mode: DryRun, action: Deny, workloads: {}, egress: [{to: [{namespace: ops}]}]";
    let world = World::new(NODE, &(policy("p", allow) + &policy("d", deny)));
    let anybody = world.dry_egress("web", TCP, "10.1.0.1:80");
    assert_eq!(anybody, (DryRun::Allow, "p/egress[0]"));
    assert_eq!(world.dry_egress("web", TCP, "10.1.0.2:80").0, DryRun::Same);
    assert_eq!(world.dry_egress("web", UDP, "10.1.0.2:80").0, DryRun::Same);
}

#[test]
fn a_permissive_workload_takes_plaintext_that_nothing_denies() {
    let text = policy(
        "p",
        "workloads: {}, ingress: [{from: [{namespace: shop}]}, {from: [{cidr: 10.1.0.9}]}]",
    ) + &policy(
        "d",
        "action: Deny, workloads: {}, ingress: [{from: [{cidr: 10.8.0.0/16}]}]",
    );
    let world = World::new(NODE, &text);
    for (from, protocol) in [("9.9.9.9", TCP), ("9.9.9.9", UDP), ("10.1.0.1", TCP)] {
        assert_eq!(world.plaintext("job", protocol, from, 80), "permissive");
        let from = from.parse().unwrap();
        let decision = world.snapshot.judge_plaintext(2, from, protocol, 80);
        assert_eq!(decision.reason, Reason::Permissive);
    }
    // What is allowed anyway is told by its own rule, and what is denied stays so.
    assert_eq!(world.plaintext("job", TCP, "10.1.0.9", 80), "p/ingress[1]");
    assert_eq!(world.plaintext("job", UDP, "10.1.0.1", 80), "p/ingress[0]");
    assert_eq!(world.plaintext("job", TCP, "10.8.0.1", 80), "no");
    // Others are not permissive, and through a tunnel the policy holds.
    assert_eq!(world.plaintext("web", TCP, "9.9.9.9", 80), "no");
    assert_eq!(
        world.tunnel("job", "spiffe://example.org/ns/ops/sa/log", "10.1.0.2", 80),
        "no"
    );
    assert_eq!(world.tunnel("job", DB, "10.1.0.1", 80), "p/ingress[0]");
    assert_eq!(world.egress("job", TCP, "9.9.9.9:80"), "no");
}

const GROUP: &str = "---
apiVersion: reeve.dev/v1alpha1
kind: IdentityGroup
metadata: {name: callers, labels: {of: shop}}
spec:
  members:
  - {identity: 'spiffe://example.org/ns/shop/sa/db'}
  - {identityPrefix: 'spiffe://*/ns/ops/'}
  - {namespace: shop, serviceAccount: a}
";

#[test]
fn a_group_stands_for_its_members_wherever_it_is_written() {
    let spec =
        "workloads: {}, egress: [{to: [{group: callers}]}], ingress: [{from: [{group: callers}]}]";
    for text in [
        policy("p", spec) + GROUP,
        GROUP.to_owned() + &policy("p", spec),
    ] {
        let world = World::new(NODE, &text);
        for (to, rule) in [
            ("10.1.0.1:80", "p/egress[0]"),
            ("10.1.0.2:80", "p/egress[0]"),
            ("10.1.0.3:80", "p/egress[0]"),
            ("10.1.0.3:81", "p/egress[0]"),
            ("10.1.0.4:80", "no"),
            ("9.9.9.9:80", "no"),
        ] {
            assert_eq!(world.egress("web", TCP, to), rule, "{to}");
        }
        for domain in ["example.org", "other.org", "third.org"] {
            let client = format!("spiffe://{domain}/ns/ops/sa/x");
            assert_eq!(world.tunnel("web", &client, "10.5.0.1", 80), "p/ingress[0]");
            let client = format!("spiffe://{domain}/ns/opsy/sa/x");
            assert_eq!(world.tunnel("web", &client, "10.5.0.1", 80), "no");
        }
    }
}

#[test]
fn what_is_wrong_with_a_group_is_said() {
    let text = GROUP.to_owned()
        + "---
apiVersion: reeve.dev/v1alpha1
kind: IdentityGroup
metadata: {name: callers}
spec: {members: [{cidr: 10.0.0.0/8}, {}, {identity: 'spiffe://a/b', namespace: x}]}
---
apiVersion: reeve.dev/v1alpha1
kind: IdentityGroup
metadata: {name: empty}
spec: {members: []}
" + &policy(
        "p",
        "workloads: {}, egress: [{to: [{group: caller}]}, {to: [{group: callers, any: {}}]}]",
    );
    let found = policies(&config(NODE), &text).unwrap_err();
    let wanted = [
        (
            13,
            "metadata.name: there is a group `callers` already, on line 4",
        ),
        (14, "spec.members[0]: expected exactly one of"),
        (14, "spec.members[0].cidr: there is no such field"),
        (14, "spec.members[1]: expected exactly one of"),
        (14, "spec.members[2]: expected exactly one of"),
        (19, "spec.members: is empty"),
        (
            24,
            "there is no IdentityGroup `caller`; did you mean `callers`?",
        ),
        (24, "spec.egress[1].to[0]: says more than a `group`"),
    ];
    are_the_mistakes(&found, &wanted);
}

#[test]
fn the_documents_of_the_reference_are_accepted_together() {
    let reference = include_str!("../../../../docs/policy.md");
    let blocks = reference.split("```yaml\n").skip(1);
    let blocks: Vec<_> = blocks.filter_map(|rest| rest.split("```").next()).collect();
    let text = blocks
        .join("---\n")
        .replacen("name: cart", "name: cart-2", 1);
    let set = PolicySet::parse_alone(Path::new("policy.md"), &text);
    let set = set.unwrap_or_else(|mistakes| panic!("{mistakes}"));
    assert_eq!(set.len(), 2);
}

#[test]
fn what_no_policy_is_about_is_open_where_that_is_set() {
    let node = format!("{NODE}policies: {{unselected: allow}}\n");
    let open = World::new(
        &node,
        &policy(
            "p",
            "workloads: {names: [web]}, ingress: [{from: [{namespace: shop}]}]",
        ),
    );
    assert_eq!(open.egress("web", TCP, "9.9.9.9:80"), "unselected");
    assert_eq!(open.plaintext("web", TCP, "9.9.9.9", 80), "no");
    assert_eq!(open.plaintext("job", UDP, "9.9.9.9", 80), "unselected");
    let text = policy(
        "p",
        "action: Deny, workloads: {}, egress: [{to: [{cidr: 9.0.0.0/8}]}]",
    ) + &policy(
        "q",
        "mode: DryRun, workloads: {}, egress: [{to: [{cidr: 8.0.0.0/8}]}]",
    );
    let open = World::new(&node, &text);
    assert_eq!(open.egress("web", TCP, "9.9.9.9:80"), "no");
    assert_eq!(open.egress("web", TCP, "10.9.9.9:80"), "unselected");
    assert_eq!(
        open.dry_egress("web", TCP, "10.9.9.9:80"),
        (DryRun::Deny, "default deny")
    );
    assert_eq!(open.dry_egress("web", TCP, "8.9.9.9:80").0, DryRun::Same);
}
