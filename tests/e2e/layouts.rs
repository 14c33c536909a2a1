//! A daemon takes over from one whose kernel maps have another layout. Both judge for as long as the old one
//! has connections; what one refuses is refused, and nothing is left of the old one when it ends.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use harness::{Daemon, Node, Process, Programs, SOON, Workload, eventually};
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, Pair, Probe, TCP, answers, fails_fast, is_denied, of, say, serve, tcp},
    busy::{ANSWERS, Busy, beat, goes_on},
};

/// For the old daemon to leave, once it has nothing to do.
const LEAVES: Duration = Duration::from_secs(20);

#[test]
fn no_connection_notices_a_takeover_by_another_layout_and_back() {
    let mut busy = Busy::start();
    let stranger = busy.pair.one.pod("stranger");
    let to = busy.pair.server.addresses().port4(ANSWERS);
    let intruder = Probe::start(&stranger, to, &[]);
    // One daemon after another carries one that does nothing for most of the time and one that never rests.
    let mut hearts = vec![busy.beat("1000"), busy.beat("20")];
    busy.short_ones_go_on(100);

    let mut old = Vec::new();
    for program in [
        Programs::other_layout(),
        Programs::get().reeve.clone(),
        Programs::other_layout(),
    ] {
        for node in 0..2 {
            let transfer = busy.transfer();
            // It is under way.
            thread::sleep(Duration::from_millis(300));
            let daemon = &mut busy.daemons[node];
            daemon.use_program(&program);
            old.push(daemon.take_over());
            busy.is_served_by(&busy.daemons[node], transfer);
            for heart in &mut hearts {
                assert!(heart.ended().is_none(), "{}", heart.stderr());
                goes_on(heart, 1);
            }
            busy.all_is_well();
        }
        hearts.push(busy.beat("1000"));
    }
    for node in [&busy.pair.one, &busy.pair.two] {
        assert_eq!(pins(node), ["", "-old-1", "-old-2", "-old-3"]);
    }
    // Each old daemon leaves with its last connection, and takes along what was its own.
    drop(hearts);
    for old in old {
        let ended = old.wait(LEAVES);
        assert!(ended.status.success(), "{}", ended.stderr);
        assert!(ended.stderr.contains("judge alone"), "{}", ended.stderr);
    }
    for node in [&busy.pair.one, &busy.pair.two] {
        assert_eq!(pins(node), [""]);
    }
    busy.short_ones_go_on(100);
    busy.all_is_well();
    assert_eq!(intruder.worked(), 0, "{}", intruder.seen());
    busy.finish();
}

#[test]
fn a_deny_after_the_takeover_cuts_what_the_old_daemon_carries_and_an_allow_is_one_for_both() {
    let (pair, mut one, mut two) = Pair::started();
    let _servers = [
        serve(&pair.server, PORT, &[]),
        serve(&pair.server, 8081, &[]),
    ];
    let to = pair.server.addresses();
    let heart = beat(&pair);
    let old = [take_over(&mut one), take_over(&mut two)];
    goes_on(&heart, 1);
    // What neither knew when it began.
    fails_fast(&pair.client, to.port4(8081), "not permitted");
    let both = |workload: &Workload, other: &Workload, calls| match calls {
        true => of(workload).calls(other, TCP).calls(other, tcp(8081)),
        false => of(workload).hears(other, TCP).hears(other, tcp(8081)),
    };
    put(&two, &both(&pair.server, &pair.client, false).text());
    put(&one, &both(&pair.client, &pair.server, true).text());
    eventually("both allow it", || answers(&pair.client, to.port4(8081)));
    goes_on(&heart, 1);
    // At the server's node alone: there the old daemon carries it, too.
    put(
        &two,
        &of(&pair.server).hears(&pair.client, tcp(8081)).text(),
    );
    assert!(!heart.wait(SOON).status.success());
    say(&pair.client, to.port4(8081), "still");
    for old in old {
        assert!(old.wait(LEAVES).status.success());
    }
    eventually("nothing is left of the old daemons", || {
        pins(&pair.one) == [""] && pins(&pair.two) == [""]
    });
    say(&pair.client, to.port4(8081), "and still");
    fails_fast(&pair.client, to.port4(9999), "not permitted");
}

#[test]
fn what_an_old_daemon_of_another_layout_has_in_the_kernel_ends_when_it_is_killed() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let heart = beat(&pair);
    let old = take_over(&mut one);
    assert_eq!(pins(&pair.one), ["", "-old-1"]);
    drop(old);
    assert!(!heart.wait(SOON).status.success());
    eventually("what it had pinned is gone", || pins(&pair.one) == [""]);
    say(&pair.client, to, "the other one serves");
    is_denied(&pair.client, pair.server.addresses().port4(9999));
    assert!(one.is_ready());
}

#[test]
fn an_old_daemon_of_another_layout_goes_on_while_the_one_that_serves_is_restarted() {
    let (pair, mut one, mut two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let heart = beat(&pair);
    let old = [take_over(&mut one), take_over(&mut two)];
    let later = beat(&pair);
    for daemon in [&mut one, &mut two] {
        daemon.kill();
        goes_on(&heart, 1);
        is_denied(&pair.client, pair.server.addresses().port4(9999));
        daemon.start_again();
        daemon.wait_until_ready();
        goes_on(&heart, 1);
    }
    assert!(!later.wait(SOON).status.success(), "its daemon was killed");
    for node in [&pair.one, &pair.two] {
        assert_eq!(pins(node), ["", "-old-1"]);
    }
    for (daemon, old) in [&one, &two].into_iter().zip(&old) {
        eventually("the old one is known to the new one", || {
            daemon.status()["predecessors"][0]["process"] == old.id()
        });
    }
    say(&pair.client, to, "served");
    drop(heart);
    let [old_one, old_two] = old;
    assert!(old_two.wait(LEAVES).status.success());
    assert!(old_one.wait(LEAVES).status.success());
    eventually("nothing is left of the old daemons", || {
        pins(&pair.one) == [""] && pins(&pair.two) == [""]
    });
    say(&pair.client, to, "served");
}

#[test]
fn what_is_left_of_two_daemons_that_were_killed_is_removed_by_the_next_one() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses();
    let heart = beat(&pair);
    let old = take_over(&mut one);
    one.kill();
    drop(old);
    assert!(!heart.wait(SOON).status.success());
    assert_eq!(pins(&pair.one), ["", "-old-1"]);
    is_denied(&pair.client, to.port4(9999));
    // Of the first layout again.
    one.use_program(&Programs::get().reeve);
    one.start_again();
    one.wait_until_ready();
    eventually("nothing else is left", || pins(&pair.one) == [""]);
    say(&pair.client, to.port4(PORT), "served");
    is_denied(&pair.client, to.port4(9999));
}

#[test]
fn a_daemon_of_another_layout_that_is_killed_before_it_has_taken_over_leaves_nothing() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses();
    let short = Probe::start(&pair.client, to.port4(PORT), &["--threads", "2"]);
    short.goes_on(50);
    let config = fs::read_to_string(one.config()).unwrap();
    let mut broken: Value = serde_json::from_str(&config).unwrap();
    // No agent is there, so that it waits for one.
    let agent = pair.one.folder().join("agent.sock");
    broken["certificates"]["sources"] = json!([{"workloadApi": {"socket": agent}}]);
    fs::write(one.config(), broken.to_string()).unwrap();
    one.use_program(&Programs::other_layout());
    let first = one.start_taking_over();
    let new = one.replace(first);
    eventually("both judge", || pins(&pair.one) == ["", "-next"]);
    short.goes_on(100);
    drop(new);
    fs::write(one.config(), config).unwrap();
    eventually("nothing is left of it", || pins(&pair.one) == [""]);
    short.goes_on(100);
    short.all_worked();
    is_denied(&pair.client, to.port4(9999));
    // And the next one may try again.
    let old = one.take_over();
    short.goes_on(100);
    short.all_worked();
    assert!(old.wait(LEAVES).status.success());
}

/// Has a daemon of the other layout take over.
fn take_over(daemon: &mut Daemon) -> Process {
    daemon.use_program(&Programs::other_layout());
    daemon.take_over()
}

/// What the daemons of a node have pinned, by what follows the first one's name.
fn pins(node: &Node) -> Vec<String> {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let first = name(node.pins());
    let rest = |path: PathBuf| name(&path).split_off(first.len());
    node.all_pins().into_iter().map(rest).collect()
}

/// Puts a policy in place of the one that there is.
fn put(daemon: &Daemon, policy: &str) {
    let file = daemon.policies().join("0.yaml");
    let new = daemon.policies().join(".new");
    fs::write(&new, policy).unwrap();
    fs::rename(new, file).unwrap();
    // For both to have seen it, where nothing else tells.
    thread::sleep(Duration::from_millis(500));
}
