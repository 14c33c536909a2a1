//! Kubernetes' NetworkPolicy between pods on two nodes, with real sockets: for each policy, who
//! reaches whom. Every case is in the daemon's own tests of policies; here is a part of each kind.

use std::{cell::RefCell, fs, net::SocketAddr, sync::Arc};

use harness::{Cgroup, Daemon, Network, Node, Place, Process, Workload, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::arrange::{is_denied, say, send, serve};

/// Ports of TCP, and of UDP.
const TCP_PORTS: [u16; 2] = [80, 81];
const UDP_PORT: u16 = 80;

/// A pod: namespace, own name, and the node that it is on.
const PODS: [(&str, &str, usize); 4] = [("x", "a", 0), ("x", "b", 1), ("y", "a", 1), ("z", "b", 0)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    Tcp(u16),
    Udp,
}

/// From pod, to pod, where.
type Call = (usize, usize, Port);

struct Cluster {
    pods: Vec<Workload>,
    daemons: [Daemon; 2],
    stranger: Workload,
    nodes: [Node; 2],
    _servers: Vec<Process>,
    _network: Network,
}

impl Cluster {
    fn start() -> Self {
        let network = Network::new();
        let nodes = ["one", "two"].map(|name| Node::new(&network, name));
        let pods: Vec<_> = PODS
            .iter()
            .map(|(namespace, name, node)| nodes[*node].pod(&format!("{namespace}-{name}")))
            .collect();
        let settings = |pod: usize| {
            let (namespace, name, _) = PODS[pod];
            let web = if name == "a" { 80 } else { 81 };
            let labels = json!({"pod": name});
            json!({"namespace": namespace, "labels": labels, "namedPorts": {"web": web}})
        };
        let daemons = [0, 1].map(|own| {
            let mut reeve = nodes[own]
                .reeve()
                .set("/policies/unselected", json!("allow"))
                .set(
                    "/namespaces",
                    json!([{"name": "x", "labels": {"team": "one"}}]),
                );
            for (number, (.., node)) in PODS.iter().enumerate() {
                let mut settings = settings(number);
                if *node == own {
                    reeve = reeve.enrol_with(&pods[number], settings);
                } else {
                    settings["tunnel"] = json!(true);
                    reeve = reeve.peer_with(&pods[number], settings);
                }
            }
            reeve.start()
        });
        let mut servers = Vec::new();
        for pod in &pods {
            servers.extend(TCP_PORTS.map(|port| serve(pod, port, &[])));
            let mut datagrams = pod.spawn_peer(["udp-serve", &format!("[::]:{UDP_PORT}")]);
            datagrams.wait_for("listening");
            servers.push(datagrams);
        }
        Self {
            stranger: nodes[0].pod("stranger"),
            pods,
            daemons,
            nodes,
            _servers: servers,
            _network: network,
        }
    }

    /// Puts policies in force and compares every connection with what is expected of it.
    #[track_caller]
    fn expect(&self, what: &str, policies: &[&str], expected: impl Fn(Call) -> bool) {
        let text: String = policies.iter().enumerate().map(document).collect();
        for daemon in &self.daemons {
            let folder = daemon.policies();
            fs::write(folder.join(".new"), &text).unwrap();
            fs::rename(folder.join(".new"), folder.join("policies.yaml")).unwrap();
        }
        let wrong = RefCell::new(Vec::new());
        eventually_or(
            || {
                let all = calls().filter(|call| self.reaches(*call) != expected(*call));
                *wrong.borrow_mut() = all.collect();
                wrong.borrow().is_empty()
            },
            || format!("{what}: {:?}", wrong.borrow()),
        );
    }

    fn reaches(&self, (from, to, port): Call) -> bool {
        let there = self.pods[to].addresses();
        match port {
            // The families take turns.
            Port::Tcp(80) => answers(&self.pods[from], there.port4(80)),
            Port::Tcp(port) => answers(&self.pods[from], there.port6(port)),
            Port::Udp => {
                let to = there.port4(UDP_PORT).to_string();
                let sent = self.pods[from].peer(["udp-send", &to, "--patience", "150"]);
                sent.status.success()
            }
        }
    }
}

fn answers(place: &Place, to: SocketAddr) -> bool {
    let sent = send(place, to, &["--text", "may I", "--patience", "5"]);
    sent.status.success()
}

/// As [`eventually`], with something to say at the end.
#[track_caller]
fn eventually_or(so: impl Fn() -> bool, otherwise: impl Fn() -> String) {
    let deadline = std::time::Instant::now() + harness::SOON;
    while !so() {
        assert!(std::time::Instant::now() < deadline, "{}", otherwise());
    }
}

fn calls() -> impl Iterator<Item = Call> {
    let pods = 0..PODS.len();
    let pairs = pods
        .clone()
        .flat_map(move |from| pods.clone().map(move |to| (from, to)));
    let ports = [Port::Tcp(80), Port::Tcp(81), Port::Udp];
    let pairs = pairs.filter(|(from, to)| from != to);
    pairs.flat_map(move |(from, to)| ports.map(|port| (from, to, port)))
}

/// `namespace {spec}` as a document.
fn document((number, policy): (usize, &&str)) -> String {
    let (namespace, spec) = policy.split_once(' ').unwrap();
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p{number}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn namespace(pod: usize) -> &'static str {
    PODS[pod].0
}

#[test]
fn who_reaches_whom_is_what_the_policies_say() {
    let cluster = Cluster::start();
    cluster.expect("without policies all is open", &[], |_| true);
    cluster.expect(
        "ingress is closed for the selected pods only",
        &["x {podSelector: {}}"],
        |(_, to, _)| namespace(to) != "x",
    );
    // What holds whatever the policies say: the node, the pod itself; and no stranger.
    let closed = cluster.pods[0].addresses();
    say(cluster.nodes[0].host(), closed.port4(80), "a probe");
    say(cluster.nodes[0].host(), closed.port6(80), "a probe by IPv6");
    say(&cluster.pods[0], closed.port4(80), "to myself");
    say(&cluster.pods[0], closed.port6(81), "to myself");
    assert!(!answers(&cluster.stranger, closed.port4(80)));
    cluster.expect(
        "egress is closed, and replies to what comes in pass",
        &["x {podSelector: {}, policyTypes: [Egress]}"],
        |(from, ..)| namespace(from) != "x",
    );
    cluster.expect(
        "rules of UDP close TCP too",
        &["x {podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: UDP, port: 80}]}]}"],
        |(_, to, port)| to != 0 || port == Port::Udp,
    );
    cluster.expect(
        "both selectors is AND, two items are OR, and policies add up",
        &[
            "x {podSelector: {}}",
            "x {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}, podSelector: {matchLabels: {pod: a}}}, {podSelector: {}}]}]}",
            "x {podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}}], ports: [{port: 80}]}]}",
        ],
        |(from, to, port)| match to {
            0 => [1, 2].contains(&from),
            1 => namespace(from) != "x" && port == Port::Tcp(80),
            _ => true,
        },
    );
    cluster.expect(
        "a named port is each destination's own",
        &["z {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: web}]}]}"],
        |(from, to, port)| {
            let web = if PODS[to].1 == "a" { 80 } else { 81 };
            namespace(from) != "z" || port == Port::Tcp(web)
        },
    );
    let [a, b] = [0, 1].map(|pod: usize| cluster.pods[pod].addresses());
    let block = format!(
        "y {{podSelector: {{}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: 10.77.0.0/16, except: [{}/32]}}}}, {{ipBlock: {{cidr: {}/128}}}}], ports: [{{port: 80, endPort: 81}}]}}]}}",
        a.v4, b.v6
    );
    cluster.expect(
        "a block means pods by address, and its exception narrows only it",
        &[&block],
        |(from, to, port)| match (from, port) {
            (2, Port::Tcp(80)) => to != 0,
            (2, Port::Tcp(_)) => to == 1,
            (2, Port::Udp) => false,
            _ => true,
        },
    );
    cluster.expect("deleted policies give back what they took", &[], |_| true);
}

#[test]
fn established_connections_are_judged_again() {
    let cluster = Cluster::start();
    // In a tunnel from node to node, and within one node; silent and busy.
    let calls = [(2, 1), (0, 3)];
    let connect = |(from, to): (usize, usize)| {
        let to = cluster.pods[to].addresses().port4(80).to_string();
        ["heartbeat", "hold"].map(|how| {
            let mut connection = cluster.pods[from].spawn_peer([how, &to]);
            connection.wait_for(if how == "hold" { "holding" } else { "beat 2" });
            connection
        })
    };
    let mut standing = calls.map(connect);
    cluster.expect(
        "ingress of one pod is closed",
        &["x {podSelector: {matchLabels: {pod: b}}}"],
        |(_, to, _)| to != 1,
    );
    for connection in &mut standing[0] {
        eventually("what is no longer allowed ends", || {
            connection.ended().is_some() || connection.stdout().contains("ended at")
        });
    }
    for connection in &mut standing[1] {
        assert!(connection.ended().is_none());
        assert!(!connection.stdout().contains("ended at"));
    }
    cluster.expect(
        "egress of another is closed",
        &["x {podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}"],
        |(from, ..)| from != 0,
    );
    for connection in &mut standing[1] {
        eventually("what is no longer allowed ends", || {
            connection.ended().is_some() || connection.stdout().contains("ended at")
        });
    }
}

#[test]
fn a_pod_in_the_hosts_network_is_isolated_alone_and_known_by_its_certificate() {
    let network = Network::new();
    let [one, two] = ["one", "two"].map(|name| Node::new(&network, name));
    let (agent, proxy) = (one.service("agent"), one.service("proxy"));
    let pod = two.pod("pod");
    let from_agent = document((
        0,
        &"default {podSelector: {matchLabels: {app: pod}}, ingress: [{from: [{podSelector: {matchLabels: {app: agent}}}]}]}",
    ));
    let isolated = document((1, &"default {podSelector: {matchLabels: {app: agent}}}"));
    let policies = from_agent + &isolated;
    let open = json!("allow");
    let at_one = one
        .reeve()
        .set("/policies/unselected", open.clone())
        .enrol_with(&agent, json!({"ports": [80]}))
        .enrol_with(&proxy, json!({"ports": [81]}))
        .peer(&pod)
        .policy(&policies)
        .start();
    let _at_two = two
        .reeve()
        .set("/policies/unselected", open)
        .enrol(&pod)
        .peer_with(&agent, json!({"ports": [80], "tunnel": true}))
        .peer_with(&proxy, json!({"ports": [81], "tunnel": true}))
        .policy(&policies)
        .start();
    let _servers = [
        serve(&pod, 80, &[]),
        serve(&agent, 80, &[]),
        serve(&proxy, 81, &[]),
    ];
    // By the same address, and each with its own certificate.
    let there = pod.addresses();
    say(&agent, there.port4(80), "the one that is meant");
    for to in [there.port4(80), there.port6(80)] {
        assert!(!answers(&proxy, to), "another of the same address");
        assert!(!answers(one.host(), to), "the host itself");
    }
    let here = one.addresses();
    assert!(!answers(&pod, here.port4(80)), "its own ingress is closed");
    say(&pod, here.port4(81), "and nobody else's");
    drop(at_one);
}

#[test]
fn a_pod_is_isolated_from_its_first_container_on_before_anybody_has_seen_it() {
    let network = Network::new();
    let node = Node::new(&network, "one");
    // The pod's network is there before the first of its processes.
    let (other, sandbox) = (node.pod("other"), node.pod("sandbox"));
    let pods = node.cgroup().child("pods");
    let place = format!("{}/web", pods.below_mount());
    let allow = format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web}}\nspec: {{podSelector: {{matchLabels: {{app: web}}}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: {}/32}}}}], ports: [{{port: 80}}]}}]}}\n",
        other.addresses().v4
    );
    let _servers = [serve(&other, 80, &[])];
    let daemon = node
        .reeve()
        .set("/policies/unselected", json!("allow"))
        .set("/enforcedParents", json!([pods.below_mount()]))
        .set(
            "/workloads/0",
            json!({"name": "web", "namespace": "default", "labels": {"app": "web"}, "cgroup": place}),
        )
        .policy(&allow)
        .start();
    // Its first process is an init container's, and the daemon cannot have seen it.
    daemon.signal(Signal::SIGSTOP);
    let pod = Cgroup::at(&pods.path().join("web"));
    let init = sandbox.with_cgroup(Arc::new(pod.child("init")));
    let there = other.addresses();
    let denied = [there.port6(80), there.port4(81)];
    for to in denied {
        is_denied(&init, to);
    }
    // The kernel enrols it by its place.
    assert!(answers(&init, there.port4(80)), "what its policy says");
    daemon.signal(Signal::SIGCONT);
    daemon.command(["reload"]).ok();
    assert!(answers(&init, there.port4(80)));
    for to in denied {
        is_denied(&init, to);
    }
    drop(daemon);
}

#[test]
fn a_pod_that_no_policy_selects_is_closed_unless_that_is_set() {
    let network = Network::new();
    let node = Node::new(&network, "one");
    let (pod, other) = (node.pod("pod"), node.pod("other"));
    let mut daemon = node.reeve().enrol(&pod).start();
    let _servers = [serve(&pod, 80, &[]), serve(&other, 80, &[])];
    assert!(!answers(&pod, other.addresses().port4(80)));
    assert!(!answers(&other, pod.addresses().port4(80)));
    let text = fs::read_to_string(daemon.config()).unwrap();
    let mut settings: serde_json::Value = serde_json::from_str(&text).unwrap();
    settings["policies"]["unselected"] = json!("allow");
    fs::write(daemon.config(), settings.to_string()).unwrap();
    daemon.signal(Signal::SIGHUP);
    eventually("egress is open", || {
        answers(&pod, other.addresses().port4(80))
    });
    eventually("ingress is open", || {
        answers(&other, pod.addresses().port6(80))
    });
    assert!(daemon.ended().is_none());
}
