//! What is wrong with a document is said with its place, all at once.

use super::world::{config, policies};
use crate::{
    policy::{Known, PolicySet, PolicySources, document::ConnectionPolicy},
    yaml::reference,
};

const NODE: &str = "
trustDomain: example.org
workloads:
- {name: web, namespace: shop, labels: {app: web}, cgroup: /web}
peers:
- {name: db, namespace: shop, labels: {app: db}, addresses: [10.1.0.1]}
- {name: printer, addresses: [10.1.0.9]}
";

fn mistakes(text: &str) -> Vec<String> {
    policies(&config(NODE), text).expect_err("the text has a mistake")
}

fn with_spec(spec: &str) -> String {
    format!(
        "apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {{name: p}}\nspec:\n{spec}"
    )
}

#[test]
fn every_field_is_described_and_every_description_has_a_field() {
    reference::compare::<ConnectionPolicy>(include_str!("../../../../docs/policy.md"));
}

#[test]
fn all_mistakes_are_reported_with_their_places() {
    let found = mistakes(
        "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: p, namspace: shop}
spec:
  workloads: {names: [wbe, db], matchLabels: {app: 5}}
  ingress:
  - from: []
  - from:
  - ports:
  - from: [{identity: 'spiffe://example.org'}, {identityPrefix: 'spiffe://example.org/a'}]
  - from: [{}, {cidr: 10.0.0.0/8, any: {}}, {namespace: shop, except: [10.0.0.0/8]}]
  egress:
  - to: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8, 10.0.0.0/8]}]
  - to: [{labels: {app: dbb}}]
  - to: [{namespace: shop, matchExpressions: [{key: app}, {key: app, operator: in}, {key: app, operator: In}, {key: app, operator: Exists, values: [x]}]}]
  - ports: [{port: 0}, {port: http}, {endPort: 5}, {port: 80, endPort: 79}, {protocol: ICMP, port: 1}, {protocol: tcp}]
---
kind: ConnectionPolicy
---
apiVersion: v1
kind: ConnectPolicy
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: p}
spec: {workloads: {matchLabels: {app: wbe}}}
",
    );
    let wanted = [
        "3:21: metadata.namspace: there is no such field; did you mean `namespace`?",
        "5:23: spec.workloads.names[0]: no workload and no peer has the name `wbe`; did you mean `web`?",
        "5:52: spec.workloads.matchLabels.app: `5` is not a text; write it in quotes",
        "7:11: spec.ingress[0].from: is empty; name somebody",
        "8:9: spec.ingress[1].from: is empty; name somebody",
        "9:10: spec.ingress[2].ports: is empty; name ports",
        "10:23: spec.ingress[3].from[0].identity: a workload's SPIFFE ID has a path",
        "10:65: spec.ingress[3].from[1].identityPrefix: `spiffe://example.org/a` has no slash at its end",
        "11:12: spec.ingress[4].from[0]: says nobody; expected exactly one of",
        "11:16: spec.ingress[4].from[1]: says several things; expected exactly one of",
        "11:45: spec.ingress[4].from[2]: has `except` without `cidr`",
        "13:38: spec.egress[0].to[0].except[0]: `11.0.0.0/8` is not a smaller network in `10.0.0.0/8`",
        "13:50: spec.egress[0].to[0].except[1]: `10.0.0.0/8` is not a smaller network in `10.0.0.0/8`",
        "14:10: spec.egress[1].to[0]: no workload and no peer fits",
        "15:47: spec.egress[2].to[0].matchExpressions[0]: `operator` is missing; add it",
        "15:80: spec.egress[2].to[0].matchExpressions[1].operator: `in` is not known here",
        "15:85: spec.egress[2].to[0].matchExpressions[2]: `In` needs `values`; add them",
        "15:111: spec.egress[2].to[0].matchExpressions[3]: `Exists` takes no `values`",
        "16:20: spec.egress[3].ports[0].port: found the number 0; expected a port",
        "16:31: spec.egress[3].ports[1].port: found the text `http`; expected a port",
        "16:38: spec.egress[3].ports[2]: has `endPort` without `port`",
        "16:52: spec.egress[3].ports[3]: `endPort` 79 lies below `port` 80; swap them",
        "16:77: spec.egress[3].ports[4]: has a port, which only TCP, UDP and SCTP have",
        "16:115: spec.egress[3].ports[5].protocol: `tcp` is not known here",
        "18:1: `apiVersion` is missing; expected `reeve.dev/v1alpha1`",
        "21:7: kind: `ConnectPolicy` is not known here; expected `ConnectionPolicy`, `IdentityGroup`, `NetworkPolicy`, `List`, `ConnectionPolicyList`, `IdentityGroupList`, `NetworkPolicyList`; did you mean `ConnectionPolicy`?",
        "25:18: metadata.name: there is a ConnectionPolicy `p` already, in policy.yaml on line 3",
        "26:19: spec.workloads: selects no workload and no peer that is declared",
    ];
    for (found, wanted) in found.iter().zip(wanted) {
        let line = format!("policy.yaml:{wanted}");
        assert!(found.starts_with(&line), "found:  {found}\nwanted: {line}");
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn what_could_still_come_with_a_certificate_is_a_warning() {
    let warnings = |spec: &str| -> Vec<String> {
        let set = policies(&config(NODE), &with_spec(spec)).unwrap();
        set.warnings().iter().map(ToString::to_string).collect()
    };
    let found = warnings(
        "
  workloads: {}
  ingress:
  - from: [{identity: 'spiffe://example.org/x'}, {identityPrefix: 'spiffe://b/'}, {namespace: ops}]
",
    );
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].starts_with("policy.yaml:8:12: spec.ingress[0].from[0]: no workload"));
    assert_eq!(warnings("  workloads: {}\n").len(), 1);
    assert!(warnings("  workloads: {}\n  egress: [{to: [{namespace: shop}]}]\n").is_empty());
}

#[test]
fn a_policy_for_the_workloads_of_another_node_is_none_of_this_one_s_business() {
    let spec = "  workloads: {names: [db]}\n  egress: [{to: [{namespace: shop}]}]\n";
    assert!(policies(&config(NODE), &with_spec(spec)).is_ok());
    // Without an identity it cannot be a workload anywhere.
    let spec = "  workloads: {names: [printer]}\n  egress: [{}]\n";
    let found = mistakes(&with_spec(spec));
    assert!(
        found[0].contains("selects no workload and no peer"),
        "{found:?}"
    );
}

#[test]
fn a_policy_cannot_select_beyond_its_namespace() {
    let text = with_spec("  workloads: {namespace: ops}\n  egress: [{}]\n")
        .replace("{name: p}", "{name: p, namespace: shop}");
    let found = mistakes(&text);
    assert!(found[0].contains("`ops` is another namespace"), "{found:?}");
}

#[test]
fn a_file_that_has_lost_all_its_policies_is_known_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let (kept, emptied) = (folder.path().join("a.yaml"), folder.path().join("b.yaml"));
    let config = config(NODE);
    let known = Known {
        workloads: &config.workloads,
        peers: &config.peers,
        namespaces: &config.namespaces,
    };
    let read = || {
        let sources = PolicySources {
            folder: Some(folder.path().to_owned()),
            files: Vec::new(),
        };
        PolicySet::load(&sources, &known).unwrap()
    };
    let text = with_spec("  workloads: {names: [web]}\n");
    std::fs::write(&kept, text.replace("name: p}", "name: q}")).unwrap();
    std::fs::write(&emptied, &text).unwrap();
    std::fs::write(folder.path().join("c.yaml"), "").unwrap();
    let before = read();
    assert_eq!(before.emptied(&before).count(), 0, "c never held any");
    for nothing in ["", "\n", "# a comment\n", "---\n"] {
        std::fs::write(&emptied, nothing).unwrap();
        let after = read();
        assert_eq!(
            after.emptied(&before).collect::<Vec<_>>(),
            [emptied.as_path()]
        );
        assert_eq!(after.len(), 1);
    }
    std::fs::remove_file(&emptied).unwrap();
    assert_eq!(
        read().emptied(&before).count(),
        0,
        "that is said by deleting it"
    );
}

#[test]
fn a_list_says_what_its_items_are_and_nothing_else() {
    let list = |fields: &str| format!("apiVersion: v1\nkind: List\n{fields}\n");
    for (fields, wanted) in [
        ("itmes: []", "there is no such field; did you mean `items`?"),
        ("metadata: {}", "`items` is missing; add it"),
        ("items:", "`items` is missing; add it"),
        ("items: {}", "items: found a mapping; expected a list"),
        (
            "items: [5]",
            "items[0]: `kind` is missing; expected `ConnectionPolicy`",
        ),
    ] {
        let found = mistakes(&list(fields));
        assert!(
            found.iter().any(|found| found.contains(wanted)),
            "{fields}: {found:#?}"
        );
    }
    assert!(
        policies(
            &config(NODE),
            &list("metadata: {resourceVersion: ''}\nitems: []")
        )
        .is_ok()
    );
}

#[test]
fn a_list_of_one_kind_needs_not_repeat_it_and_allows_no_other() {
    let item = "metadata: {name: a, namespace: shop}, spec: {podSelector: {}}";
    let list = |item: &str| {
        format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems: [{{{item}}}]\n")
    };
    assert_eq!(policies(&config(NODE), &list(item)).unwrap().len(), 1);
    let whole = format!("apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, {item}");
    assert_eq!(policies(&config(NODE), &list(&whole)).unwrap().len(), 1);
    let other = format!("kind: ConnectionPolicy, {item}");
    let found = mistakes(&list(&other));
    assert!(
        found[0].contains("`ConnectionPolicy` is not known here; expected `NetworkPolicy`"),
        "{found:#?}"
    );
}

#[test]
fn policies_of_two_kinds_may_have_one_name() {
    let text = "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: a, namespace: shop}
spec: {workloads: {}, ingress: [{from: [{any: {}}], ports: [{port: 80}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: [{port: 81}]}]}
";
    let set = policies(&config(NODE), text).unwrap();
    let names: Vec<_> = set
        .rules
        .iter()
        .map(|rule| rule.origin.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["shop/a/ingress[0]", "NetworkPolicy:shop/a/ingress[0]"]
    );
    let twice = format!("{text}---\n{}", text.split("---\n").next().unwrap());
    let found = mistakes(&twice);
    assert!(
        found[0].contains("there is a ConnectionPolicy `shop/a` already"),
        "{found:#?}"
    );
}

#[test]
fn what_is_easily_written_wrong_is_named_for_what_it_is() {
    let network = |spec: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: a, namespace: shop}}\nspec: {{podSelector: {{}}, ingress: [{spec}]}}\n"
        )
    };
    for (text, wanted) in [
        (
            network("{ports: [{port: \"80\"}]}"),
            "port: \"80\" is a text; write 80 without quotes",
        ),
        (
            network("{ports: [{port: 80-90}]}"),
            "port: `80-90` is no port; write a range as `port: 80` and `endPort: 90`",
        ),
        (
            network("{ports: [{port: 0120}]}"),
            "port: `0120` has a zero in front, and other tools read that as an octal number; \
             write 120",
        ),
        (
            network("{from: [{ipBlock: {cidr: 10.0.0.1}}]}"),
            "cidr: `10.0.0.1` has no prefix length; write `10.0.0.1/32`",
        ),
        (
            network("{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}"),
            "a number in it has a zero in front",
        ),
        (
            network("{ports: [{port: '{{ .Values.port }}'}]}"),
            "this is a template that was not rendered",
        ),
        (
            network("{ports: [{port: {{ .Values.port }}}]}"),
            "the template was not rendered",
        ),
        (
            "{{- if .Values.policies }}\nkind: NetworkPolicy\n".to_owned(),
            "not rendered",
        ),
        (
            with_spec(
                "  workloads: {}\n  ingress: [{from: [{any: {}}], ports: [{port: \"80\"}, {port: 80:90}]}]",
            ),
            "ports[1].port: `80:90` is no port; write a range",
        ),
        (
            "- apiVersion: v1\n  kind: List\n  items: []\n".to_owned(),
            "is a list; expected one policy: part them by lines of `---`",
        ),
    ] {
        let found = mistakes(&text);
        assert!(
            found.iter().any(|found| found.contains(wanted)),
            "{text}: {found:#?}"
        );
    }
}
