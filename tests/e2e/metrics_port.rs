//! Other processes at the metrics endpoint's address: they keep reeve from being ready, and from
//! nothing else.

use std::{fs, os::unix::net::UnixDatagram};

use harness::{Daemon, Network, Node, Process, Programs, eventually};
use serde_json::json;

use crate::arrange::{PORT, Pair, answers, is_denied, say, serve};

/// A process of an unprivileged user that listens where reeve tells its metrics.
fn squat(node: &Node) -> Process {
    let peer = Programs::get().peer.to_str().unwrap();
    let address = format!("127.0.0.1:{}", Daemon::METRICS_PORT);
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let words = [&nobody[..], &["--", peer, "serve", &address]].concat();
    let mut squatter = node.host().spawn(words);
    squatter.wait_for("listening");
    squatter
}

/// Why the daemon says that it is not ready.
fn not_ready(daemon: &Daemon) -> String {
    daemon.status()["notReady"].to_string()
}

#[test]
fn whoever_takes_the_metrics_port_while_reeve_is_away_stops_nothing_else() {
    let pair = Pair::new();
    let reports = pair.one.folder().join("notify");
    let systemd = UnixDatagram::bind(&reports).unwrap();
    systemd.set_read_timeout(Some(harness::SOON)).unwrap();
    let hear = |wanted: &[&str]| {
        let mut report = [0; 4096];
        loop {
            let length = systemd
                .recv(&mut report)
                .expect("systemd is told {wanted:?}");
            let said = String::from_utf8_lossy(&report[..length]);
            if wanted.iter().all(|text| said.contains(text)) {
                return;
            }
        }
    };
    let _two = pair.allowing_at_two().start();
    let mut one = pair
        .allowing_at_one()
        .environment("NOTIFY_SOCKET", &reports)
        .start();
    let _echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "before");

    one.kill();
    let squatter = squat(&pair.one);
    one.start_again();
    let holder = format!("process {} (peer) of user 65534", squatter.id());
    one.wait_for_log(&["`metrics.address` 127.0.0.1:15020", &holder]);
    // It serves, says to systemd that it runs and what is missing, and denies what no policy allows.
    hear(&["READY=1"]);
    hear(&["STATUS=not ready", &holder]);
    eventually("tunnels are opened", || answers(&pair.client, to));
    is_denied(&pair.client, pair.server.addresses().port4(PORT + 2));
    let why = not_ready(&one);
    assert!(
        why.contains(&holder) && why.contains("metrics.address"),
        "{why}"
    );

    drop(squatter);
    one.wait_until_ready();
    assert_eq!(not_ready(&one), "[]");
    one.wait_for_log(&["`metrics.address` is listened on now"]);
    hear(&["STATUS=ready"]);
}

#[test]
fn a_daemon_whose_metrics_port_is_taken_is_handed_over_as_it_is() {
    let node = Node::new(&Network::new(), "one");
    let squatter = squat(&node);
    let mut daemon = node.reeve().start_unready();
    let holder = format!("process {} (peer) of user 65534", squatter.id());
    daemon.wait_for_log(&["`metrics.address`", &holder]);
    eventually("it serves", || not_ready(&daemon).contains(&holder));
    // The next one is as ready as this one.
    drop(daemon.take_over());
    assert!(not_ready(&daemon).contains("`metrics.address`"));
    eventually("it finds out who", || not_ready(&daemon).contains(&holder));
    drop(squatter);
    daemon.wait_until_ready();
    assert!(daemon.metrics().sum("reeve_ready", &[]) > 0.0);
    // It is handed over like one that was bound at the start.
    drop(daemon.take_over());
    daemon.wait_until_ready();
    assert!(daemon.logged(&["`metrics.address`"]).is_empty());
}

#[test]
fn an_address_that_no_device_has_yet_is_waited_for() {
    let node = Node::new(&Network::new(), "one");
    let address = "10.99.0.1";
    let mut daemon = node
        .reeve()
        .set("/metrics/address", json!(format!("{address}:15020")))
        .start_unready();
    daemon.wait_for_log(&["`metrics.address` 10.99.0.1:15020", "no device"]);
    eventually("it serves", || not_ready(&daemon).contains("no device"));
    let add = ["ip", "address", "add", "10.99.0.1/32", "dev", "lo"];
    node.host().exec(add).ok();
    eventually("it is ready", || not_ready(&daemon) == "[]");
    assert!(daemon.ended().is_none());
}

#[test]
fn a_second_daemon_with_another_admin_socket_does_not_start() {
    let node = Node::new(&Network::new(), "one");
    let daemon = node.reeve().start();
    let config = fs::read_to_string(daemon.config()).unwrap();
    let other = node.folder().join("other.yaml");
    fs::write(&other, config.replace("admin.sock", "other.sock")).unwrap();
    let reeve = Programs::get().reeve.to_str().unwrap();
    let second = ["run", "--config", other.to_str().unwrap()];
    let said = node.host().exec([&[reeve], &second[..]].concat()).fails();
    let named = format!("another reeve (process {})", daemon.id());
    assert!(said.contains(&named), "{said}");
    assert!(daemon.is_ready());
}
