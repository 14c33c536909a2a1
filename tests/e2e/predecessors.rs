//! Daemons from which another one has taken over, for as long as connections keep them.

use std::{fs, thread, time::Duration};

use harness::{Daemon, SOON, certs::Authority, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, Pair, serve},
    busy::{beat, goes_on},
};

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
    goes_on(&heart, 2);
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
    goes_on(&first, 2);
    goes_on(&second, 2);
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

#[test]
fn an_old_daemon_stays_for_its_connections_until_there_are_too_many() {
    let pair = Pair::new();
    let mut one = pair
        .allowing_at_one()
        .set("/limits/predecessors", json!(2))
        .set("/timeouts/drain", json!("2s"))
        .start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    let mut hearts = Vec::new();
    let mut old = Vec::new();
    for _ in 0..2 {
        hearts.push(beat(&pair));
        old.push(one.take_over());
    }
    one.wait_for_metric("reeve_predecessors", &[], 2.0);
    one.wait_for_metric("reeve_predecessor_age_seconds", &version, 2.0);
    // The longest drain is over, and nobody has ended.
    thread::sleep(Duration::from_secs(3));
    hearts.iter().for_each(|heart| goes_on(heart, 2));
    assert!(old.iter_mut().all(|old| old.ended().is_none()));
    // One more is one too many.
    hearts.push(beat(&pair));
    old.push(one.take_over());
    let said = one.wait_for_log(&["more old daemons than `limits.predecessors`"]);
    let oldest = old.remove(0);
    assert!(
        said.contains(&format!("process {},", oldest.id())),
        "{said}"
    );
    let ended = oldest.wait(SOON);
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(ended.stderr.contains("told to end"), "{}", ended.stderr);
    assert!(!hearts.remove(0).wait(SOON).status.success());
    hearts.iter().for_each(|heart| goes_on(heart, 2));
    let left = |one: &Daemon| one.status()["predecessors"].as_array().unwrap().len();
    eventually("the others are there", || left(&one) == 2);
    // They leave with their last connection.
    drop(hearts);
    for old in old {
        assert!(old.wait(SOON).status.success());
    }
    eventually("none is left", || left(&one) == 0);
    assert!(!one.metrics().has("reeve_predecessor_age_seconds"));
}

#[test]
fn a_takeover_ends_all_old_daemons_after_the_time_that_it_is_told() {
    let pair = Pair::new();
    let mut one = pair.allowing_at_one().start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let first = beat(&pair);
    let oldest = one.take_over();
    let second = beat(&pair);
    let old = one.take_over_with(&["--end-old-after", "10s"]);
    eventually("it is told", || {
        let seconds =
            |number: usize| one.status()["predecessors"][number]["left"]["seconds"].as_u64();
        seconds(0).is_some_and(|seconds| seconds < 10)
            && seconds(1).is_some_and(|seconds| seconds < 10)
    });
    goes_on(&first, 2);
    goes_on(&second, 2);
    for (heart, old) in [(first, oldest), (second, old)] {
        assert!(!heart.wait(SOON).status.success());
        assert!(old.wait(SOON).status.success());
    }
    assert!(one.is_ready());
}

#[test]
fn a_daemon_that_stops_ends_those_before_it_also_one_that_hangs() {
    let pair = Pair::new();
    let mut one = pair
        .allowing_at_one()
        .set("/timeouts/drain", json!("2s"))
        .start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let mut hearts = Vec::new();
    let mut old = Vec::new();
    for _ in 0..3 {
        hearts.push(beat(&pair));
        old.push(one.take_over());
    }
    one.wait_for_metric("reeve_predecessors", &[], 3.0);
    eventually("the two before the last have moved", || {
        one.logged(&["an old daemon is there"]).len() == 2
    });
    old[0].signal(Signal::SIGSTOP);
    let ended = one.stop();
    assert!(ended.status.success(), "{}", ended.stderr);
    // When it has ended, nobody is left.
    for (number, mut old) in old.into_iter().enumerate() {
        let status = old.ended();
        let status = status.unwrap_or_else(|| panic!("{number} has not ended: {}", ended.stderr));
        assert_eq!(status.success(), number > 0, "{number}: {}", old.stderr());
    }
    for heart in hearts {
        assert!(!heart.wait(SOON).status.success());
    }
}

#[test]
fn an_old_daemon_whose_successor_ends_is_known_to_the_next_one() {
    let pair = Pair::new();
    let mut one = pair
        .allowing_at_one()
        .set("/timeouts/drain", json!("2s"))
        .start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let known = |one: &Daemon| -> Vec<u64> {
        let status = one.status();
        let known = status["predecessors"].as_array().unwrap().iter();
        known.map(|old| old["process"].as_u64().unwrap()).collect()
    };
    let heart = beat(&pair);
    let oldest = one.take_over();
    // The one between has nothing to stay for.
    let between = one.take_over();
    assert!(between.wait(SOON).status.success());
    eventually("it comes to the one that serves", || {
        known(&one) == [u64::from(oldest.id())]
    });
    goes_on(&heart, 2);
    // Nor is it lost when the daemon that serves is.
    one.kill();
    one.start_again();
    one.wait_until_ready();
    eventually("it comes to the one that serves now", || {
        known(&one) == [u64::from(oldest.id())]
    });
    goes_on(&heart, 2);
    // It still does what it is told.
    assert!(one.stop().status.success());
    assert!(oldest.wait(SOON).status.success());
    assert!(!heart.wait(SOON).status.success());
}

/// Changes the configuration of a daemon.
fn change(daemon: &Daemon, change: impl FnOnce(&mut Value)) {
    let mut settings = serde_json::from_str(&fs::read_to_string(daemon.config()).unwrap()).unwrap();
    change(&mut settings);
    fs::write(daemon.config(), settings.to_string()).unwrap();
}
