//! Many connections at once: each is answered with its own bytes, and nothing is left of them.

use harness::{Daemon, SOON, eventually};
use serde_json::json;

use crate::arrange::{PORT, Pair, say, serve};

/// Below the 16 tunnels of 200 streams that one identity has to another by default.
const CONNECTIONS: usize = 3000;

#[test]
fn thousands_of_connections_work_at_once_and_leave_nothing() {
    let pair = Pair::new();
    // What is idle shall be gone before the test is.
    let (one, two) = (
        pair.allowing_at_one()
            .set("/timeouts/tunnelIdle", json!("2s"))
            .start(),
        pair.allowing_at_two()
            .set("/timeouts/tunnelIdle", json!("2s"))
            .start(),
    );
    let to = pair.server.addresses().port4(PORT);
    let mut echo = serve(&pair.server, PORT, &[]);
    say(&pair.client, to, "the first one");
    let quiet = || [&one, &two].iter().all(|daemon| open_now(daemon) == 0.0);
    eventually("the first tunnel is closed again", quiet);
    let files = [one.settled_files(), two.settled_files()];

    let mut flood = pair.client.spawn_peer([
        "flood",
        &to.to_string(),
        "--connections",
        &CONNECTIONS.to_string(),
        "--hold",
        "1",
    ]);
    flood.wait_for(&format!("open {CONNECTIONS}"));
    for (daemon, role) in [(&one, "client"), (&two, "server")] {
        let streams = daemon
            .metrics()
            .sum("reeve_streams_open", &[("role", role)]);
        assert_eq!(streams, CONNECTIONS as f64, "{role}");
    }
    flood.wait(SOON).ok();

    eventually("every stream and tunnel is closed", quiet);
    for (daemon, files) in [&one, &two].into_iter().zip(files) {
        daemon.closes_files(files);
    }
    assert!(echo.ended().is_none());
    say(&pair.client, to, "and one more");
}

fn open_now(daemon: &Daemon) -> f64 {
    let metrics = daemon.metrics();
    metrics.sum("reeve_streams_open", &[]) + metrics.sum("reeve_tunnels_open", &[])
}
