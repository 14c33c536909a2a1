//! `reeve policy`: what users ask of their policies without a daemon, as in their own CI.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    arrange::Pair,
    program::{Files, Said, reeve},
};

// === test ===

#[test]
fn the_examples_tests_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/policy-tests");
    let mut files = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let ran = reeve(&["policy", "test", file.to_str().unwrap()]);
        assert_eq!(ran.code(), 0, "{}", ran.said());
        files += 1;
    }
    assert!(files > 0);
}

#[test]
fn what_is_not_as_expected_is_shown_with_the_difference() {
    let files = Files::new();
    let good = files.write("good.yaml", TEST);
    let bad = files.write("bad.yaml", &TEST.replace("expect: deny", "expect: allow"));
    let ran = reeve(&["policy", "test", &good]);
    assert_eq!(ran.code(), 0, "{}", ran.said());
    assert!(
        ran.said().contains("2 cases: 2 as expected, 0 not"),
        "{}",
        ran.said()
    );

    let ran = reeve(&["policy", "test", &good, &bad]);
    assert_eq!(ran.code(), 1, "{}", ran.said());
    for text in [
        "bad.yaml:9: no other port",
        "expected: allow",
        "got:      deny (egress no_policy by default deny)",
        "nearest: web/egress[0]",
        "is about tcp 5432; this is tcp 5433",
        "4 cases: 3 as expected, 1 not",
    ] {
        assert!(ran.said().contains(text), "{text} is not in {}", ran.said());
    }
    let wrong_rule = files.write("rule.yaml", &TEST.replace("web/egress[0]", "web/egress[1]"));
    assert_eq!(reeve(&["policy", "test", &wrong_rule]).code(), 1);

    let json = reeve(&["policy", "test", "--format", "json", &good, &bad]);
    assert_eq!(json.code(), 1);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["cases"], &json["failed"]), (&4.into(), &1.into()));
    assert_eq!(json["results"][3]["passed"], false);
    assert_eq!(json["results"][3]["line"], 9);
    let junit = reeve(&["policy", "test", "--format", "junit", &bad]).said();
    for text in [
        "tests=\"2\" failures=\"1\"",
        "name=\"no other port\"",
        "expected: allow",
        "web -&gt; db",
    ] {
        assert!(junit.contains(text), "{text} is not in {junit}");
    }
}

#[test]
fn a_test_may_be_about_a_nodes_own_configuration() {
    let files = Files::new();
    files.write("policies/web.yaml", POLICY);
    files.write("reeve.yaml", CONFIG);
    let cases = TEST.split("---").next().unwrap();
    let (head, cases) = (
        "apiVersion: reeve.dev/v1alpha1\nkind: PolicyTest\nconfigFile: reeve.yaml\n",
        &cases[cases.find("cases:").unwrap()..],
    );
    let test = files.write("test.yaml", &format!("{head}{cases}"));
    let ran = reeve(&["policy", "test", &test]);
    assert_eq!(ran.code(), 0, "{}", ran.said());
}

#[test]
fn mistakes_in_tests_are_told_with_their_places() {
    let files = Files::new();
    for (from, to, text) in [
        ("expect: deny", "expct: deny", "test.yaml:9:"),
        ("expect: deny", "expct: deny", "did you mean `expect`?"),
        ("from: web", "from: wbe", "did you mean `web`?"),
        ("port: 5433", "port: many", "cases[1].port"),
        (
            "expect: deny",
            "reason: no_polici, expect: deny",
            "did you mean `no_policy`?",
        ),
        (", port: 5433", "", "`port` is missing"),
        ("config:", "confg:", "did you mean `config`?"),
        (
            "apiVersion: reeve.dev/v1alpha1\nkind: PolicyTest",
            "apiVersion: v1\nkind: PolicyTest",
            "reeve.dev/v1alpha1",
        ),
        ("kind: PolicyTest", "kind: PolicyTst", "holds no test"),
        (
            "to: [{labels: {app: db}}]",
            "to: [{labels: {app: dbx}}]",
            "test.yaml:17:",
        ),
    ] {
        let test = TEST.replacen(from, to, 1);
        assert_ne!(test, TEST, "{from}");
        let file = files.write("test.yaml", &test);
        let ran = reeve(&["policy", "test", &file]);
        assert_eq!(ran.code(), 2, "{from}: {}", ran.said());
        assert!(ran.said().contains(text), "{text} is not in {}", ran.said());
    }
    let ran = reeve(&["policy", "test", "/nowhere/test.yaml"]);
    assert_eq!(ran.code(), 2);
    assert!(ran.said().contains("/nowhere/test.yaml"));
}

// === list ===

#[test]
fn the_policies_in_force_are_listed_from_files_and_by_the_daemon() {
    let files = Files::new();
    files.write("policies/web.yaml", POLICY);
    let config = files.write("reeve.yaml", CONFIG);
    let listed = reeve(&["policy", "list", "--config", &config, "--json"]);
    assert_eq!(listed.code(), 0, "{}", listed.said());
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let policy = &listed[0];
    assert_eq!(
        (&policy["name"], &policy["kind"]),
        (&"web".into(), &"ConnectionPolicy".into())
    );
    assert_eq!(policy["workloads"], serde_json::json!(["web"]));
    let rule = &policy["rules"][0];
    assert_eq!(
        (&rule["name"], &rule["direction"]),
        (&"web/egress[0]".into(), &"egress".into())
    );
    assert_eq!(rule["ports"], serde_json::json!(["tcp 5432"]));
    assert!(
        rule["at"]
            .as_str()
            .unwrap()
            .ends_with("policies/web.yaml:7"),
        "{rule}"
    );
    // A policy without rules is for somebody all the same: it closes.
    files.write(
        "policies/closed.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed}\n\
         spec: {podSelector: {}}\n",
    );
    let both = reeve(&["policy", "list", "--config", &config, "--json"]);
    let both: Value = serde_json::from_slice(&both.stdout).unwrap();
    assert_eq!(both[0]["name"], "default/closed");
    assert_eq!(both[0]["workloads"], serde_json::json!(["web"]));
    assert_eq!(both[0]["rules"], serde_json::json!([]));
    fs::remove_file(files.folder().join("policies/closed.yaml")).unwrap();

    let page = reeve(&["policy", "list", "--config", &config]).said();
    for text in [
        "web (ConnectionPolicy, ",
        "for web",
        "egress[0]",
        "tcp 5432",
        "1 policies",
    ] {
        assert!(page.contains(text), "{text} is not in {page}");
    }

    let (_pair, one, _two) = Pair::started();
    let listed = one.command(["policy", "list", "--json"]).json();
    assert_eq!(listed[0]["name"], "of-client");
    assert_eq!(listed[0]["workloads"], serde_json::json!(["client"]));
    assert_eq!(listed[0]["rules"][0]["name"], "of-client/egress[0]");
}

// === lint ===

#[test]
fn lint_finds_nothing_in_what_is_well_meant() {
    let files = Files::new();
    files.write("policies/all.yaml", WELL_MEANT);
    let config = files.write("reeve.yaml", SHOP);
    let ran = reeve(&["policy", "lint", "--config", &config]);
    assert_eq!(ran.code(), 0, "{}", ran.said());
    assert!(ran.said().contains("0 findings"));
}

#[test]
fn lint_finds_what_is_probably_not_meant_each_with_its_place() {
    let files = Files::new();
    let config = files.write("reeve.yaml", SHOP);
    for (from, to, kind, place, text) in [
        // Nobody has the identity.
        (
            "{serviceAccount: web}",
            "{serviceAccount: web}\n        - {identity: spiffe://example.org/ns/shop/sa/wbe}",
            "matches_nothing",
            "all.yaml:20:",
            "no workload and no peer has the identity",
        ),
        // The same again, and something within something wider.
        (
            "    - to: [{cidr: 10.0.0.53}]",
            "    - to: [{labels: {tier: data}}]\n      ports: [{port: 5432}]\n    - to: [{cidr: 10.0.0.53}]",
            "shadowed",
            "all.yaml:9:",
            "shop/web/egress[1] allows nothing that shop/web/egress[0]",
        ),
        (
            "    - to: [{cidr: 10.0.0.53}]",
            "    - to: [{cidr: 10.0.0.0/24}]\n      ports: [{port: 53}, {protocol: UDP}]\n    - to: [{cidr: 10.0.0.53}]",
            "shadowed",
            "all.yaml:11:",
            "shop/web/egress[2] allows nothing",
        ),
        (
            "{protocol: TCP, port: 53}]\n---\n",
            "{protocol: TCP, port: 53}]\n---\napiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\n\
             metadata: {name: no-dns, namespace: shop}\nspec:\n  action: Deny\n  \
             workloads: {names: [web]}\n  egress: [{to: [{any: {}}], ports: [{port: 53}, {protocol: UDP}]}]\n---\n",
            "shadowed",
            "all.yaml:9:",
            "shop/web/egress[1] allows nothing: shop/no-dns/egress[0]",
        ),
        (
            "{protocol: UDP, port: 53}",
            "{protocol: UDP, port: 54}",
            "blocks_dns",
            "all.yaml:7:",
            "no rule lets them out to UDP port 53",
        ),
        (
            "{protocol: TCP, port: 53}",
            "{protocol: TCP, port: 54}",
            "blocks_dns",
            "all.yaml:7:",
            "no rule lets them out to TCP port 53",
        ),
        (
            "{protocol: UDP, port: 53}, {protocol: TCP, port: 53}",
            "{protocol: UDP, port: 54}",
            "blocks_dns",
            "all.yaml:7:",
            "no rule lets them out to UDP or TCP port 53",
        ),
        (
            "{serviceAccount: web}",
            "{serviceAccount: nobody}",
            "unreachable",
            "all.yaml:18:",
            "can reach db",
        ),
        (
            "{serviceAccount: web}",
            "{cidr: 10.7.0.0/16}",
            "one_sided",
            "all.yaml:7:",
            "no ingress of the destination lets it in",
        ),
    ] {
        let policies = WELL_MEANT.replacen(from, to, 1);
        assert_ne!(policies, WELL_MEANT);
        files.write("policies/all.yaml", &policies);
        let ran = reeve(&["policy", "lint", "--config", &config]);
        assert_eq!(ran.code(), 1, "{kind}: {}", ran.said());
        let found = ran.said();
        let found = found.lines().find(|line| line.contains(kind));
        let found = found.unwrap_or_else(|| panic!("no {kind} in {}", ran.said()));
        assert!(found.contains(text) && found.contains(place), "{found}");

        let json = reeve(&["policy", "lint", "--config", &config, "--json"]);
        assert_eq!(json.code(), 1);
        let json: Value = serde_json::from_slice(&json.stdout).unwrap();
        let kinds: Vec<_> = json
            .as_array()
            .unwrap()
            .iter()
            .map(|found| &found["kind"])
            .collect();
        assert!(kinds.contains(&&Value::from(kind)), "{json}");
    }
    files.write("policies/all.yaml", "kind: Nothing\n");
    assert_eq!(reeve(&["policy", "lint", "--config", &config]).code(), 2);
}

#[test]
fn lint_looks_at_network_policies_as_at_connection_policies() {
    let files = Files::new();
    let config = files.write("reeve.yaml", NETWORK_CONFIG);
    for (name, policies, kind, text) in [
        (
            "a typo in `from`",
            "spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: dbb}}}, {podSelector: {}}]}]}",
            "matches_nothing",
            "no workload and no peer fits",
        ),
        (
            "a name that no port has",
            "spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}], ports: [{port: htpp}]}]}",
            "matches_nothing",
            "`htpp`",
        ),
        (
            "a name of another protocol",
            "spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}], ports: [{port: http, protocol: UDP}]}]}",
            "matches_nothing",
            "`http`",
        ),
        (
            "a name that no destination has",
            "spec: {podSelector: {matchLabels: {app: web}}, egress: [{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: postgres}]}]}",
            "matches_nothing",
            "`postgres`",
        ),
        (
            "a direction that is left out",
            "spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], egress: [{ports: [{port: 53}]}]}",
            "matches_nothing",
            "does not name Egress",
        ),
        (
            "isolation without names",
            "spec: {podSelector: {}, policyTypes: [Egress]}",
            "blocks_dns",
            "what web, db, job may call",
        ),
        (
            "a Service's port",
            "spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}], ports: [{port: 80}]}]}",
            "other_port",
            "web declares 8080 only",
        ),
        (
            "an emptied `from`",
            "spec:\n  podSelector: {matchLabels: {app: web}}\n  ingress:\n    - from:\n      # - podSelector: {}\n      ports: [{port: 8080}]",
            "emptied",
            "means everybody",
        ),
        (
            "egress that the other side refuses",
            "spec: {podSelector: {matchLabels: {app: web}}, egress: [{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 5432}]}]}",
            "one_sided",
            "lets web to db call port 5432",
        ),
        (
            "egress to every port that the other side refuses",
            "spec: {podSelector: {matchLabels: {app: web}}, egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]}",
            "one_sided",
            "lets web to db call port 5432",
        ),
        (
            "ingress that the other side refuses",
            "spec: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]}",
            "one_sided",
            "lets web to db in on port 5432",
        ),
    ] {
        let policy = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: shop}}\n{policies}\n"
        );
        files.write("policies/all.yaml", &policy);
        let ran = reeve(&["policy", "lint", "--config", &config]);
        let said = ran.said();
        let mut found = said
            .lines()
            .filter(|line| line.contains(&format!(": {kind}: ")));
        assert!(
            found.clone().any(|line| line.contains(text)),
            "{name}: no {kind} with {text} in {said}"
        );
        assert!(found.all(|line| line.starts_with("policies/") || line.contains("all.yaml:")));
    }
}

#[test]
fn a_rule_for_many_workloads_is_one_line() {
    let files = Files::new();
    let workloads: Vec<_> = (0..20)
        .map(|number| format!("{{name: web-{number}, namespace: shop, labels: {{app: web}}}}"))
        .collect();
    let config = format!(
        "trustDomain: example.org\nworkloads: [{}]\npeers: [{{name: db, namespace: shop, addresses: [192.0.2.1], serviceAccount: db}}]\npolicies: {{folder: policies}}\n",
        workloads
            .join(", ")
            .replace("name: web-", "cgroup: /w, name: web-")
    );
    let config = (0..20).fold(config, |text, number| {
        text.replacen("cgroup: /w,", &format!("cgroup: /w{number},"), 1)
    });
    let config = files.write("reeve.yaml", &config);
    files.write(
        "policies/all.yaml",
        "apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  workloads: {matchLabels: {app: web}}\n  egress: [{to: [{serviceAccount: db}], ports: [{port: 5432}]}]\n",
    );
    let ran = reeve(&["policy", "lint", "--config", &config]);
    let said = ran.said();
    assert_eq!(said.matches("blocks_dns").count(), 1, "{said}");
    assert!(said.contains("and 15 more"), "{said}");
}

#[test]
fn a_peer_that_is_a_network_is_judged_as_a_whole_or_differs() {
    let files = Files::new();
    let test = |to: &str, expect: &str| {
        format!(
            "apiVersion: reeve.dev/v1alpha1\nkind: PolicyTest\nconfig:\n  trustDomain: example.org\n  \
             workloads: [{{name: web}}]\n  peers: [{{name: all, addresses: [192.0.2.0/24]}}, {{name: half, \
             addresses: [192.0.2.128/25]}}]\ncases:\n  - {{from: web, to: {to}, port: 80, expect: \
             {expect}}}\n---\napiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {{name: \
             web}}\nspec:\n  workloads: {{names: [web]}}\n  egress: [{{to: [{{cidr: 192.0.2.128/25}}]}}]\n"
        )
    };
    for (to, expect, code) in [
        ("half", "allow", 0),
        ("half", "deny", 1),
        ("all", "allow", 1),
        ("all", "deny", 1),
    ] {
        let file = files.write("test.yaml", &test(to, expect));
        let ran = reeve(&["policy", "test", &file]);
        assert_eq!(ran.code(), code, "{to} {expect}: {}", ran.said());
        if to == "all" {
            assert!(ran.said().contains("the answer differs"), "{}", ran.said());
            assert!(ran.said().contains("192.0.2.128/25"), "{}", ran.said());
        }
    }
}

#[test]
fn dry_runs_can_be_asked_for_and_no_address_is_invented() {
    let files = Files::new();
    let test = "apiVersion: reeve.dev/v1alpha1\nkind: PolicyTest\nconfig:\n  trustDomain: example.org\n  \
         workloads: [{name: web}, {name: db}]\ncases:\n  - {from: web, to: db, port: 80, expect: deny}\n  \
         - {from: web, to: 192.0.2.1, port: 80, dryRun: true, expect: allow, rule: 'web/egress[0]'}\n---\n\
         apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {name: web}\nspec:\n  mode: \
         DryRun\n  workloads: {names: [web]}\n  egress: [{to: [{any: {}}]}]\n";
    let file = files.write("test.yaml", test);
    let ran = reeve(&["policy", "test", &file]);
    assert_eq!(ran.code(), 0, "{}", ran.said());
    let file = files.write(
        "test.yaml",
        &test.replacen("expect: deny", "expect: allow", 1),
    );
    let ran = reeve(&["policy", "test", &file]);
    assert_eq!(ran.code(), 1);
    let said = ran.said();
    assert!(
        !said.contains("240.0.0.") && !said.contains(" 0.0.0."),
        "{said}"
    );
    assert!(
        said.contains("would allow it: a ConnectionPolicy for web"),
        "{said}"
    );
}

// === the arrangement ===

const NETWORK_CONFIG: &str = "\
trustDomain: example.org
workloads:
  - {name: web, namespace: shop, labels: {app: web}, cgroup: /web, addresses: [10.0.1.1], namedPorts: {http: 8080}}
  - {name: db, namespace: shop, labels: {app: db}, cgroup: /db, addresses: [10.0.1.2], namedPorts: {pg: 5432}}
  - {name: job, namespace: shop, labels: {app: job}, cgroup: /job, addresses: [10.0.1.3]}
policies: {folder: policies}
";

const TEST: &str = "\
apiVersion: reeve.dev/v1alpha1
kind: PolicyTest
config:
  trustDomain: example.org
  workloads: [{name: web}]
  peers: [{name: db, labels: {app: db}, addresses: [192.0.2.1]}]
cases:
  - {from: web, to: db, port: 5432, expect: allow, rule: \"web/egress[0]\"}
  - {name: no other port, from: web, to: db, port: 5433, expect: deny}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: web}
spec:
  workloads: {names: [web]}
  egress:
    - to: [{labels: {app: db}}]
      ports: [{port: 5432}]
";

const CONFIG: &str = "\
trustDomain: example.org
workloads: [{name: web, cgroup: /web}]
peers: [{name: db, labels: {app: db}, addresses: [192.0.2.1]}]
policies: {folder: policies}
";

const POLICY: &str = "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: web}
spec:
  workloads: {names: [web]}
  egress:
    - to: [{labels: {app: db}}]
      ports: [{port: 5432}]
";

const SHOP: &str = "\
trustDomain: example.org
workloads:
  - {name: web, namespace: shop, cgroup: /web, addresses: [10.0.1.1]}
  - {name: db, namespace: shop, labels: {tier: data}, cgroup: /db, addresses: [10.0.1.2]}
policies: {folder: policies}
";

const WELL_MEANT: &str = "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: web, namespace: shop}
spec:
  workloads: {names: [web]}
  egress:
    - to: [{labels: {tier: data}}]
      ports: [{port: 5432}]
    - to: [{cidr: 10.0.0.53}]
      ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: db, namespace: shop}
spec:
  workloads: {names: [db]}
  ingress:
    - from:
        - {serviceAccount: web}
      ports: [{port: 5432}]
";
