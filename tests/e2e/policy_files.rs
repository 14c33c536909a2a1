//! Policy files that are written in place, as `cp`, `tee` and many a tool do it: emptied first, and
//! then filled. What is in between is never in force.

use std::{
    fs::{self, File},
    io::Write as _,
    thread,
    time::Duration,
};

use harness::eventually;
use serde_json::json;

use crate::arrange::{PORT, Pair, Probe, TCP, answers, denials, is_denied, of, serve, tcp};

/// Longer than the daemon waits for a second change, and far shorter than it waits for a writer.
const PAUSE: Duration = Duration::from_millis(900);

#[test]
fn a_file_that_is_rewritten_in_place_refuses_nobody_meanwhile() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses().port4(PORT);
    let probe = Probe::start(&pair.client, to, &[]);
    for (daemon, policy) in [
        (&one, of(&pair.client).calls(&pair.server, TCP)),
        (&two, of(&pair.server).hears(&pair.client, TCP)),
    ] {
        let file = daemon.policies().join("0.yaml");
        // Half of the file is one of two policies, and reads well.
        let (first, second) = (of(&pair.client), policy);
        let first = first.text().replace("of-client", "nothing") + "\n---\n";
        for pause in [Duration::from_millis(10), PAUSE] {
            // By one who has the file open for all the time.
            let mut writer = File::create(&file).unwrap();
            thread::sleep(pause);
            writer.write_all(first.as_bytes()).unwrap();
            thread::sleep(pause);
            writer.write_all(second.text().as_bytes()).unwrap();
            drop(writer);
            thread::sleep(pause);
            // By two, of whom the first empties it.
            fs::write(&file, "").unwrap();
            thread::sleep(pause);
            fs::write(&file, first.clone() + &second.text()).unwrap();
            thread::sleep(pause);
        }
        daemon.wait_for_log(&["a file of policies holds nothing any more"]);
        daemon.wait_for_log(&["policies in force", "\"policies\":2"]);
        probe.goes_on(100);
    }
    probe.all_worked();
}

#[test]
fn a_file_that_stays_empty_takes_its_policies_away() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    assert!(answers(&pair.client, to));
    fs::write(one.policies().join("0.yaml"), "# nothing\n").unwrap();
    eventually("it is denied", || !answers(&pair.client, to));
    is_denied(&pair.client, to);
    one.wait_for_log(&["still nothing"]);
}

#[test]
fn a_file_that_is_deleted_takes_its_policies_away_at_once() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    assert!(answers(&pair.client, to));
    fs::remove_file(one.policies().join("0.yaml")).unwrap();
    eventually("it is denied", || !answers(&pair.client, to));
    assert!(one.logged(&["a file of policies holds nothing"]).is_empty());
}

#[test]
fn what_changes_while_everything_is_read_again_is_not_missed() {
    let (_pair, one, _two) = Pair::started();
    let file = one.policies().join("0.yaml");
    let text = fs::read_to_string(&file).unwrap();
    for round in 0..40 {
        thread::scope(|scope| {
            let reload = scope.spawn(|| one.command(["reload"]).ok());
            // What `reeve reload` itself takes to start, and then all of the daemon's turn.
            thread::sleep(Duration::from_millis(5 + round % 30));
            match round % 2 {
                0 => fs::remove_file(&file).unwrap(),
                _ => fs::write(&file, &text).unwrap(),
            }
            reload.join().unwrap();
        });
        let wanted = json!(round % 2);
        eventually("what is there now is in force", || {
            one.status()["policies"]["policies"] == wanted
        });
    }
}

#[test]
fn who_asks_for_a_reload_in_between_waits_for_the_rest() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses().port4(PORT);
    let probe = Probe::start(&pair.client, to, &[]);
    let file = one.policies().join("0.yaml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, "").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(PAUSE);
            fs::write(&file, &text).unwrap();
        });
        let said = one.command(["reload"]).ok();
        assert!(said.contains("1 policies"), "{said}");
    });
    probe.goes_on(100);
    probe.all_worked();
}

#[test]
fn a_change_that_has_no_room_is_refused_as_a_whole_and_a_deny_closes_its_workload() {
    let pair = Pair::new();
    let _two = pair.allowing_at_two().start();
    let narrow = of(&pair.client).calls(&pair.server, TCP).text();
    let one = pair
        .at_one()
        .policy(&narrow)
        // Room for three.
        .set("/maps/verdicts", json!(4))
        .set("/node/addresses", json!([]))
        .start();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    assert!(answers(&pair.client, to));
    let file = one.policies().join("0.yaml");
    let without_room = || one.metrics().sum("reeve_policies_without_room", &[]);
    let closed = || one.metrics().sum("reeve_closed_directions", &[]);
    assert_eq!((without_room(), closed()), (0.0, 0.0));

    // More ports than there is room for: what was allowed stays so, and nothing is added.
    let wide = (9001..9021)
        .step_by(2)
        .fold(of(&pair.client).calls(&pair.server, TCP), |policy, port| {
            policy.calls(&pair.server, tcp(port))
        });
    fs::write(&file, wide.text()).unwrap();
    eventually("it is told of", || without_room() == 1.0);
    assert_eq!(closed(), 0.0);
    assert!(answers(&pair.client, to));
    is_denied(&pair.client, pair.server.addresses().port4(9001));
    let status = one.command(["status"]).stdout;
    assert!(status.contains("refused as a whole"), "{status}");
    assert!(!one.is_ready());

    // A denial that has no room: staying as it was would allow what shall be denied.
    let ports: Vec<_> = (7001..7021)
        .step_by(2)
        .map(|port| json!({"port": port}))
        .collect();
    let deny = json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": "no"},
        "spec": {
            "action": "Deny",
            "workloads": {"names": ["client"]},
            "egress": [{"to": [{"any": {}}], "ports": ports}],
        },
    });
    fs::write(&file, format!("{narrow}\n---\n{deny}")).unwrap();
    eventually("its direction is closed", || closed() == 1.0);
    is_denied(&pair.client, to);
    assert!(denials(&one, "egress", "map_failure") >= 1.0);
    let status = one.command(["status"]).stdout;
    assert!(status.contains("egress of client"), "{status}");

    // What has room again is taken.
    fs::write(&file, &narrow).unwrap();
    eventually("it is open again", || {
        closed() == 0.0 && without_room() == 0.0
    });
    assert!(answers(&pair.client, to));
    eventually("the daemon is ready", || one.is_ready());
}
