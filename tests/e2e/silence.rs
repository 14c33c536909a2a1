//! Wires that are cut and daemons that stand still for longer than a PING is waited for: connections
//! wait, as they would without reeve, while new ones find a peer that answers.

use std::{
    thread,
    time::{Duration, Instant},
};

use harness::{Daemon, Process, eventually};
use nix::sys::signal::Signal;

use crate::arrange::{PORT, Pair, send, serve};

/// Of the applications: far more than anything here takes.
const PATIENT: &str = "300";
/// TCP asks again after up to so long where a wire was cut for a minute.
const ASKED_AGAIN: Duration = Duration::from_secs(100);

#[test]
fn a_wire_that_is_cut_for_a_minute_costs_no_connection() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "echo"]);
    let mut beating = beating(&pair);
    let cut = Instant::now();
    pair.server.cut(&pair.network);
    // By default a PING is sent each 10 s and waited for for 20 s.
    thread::sleep(Duration::from_secs(35));
    for daemon in [&one, &two] {
        assert_eq!(silent(daemon), 2, "{:#}", daemon.status()["tunnels"]);
    }
    let begun = Instant::now();
    let to = pair.server.addresses().port4(PORT);
    send(&pair.client, to, &["--text", "anybody?"]).fails();
    let taken = begun.elapsed();
    assert!(taken < Duration::from_secs(13), "{taken:?}");
    thread::sleep(Duration::from_secs(60).saturating_sub(cut.elapsed()));
    pair.server.mend(&pair.network);
    eventually("a new connection finds the peer", || {
        send(&pair.client, to, &["--text", "here?", "--patience", "3"])
            .status
            .success()
    });
    go_on(&mut beating, ASKED_AGAIN);
    for daemon in [&one, &two] {
        eventually("no tunnel is silent", || silent(daemon) == 0);
        let timeout = [("reason", "timeout")];
        let metrics = daemon.metrics();
        assert_eq!(metrics.sum("reeve_tunnels_closed_total", &timeout), 0.0);
    }
}

#[test]
fn a_daemon_that_stands_still_for_forty_seconds_costs_no_connection() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "echo"]);
    let mut beating = beating(&pair);
    for daemon in [&one, &two] {
        daemon.signal(Signal::SIGSTOP);
        thread::sleep(Duration::from_secs(40));
        daemon.signal(Signal::SIGCONT);
        go_on(&mut beating, ASKED_AGAIN);
    }
    for daemon in [&one, &two] {
        eventually("no tunnel is silent", || silent(daemon) == 0);
    }
}

/// How many of a daemon's tunnels are silent.
fn silent(daemon: &Daemon) -> usize {
    let status = daemon.status();
    let tunnels = status["tunnels"]["tunnels"].as_array().unwrap();
    tunnels.iter().filter(|it| it["silent"] == true).count()
}

fn beating(pair: &Pair) -> Vec<Process> {
    let to = pair.server.addresses();
    let beat = |to: String| {
        let words = ["heartbeat", &to, "--patience", PATIENT];
        let mut beating = pair.client.spawn_peer(words);
        beating.wait_for("beat 2");
        beating
    };
    [to.port4(PORT), to.port6(PORT)]
        .map(|to| beat(to.to_string()))
        .into()
}

#[track_caller]
fn go_on(beating: &mut [Process], patience: Duration) {
    let since = Instant::now();
    for beating in beating {
        let beats = |beating: &Process| beating.stdout().lines().count();
        let before = beats(beating);
        while beats(beating) <= before + 2 {
            assert!(beating.ended().is_none(), "{}", beating.stderr());
            assert!(since.elapsed() < patience, "it says nothing");
            thread::sleep(Duration::from_millis(50));
        }
    }
}
