//! Whom a real agent grants an identity, and what is said where it does not.

use std::{collections::BTreeSet, thread, time::Duration};

use harness::{
    Daemon, Reeve, eventually,
    spire::{Agent, reeve_itself},
};
use serde_json::{Value, json};

use super::{AN_HOUR, Spired, WORKER, delegated, entry, has_certificate, within, worker};
use crate::{
    agents::{certificate, error},
    arrange::{PORT, say, serve},
    opposite::{CLIENT, SERVER},
};

/// For an entry to reach an agent, and reeve to look at a workload's processes again.
const A_WHILE: u64 = 40;

/// Waits until status, `reeve certs` and the log say this of an identity, and gives the line of the log.
#[track_caller]
fn told(daemon: &Daemon, id: &str, texts: &[&str]) -> String {
    within(A_WHILE, &format!("{texts:?} is told"), || {
        let error = error(daemon, id);
        let pages = [["certs"], ["status"]].map(|words| daemon.command(words).ok());
        texts.iter().all(|text| error.contains(text))
            && pages.iter().all(|page| page.contains(&error))
    });
    daemon.wait_for_log(&[id, texts[0]])
}

/// Starts a daemon that may not become ready, and waits until it answers.
fn answering(reeve: Reeve<'_>) -> Daemon {
    let daemon = reeve.start_unready();
    eventually("the daemon answers", || {
        daemon.command(["status"]).status.success()
    });
    daemon
}

/// The daemon at the server's node, whatever it is granted.
fn at_the_server(spired: &Spired, change: impl FnOnce(Reeve<'_>) -> Reeve<'_>) -> Daemon {
    let [_, reeve] = spired.daemons(delegated);
    answering(change(reeve))
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn workers_of_a_root_master_give_the_workload_its_first_certificate() {
    let mut spired = Spired::new(AN_HOUR);
    spired.grant_all();
    let daemons = spired.daemons(delegated).map(Reeve::start);
    let pair = &spired.pair;
    let _echo = serve(&pair.server, PORT, &[]);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "who are we?",
    );
    // The agent is not asked for renewal: it tells.
    for (daemon, id) in daemons.iter().zip([CLIENT, SERVER]) {
        assert_eq!(certificate(daemon, id)["nextAttempt"], Value::Null);
        assert!(!daemon.command(["certs"]).ok().contains("renewal"));
        let untrue = daemon.logged(&["stays so until"]);
        assert_eq!(untrue, Vec::<String>::new());
    }
    // The last worker is gone: root alone is granted nothing.
    spired.workers.clear();
    eventually("the certificates are dropped", || {
        !has_certificate(&daemons[0], CLIENT) && !has_certificate(&daemons[1], SERVER)
    });
    spired.start_workers();
    within(A_WHILE, "other workers have certificates", || {
        has_certificate(&daemons[0], CLIENT) && has_certificate(&daemons[1], SERVER)
    });
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn never_granted_and_withdrawn_and_not_a_delegate_are_told_apart() {
    let spired = Spired::new(AN_HOUR);
    let daemon = at_the_server(&spired, |reeve| reeve);
    let id = daemon.id();
    let reeve = format!("process {id} (user 0, ");

    // No entry describes reeve's own process.
    let logged = told(
        &daemon,
        SERVER,
        &[
            "not a delegate",
            &reeve,
            "no identity issued",
            "authorized_delegates",
        ],
    );
    assert!(logged.contains("there is none in force"), "{logged}");
    spired.let_reeve_ask();
    told(
        &daemon,
        SERVER,
        &[
            "never granted",
            "process ",
            "(user 0, ",
            "an entry with this identity",
        ],
    );
    let entries = spired.grant_to_workers();
    let _worker = worker(&spired.pair.server);
    within(A_WHILE, "the server's certificate", || {
        has_certificate(&daemon, SERVER)
    });
    assert_eq!(error(&daemon, SERVER), "");

    spired.spire.withdraw(&entries[1]);
    let user = format!("(user {WORKER}, ");
    told(
        &daemon,
        SERVER,
        &[
            "withdrawn",
            "process ",
            &user,
            "an entry with this identity",
        ],
    );
    daemon.wait_for_log(&[SERVER, "withdrawn", "is dropped at once"]);
    assert!(!has_certificate(&daemon, SERVER));
    let untrue = daemon.logged(&["stays so until"]);
    assert_eq!(untrue, Vec::<String>::new());
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn an_identity_that_is_no_delegate_is_told_as_the_agent_says_it() {
    let spired = Spired::new(AN_HOUR);
    let selectors = reeve_itself();
    let selectors = selectors.each_ref().map(String::as_str);
    let other = "spiffe://example.org/somebody-else";
    spired
        .spire
        .grant(&spired.agents[1], &entry(other, &selectors));
    let daemon = at_the_server(&spired, |reeve| reeve);
    told(
        &daemon,
        SERVER,
        &[
            "not a delegate",
            "caller not configured as an authorized delegate",
            "authorized_delegates",
        ],
    );
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn selectors_by_user_are_granted_what_their_entry_says() {
    let spired = Spired::new(AN_HOUR);
    spired.let_reeve_ask();
    spired.grant_to_workers();
    // No worker runs: it is not the process that is asked for.
    let user = format!("unix:uid:{WORKER}");
    let selectors = |user: &str| json!({"server": [user]});
    let daemon = at_the_server(&spired, |reeve| {
        let place = "/certificates/sources/0/delegatedIdentity/selectors";
        reeve.set(place, selectors(&user))
    });
    within(A_WHILE, "the server's certificate", || {
        has_certificate(&daemon, SERVER)
    });
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn selectors_without_an_entry_are_told() {
    let spired = Spired::new(AN_HOUR);
    spired.let_reeve_ask();
    spired.grant_to_workers();
    let daemon = at_the_server(&spired, |reeve| {
        let place = "/certificates/sources/0/delegatedIdentity/selectors";
        reeve.set(place, json!({"server": ["unix:uid:12345"]}))
    });
    told(&daemon, SERVER, &["never granted", "unix:uid:12345"]);
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn the_workload_api_gives_reeve_what_describes_its_own_process() {
    let spired = Spired::new(AN_HOUR);
    let source = |agent: &Agent| json!({"sources": [{"workloadApi": {"socket": agent.socket()}}]});
    let daemons = spired.daemons(source).map(answering);
    told(
        &daemons[1],
        SERVER,
        &["never granted", "no identity issued", "reeve's own process"],
    );
    let selectors = reeve_itself();
    let selectors = selectors.each_ref().map(String::as_str);
    for (agent, id) in spired.agents.iter().zip([CLIENT, SERVER]) {
        spired.spire.grant(agent, &entry(id, &selectors));
    }
    within(A_WHILE, "both have certificates", || {
        has_certificate(&daemons[0], CLIENT) && has_certificate(&daemons[1], SERVER)
    });
    let pair = &spired.pair;
    let _echo = serve(&pair.server, PORT, &[]);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "who are we?",
    );
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn an_agent_that_is_away_is_said_once_for_all_its_identities() {
    const SECOND: &str = "spiffe://example.org/ns/default/sa/second";
    let mut spired = Spired::new(AN_HOUR);
    let second = spired.pair.two.pod("second");
    spired.grant_all();
    let user = format!("unix:uid:{WORKER}");
    spired
        .spire
        .grant(&spired.agents[1], &entry(SECOND, &[&user]));
    spired.workers.push(worker(&second));
    let daemon = at_the_server(&spired, |reeve| reeve.enrol(&second));
    let ids = [SERVER, SECOND];
    within(A_WHILE, "both have certificates", || {
        ids.iter().all(|id| has_certificate(&daemon, id))
    });
    let started = daemon.logged(&["cannot be reached"]);
    assert_eq!(started, Vec::<String>::new());

    spired.agents[1].stop();
    eventually("both know that it is away", || {
        ids.iter()
            .all(|id| error(&daemon, id).contains("cannot be reached"))
    });
    // Some more attempts of each.
    thread::sleep(Duration::from_secs(8));
    let said = daemon.logged(&["cannot be reached"]);
    assert!(
        said.iter().all(|line| line.contains(r#""identities":2"#)),
        "{said:?}"
    );
    let messages: BTreeSet<_> = said.iter().map(|line| message(line)).collect();
    assert_eq!(messages.len(), said.len(), "{said:?}");
    assert!(ids.iter().all(|id| has_certificate(&daemon, id)));
    for id in ids {
        let own = daemon.logged(&[id, "cannot be reached"]);
        assert_eq!(own, Vec::<String>::new());
    }

    spired.agents[1].start_again();
    within(A_WHILE, "it is back for both", || {
        ids.iter().all(|id| error(&daemon, id).is_empty())
    });
    let back = daemon.logged(&["can be reached again"]);
    assert_eq!(back.len(), 1, "{back:?}");
    assert!(back[0].contains(r#""identities":2"#), "{back:?}");
}

/// The text of a line of the log.
fn message(line: &str) -> String {
    let line: Value = serde_json::from_str(line).unwrap();
    line["message"].to_string()
}
