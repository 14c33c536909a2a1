//! What a policy can do beside allowing: deny, try without enforcing, and let a roll-out take its
//! time.

use std::fs;

use harness::eventually;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, answers, denials, fails_fast, is_denied, say, serve};

fn policy(name: &str, spec: &Value) -> String {
    let document = json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": name},
        "spec": spec,
    });
    document.to_string()
}

#[test]
fn a_deny_at_either_end_goes_before_every_allow() {
    let pair = Pair::new();
    let client = json!([{"identity": pair.client.spiffe_id("example.org")}]);
    let deny = json!({
        "action": "Deny",
        "workloads": {"names": ["server"]},
        "ingress": [{"from": client, "ports": [{"port": PORT}]}],
    });
    let all = policy(
        "all",
        &json!({"workloads": {}, "egress": [{}], "ingress": [{}]}),
    );
    let one = pair.at_one().policy(&all).start();
    let two = pair
        .at_two()
        .policy(&all)
        .policy(&policy("deny", &deny))
        .start();
    let _servers = [
        serve(&pair.server, PORT, &[]),
        serve(&pair.server, 8081, &[]),
    ];
    let there = pair.server.addresses();
    say(&pair.client, there.port4(8081), "another port");
    fails_fast(&pair.client, there.port4(PORT), "reset");
    assert!(denials(&two, "ingress", "policy_deny") >= 1.0);
    two.wait_for_log(&["connection refused", "policy_deny", "deny/ingress[0]"]);

    let deny = json!({
        "action": "Deny",
        "workloads": {"names": ["client"]},
        "egress": [{"to": [{"cidr": format!("{}/32", there.v4)}], "ports": [{"port": 8081}]}],
    });
    fs::write(one.policies().join("deny.yaml"), policy("deny", &deny)).unwrap();
    one.wait_for_log(&["policies in force", "\"policies\":2"]);
    eventually("the new policy denies", || {
        !answers(&pair.client, there.port4(8081))
    });
    is_denied(&pair.client, there.port4(8081));
    say(&pair.client, there.port6(8081), "the other family");
    one.wait_for_log(&["connection refused", "policy_deny", "deny/egress[0]"]);
}

#[test]
fn a_dry_run_is_counted_and_logged_at_both_ends_and_refuses_nothing() {
    let pair = Pair::new();
    let all = policy(
        "all",
        &json!({"workloads": {}, "egress": [{}], "ingress": [{}]}),
    );
    let deny = |direction: &str| {
        let mut spec = json!({"mode": "DryRun", "action": "Deny", "workloads": {}});
        spec[direction] = json!([{"ports": [{"port": PORT}]}]);
        policy("try", &spec)
    };
    let one = pair.at_one().policy(&all).policy(&deny("egress")).start();
    let two = pair.at_two().policy(&all).policy(&deny("ingress")).start();
    let _servers = [
        serve(&pair.server, PORT, &[]),
        serve(&pair.server, 8081, &[]),
    ];
    let there = pair.server.addresses();
    say(&pair.client, there.port4(8081), "as it is");
    for (daemon, direction) in [(&one, "egress"), (&two, "ingress")] {
        let labels = [("direction", direction)];
        assert_eq!(
            daemon
                .metrics()
                .sum("reeve_dry_run_verdicts_total", &labels),
            0.0
        );
    }
    // Through the tunnel, then as plaintext.
    say(&pair.client, there.port4(PORT), "in spite of it");
    say(&pair.two.pod("stranger"), there.port6(PORT), "as well");
    for (daemon, direction, count) in [(&one, "egress", 1.0), (&two, "ingress", 2.0)] {
        let labels = [("direction", direction), ("verdict", "deny")];
        daemon.wait_for_metric("reeve_dry_run_verdicts_total", &labels, count);
        assert_eq!(
            daemon
                .metrics()
                .sum("reeve_dry_run_verdicts_total", &labels),
            count
        );
        let rule = format!("try/{direction}[0]");
        daemon.wait_for_log(&["dry run of a policy", &rule, "\"would\":\"deny\""]);
        assert_eq!(denials(daemon, direction, "policy_deny"), 0.0);
    }
}

#[test]
fn what_a_dry_run_would_allow_is_still_refused() {
    let pair = Pair::new();
    let allow = json!({"mode": "DryRun", "workloads": {}, "egress": [{"ports": [{"port": PORT}]}]});
    let one = pair.at_one().policy(&policy("try", &allow)).start();
    is_denied(&pair.client, pair.server.addresses().port4(PORT));
    is_denied(&pair.client, pair.server.addresses().port4(8081));
    let labels = [("direction", "egress"), ("verdict", "allow")];
    one.wait_for_metric("reeve_dry_run_verdicts_total", &labels, 1.0);
    one.wait_for_log(&[
        "dry run of a policy",
        "try/egress[0]",
        "\"would\":\"allow\"",
    ]);
}

#[test]
fn a_permissive_workload_takes_plaintext_and_counts_it_until_that_is_switched_off() {
    let pair = Pair::new();
    let hears = json!({
        "workloads": {"names": ["server"]},
        "ingress": [{"from": [{"identity": pair.client.spiffe_id("example.org")}]}],
    });
    let strict = pair
        .two
        .reeve()
        .peer(&pair.client)
        .policy(&policy("hears", &hears));
    let two = strict
        .enrol_with(&pair.server, json!({"permissive": true}))
        .start();
    let _server = serve(&pair.server, PORT, &[]);
    let there = pair.server.addresses();
    // One whom the policy allows by identity, and one whom nothing allows.
    let stranger = pair.one.pod("stranger");
    say(&pair.client, there.port4(PORT), "without a tunnel");
    say(&stranger, there.port6(PORT), "nobody knows me");
    let permissive = [
        ("direction", "ingress"),
        ("verdict", "allow"),
        ("reason", "permissive"),
    ];
    two.wait_for_metric("reeve_verdicts_total", &permissive, 2.0);
    two.wait_for_log(&["connection allowed", "permissive", &there.v4.to_string()]);
    let opened = [("direction", "ingress"), ("transport", "plaintext")];
    two.wait_for_metric("reeve_connections_closed_total", &opened, 2.0);

    let text = fs::read_to_string(two.config()).unwrap();
    let mut settings: Value = serde_json::from_str(&text).unwrap();
    settings["workloads"][0]["permissive"] = json!(false);
    fs::write(two.config(), settings.to_string()).unwrap();
    two.signal(Signal::SIGHUP);
    two.wait_for_log(&["the configuration was read again"]);
    eventually("plaintext is refused", || {
        !answers(&stranger, there.port4(PORT))
    });
    fails_fast(&pair.client, there.port4(PORT), "Connection refused");
    assert!(denials(&two, "ingress", "plaintext_refused") >= 1.0);
    assert!(denials(&two, "ingress", "no_policy") >= 1.0);
}
