//! Two SPIREs of two trust domains that have each other's bundles.

use harness::{
    Node,
    certs::Authority,
    eventually,
    spire::{Agent, Entry, Server, Settings, reeve_itself},
};
use serde_json::{Value, json};

use super::{AN_HOUR, REEVE, WORKER, delegated, entry, has_certificate, within, worker};
use crate::{
    agents::certificate,
    arrange::{PORT, Pair, TRUST_DOMAIN, answers, say, serve},
    opposite::SERVER,
};

const OTHER: &str = "other.example";
const ALIEN: &str = "spiffe://other.example/ns/default/sa/client";
const ALIEN_REEVE: &str = "spiffe://other.example/reeve";

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn a_federated_bundle_is_trusted_and_one_that_is_refused_is_told() {
    let pair = Pair::new();
    let nodes = ["control", "other-control"].map(|name| Node::new(&pair.network, name));
    let start = |node, trust_domain| {
        let settings = Settings {
            trust_domain,
            lifetime: AN_HOUR,
            upstream: None,
        };
        Server::start(node, &settings)
    };
    // The client's trust domain is the other one.
    let (alien, own) = (start(&nodes[1], OTHER), start(&nodes[0], TRUST_DOMAIN));
    let agents = [
        Agent::start(&pair.one, &alien, &[ALIEN_REEVE]),
        Agent::start(&pair.two, &own, &[REEVE]),
    ];
    own.federate(OTHER, &alien.bundle());
    alien.federate(TRUST_DOMAIN, &own.bundle());
    let selectors = reeve_itself();
    let selectors = selectors.each_ref().map(String::as_str);
    alien.grant(&agents[0], &entry(ALIEN_REEVE, &selectors));
    own.grant(&agents[1], &entry(REEVE, &selectors));
    let user = format!("unix:uid:{WORKER}");
    for (spire, agent, id, other) in [
        (&alien, &agents[0], ALIEN, TRUST_DOMAIN),
        (&own, &agents[1], SERVER, OTHER),
    ] {
        let entry = Entry {
            id,
            selectors: &[&user],
            federates_with: &[other],
        };
        spire.grant(agent, &entry);
    }
    let _workers = [worker(&pair.client), worker(&pair.server)];
    let policy = |name: &str, rules: Value| {
        json!({
            "apiVersion": "reeve.dev/v1alpha1",
            "kind": "ConnectionPolicy",
            "metadata": {"name": name},
            "spec": rules,
        })
        .to_string()
    };
    let one = pair
        .one
        .reeve()
        .set("/trustDomain", json!(OTHER))
        .enrol(&pair.client)
        .peer_with(&pair.server, json!({"spiffeId": SERVER, "tunnel": true}))
        .policy(&policy(
            "out",
            json!({"workloads": {}, "egress": [{"to": [{"identity": SERVER}]}]}),
        ))
        .set("/certificates", delegated(&agents[0]))
        .start();
    let two = pair
        .two
        .reeve()
        .enrol(&pair.server)
        .peer_with(&pair.client, json!({"spiffeId": ALIEN, "tunnel": true}))
        .policy(&policy(
            "in",
            json!({"workloads": {}, "ingress": [{"from": [{"identity": ALIEN}]}]}),
        ))
        .set("/certificates", delegated(&agents[1]))
        .start();
    let _echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "from another trust domain");

    // A certificate that signs nothing is no authority.
    own.federate(OTHER, &Authority::root(OTHER).leaf(ALIEN).chain_pem());
    within(40, "the refused bundle is told", || {
        certificate(&two, SERVER)["refusedBundles"][0]["trustDomain"] == OTHER
    });
    for words in ["certs", "status"] {
        let page = two.command([words]).ok();
        let mut lines = page.lines().map(str::to_lowercase);
        let told = lines.any(|line| line.contains(OTHER) && line.contains("refused"));
        assert!(told, "{page}");
    }
    two.wait_for_log(&["bundle of the agent is refused", OTHER]);
    // Its own certificate is not the worse for it.
    assert!(has_certificate(&two, SERVER));
    eventually("the other trust domain is denied", || {
        !answers(&pair.client, to)
    });

    own.federate(OTHER, &alien.bundle());
    within(40, "the other trust domain is trusted again", || {
        answers(&pair.client, to)
    });
    assert!(has_certificate(&one, ALIEN));
}
