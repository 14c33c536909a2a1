//! What several files of tests start from: a client and a server, policies for them, and the
//! words in which tests say what they do.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use harness::{Daemon, Network, Node, Output, Place, Process, Reeve, Workload, eventually};
use serde_json::{Value, json};

/// What a refusal may take: far less than any time-out, and enough for a busy machine to start a
/// program.
pub(crate) const FAST: Duration = Duration::from_secs(5);

/// Trust domain of every node, where a test says nothing else.
pub(crate) const TRUST_DOMAIN: &str = "example.org";

/// The port that most tests talk to.
pub(crate) const PORT: u16 = 8080;

/// A client on one node and a server on another.
pub(crate) struct Pair {
    pub(crate) client: Workload,
    pub(crate) server: Workload,
    pub(crate) one: Node,
    pub(crate) two: Node,
    pub(crate) network: Network,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        Self {
            client: one.pod("client"),
            server: two.pod("server"),
            one,
            two,
            network,
        }
    }

    /// With both daemons running, by whose policies the client may call the server's TCP port
    /// [`PORT`].
    pub(crate) fn started() -> (Self, Daemon, Daemon) {
        let pair = Self::new();
        let (one, two) = (
            pair.allowing_at_one().start(),
            pair.allowing_at_two().start(),
        );
        (pair, one, two)
    }

    /// Settings of the client's node, without a policy.
    pub(crate) fn at_one(&self) -> Reeve<'_> {
        self.one.reeve().enrol(&self.client).peer(&self.server)
    }

    /// Settings of the server's node, without a policy.
    pub(crate) fn at_two(&self) -> Reeve<'_> {
        self.two.reeve().enrol(&self.server).peer(&self.client)
    }

    /// Settings of the client's node, with leave to call the server.
    pub(crate) fn allowing_at_one(&self) -> Reeve<'_> {
        self.at_one()
            .policy(&of(&self.client).calls(&self.server, TCP).text())
    }

    /// Settings of the server's node, with leave for the client to call.
    pub(crate) fn allowing_at_two(&self) -> Reeve<'_> {
        self.at_two()
            .policy(&of(&self.server).hears(&self.client, TCP).text())
    }
}

/// Protocol and port of one rule.
#[derive(Clone, Copy)]
pub(crate) struct Traffic {
    protocol: &'static str,
    port: Option<u16>,
}

/// TCP to [`PORT`].
pub(crate) const TCP: Traffic = tcp(PORT);
/// UDP to [`PORT`].
pub(crate) const UDP: Traffic = udp(PORT);
/// ICMP.
pub(crate) const ICMP: Traffic = Traffic {
    protocol: "ICMP",
    port: None,
};

/// TCP to a port.
pub(crate) const fn tcp(port: u16) -> Traffic {
    Traffic {
        protocol: "TCP",
        port: Some(port),
    }
}

/// UDP to a port.
pub(crate) const fn udp(port: u16) -> Traffic {
    Traffic {
        protocol: "UDP",
        port: Some(port),
    }
}

/// A policy of one workload.
pub(crate) struct Policy {
    subject: String,
    egress: Vec<Value>,
    ingress: Vec<Value>,
}

/// A policy of this workload, which allows nothing yet.
pub(crate) fn of(workload: &Workload) -> Policy {
    Policy {
        subject: workload.name().to_owned(),
        egress: Vec::new(),
        ingress: Vec::new(),
    }
}

impl Policy {
    /// May call a workload.
    pub(crate) fn calls(mut self, other: &Workload, traffic: Traffic) -> Self {
        self.egress.push(rule("to", known(other), traffic));
        self
    }

    /// May be called by a workload.
    pub(crate) fn hears(mut self, other: &Workload, traffic: Traffic) -> Self {
        self.ingress.push(rule("from", known(other), traffic));
        self
    }

    /// May call what is at this address, whoever it is.
    pub(crate) fn calls_address(mut self, address: impl Into<IpAddr>, traffic: Traffic) -> Self {
        self.egress.push(rule("to", at(address.into()), traffic));
        self
    }

    /// May be called by what is at this address, whoever it is.
    pub(crate) fn hears_address(mut self, address: impl Into<IpAddr>, traffic: Traffic) -> Self {
        self.ingress.push(rule("from", at(address.into()), traffic));
        self
    }

    /// The document.
    pub(crate) fn text(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let document = json!({
            "apiVersion": "reeve.dev/v1alpha1",
            "kind": "ConnectionPolicy",
            "metadata": {"name": format!("of-{}", self.subject)},
            "spec": {
                "workloads": {"names": [self.subject]},
                "egress": self.egress,
                "ingress": self.ingress,
            },
        });
        document.fmt(f)
    }
}

fn known(workload: &Workload) -> Value {
    json!({"identity": workload.spiffe_id(TRUST_DOMAIN)})
}

fn at(address: IpAddr) -> Value {
    json!({"cidr": address.to_string()})
}

fn rule(end: &str, who: Value, traffic: Traffic) -> Value {
    let mut ports = json!({"protocol": traffic.protocol});
    if let Some(port) = traffic.port {
        ports["port"] = port.into();
    }
    json!({end: [who], "ports": [ports]})
}

/// Starts a TCP server on every address, with further options of `peer serve`.
pub(crate) fn serve(place: &Place, port: u16, options: &[&str]) -> Process {
    let address = format!("[::]:{port}");
    let mut server = place.spawn_peer([&["serve", &address], options].concat());
    server.wait_for("listening");
    server
}

/// Starts a TCP client, with further options of `peer send`.
pub(crate) fn start_sending(place: &Place, to: impl fmt::Display, options: &[&str]) -> Process {
    place.spawn_peer([&["send", &to.to_string()], options].concat())
}

/// Runs a TCP client, with further options of `peer send`.
pub(crate) fn send(place: &Place, to: impl fmt::Display, options: &[&str]) -> Output {
    place.peer([&["send", &to.to_string()], options].concat())
}

/// Sends a text to an echo server, and checks that it comes back from there.
#[track_caller]
pub(crate) fn say(place: &Place, to: impl fmt::Display, text: &str) -> Value {
    let seen = send(place, &to, &["--text", text]).json();
    assert_eq!(seen["received"]["head"], text);
    assert_eq!(
        seen["remote"],
        to.to_string(),
        "where it seems to be connected to"
    );
    seen
}

/// Whether an echo server answers.
pub(crate) fn answers(place: &Place, to: impl fmt::Display) -> bool {
    send(place, to, &["--text", "may I"]).status.success()
}

/// Fails the test unless the connection is refused to the caller at once.
#[track_caller]
pub(crate) fn is_denied(place: &Place, to: impl fmt::Display) {
    fails_fast(place, to, "Operation not permitted");
}

/// Fails the test unless the connection fails at once, and with these words.
#[track_caller]
pub(crate) fn fails_fast(place: &Place, to: impl fmt::Display, how: &str) {
    let error = quickly(|| send(place, &to, &["--text", "let me in"]).fails());
    assert!(error.contains(how), "{to}: {error}");
}

/// Does something that must not take long.
#[track_caller]
pub(crate) fn quickly<T>(work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = work();
    let taken = started.elapsed();
    assert!(taken < FAST, "it took {taken:?}");
    done
}

/// An IPv4 address and port in IPv6's notation.
pub(crate) fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

/// The number of denials of a direction for a reason, of kernel and tunnel.
pub(crate) fn denials(daemon: &Daemon, direction: &str, reason: &str) -> f64 {
    let labels = [
        ("direction", direction),
        ("verdict", "deny"),
        ("reason", reason),
    ];
    daemon.metrics().sum("reeve_verdicts_total", &labels)
}

/// What became of connections that are opened one after another.
pub(crate) struct Probe(Process);

impl Probe {
    /// Starts opening connections to a server of mode `answer`, with further options of
    /// `peer probe`.
    pub(crate) fn start(place: &Place, to: impl fmt::Display, options: &[&str]) -> Self {
        let mut probe = place.spawn_peer([&["probe", &to.to_string()], options].concat());
        probe.wait_for("}\n");
        Self(probe)
    }

    /// The sums until now.
    pub(crate) fn seen(&self) -> Value {
        let printed = self.0.stdout();
        let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let last = whole.lines().last().expect("it has printed something");
        serde_json::from_str(last).unwrap()
    }

    /// Connections that worked.
    pub(crate) fn worked(&self) -> u64 {
        self.seen()["worked"].as_u64().unwrap()
    }

    /// Connections that failed, by what was said of them.
    pub(crate) fn failed(&self) -> serde_json::Map<String, Value> {
        self.seen()["failed"].as_object().unwrap().clone()
    }

    /// Waits until this many more have been tried than now.
    #[track_caller]
    pub(crate) fn goes_on(&self, more: u64) {
        let tried = |probe: &Self| {
            let failed = probe.failed();
            let failed = failed.values().filter_map(Value::as_u64);
            probe.worked() + failed.sum::<u64>()
        };
        let now = tried(self);
        eventually("connections are tried", || tried(self) >= now + more);
    }

    /// Fails the test unless every connection worked, and there were some.
    #[track_caller]
    pub(crate) fn all_worked(&self) {
        let seen = self.seen();
        assert!(self.failed().is_empty() && self.worked() > 100, "{seen}");
    }

    /// Fails the test unless every connection failed with these words, and there were some.
    #[track_caller]
    pub(crate) fn all_failed(&self, how: &str) {
        let (seen, failed) = (self.seen(), self.failed());
        assert_eq!(self.worked(), 0, "{seen}");
        assert!(!failed.is_empty(), "{seen}");
        assert!(failed.keys().all(|error| error.contains(how)), "{seen}");
    }
}
