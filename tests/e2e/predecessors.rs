//! Daemons from which another one has taken over, for as long as connections keep them.

use std::fs;

use harness::{Daemon, Process, SOON, certs::Authority};
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, serve};

#[test]
fn a_daemon_that_has_handed_over_follows_trust_bundles_as_before() {
    let pair = Pair::new();
    let _one = pair.allowing_at_one().start();
    let root = fs::read_to_string(pair.network.trust().join("root.pem")).unwrap();
    let at_two = pair.allowing_at_two().trust("example.org", &root);
    let bundle = at_two.folder().join("example.org.pem");
    let mut two = at_two.start();
    let _server = serve(&pair.server, PORT, &[]);
    let heart = beat(&pair);
    let old = two.take_over();
    goes_on(&heart);
    fs::write(bundle, Authority::root("example.org").certificate_pem()).unwrap();
    let ended = heart.wait(SOON);
    assert!(!ended.status.success());
    assert!(old.wait(SOON).status.success());
}

#[test]
fn a_daemon_that_has_handed_over_takes_the_configuration_that_the_next_one_takes() {
    let pair = Pair::new();
    let _one = pair.allowing_at_one().start();
    let mut two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    // Two daemons before: the word is passed on.
    let first = beat(&pair);
    let oldest = two.take_over();
    let second = beat(&pair);
    let old = two.take_over();
    goes_on(&first);
    goes_on(&second);
    let bundle = two.config().with_file_name("other.pem");
    fs::write(&bundle, Authority::root("example.org").certificate_pem()).unwrap();
    change(&two, |settings| {
        settings["certificates"]["trustBundles"] = json!({"example.org": bundle});
    });
    // Its own certificate is refused as well.
    two.command(["reload"]).fails();
    for heart in [first, second] {
        assert!(!heart.wait(SOON).status.success());
    }
    assert!(oldest.wait(SOON).status.success());
    assert!(old.wait(SOON).status.success());
}

/// A connection that lives for as long as nobody ends it.
fn beat(pair: &Pair) -> Process {
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    heart
}

#[track_caller]
fn goes_on(heart: &Process) {
    let beats = || heart.stdout().lines().count();
    let now = beats();
    harness::eventually("it goes on", || beats() > now + 2);
}

/// Changes the configuration of a daemon.
fn change(daemon: &Daemon, change: impl FnOnce(&mut Value)) {
    let mut settings = serde_json::from_str(&fs::read_to_string(daemon.config()).unwrap()).unwrap();
    change(&mut settings);
    fs::write(daemon.config(), settings.to_string()).unwrap();
}
