//! Certificates from a SPIFFE agent: what it gives is used at once, what it takes back is dropped at
//! once, and while it cannot be reached what it gave is good. The agent is a real gRPC server.

use std::{thread, time::Duration};

use harness::{
    Daemon, Process, Workload,
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
    let told = certificate(&one, CLIENT);
    assert_eq!(told["source"], "own");
    // The agent is not asked for renewal: it tells.
    assert_eq!(told["nextAttempt"], Value::Null);
    assert!(!one.command(["certs"]).ok().contains("renewal"));
    let metrics = one.get("/metrics").unwrap();
    assert!(!metrics.contains("reeve_certificate_renewal_due_timestamp_seconds{"));

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

    // A bundle that is none is told, with the reason, and harms nobody else.
    let grant = Grant::of(&root, &[SERVER]).federated_bytes("other.example", b"no bundle");
    agent.grant(Subject::Caller, grant);
    eventually("the refused bundle is told", || {
        let refused = &certificate(&guarded.daemon, SERVER)["refusedBundles"][0];
        refused["trustDomain"] == "other.example" && refused["reason"].to_string().contains("DER")
    });
    for words in ["certs", "status"] {
        let page = guarded.daemon.command([words]).ok();
        let line = page.lines().find(|line| line.contains("not DER"));
        assert!(
            line.is_some_and(|line| line.to_lowercase().contains("other.example")),
            "{page}"
        );
    }
    guarded
        .daemon
        .wait_for_log(&["bundle of the agent is refused", "other.example"]);
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
    let (root, agent, guarded) = by_delegation();
    lives_with_its_workload(&agent, &root, guarded);
}

#[test]
fn the_broker_api_gives_by_process_and_no_longer_than_it_lives() {
    let (root, agent, guarded, _workload_api) = by_broker();
    lives_with_its_workload(&agent, &root, guarded);
    assert!(agent.presented().iter().all(|id| id == REEVE));
}

#[test]
fn after_a_takeover_one_daemon_asks_a_broker_and_for_its_own_certificate() {
    let (root, agent, mut guarded, workload_api) = by_broker();
    agent.grant(place(&guarded.server), Grant::of(&root, &[SERVER]));
    let client = Client::new(&guarded.stranger).presenting(&root.leaf(CLIENT));
    eventually("the server's certificate", || {
        client.tunnel(guarded.tunnel_port()).is_ok()
    });
    let tunnel = client.tunnel(guarded.tunnel_port()).unwrap();
    let stream = tunnel.connect(&guarded.authority()).unwrap();
    assert_eq!(stream.status, 200);
    let open = || {
        thread::sleep(Duration::from_secs(1));
        [agent.open_calls(), workload_api.open_calls()]
    };
    let before = open();
    assert_eq!(before[1], 1);
    let old = guarded.daemon.take_over();
    eventually("the old one asks nobody", || {
        old.stderr().contains("sources are not asked")
    });
    eventually("the new one does", || open() == before && open() == before);
    assert!(!tunnel.ended());
    // Nobody serves, and nobody passes anything.
    guarded.daemon.kill();
    eventually("the old one asks", || {
        old.stderr().contains("sources are asked again") && open()[1] == 1
    });
    assert!(!tunnel.ended());
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

#[test]
fn a_workload_is_entitled_by_any_of_its_processes_and_asked_for_by_that_again() {
    let (root, agent, guarded) = by_delegation();
    is_entitled_by_its_worker(&agent, &root, &guarded);
}

#[test]
fn a_broker_is_asked_for_each_kind_of_process_as_well() {
    let (root, agent, guarded, _workload_api) = by_broker();
    is_entitled_by_its_worker(&agent, &root, &guarded);
}

/// The agent has an entry for processes of another user than that of the workload's first one.
fn is_entitled_by_its_worker(agent: &Agent, root: &Authority, guarded: &Guarded) {
    let has_certificate = || certificate(&guarded.daemon, SERVER)["serial"] != Value::Null;
    let subject = Subject::User(guarded.server.cgroup().below_mount(), WORKER);
    agent.grant(subject, Grant::of(root, &[SERVER]));
    eventually("none of the processes is entitled", || {
        let error = error(&guarded.daemon, SERVER);
        error.contains("never granted") && error.contains("(user 0, ")
    });
    let worker = worker(guarded);
    eventually("the worker is found and entitled", has_certificate);
    // What stays denied says nothing, and another worker takes the place of the first at once.
    let another = self::worker(guarded);
    worker.stop(PATIENCE);
    eventually("another worker has the certificate", has_certificate);
    another.stop(PATIENCE);
    eventually("the last worker is gone", || !has_certificate());
}

const WORKER: u32 = 33;
const PATIENCE: Duration = Duration::from_secs(10);

fn worker(guarded: &Guarded) -> Process {
    let user = WORKER.to_string();
    let words = [
        "setpriv",
        "--reuid",
        &user,
        "--clear-groups",
        "sleep",
        "600",
    ];
    guarded.server.spawn(words)
}

#[test]
fn never_granted_and_withdrawn_and_not_a_delegate_are_told_apart() {
    let (root, agent, guarded) = by_delegation();
    let subject = place(&guarded.server);
    let told = |texts: &[&str]| {
        eventually("the reason is told", || {
            let error = error(&guarded.daemon, SERVER);
            let page = guarded.daemon.command(["certs"]).ok();
            let status = guarded.daemon.command(["status"]).ok();
            texts.iter().all(|text| error.contains(text))
                && page.contains(&error)
                && status.contains(&error)
        });
        guarded.daemon.wait_for_log(&[SERVER, texts[0]])
    };
    let logged = told(&[
        "never granted",
        "process ",
        "(user 0, ",
        "an entry with this identity",
    ]);
    assert!(logged.contains("there is none in force"), "{logged}");

    agent.grant(subject.clone(), Grant::of(&root, &[SERVER]));
    eventually("the server's certificate", || {
        certificate(&guarded.daemon, SERVER)["serial"] != Value::Null
    });
    agent.withdraw(&subject);
    told(&["withdrawn", "process ", "(user 0, "]);
    // The attempts after it find none in force.
    let dropped = [SERVER, "withdrawn", "is dropped at once"];
    guarded.daemon.wait_for_log(&dropped);
    let untrue = guarded.daemon.logged(&["stays in force until it expires"]);
    assert_eq!(untrue, Vec::<String>::new());

    // What the agent says is nothing that a terminal obeys.
    agent.refuse_delegates(Some("no%1b[31m delegate"));
    let id = guarded.daemon.id();
    let reeve = format!("process {id} (user 0, ");
    told(&[
        "not a delegate",
        &reeve,
        "no\\u{1b}[31m delegate",
        "authorized_delegates",
    ]);
    agent.refuse_delegates(None);
    agent.grant(subject, Grant::of(&root, &[SERVER]));
    eventually("it is a delegate again", || {
        certificate(&guarded.daemon, SERVER)["serial"] != Value::Null
    });
}

#[test]
fn that_an_agent_is_away_is_said_once_for_all_its_identities_and_once_that_it_is_back() {
    const NEIGHBOUR: &str = "spiffe://example.org/ns/default/sa/neighbour";
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    let grant = Grant::of(&root, &[SERVER, NEIGHBOUR]);
    let place_of = |workload: &Workload| place(workload);
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", delegated(&agent, &json!({}))));
    let grant_to_both = |agent: &Agent| {
        agent.grant(place_of(&guarded.server), grant.clone());
        agent.grant(place_of(&guarded.neighbour), grant.clone());
    };
    grant_to_both(&agent);
    let ids = [SERVER, NEIGHBOUR];
    let both = |what: &dyn Fn(&str) -> bool| ids.iter().all(|id| what(id));
    eventually("both have certificates", || {
        both(&|id| certificate(&guarded.daemon, id)["serial"] != Value::Null)
    });

    let socket = agent.socket().to_owned();
    drop(agent);
    eventually("both know that it is away", || {
        both(&|id| error(&guarded.daemon, id).contains("cannot be reached"))
    });
    // Some more attempts of each.
    std::thread::sleep(Duration::from_secs(5));
    let said = guarded.daemon.logged(&["cannot be reached"]);
    assert!(
        said.iter().all(|line| line.contains(r#""identities":2"#)),
        "{said:?}"
    );
    let broken_off = guarded.daemon.logged(&["cannot be reached", "broken off"]);
    let no_socket = guarded.daemon.logged(&["cannot be reached", "agent at"]);
    assert!(broken_off.len() <= 1 && no_socket.len() == 1, "{said:?}");
    assert_eq!(said.len(), broken_off.len() + no_socket.len(), "{said:?}");

    let agent = Agent::again_at(&socket);
    grant_to_both(&agent);
    eventually("it is back for both", || {
        both(&|id| error(&guarded.daemon, id).is_empty())
    });
    let back = guarded.daemon.logged(&["can be reached again"]);
    assert_eq!(back.len(), 1, "{back:?}");
    assert!(back[0].contains(r#""identities":2"#), "{back:?}");
}

// === words ===

fn workload_api(agent: &Agent) -> Value {
    json!({"sources": [{"name": "own", "workloadApi": {"socket": agent.socket()}}]})
}

/// A server whose certificates come by the delegated identity API, with the agent and its authority.
fn by_delegation() -> (Authority, Agent, Guarded) {
    let root = Authority::root(TRUST_DOMAIN);
    let agent = Agent::start();
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", delegated(&agent, &json!({}))));
    (root, agent, guarded)
}

/// The same by the broker API, with the agent from which reeve has a certificate of its own.
fn by_broker() -> (Authority, Agent, Guarded, Agent) {
    let root = Authority::root(TRUST_DOMAIN);
    let workload_api = Agent::start();
    workload_api.grant(Subject::Caller, Grant::of(&root, &[REEVE]));
    let agent = Agent::with_tls(&root.leaf(SPIRE));
    let guarded =
        Guarded::unready(|reeve| reeve.set("/certificates", broker(&agent, &workload_api)));
    (root, agent, guarded, workload_api)
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

/// Why status says that an identity's last attempt failed; empty where it did not.
pub(crate) fn error(daemon: &Daemon, id: &str) -> String {
    let error = &certificate(daemon, id)["lastError"];
    error.as_str().unwrap_or_default().to_owned()
}

/// What status says of an identity's certificate.
pub(crate) fn certificate(daemon: &Daemon, id: &str) -> Value {
    let status = daemon.status();
    let certificates = status["certificates"].as_array().unwrap();
    let found = certificates.iter().find(|entry| entry["spiffeId"] == id);
    found.cloned().unwrap_or_default()
}

fn serial(daemon: &Daemon, id: &str) -> Value {
    certificate(daemon, id)["serial"].clone()
}
