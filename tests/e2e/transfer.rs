//! Bytes: they arrive whole, in order and only at the pace of whoever reads them; each direction
//! ends on its own, and a reset at one end is a reset at the other.

use harness::{SOON, eventually};
use serde_json::Value;

use crate::arrange::{PORT, Pair, send, serve, start_sending};

const MIB: u64 = 1 << 20;

#[test]
fn a_client_that_has_said_everything_still_hears_the_answer() {
    let (pair, _one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "hash"]);
    let to = pair.server.addresses().port4(PORT);
    let seen = send(&pair.client, to, &["--bytes", "1000000"]).json();
    // The server answers only when the client's half has ended.
    assert_eq!(seen["received"]["head"], seen["sent"]["sha256"]);
}

#[test]
fn a_server_that_has_said_everything_still_hears_the_client() {
    let (pair, _one, _two) = Pair::started();
    let mut server = serve(
        &pair.server,
        PORT,
        &["--mode", "source", "--bytes", "100000"],
    );
    let to = pair.server.addresses().port6(PORT);
    let seen = send(&pair.client, to, &["--last", "--bytes", "1000000"]).json();
    assert_eq!(seen["received"]["bytes"], 100_000);
    server.wait_for(&format!(
        "1000000 {}",
        seen["sent"]["sha256"].as_str().unwrap()
    ));
}

#[test]
fn a_server_may_speak_first() {
    let (pair, _one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "source", "--bytes", "17"]);
    let to = pair.server.addresses().port4(PORT);
    let seen = send(&pair.client, to, &["--keep-open", "--patience", "10"]).json();
    assert_eq!(seen["received"]["bytes"], 17);
}

#[test]
fn a_large_transfer_arrives_whole_in_both_directions_at_once() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let bytes = 256 * MIB;
    let to = pair.server.addresses().port4(PORT);
    let seen = send(&pair.client, to, &["--bytes", &bytes.to_string()]).json();
    came_back_whole(&seen, bytes);
    for (daemon, direction) in [(&one, "egress"), (&two, "ingress")] {
        for flow in ["sent", "received"] {
            let labels = [
                ("flow", flow),
                ("direction", direction),
                ("transport", "tunnel"),
            ];
            daemon.wait_for_metric("reeve_connection_bytes_total", &labels, bytes as f64);
            assert_eq!(
                daemon
                    .metrics()
                    .sum("reeve_connection_bytes_total", &labels),
                bytes as f64
            );
        }
    }
}

#[test]
fn slow_ends_get_everything_and_hold_up_nobody() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    let bytes = (8 * MIB).to_string();
    let before = [one.resident(), two.resident()];
    // All at once, through the same tunnel: one reads slowly, one writes slowly, one does neither.
    let reads_slowly = start_sending(&pair.client, to, &["--slow", "20", "--bytes", &bytes]);
    let writes_slowly = start_sending(&pair.client, to, &["--trickle", "20", "--bytes", &bytes]);
    let quick = send(&pair.client, to, &["--bytes", &(32 * MIB).to_string()]);
    came_back_whole(&quick.json(), 32 * MIB);
    for slow in [reads_slowly, writes_slowly] {
        came_back_whole(&slow.wait(SOON * 3).json(), 8 * MIB);
    }
    for (daemon, before) in [(&one, before[0]), (&two, before[1])] {
        let grown = daemon.resident().saturating_sub(before);
        assert!(
            grown < 64 * MIB,
            "the daemon keeps {grown} bytes of what passed"
        );
    }
}

#[test]
fn a_reader_that_stops_stops_the_writer() {
    let (pair, _one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "hold"]);
    let to = pair.server.addresses().port4(PORT);
    let stuck = send(
        &pair.client,
        to,
        &["--bytes", &(256 * MIB).to_string(), "--patience", "3"],
    );
    // Neither half moves: the writer runs into its time-out long before everything is written.
    let error = stuck.fails();
    assert!(
        error.contains("Resource temporarily unavailable"),
        "{error}"
    );
}

#[test]
fn a_reset_by_the_client_is_a_reset_for_the_server() {
    let (pair, one, _two) = Pair::started();
    let server = serve(&pair.server, PORT, &["--slow", "50"]);
    let to = pair.server.addresses().port4(PORT);
    // The server has accepted by then: one that is reset before is not told of it by a read.
    let paused = ["--pause", "500", "--text", "and away", "--reset"];
    send(&pair.client, to, &paused).ok();
    eventually("the server is told", || {
        server.stderr().contains("Connection reset by peer")
    });
    assert!(
        !server.stdout().contains("served"),
        "it looked like an end in good order"
    );
    one.wait_for_metric(
        "reeve_connections_closed_total",
        &[("reason", "reset")],
        1.0,
    );
}

#[test]
fn a_reset_by_the_server_is_a_reset_for_the_client() {
    let (pair, _one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "reset"]);
    let to = pair.server.addresses().port6(PORT);
    let error = send(&pair.client, to, &["--text", "hello", "--keep-open"]).fails();
    assert!(error.contains("Connection reset by peer"), "{error}");
    two.wait_for_metric(
        "reeve_connections_closed_total",
        &[("reason", "reset")],
        1.0,
    );
}

fn came_back_whole(seen: &Value, bytes: u64) {
    assert_eq!(seen["sent"]["bytes"], bytes);
    assert_eq!(seen["received"]["bytes"], bytes);
    assert_eq!(seen["sent"]["sha256"], seen["received"]["sha256"]);
}
