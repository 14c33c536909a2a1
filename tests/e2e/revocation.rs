//! Live connections and change: what a policy, a label or an enrolment no longer allows ends within
//! a second, silent or busy, in a tunnel or not, and from whenever it is; what is still allowed
//! notices nothing.

use std::{
    fmt, fs,
    net::IpAddr,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use harness::{Daemon, Place, Process, Workload, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::arrange::{ICMP, PORT, Pair, Policy, denials, of, serve, tcp, udp};

/// A port that stays allowed while [`PORT`] does not.
const STAYS: u16 = 8081;

/// From writing a file to the end of the last connection that it no longer allows: a second, and
/// before it the time for which the daemon waits whether more is being written.
const BOUND: Duration = Duration::from_millis(1000 + 200);
/// A machine that is busy with other things may be late; never three times in a row.
const ATTEMPTS: usize = 3;

#[test]
fn silent_plaintext_ends_in_both_roles() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let policy = |ports: &[u16]| {
        let mut policy = of(&pair.client);
        for (ip, port) in stranger
            .addresses()
            .both()
            .into_iter()
            .flat_map(|ip| ports.iter().map(move |port| (ip, *port)))
        {
            policy = policy
                .calls_address(ip, tcp(port))
                .hears_address(ip, tcp(port));
        }
        policy
    };
    let one = pair.at_one().policy(&policy(&[PORT, STAYS]).text()).start();
    let mut servers = Vec::new();
    for place in [&pair.client, &stranger] {
        servers.push(serve(place, PORT, &[]));
        servers.push(serve(place, STAYS, &[]));
    }
    let ways = [(&*pair.client, &stranger), (&*stranger, &pair.client)];
    let mut neighbours: Vec<Neighbour> = ways
        .iter()
        .flat_map(|(from, to)| Neighbour::of_each(from, to))
        .collect();

    let mut rounds = 0;
    in_time("plaintext TCP", || {
        rounds += 1;
        rewrite(&one, &policy(&[PORT, STAYS]));
        let mut held: Vec<Held> = ways
            .iter()
            .flat_map(|(from, to)| to.addresses().both().map(|ip| Held::tcp(from, ip)))
            .collect();
        let since = now();
        rewrite(&one, &policy(&[STAYS]));
        let taken = last_of(&mut held, since);
        for held in &held[..2] {
            held.says("Software caused connection abort");
        }
        for held in &held[2..] {
            held.says("Connection reset by peer");
        }
        taken
    });
    for neighbour in &mut neighbours {
        neighbour.goes_on();
    }
    let each = f64::from(rounds) * 2.0;
    assert_eq!(denials(&one, "egress", "revoked"), each);
    assert_eq!(denials(&one, "ingress", "revoked"), each);
    for direction in ["egress", "ingress"] {
        let labels = [
            ("direction", direction),
            ("transport", "plaintext"),
            ("reason", "revoked"),
        ];
        one.wait_for_metric("reeve_connections_closed_total", &labels, each);
    }
    one.wait_for_log(&["connection closed", "revoked", "plaintext"]);
    one.wait_for_log(&["live connections that are no longer allowed were ended"]);
}

#[test]
fn busy_plaintext_ends_as_well() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let policy = |ports: &[u16]| {
        ports.iter().fold(of(&pair.client), |policy, port| {
            policy.calls_address(stranger.addresses().v4, tcp(*port))
        })
    };
    let one = pair.at_one().policy(&policy(&[PORT, STAYS]).text()).start();
    let _servers = [serve(&stranger, PORT, &[]), serve(&stranger, STAYS, &[])];
    let mut beating = heartbeat(&pair.client, stranger.addresses().v4, PORT);
    let mut neighbour = Neighbour::new(&pair.client, stranger.addresses().v4);
    rewrite(&one, &policy(&[STAYS]));
    eventually("the connection has ended", || beating.ended().is_some());
    neighbour.goes_on();
    assert_eq!(denials(&one, "egress", "revoked"), 1.0, "once, not twice");
}

#[test]
fn tunnelled_connections_end_whichever_side_changes() {
    let pair = Pair::new();
    let policies = |ports: &[u16]| {
        ports.iter().fold(
            (of(&pair.client), of(&pair.server)),
            |(client, server), port| {
                (
                    client.calls(&pair.server, tcp(*port)),
                    server.hears(&pair.client, tcp(*port)),
                )
            },
        )
    };
    let (before, after) = (policies(&[PORT, STAYS]), policies(&[STAYS]));
    let one = pair.at_one().policy(&before.0.text()).start();
    let two = pair.at_two().policy(&before.1.text()).start();
    let _servers = [
        serve(&pair.server, PORT, &[]),
        serve(&pair.server, STAYS, &[]),
    ];
    let mut neighbours = Neighbour::of_each(&pair.client, &pair.server);
    for (what, daemon, before, after) in [
        ("tunnelled, at the client", &one, &before.0, &after.0),
        ("tunnelled, at the server", &two, &before.1, &after.1),
    ] {
        in_time(what, || {
            rewrite(daemon, before);
            let mut held = pair
                .server
                .addresses()
                .both()
                .map(|ip| Held::tcp(&pair.client, ip));
            let mut beating = heartbeat(&pair.client, pair.server.addresses().v4, PORT);
            let since = now();
            rewrite(daemon, after);
            let taken = last_of(&mut held, since);
            eventually("the busy one has ended", || beating.ended().is_some());
            taken
        });
        rewrite(daemon, before);
        let labels = [("transport", "tunnel"), ("reason", "revoked")];
        daemon.wait_for_metric("reeve_connections_closed_total", &labels, 3.0);
    }
    for neighbour in &mut neighbours {
        neighbour.goes_on();
    }
}

#[test]
fn flows_without_a_handshake_end_and_are_counted() {
    let pair = Pair::new();
    let host = pair.two.addresses();
    let policy = |ports: &[u16], icmp: bool| {
        let mut policy = of(&pair.client);
        for ip in host.both() {
            for port in ports {
                policy = policy.calls_address(ip, udp(*port));
            }
            if icmp {
                policy = policy.calls_address(ip, ICMP);
            }
        }
        policy
    };
    let all = policy(&[PORT, STAYS], true);
    let one = pair.at_one().policy(&all.text()).start();
    let _servers = [PORT, STAYS].map(|port| {
        let mut server = pair
            .two
            .host()
            .spawn_peer(["udp-serve", &format!("[::]:{port}")]);
        server.wait_for("listening");
        server
    });
    let mut neighbour = Held::udp(&pair.client, host.v4, STAYS);
    let mut rounds = 0.0;
    in_time("connected UDP", || {
        rounds += 1.0;
        rewrite(&one, &all);
        let mut held = host.both().map(|ip| Held::udp(&pair.client, ip, PORT));
        // A flow of a socket that is gone already, and one of ICMP.
        let to = host.port4(PORT).to_string();
        pair.client.peer(["udp-send", &to]).ok();
        pair.client.peer(["ping", &host.v4.to_string()]).ok();
        let since = now();
        rewrite(&one, &policy(&[STAYS], false));
        let taken = last_of(&mut held, since);
        for held in &held {
            held.says("Software caused connection abort");
        }
        taken
    });
    // Two sockets and their flows, and the other two flows.
    eventually("all of them are counted", || {
        denials(&one, "egress", "revoked") >= rounds * 6.0
    });
    one.wait_for_log(&["connection refused", "icmp", "revoked"]);
    assert!(neighbour.process.ended().is_none());
    let to = host.port4(PORT).to_string();
    let error = pair.client.peer(["udp-send", &to]).fails();
    assert!(error.contains("Operation not permitted"), "{error}");
}

#[test]
fn connections_from_before_the_daemon_are_judged_when_it_starts() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let _servers = [
        serve(&stranger, PORT, &[]),
        serve(&stranger, STAYS, &[]),
        serve(&pair.client, PORT, &[]),
    ];
    let ip = stranger.addresses().v4;
    let mut held = [
        Held::tcp(&pair.client, ip),
        Held::tcp(&stranger, pair.client.addresses().v4),
        Held::tcp(&pair.client, stranger.addresses().v6),
    ];
    let mut neighbour = Neighbour::new(&pair.client, ip);
    let mut quiet = Held::to(&pair.client, ip, STAYS, &[]);
    let policy = of(&pair.client).calls_address(ip, tcp(STAYS));
    let one = pair.at_one().policy(&policy.text()).start();
    last_of(&mut held, now());
    neighbour.goes_on();
    assert!(quiet.process.ended().is_none());
    let revoked = denials(&one, "egress", "revoked") + denials(&one, "ingress", "revoked");
    assert_eq!(revoked, 3.0);
}

#[test]
fn a_label_that_changes_ends_what_it_allowed() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let policy = json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": "by-label"},
        "spec": {
            "workloads": {"matchLabels": {"tier": "front"}},
            "egress": [{
                "to": [{"cidr": stranger.addresses().v4.to_string()}],
                "ports": [{"protocol": "TCP", "port": PORT}],
            }],
        },
    });
    let stays = of(&pair.client).calls_address(stranger.addresses().v4, tcp(STAYS));
    let label = |tier: &str| json!({"labels": {"tier": tier}});
    let other = pair.one.pod("other");
    let one = pair
        .one
        .reeve()
        .enrol_with(&pair.client, label("front"))
        .enrol_with(&other, label("front"))
        .policy(&policy.to_string())
        .policy(&stays.text())
        .start();
    let _servers = [serve(&stranger, PORT, &[]), serve(&stranger, STAYS, &[])];
    let mut neighbours = [
        Neighbour::new(&pair.client, stranger.addresses().v4),
        Neighbour {
            process: heartbeat(&other, stranger.addresses().v4, PORT),
        },
    ];
    in_time("a label", || {
        reconfigure(&one, |settings| {
            settings["workloads"][0]["labels"] = label("front")["labels"].clone()
        });
        let mut held = [Held::tcp(&pair.client, stranger.addresses().v4)];
        let since = now();
        reconfigure(&one, |settings| {
            settings["workloads"][0]["labels"] = label("back")["labels"].clone()
        });
        last_of(&mut held, since)
    });
    for neighbour in &mut neighbours {
        neighbour.goes_on();
    }
}

#[test]
fn a_peer_that_is_now_somebody_else_loses_what_was_opened_to_the_one_before() {
    let pair = Pair::new();
    // Whoever it is, the policy allows it.
    let anybody = json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": "anybody"},
        "spec": {"workloads": {}, "egress": [{}]},
    });
    let one = pair.at_one().policy(&anybody.to_string()).start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &[]);
    let mut held = Held::tcp(&pair.client, pair.server.addresses().v4);
    reconfigure(&one, |settings| {
        settings["peers"][0]["serviceAccount"] = json!("somebody-else")
    });
    held.ended_at();
    let labels = [
        ("direction", "egress"),
        ("transport", "tunnel"),
        ("reason", "revoked"),
    ];
    one.wait_for_metric("reeve_connections_closed_total", &labels, 1.0);
}

#[test]
fn who_is_enrolled_later_is_judged_then_and_who_is_released_is_left_alone() {
    let pair = Pair::new();
    let stranger = pair.two.pod("stranger");
    let late = pair.one.pod("late");
    let one = pair.at_one().enrol(&late).start();
    let with_late = fs::read_to_string(one.config()).unwrap();
    let _server = serve(&stranger, PORT, &[]);
    let leave = |settings: &mut Value| {
        settings["workloads"].as_array_mut().unwrap().pop();
    };
    in_time("an enrolment", || {
        reconfigure(&one, leave);
        let mut held = [Held::tcp(&late, stranger.addresses().v4)];
        let since = now();
        replace(one.config(), &with_late);
        one.signal(Signal::SIGHUP);
        last_of(&mut held, since)
    });
    // Released again, it may do what it likes, and goes on with it.
    reconfigure(&one, leave);
    let mut free = Held::tcp(&late, stranger.addresses().v4);
    let mut neighbour = Neighbour {
        process: heartbeat(&late, stranger.addresses().v4, PORT),
    };
    reconfigure(&one, |settings| {
        settings["workloads"][0]["labels"] = json!({"x": "y"})
    });
    neighbour.goes_on();
    assert!(free.process.ended().is_none());
}

/// A silent connection.
struct Held {
    process: Process,
}

impl Held {
    /// To [`PORT`] at an address, as soon as it is allowed.
    fn tcp(from: &Place, ip: impl Into<IpAddr>) -> Self {
        Self::to(from, ip, PORT, &[])
    }

    fn udp(from: &Place, ip: impl Into<IpAddr>, port: u16) -> Self {
        Self::to(from, ip, port, &["--udp"])
    }

    fn to(from: &Place, ip: impl Into<IpAddr>, port: u16, options: &[&str]) -> Self {
        let address = std::net::SocketAddr::new(ip.into(), port).to_string();
        let mut found = None;
        eventually(&format!("{address} can be connected to"), || {
            let mut process = from.spawn_peer([&["hold", &address], options].concat());
            eventually("it holds a connection or has failed", || {
                process.stdout().contains("holding") || process.ended().is_some()
            });
            let holds = process.stdout().contains("holding");
            found = holds.then_some(process);
            holds
        });
        Self {
            process: found.unwrap(),
        }
    }

    /// Milliseconds of the wall clock at which it ended.
    fn ended_at(&mut self) -> u128 {
        self.process.wait_for("ended at");
        let said = self.process.stdout();
        let time = said.split("ended at ").nth(1).unwrap();
        time.split(':').next().unwrap().parse().unwrap()
    }

    #[track_caller]
    fn says(&self, how: &str) {
        let said = self.process.stdout();
        assert!(said.contains(how), "{said}");
    }
}

/// A busy connection that stays allowed.
struct Neighbour {
    process: Process,
}

impl Neighbour {
    fn new(from: &Place, ip: impl Into<IpAddr>) -> Self {
        Self {
            process: heartbeat(from, ip, STAYS),
        }
    }

    fn of_each(from: &Place, to: &Workload) -> Vec<Self> {
        let ips = to.addresses().both();
        ips.into_iter().map(|ip| Self::new(from, ip)).collect()
    }

    /// Waits for some more beats, and for no error.
    #[track_caller]
    fn goes_on(&mut self) {
        let beats = |process: &Process| process.stdout().lines().count();
        let before = beats(&self.process);
        eventually("the neighbour's connection goes on", || {
            assert!(self.process.ended().is_none(), "{}", self.process.stderr());
            beats(&self.process) >= before + 3
        });
    }
}

fn heartbeat(from: &Place, ip: impl Into<IpAddr>, port: u16) -> Process {
    let address = std::net::SocketAddr::new(ip.into(), port).to_string();
    let mut found = None;
    eventually(&format!("{address} can be connected to"), || {
        let mut process = from.spawn_peer(["heartbeat", &address]);
        eventually("it beats or has failed", || {
            process.stdout().contains("beat 2") || process.ended().is_some()
        });
        let beats = process.stdout().contains("beat 2");
        found = beats.then_some(process);
        beats
    });
    found.unwrap()
}

/// Puts another policy in the place of the daemon's first.
fn rewrite(daemon: &Daemon, policy: &Policy) {
    replace(&daemon.policies().join("0.yaml"), &policy.text());
}

/// Puts a file in the place of another at once: whoever reads sees the one or the other, and
/// never an empty one, which would allow nothing.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, file).unwrap();
}

/// Changes the configuration, and has it read.
fn reconfigure(daemon: &Daemon, change: impl Fn(&mut Value)) {
    let text = fs::read_to_string(daemon.config()).unwrap();
    let mut settings = serde_json::from_str(&text).unwrap();
    change(&mut settings);
    replace(daemon.config(), &settings.to_string());
    daemon.signal(Signal::SIGHUP);
}

fn now() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_millis()
}

/// From a moment to the end of the last of these.
fn last_of(held: &mut [Held], since: u128) -> Duration {
    let last = held.iter_mut().map(Held::ended_at).max().unwrap();
    let taken = last.saturating_sub(since);
    Duration::from_millis(taken.try_into().unwrap())
}

/// Measures until it is within [`BOUND`], and says what was measured.
#[track_caller]
fn in_time(what: impl fmt::Display, mut round: impl FnMut() -> Duration) {
    let mut taken = Vec::new();
    for _ in 0..ATTEMPTS {
        taken.push(round());
        println!(
            "{what}: {:?} from the change to the end",
            taken.last().unwrap()
        );
        if taken.last().is_some_and(|last| *last <= BOUND) {
            return;
        }
    }
    panic!("{what}: {taken:?}, more than {BOUND:?}");
}
