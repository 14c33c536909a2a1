//! A configuration that is read again: what needs a restart is taken whole or not at all.

use std::fs;

use harness::{Daemon, Output, Programs};
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, is_denied, say, serve};

#[test]
fn a_setting_on_which_the_rest_depends_has_the_reload_refused_and_all_stays_as_it_was() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "before");
    let before = read(&one);
    let certificates = one.status()["certificates"].clone();
    for (pointer, value, name) in [
        ("/trustDomain", json!("example.com"), "trustDomain"),
        ("/ports", json!({"tunnel": 15009}), "ports"),
        ("/maps", json!({"workloads": 2000}), "maps"),
        (
            "/certificates",
            json!({"sources": [{"name": "other", "embedded": {"caDir": "/nowhere"}}]}),
            "certificates.sources",
        ),
    ] {
        let mut changed = before.clone();
        changed[&pointer[1..]] = value;
        // And something that a reload could take.
        changed["peers"] = json!([]);
        write(&one, &changed);
        let checked = check(&one).ok();
        assert!(checked.contains("refuses to reload this file"), "{checked}");
        assert!(checked.contains(&format!("`{name}`")), "{checked}");
        let reloaded = one.command(["reload"]);
        assert_eq!(reloaded.status.code(), Some(1));
        let said = reloaded.stdout;
        assert!(said.contains(&format!("`{name}` cannot change")), "{said}");
        let status = one.status();
        assert_eq!(status["trustDomain"], "example.org");
        assert_eq!(status["workloads"][0]["name"], "client");
        // The same identity, and one that a peer accepts.
        let certificate = &status["certificates"][0];
        assert_eq!(certificate["spiffeId"], certificates[0]["spiffeId"]);
        assert!(certificate["serial"].is_string(), "{certificate}");
        say(&pair.client, to, name);
    }
    assert!(one.logged(&["stay in force"]).is_empty(), "{}", one.log());
    write(&one, &before);
    let checked = check(&one).ok();
    assert!(!checked.contains("restart"), "{checked}");
    one.command(["reload"]).ok();
}

#[test]
fn a_setting_that_waits_for_a_restart_is_left_and_the_rest_of_the_file_is_taken() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let before = read(&one);
    let mut changed = before.clone();
    changed["timeouts"] = json!({"drain": "7s"});
    changed["tunnel"] = json!({"congestionControl": "reno"});
    changed["peers"] = json!([]);
    write(&one, &changed);
    let settings = "tunnel.congestionControl`, `timeouts";
    let checked = check(&one).ok();
    assert!(
        checked.contains(&format!("restarted for `{settings}`")),
        "{checked}"
    );
    let said = one.command(["reload"]).ok();
    assert!(
        said.contains("a restart is needed for tunnel.congestionControl, timeouts"),
        "{said}"
    );
    assert_eq!(
        one.status()["restartNeeded"],
        json!(["tunnel.congestionControl", "timeouts"])
    );
    let page = one.command(["status"]).ok();
    assert!(page.contains("a restart is needed for"), "{page}");
    is_denied(&pair.client, to);
    write(&one, &before);
    one.command(["reload"]).ok();
    assert_eq!(one.status()["restartNeeded"], json!([]));
    say(&pair.client, to, "again");
}

fn read(daemon: &Daemon) -> Value {
    serde_json::from_str(&fs::read_to_string(daemon.config()).unwrap()).unwrap()
}

fn write(daemon: &Daemon, settings: &Value) {
    fs::write(daemon.config(), settings.to_string()).unwrap();
}

fn check(daemon: &Daemon) -> Output {
    let reeve = Programs::get().reeve.as_os_str();
    let words = [
        reeve,
        "check".as_ref(),
        "--config".as_ref(),
        daemon.config().as_os_str(),
    ];
    daemon.beside(words)
}
