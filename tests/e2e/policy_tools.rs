//! `reeve policy`: what users ask of their policies without a daemon, as in their own CI.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use harness::{Network, Node, Programs};
use serde_json::Value;

// === test ===

#[test]
fn the_examples_tests_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/policy-tests");
    let mut files = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let ran = reeve(&["policy", "test", file.to_str().unwrap()]);
        assert_eq!(code(&ran), 0, "{}", said(&ran));
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
    assert_eq!(code(&ran), 0, "{}", said(&ran));
    assert!(
        said(&ran).contains("2 cases: 2 as expected, 0 not"),
        "{}",
        said(&ran)
    );

    let ran = reeve(&["policy", "test", &good, &bad]);
    assert_eq!(code(&ran), 1, "{}", said(&ran));
    for text in [
        "bad.yaml:9: no other port",
        "expected: allow",
        "got:      deny (egress no_policy by default deny)",
        "nearest: web/egress[0]",
        "is about tcp 5432; this is tcp 5433",
        "4 cases: 3 as expected, 1 not",
    ] {
        assert!(said(&ran).contains(text), "{text} is not in {}", said(&ran));
    }
    let wrong_rule = files.write("rule.yaml", &TEST.replace("web/egress[0]", "web/egress[1]"));
    assert_eq!(code(&reeve(&["policy", "test", &wrong_rule])), 1);

    let json = reeve(&["policy", "test", "--format", "json", &good, &bad]);
    assert_eq!(code(&json), 1);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["cases"], &json["failed"]), (&4.into(), &1.into()));
    assert_eq!(json["results"][3]["passed"], false);
    assert_eq!(json["results"][3]["line"], 9);
    let junit = said(&reeve(&["policy", "test", "--format", "junit", &bad]));
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
    assert_eq!(code(&ran), 0, "{}", said(&ran));
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
        assert_eq!(code(&ran), 2, "{from}: {}", said(&ran));
        assert!(said(&ran).contains(text), "{text} is not in {}", said(&ran));
    }
    let ran = reeve(&["policy", "test", "/nowhere/test.yaml"]);
    assert_eq!(code(&ran), 2);
    assert!(said(&ran).contains("/nowhere/test.yaml"));
}

// === the arrangement ===

/// A folder of files that goes with the value.
struct Files(Node);

impl Files {
    fn new() -> Self {
        Self(Node::new(&Network::new(), "files"))
    }

    /// Writes a file, and gives its path.
    fn write(&self, name: &str, text: &str) -> String {
        let file = self.0.folder().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

fn reeve(words: &[&str]) -> Output {
    let mut command = Command::new(&Programs::get().reeve);
    command.args(words).stdin(Stdio::null()).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

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
