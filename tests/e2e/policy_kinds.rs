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
fn a_dry_run_that_comes_later_tells_once_of_each_connection_that_stands() {
    let pair = Pair::new();
    let all = policy(
        "all",
        &json!({"workloads": {}, "egress": [{}], "ingress": [{}]}),
    );
    let one = pair.at_one().policy(&all).start();
    let two = pair.at_two().policy(&all).start();
    let stranger = pair.two.pod("stranger");
    let _servers = [&*pair.server, &*stranger].map(|place| serve(place, PORT, &[]));
    let mut datagrams = stranger.spawn_peer(["udp-serve", &format!("[::]:{PORT}")]);
    datagrams.wait_for("listening");
    // Through a tunnel, as plaintext out of one and into the other, and without a handshake.
    let (there, outside) = (pair.server.addresses(), stranger.addresses());
    let mut standing = [
        (&*pair.client, there.port4(PORT)),
        (&*pair.client, outside.port6(PORT)),
        (&*stranger, there.port6(PORT)),
    ]
    .map(|(from, to)| {
        let mut beating = from.spawn_peer(["heartbeat", &to.to_string()]);
        beating.wait_for("beat 2");
        beating
    });
    let to = outside.port4(PORT).to_string();
    pair.client.peer(["udp-send", &to]).ok();

    let tell = |name: &str, protocol: &str| {
        let ports = json!([{"protocol": protocol, "port": PORT}]);
        let rules = json!([{"ports": ports}]);
        let spec = json!({
            "mode": "DryRun", "action": "Deny", "workloads": {}, "egress": rules, "ingress": rules,
        });
        for daemon in [&one, &two] {
            fs::write(daemon.policies().join("try.yaml"), policy(name, &spec)).unwrap();
        }
    };
    let told = |expected: [f64; 2]| {
        for ((daemon, direction), expected) in [(&one, "egress"), (&two, "ingress")]
            .into_iter()
            .zip(expected)
        {
            let labels = [("direction", direction), ("verdict", "deny")];
            let metric = "reeve_dry_run_verdicts_total";
            daemon.wait_for_metric(metric, &labels, expected);
            // A change of something else tells nothing again.
            let generation = daemon.status()["generation"].as_u64();
            let other = policy(
                "other",
                &json!({"workloads": {}, "egress": [{"to": [{"cidr": "192.0.2.0/24"}]}]}),
            );
            fs::write(daemon.policies().join("other.yaml"), other).unwrap();
            eventually("the change is in force", || {
                daemon.status()["generation"].as_u64() > generation
            });
            fs::remove_file(daemon.policies().join("other.yaml")).unwrap();
            eventually("and gone again", || {
                daemon.status()["generation"].as_u64() > generation.map(|number| number + 1)
            });
            assert_eq!(daemon.metrics().sum(metric, &labels), expected);
        }
    };
    tell("try", "TCP");
    told([2.0, 2.0]);
    for (daemon, rule) in [(&one, "try/egress[0]"), (&two, "try/ingress[0]")] {
        for transport in ["tunnel", "plaintext"] {
            let lines = daemon.logged(&["dry run of a policy", rule, transport]);
            assert_eq!(lines.len(), 1, "{transport}: {lines:?}");
        }
    }
    // By another rule; then of another protocol.
    tell("again", "TCP");
    told([4.0, 4.0]);
    tell("again", "UDP");
    told([5.0, 4.0]);
    one.wait_for_log(&["dry run of a policy", "again/egress[0]", "udp"]);
    for beating in &mut standing {
        assert!(beating.ended().is_none(), "nothing is refused");
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
