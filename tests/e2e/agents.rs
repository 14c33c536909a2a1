//! Certificates from a SPIFFE agent: what it gives is used at once, what it takes back is dropped at
//! once, and while it cannot be reached what it gave is good. The agent is a real gRPC server.

use harness::{
    Daemon, Workload,
    agent::{Agent, Grant, Subject},
    certs::Authority,
    eventually,
    hbone::Client,
};
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, Pair, TRUST_DOMAIN, say, serve},
    opposite::{CLIENT, Guarded, SERVER},
};

const REEVE: &str = "spiffe://example.org/reeve";
const SPIRE: &str = "spiffe://example.org/spire/agent";

// === the Workload API ===

#[test]
fn the_workload_api_gives_certificates_and_bundles_and_rotates_them() {
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    agent.grant(Subject::Caller, Grant::of(&root, &[CLIENT, SERVER]));
    let pair = Pair::new();
    let sources = workload_api(&agent);
    let (one, two) = (
        pair.allowing_at_one()
            .set("/certificates", sources.clone())
            .start(),
        pair.allowing_at_two().set("/certificates", sources).start(),
    );
    let _echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "who are we?");
    assert_eq!(certificate(&one, CLIENT)["source"], "own");

    // Another root altogether, beside the old one in neither: both ends follow.
    let next = Authority::root(TRUST_DOMAIN);
    let serials = [serial(&one, CLIENT), serial(&two, SERVER)];
    agent.grant(Subject::Caller, Grant::of(&next, &[CLIENT, SERVER]));
    eventually("both have new certificates", || {
        serial(&one, CLIENT) != serials[0] && serial(&two, SERVER) != serials[1]
    });
    say(&pair.client, to, "and now?");
}

#[test]
fn what_the_agent_withdraws_is_dropped_and_what_it_cannot_say_is_kept() {
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    agent.grant(Subject::Caller, Grant::of(&root, &[SERVER]));
    let guarded = with_agent(&agent);
    let client = || {
        Client::new(&guarded.stranger)
            .presenting(&root.leaf(CLIENT))
            .tunnel(guarded.tunnel_port())
    };
    let tunnel = client().unwrap();

    // Unreachable: nothing changes but what status says.
    let socket = agent.socket().to_owned();
    let before = serial(&guarded.daemon, SERVER);
    drop(agent);
    eventually("status says that the agent is gone", || {
        let error = certificate(&guarded.daemon, SERVER)["lastError"].to_string();
        error.contains("the agent")
    });
    assert_eq!(serial(&guarded.daemon, SERVER), before);
    assert_eq!(tunnel.connect(&guarded.authority()).unwrap().status, 200);
    client().unwrap();

    // It is back, with something new.
    let agent = Agent::again_at(&socket);
    agent.grant(Subject::Caller, Grant::of(&root, &[SERVER]));
    eventually("the new certificate", || {
        serial(&guarded.daemon, SERVER) != before
    });
    let tunnel = client().unwrap();

    // Withdrawn: at once and for tunnels that stand.
    agent.withdraw(&Subject::Caller);
    eventually("the tunnel is closed", || tunnel.ended());
    client().unwrap_err();
    assert_eq!(certificate(&guarded.daemon, SERVER)["serial"], Value::Null);
    assert!(!guarded.daemon.is_ready());

    // Another's identity is not ours.
    agent.grant(Subject::Caller, Grant::of(&root, &[CLIENT]));
    assert!(client().is_err());
    agent.grant(Subject::Caller, Grant::of(&root, &[CLIENT, SERVER]));
    eventually("it serves again", || client().is_ok());
}

#[test]
fn federated_bundles_and_revocation_lists_of_the_workload_api_count() {
    let root = Authority::root(TRUST_DOMAIN);
    let other = Authority::root("other.example");
    let agent = Agent::start();
    let alien = "spiffe://other.example/ns/default/sa/client";
    let grant = Grant::of(&root, &[SERVER]).federated("other.example", &other);
    agent.grant(Subject::Caller, grant);
    let guarded = with_agent(&agent);
    let comes = |issued| {
        let client = Client::new(&guarded.stranger).presenting(&issued);
        client.tunnel(guarded.tunnel_port()).map(drop)
    };
    comes(other.leaf(alien)).unwrap();

    agent.grant(Subject::Caller, Grant::of(&root, &[SERVER]));
    eventually("the other trust domain is no longer trusted", || {
        comes(other.leaf(alien)).is_err()
    });
    comes(root.leaf(CLIENT)).unwrap();

    let server = root.leaf(SERVER);
    let revoked = root.leaf_with(CLIENT, |params| {
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&[0x11, 0x22]));
    });
    let list = root.revocation_list(&[&[0x11, 0x22]], time::Duration::hours(1));
    let grant = Grant::issued(&root, [(SERVER, server)]).list(&list);
    agent.grant(Subject::Caller, grant);
    let revoked_comes = || {
        let client = Client::new(&guarded.stranger).presenting(&revoked);
        client.tunnel(guarded.tunnel_port()).map(drop)
    };
    eventually("the revoked one is refused", || revoked_comes().is_err());
    comes(root.leaf(CLIENT)).unwrap();
}

// === on behalf of workloads ===

#[test]
fn the_delegated_identity_api_gives_by_process_and_no_longer_than_it_lives() {
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", delegated(&agent, &json!({}))));
    lives_with_its_workload(&agent, &root, guarded);
}

#[test]
fn the_broker_api_gives_by_process_and_no_longer_than_it_lives() {
    let root = Authority::root(TRUST_DOMAIN);
    let workload_api = Agent::start();
    workload_api.grant(Subject::Caller, Grant::of(&root, &[REEVE]));
    let agent = Agent::with_tls(&root.leaf(SPIRE));
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", broker(&agent, &workload_api)));
    lives_with_its_workload(&agent, &root, guarded);
    assert!(agent.presented().iter().all(|id| id == REEVE));
}

#[test]
fn a_broker_that_is_somebody_else_gives_nothing() {
    let root = Authority::root(TRUST_DOMAIN);
    let workload_api = Agent::start();
    workload_api.grant(Subject::Caller, Grant::of(&root, &[REEVE]));
    let agent = Agent::with_tls(&root.leaf(CLIENT));
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", broker(&agent, &workload_api)));
    agent.grant(place(&guarded.server), Grant::of(&root, &[SERVER]));
    guarded.daemon.wait_for_log(&["wrong_identity"]);
    assert_eq!(certificate(&guarded.daemon, SERVER)["serial"], Value::Null);
}

#[test]
fn the_delegated_identity_api_gives_by_selectors() {
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    let selectors = ["k8s:ns:default", "k8s:sa:server"];
    agent.grant(
        Subject::Selectors(selectors.map(str::to_owned).to_vec()),
        Grant::of(&root, &[SERVER]),
    );
    let sources = delegated(&agent, &json!({"server": selectors}));
    let guarded = Guarded::unready(|reeve| reeve.set("/certificates", sources));
    eventually("the server's certificate", || {
        certificate(&guarded.daemon, SERVER)["serial"] != Value::Null
    });
    let client = Client::new(&guarded.stranger).presenting(&root.leaf(CLIENT));
    client.tunnel(guarded.tunnel_port()).unwrap();
}

/// The workload has its certificate for as long as the agent grants it and a process of it lives.
fn lives_with_its_workload(agent: &Agent, root: &Authority, guarded: Guarded) {
    let client = || {
        let client = Client::new(&guarded.stranger).presenting(&root.leaf(CLIENT));
        client.tunnel(guarded.tunnel_port())
    };
    let subject = place(&guarded.server);
    agent.grant(subject.clone(), Grant::of(root, &[SERVER]));
    eventually("the server's certificate", || client().is_ok());
    // Its neighbour is entitled to nothing.
    assert_eq!(
        certificate(
            &guarded.daemon,
            "spiffe://example.org/ns/default/sa/neighbour"
        )["serial"],
        Value::Null
    );

    let tunnel = client().unwrap();
    agent.withdraw(&subject);
    eventually("the tunnel is closed", || tunnel.ended());
    client().unwrap_err();

    agent.grant(subject, Grant::of(root, &[SERVER]));
    eventually("it serves again", || client().is_ok());
    // The agent goes on granting; the workload is gone.
    guarded.server.cgroup().kill();
    eventually("the certificate is dropped", || {
        certificate(&guarded.daemon, SERVER)["serial"] == Value::Null
    });
}

// === words ===

fn workload_api(agent: &Agent) -> Value {
    json!({"sources": [{"name": "own", "workloadApi": {"socket": agent.socket()}}]})
}

fn delegated(agent: &Agent, selectors: &Value) -> Value {
    let api = json!({"socket": agent.socket(), "selectors": selectors});
    json!({"sources": [{"delegatedIdentity": api}]})
}

fn broker(agent: &Agent, workload_api: &Agent) -> Value {
    json!({"sources": [{"broker": {
        "socket": agent.socket(),
        "agent": SPIRE,
        "identity": REEVE,
        "workloadApi": workload_api.socket(),
    }}]})
}

fn with_agent(agent: &Agent) -> Guarded {
    let sources = workload_api(agent);
    let guarded = Guarded::unready(|reeve| reeve.set("/certificates", sources));
    eventually("the server's certificate", || {
        certificate(&guarded.daemon, SERVER)["serial"] != Value::Null
    });
    guarded
}

/// The workload's processes, as an agent sees them.
fn place(workload: &Workload) -> Subject {
    Subject::Cgroup(workload.cgroup().below_mount())
}

/// What status says of an identity's certificate.
fn certificate(daemon: &Daemon, id: &str) -> Value {
    let status = daemon.status();
    let certificates = status["certificates"].as_array().unwrap();
    let found = certificates.iter().find(|entry| entry["spiffeId"] == id);
    found.cloned().unwrap_or_default()
}

fn serial(daemon: &Daemon, id: &str) -> Value {
    certificate(daemon, id)["serial"].clone()
}
