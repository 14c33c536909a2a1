//! `reeve observe`: what happens to connections, live and from the recent past, without ever
//! keeping the daemon waiting.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
};

use harness::{Daemon, Node, Process, Programs, SOON, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, TRUST_DOMAIN, is_denied, say, send, serve};

#[test]
fn who_watches_sees_a_connection_from_its_verdict_to_its_end_on_both_nodes() {
    let (pair, one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let (here, there) = (watch(&pair.one, &one, &[]), watch(&pair.two, &two, &[]));
    let to = pair.server.addresses().port4(PORT);
    let talk = || drop(send(&pair.client, to, &["--text", "hello"]));
    until_seen(&here, talk);
    until_seen(&there, talk);
    // Both watch now, from the beginning.
    talk();

    let allowed = wait_for(&here, "allowed", "egress");
    let opened = wait_for(&here, "opened", "egress");
    let closed = wait_for(&here, "closed", "egress");
    for event in [&allowed, &opened, &closed] {
        for (field, value) in [
            ("verdict", json!("allow")),
            ("transport", json!("tunnel")),
            ("protocol", json!("tcp")),
            ("source", json!("client")),
            ("sourceId", json!(pair.client.spiffe_id(TRUST_DOMAIN))),
            ("destination", json!("server")),
            ("destinationId", json!(pair.server.spiffe_id(TRUST_DOMAIN))),
            ("destinationAddress", json!(to.to_string())),
            ("rule", json!("of-client/egress[0]")),
        ] {
            assert_eq!(event[field], value, "{field} of {event}");
        }
        let place = event["ruleAt"].as_str().unwrap();
        assert!(place.ends_with("policies/0.yaml:1"), "{event}");
    }
    let source = closed["sourceAddress"].as_str().unwrap();
    assert!(
        source.starts_with(&pair.client.addresses().v4.to_string()),
        "{closed}"
    );
    assert_eq!(closed["reason"], "closed");
    assert_eq!(
        (&closed["bytesSent"], &closed["bytesReceived"]),
        (&5.into(), &5.into())
    );
    assert!(
        closed["durationSeconds"].as_f64().unwrap() < 60.0,
        "{closed}"
    );

    // Both halves have one name, which no other connection has.
    let id = closed["connection"].as_str().unwrap();
    assert_eq!(id.len(), 16, "{closed}");
    eventually("the far node has seen it too", || {
        events(&there.stdout())
            .iter()
            .any(|seen| seen["event"] == "closed" && seen["connection"] == id)
    });
    let closed = wait_for(&there, "closed", "ingress");
    assert_eq!(closed["sourceId"], pair.client.spiffe_id(TRUST_DOMAIN));
    assert_eq!(closed["rule"], "of-server/ingress[0]");
    let source = closed["sourceAddress"].as_str().unwrap();
    assert!(
        source.starts_with(&pair.client.addresses().v4.to_string()),
        "{closed}"
    );

    // Counted by rule too.
    for (daemon, policy, rule) in [
        (&one, "of-client", "egress[0]"),
        (&two, "of-server", "ingress[0]"),
    ] {
        let labels = [("policy", policy), ("rule", rule), ("verdict", "allow")];
        daemon.wait_for_metric("reeve_rule_verdicts_total", &labels, 1.0);
    }
}

#[test]
fn who_comes_later_learns_who_was_refused_and_why() {
    let (pair, one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    say(&pair.client, pair.server.addresses().port4(PORT), "hello");
    is_denied(&pair.client, pair.server.addresses().port6(8081));
    // Nobody with an identity: plaintext from the other node's host.
    let to = pair.server.addresses().port4(PORT);
    send(pair.one.host(), to, &["--text", "x"]).fails();

    eventually("the daemon has heard of it", || {
        recent(&one, &["--verdict", "deny"]).len() == 1
            && !recent(&two, &["--verdict", "deny"]).is_empty()
    });
    let denied = recent(&one, &["--verdict", "deny"]).pop().unwrap();
    for (field, value) in [
        ("event", "refused"),
        ("direction", "egress"),
        ("reason", "no_policy"),
        ("rule", "default deny"),
        ("destination", "server"),
    ] {
        assert_eq!(denied[field], value, "{field} of {denied}");
    }
    let v6 = pair.server.addresses().v6.to_string();
    for (filter, least) in [
        (&["--port", "8081"][..], 1),
        (&["--peer", "server", "--reason", "no_policy"], 1),
        (&["--peer", &v6, "--direction", "egress"], 1),
        (&["--workload", "client", "--verdict", "allow"], 3),
        (
            &["--protocol", "TCP", "--port", "8081", "--port", "8080"],
            4,
        ),
    ] {
        assert!(recent(&one, filter).len() >= least, "{filter:?}");
    }
    for filter in [
        &["--workload", "server"][..],
        &["--protocol", "udp"],
        &["--reason", "limit"],
        &["--direction", "ingress"],
        &["--since", "0s"],
    ] {
        assert_eq!(recent(&one, filter), Vec::<Value>::new(), "{filter:?}");
    }
    assert_eq!(recent(&one, &["--since", "1h"]), recent(&one, &[]));
    assert_eq!(recent(&one, &["--last", "1"]).len(), 1);

    assert_eq!(denied["cause"], "policy");
    assert!(recent(&one, &["--cause", "failure"]).is_empty());
    let page = one
        .command(["observe", "--last", "1", "--verdict", "deny"])
        .ok();
    for text in [
        "REFUSED",
        "client spiffe://",
        "no_policy",
        "rule default deny",
    ] {
        assert!(page.contains(text), "{text} is not in {page}");
    }
    let stranger = recent(&two, &["--verdict", "deny"]).pop().unwrap();
    assert_eq!(stranger["direction"], "ingress");
    assert_eq!(stranger["destination"], "server");
    assert!(stranger["sourceId"].is_null(), "{stranger}");
}

#[test]
fn a_handshake_that_fails_is_seen_and_failure_is_told_from_policy() {
    let (pair, one, two) = Pair::started();
    // Something that speaks no TLS, at the tunnel's port.
    let tunnel = pair.server.addresses().port4(15008);
    send(
        pair.two.host(),
        tunnel,
        &["--text", "GET / HTTP/1.0\r\n\r\n"],
    );
    eventually("the handshake is seen", || {
        recent(&two, &["--cause", "failure"])
            .iter()
            .any(|event| event["event"] == "handshakeFailed" && event["destination"] == "server")
    });
    let page = two
        .command(["observe", "--no-follow", "--cause", "failure"])
        .ok();
    assert!(page.contains("NO TUNNEL"), "{page}");

    // Allowed, and nobody listens: the far end's reason is known here.
    send(
        &pair.client,
        pair.server.addresses().port4(PORT),
        &["--text", "x"],
    );
    let failed = || recent(&one, &["--cause", "failure", "--port", "8080"]);
    eventually("the failure is seen", || !failed().is_empty());
    let failed = failed().pop().unwrap();
    assert_eq!(failed["event"], "refused");
    let error = failed["error"].as_str().unwrap();
    assert!(
        error.contains("application_unreachable: connection refused"),
        "{error}"
    );

    // And `explain` says that the last attempt failed, though it is allowed.
    let words = [
        "explain", "--from", "client", "--to", "server", "--port", "8080",
    ];
    let said = one.command(words).ok();
    assert!(said.contains("the last attempt failed"), "{said}");
    assert!(said.contains("connection refused"), "{said}");
}

#[test]
fn who_does_not_read_keeps_nobody_waiting_and_learns_what_was_lost() {
    let (pair, one, _two) = Pair::started();
    let mut slow = UnixStream::connect(one.socket()).unwrap();
    slow.set_read_timeout(Some(SOON)).unwrap();
    slow.write_all(b"{\"version\":1,\"command\":{\"observe\":{\"follow\":true}}}\n")
        .unwrap();
    // More than the queue and the socket have room for.
    let refused = pair.server.addresses().port4(8081).to_string();
    pair.client
        .peer(["connect-rate", &refused, "--seconds", "2"])
        .fails();
    let denied = [("verdict", "deny"), ("direction", "egress")];
    let count = one.metrics().sum("reeve_verdicts_total", &denied);
    assert!(count > 10_000.0, "{count}");
    assert!(one.is_ready(), "nobody waits for the observer");

    let lines = BufReader::new(slow).lines();
    let (mut seen, mut lost) = (0, 0);
    for line in lines.map(Result::unwrap) {
        let event: Value = serde_json::from_str(&line).unwrap();
        let event = &event["observed"];
        match event["where"].as_str() {
            Some("queue") => lost += event["events"].as_u64().unwrap(),
            Some(_) => {}
            None => seen += 1,
        }
        if lost > 0 && seen > 1000 {
            break;
        }
    }
}

#[test]
fn what_the_kernel_had_no_room_for_is_told_with_its_number() {
    let pair = Pair::new();
    let one = pair.at_one().set("/maps/events", json!("64KiB")).start();
    let (observer, page) = (watch(&pair.one, &one, &[]), follow(&pair.one, &one));
    for seen in [&observer, &page] {
        until_seen(seen, || {
            is_denied(&pair.client, pair.server.addresses().port4(8081));
        });
    }
    let lost = || one.metrics().sum("reeve_events_lost_total", &[]);
    assert_eq!(lost(), 0.0);
    let labels = [("verdict", "deny"), ("direction", "egress")];
    let verdicts = || one.metrics().sum("reeve_verdicts_total", &labels);
    let told = || {
        let events = events(&observer.stdout()).into_iter();
        events.filter(|event| event["event"] == "refused").count() as f64
    };
    // Events come in their order: with this one, all before it have been told.
    let last = pair.server.addresses().port4(8083);
    is_denied(&pair.client, last);
    let last = last.to_string();
    eventually("it is told", || observer.stdout().contains(&last));
    let (verdicts_before, told_before) = (verdicts(), told());
    // Nobody reads while it is stopped: far more than there is room for.
    one.signal(Signal::SIGSTOP);
    let refused = pair.server.addresses().port4(8082).to_string();
    pair.client
        .peer(["connect-rate", &refused, "--seconds", "1"])
        .fails();
    one.signal(Signal::SIGCONT);
    one.wait_for_metric("reeve_events_lost_total", &[], 1000.0);

    let in_kernel = || {
        let events = events(&observer.stdout()).into_iter();
        let lost = events.filter(|event| event["event"] == "lost" && event["where"] == "kernel");
        lost.map(|event| event["events"].as_u64().unwrap())
            .sum::<u64>() as f64
    };
    eventually("it is told how many were lost", || in_kernel() >= lost());
    assert_eq!(in_kernel(), lost());
    eventually("and to people", || page.stdout().contains("`maps.events`"));
    // Each verdict was told or lost.
    let all = verdicts() - verdicts_before;
    eventually("the rest is told", || told() - told_before + lost() >= all);
    assert_eq!(told() - told_before + lost(), all);
    assert!(told() - told_before > 100.0, "what had room is told");
    assert!(one.is_ready());
}

#[test]
fn a_daemon_that_keeps_few_events_says_that_others_are_gone() {
    let pair = Pair::new();
    let one = pair.at_one().set("/admin/recentEvents", json!(2)).start();
    for port in [8081, 8082, 8083] {
        is_denied(&pair.client, pair.server.addresses().port4(port));
    }
    eventually("the third is kept", || {
        !recent(&one, &["--port", "8083"]).is_empty()
    });
    let events = recent(&one, &["--since", "1h"]);
    assert_eq!(events.len(), 3, "{events:?}");
    assert_eq!(
        (&events[0]["event"], &events[0]["where"]),
        (&"lost".into(), &"recent".into())
    );
    assert_eq!(recent(&one, &["--last", "2"]).len(), 2);
}

#[test]
fn an_observer_ends_with_the_daemon_and_says_so() {
    let (pair, mut one, _two) = Pair::started();
    let observer = watch(&pair.one, &one, &[]);
    until_seen(&observer, || {
        is_denied(&pair.client, pair.server.addresses().port4(8081));
    });
    one.stop().ok();
    let end = observer.wait(SOON);
    assert_eq!(end.status.code(), Some(1));
    assert!(end.stderr.contains("has ended"), "{}", end.stderr);
}

#[test]
fn wrong_filters_are_refused_with_what_would_be_right() {
    for (words, text) in [
        (["--reason", "no_polici"], "no_policy"),
        (["--verdict", "maybe"], "allow"),
        (["--protocol", "quic"], "sctp"),
        (["--since", "yesterday"], "--since"),
    ] {
        let output = std::process::Command::new(&Programs::get().reeve)
            .arg("observe")
            .args(words)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(text), "{said}");
    }
}

// === the arrangement ===

/// Starts to observe a daemon.
fn watch(node: &Node, daemon: &Daemon, filter: &[&str]) -> Process {
    let reeve = Programs::get().reeve.to_str().unwrap();
    let socket = daemon.socket().to_str().unwrap();
    let words = [reeve, "observe", "--follow", "--json", "--socket", socket];
    node.host().spawn(words.iter().chain(filter))
}

/// As [`watch`], for people.
fn follow(node: &Node, daemon: &Daemon) -> Process {
    let reeve = Programs::get().reeve.to_str().unwrap();
    let socket = daemon.socket().to_str().unwrap();
    node.host()
        .spawn([reeve, "observe", "--follow", "--socket", socket])
}

/// Does something until the observer, who may not have begun yet, sees anything.
fn until_seen(observer: &Process, mut act: impl FnMut()) {
    eventually("the observer sees something", || {
        act();
        !observer.stdout().is_empty()
    });
}

/// Waits until an observer has seen an event.
#[track_caller]
fn wait_for(observer: &Process, event: &str, direction: &str) -> Value {
    let find = || {
        events(&observer.stdout())
            .into_iter()
            .find(|seen| seen["event"] == event && seen["direction"] == direction)
    };
    eventually(&format!("{event} is seen"), || find().is_some());
    find().unwrap()
}

/// What a daemon has kept.
#[track_caller]
fn recent(daemon: &Daemon, filter: &[&str]) -> Vec<Value> {
    let words = ["observe", "--no-follow", "--json"];
    events(&daemon.command([&words[..], filter].concat()).ok())
}

/// Whole lines only: the last one may be under way.
fn events(printed: &str) -> Vec<Value> {
    let whole = printed.rfind('\n').map_or("", |end| &printed[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
