//! One daemon takes over from another while both run: no connection notices, and where it does not
//! come to that, nothing has changed.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use harness::{Daemon, Place, Process, SOON, eventually};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    arrange::{PORT, Pair, Probe, is_denied, of, say, serve, tcp},
    busy::Busy,
};

/// For the old daemon to leave, once it has nothing to do.
const LEAVES: Duration = Duration::from_secs(20);

#[test]
fn no_connection_notices_an_upgrade() {
    let mut busy = Busy::start();
    // Long ones, that do nothing for most of the time, and one that never rests.
    let mut hearts: Vec<_> = ["1000", "1000", "20"].map(|every| busy.beat(every)).into();
    busy.short_ones_go_on(100);

    let mut old: Vec<Process> = Vec::new();
    for node in [0, 1, 0, 1] {
        // Begun before.
        let transfer = busy.transfer();
        let daemon = &mut busy.daemons[node];
        daemon.wait_for_metric("reeve_streams_open", &[], 4.0);
        old.push(daemon.take_over());
        let now = daemon.id();
        assert!(old.iter().all(|old| old.id() != now));
        busy.is_served_by(&busy.daemons[node], transfer);
        hearts.iter_mut().for_each(|heart| {
            assert!(heart.ended().is_none(), "{}", heart.stderr());
        });
    }
    assert!(busy.all_is_well() > 2000);
    // Those that live on keep their daemons until they end.
    assert!(old.iter_mut().any(|old| old.ended().is_none()));
    drop(hearts);
    for old in old {
        let ended = old.wait(LEAVES);
        assert!(ended.status.success(), "{}", ended.stderr);
        assert!(ended.stderr.contains("after another daemon has taken over"));
    }
    busy.short_ones_go_on(50);
    busy.all_is_well();
    busy.finish();
}

#[test]
fn what_outlives_its_daemon_for_too_long_is_ended() {
    let pair = Pair::new();
    let mut one = pair
        .allowing_at_one()
        .set("/timeouts/handOver", json!("3s"))
        .start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    let old = one.take_over();
    let ended = old.wait(LEAVES);
    assert!(ended.status.success(), "{}", ended.stderr);
    eventually("the connection has ended", || heart.ended().is_some());
    say(&pair.client, to, "and others are served");
}

#[test]
fn the_daemon_that_drains_still_obeys_the_policies() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    let old = one.take_over();
    assert!(heart.ended().is_none());
    for policy in fs::read_dir(one.policies()).unwrap().flatten() {
        fs::remove_file(policy.path()).unwrap();
    }
    eventually("what is no longer allowed has ended", || {
        heart.ended().is_some()
    });
    is_denied(&pair.client, &to);
    assert!(old.wait(LEAVES).status.success());
}

#[test]
fn what_is_left_of_daemons_before_is_seen_at_the_one_that_serves() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT).to_string();
    let beat = || {
        let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
        heart.wait_for("beat 2");
        heart
    };
    let gauges = |daemon: &Daemon| {
        let metrics = daemon.metrics();
        let names = ["reeve_predecessors", "reeve_predecessor_connections"];
        names.map(|name| metrics.sum(name, &[]))
    };
    assert_eq!(gauges(&one), [0.0, 0.0]);
    let first = beat();
    let oldest = one.take_over();
    let [second, third] = [beat(), beat()];
    let old = one.take_over();
    let left = |daemon: &Daemon| daemon.status()["predecessors"].clone();
    eventually("both are told of", || gauges(&one) == [2.0, 3.0]);
    let told = left(&one);
    for (number, process, connections) in [(0, &old, 2), (1, &oldest, 1)] {
        let told = &told[number];
        assert_eq!(told["process"], process.id(), "{told}");
        assert_eq!(told["left"]["connections"], connections, "{told}");
        let whose = json!([{"workload": "client", "connections": connections}]);
        assert_eq!(told["left"]["workloads"], whose, "{told}");
        assert!(told["left"]["seconds"].is_null(), "{told}");
    }
    let page = one.command(["status"]).ok();
    let line = format!(
        "a daemon before still drains: reeve {}, process {}, for ",
        env!("CARGO_PKG_VERSION"),
        old.id()
    );
    assert!(page.contains(&line), "{page}");
    let rest = ": connections left: 2 (client 2), until they end by themselves";
    assert!(page.contains(rest), "{page}");
    eventually("and in its own log", || {
        old.stderr()
            .contains("draining: connections left: 2 (client 2)")
    });
    // It is followed as it gets less, until nobody is left.
    drop(third);
    eventually("one has ended", || gauges(&one) == [2.0, 2.0]);
    drop(first);
    assert!(oldest.wait(LEAVES).status.success());
    eventually("one daemon is left", || gauges(&one) == [1.0, 1.0]);
    assert_eq!(left(&one)[0]["process"], old.id());
    drop(second);
    assert!(old.wait(LEAVES).status.success());
    eventually("nobody is left", || gauges(&one) == [0.0, 0.0]);
    assert_eq!(left(&one), json!([]));
}

#[test]
fn a_daemon_of_before_that_says_nothing_of_what_is_left_is_taken_over_from() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    one.kill();
    // In its place, one that speaks what was spoken first.
    let path = one.handover_socket();
    fs::remove_file(&path).unwrap();
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    listener.listen(1).unwrap();
    let place = place_for_another(&pair);
    let _new = start_taking_over(&place, &one);
    listener.set_read_timeout(Some(SOON)).unwrap();
    let (old, _) = listener.accept().unwrap();
    old.set_read_timeout(Some(SOON)).unwrap();
    let hear = |what: &str| {
        let said = hear(&old);
        assert!(said.contains(what), "{said}");
    };
    let tell = |what: &str| (&old).write_all(what.as_bytes()).unwrap();
    hear(r#"{"hello":{"protocol":1,"#);
    tell(r#"{"offer":{"version":"0.0.9","process":7,"isReady":true,"ownCgroups":[],"sockets":0}}"#);
    hear(r#""take""#);
    tell(r#""taken""#);
    let before = || one.status()["predecessors"].clone();
    eventually("it has taken over", || one.is_ready());
    let silent =
        json!([{"version": "0.0.9", "process": 7, "started": 0, "seconds": 0, "left": null}]);
    assert_eq!(before(), silent);
    // What a later version may say is passed over.
    tell(r#"{"more":7}"#);
    say(&pair.client, pair.server.addresses().port4(PORT), "served");
    assert_eq!(before(), silent);
    drop(old);
    eventually("its end is seen", || before() == json!([]));
}

#[test]
fn a_takeover_without_a_daemon_is_a_start() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    one.kill();
    let place = place_for_another(&pair);
    let mut new = start_taking_over(&place, &one);
    eventually("it is ready", || one.is_ready());
    assert!(new.ended().is_none());
    say(&pair.client, pair.server.addresses().port4(PORT), "served");
}

#[test]
fn a_daemon_that_does_not_become_ready_takes_nothing_over() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses();
    let short = Probe::start(&pair.client, to.port4(PORT), &["--threads", "2"]);
    short.goes_on(50);
    // What it needs at its start is broken now.
    let ca = pair.network.trust().join("root.key");
    let before = fs::metadata(&ca).unwrap().permissions();
    let away = ca.with_extension("away");
    fs::rename(&ca, &away).unwrap();
    fs::write(&ca, "no key at all").unwrap();
    fs::set_permissions(&ca, fs::Permissions::from_mode(0o600)).unwrap();
    let old = one.start_taking_over();
    let new = one.replace(old);
    let ended = new.wait(Duration::from_secs(60));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    fs::rename(&away, &ca).unwrap();
    fs::set_permissions(&ca, before).unwrap();
    one.wait_for_log(&["has not taken over"]);
    // The old one goes on, and does all that it did.
    short.goes_on(100);
    short.all_worked();
    assert_eq!(one.status()["process"], one.id());
    let other = of(&pair.client).calls(&pair.server, tcp(8085)).text();
    let other = other.replace("of-client", "more-of-client");
    fs::write(one.policies().join("more.yaml"), other).unwrap();
    one.wait_for_log(&["policies in force", "\"policies\":2"]);
    is_denied(&pair.client, to.port4(9999));
    // And the next one may try again.
    let old = one.take_over();
    short.goes_on(50);
    short.all_worked();
    assert!(old.wait(LEAVES).status.success());
}

#[test]
fn a_daemon_of_another_layout_or_protocol_is_refused_before_anything_changes() {
    let (pair, one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let short = Probe::start(&pair.client, pair.server.addresses().port4(PORT), &[]);
    let generation = one.status()["generation"].clone();
    for (hello, said) in [
        (
            r#"{"hello":{"protocol":1,"version":"0.0.9","layout":0,"outboundPort":15001,"tunnelPort":15008}}"#,
            "have layout 0",
        ),
        (
            r#"{"hello":{"protocol":99,"version":"9.9.9","layout":1,"outboundPort":15001,"tunnelPort":15008}}"#,
            "version 99 of the hand-over",
        ),
        (r#""take""#, "begins with a hello"),
        (r#"{"hello":{"protocol":1}}"#, "not understood"),
        ("\u{0}\u{1}garbage", "not understood"),
    ] {
        let answer = greet(&one, hello);
        assert!(answer.contains(said), "{hello}: {answer}");
    }
    // Who says nothing is not waited for; who only looks does no harm.
    let silent = connect(&one);
    drop(connect(&one));
    drop(silent);
    short.goes_on(150);
    short.all_worked();
    assert_eq!(one.status()["generation"], generation);
    assert!(one.is_ready());
}

/// Where a daemon runs after another one has ended; whatever runs there ends with it.
fn place_for_another(pair: &Pair) -> Place {
    let cgroup = pair.one.cgroup().child("again");
    pair.one.host().with_cgroup(cgroup.into())
}

/// Starts a daemon with the files of one that has ended, which takes over from whoever is there.
fn start_taking_over(place: &Place, ended: &Daemon) -> Process {
    let config = ended.config().to_str().unwrap();
    let reeve = harness::Programs::get().reeve.to_str().unwrap();
    place.spawn([reeve, "run", "--takeover", "--config", config])
}

/// Says something at the hand-over socket, and hears the answer.
fn greet(daemon: &Daemon, what: &str) -> String {
    let socket = connect(daemon);
    (&socket).write_all(what.as_bytes()).unwrap();
    hear(&socket)
}

fn hear(socket: &Socket) -> String {
    let mut said = [0; 4096];
    let length = (&mut &*socket).read(&mut said).unwrap();
    String::from_utf8_lossy(&said[..length]).into_owned()
}

fn connect(daemon: &Daemon) -> Socket {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let path = daemon.handover_socket();
    socket.connect(&SockAddr::unix(path).unwrap()).unwrap();
    socket
}
