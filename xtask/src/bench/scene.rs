//! What is measured on: two nodes with a daemon and a workload each.

use std::{fs, sync::Arc};

use harness::{Cgroup, Daemon, Netns, Network, Nginx, Node, Place, Process, Workload};

/// Both ends may talk to each other on every port.
const POLICY: &str = include_str!("policy.yaml");

/// What nginx answers with: as small as a health check's answer.
const PAGE: &str = "ok";

/// The way that bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// TCP as it is, between workloads that no daemon knows.
    Plain,
    /// Through both daemons.
    Tunnel,
}

/// The programs at one end of each way, and their ports.
pub(crate) struct Scene {
    pub(crate) client_daemon: Daemon,
    pub(crate) server_daemon: Daemon,
    client: Workload,
    server: Workload,
    plain_client: Workload,
    plain_server: Workload,
    _servers: Vec<Process>,
    _nginx: [Nginx; 2],
    /// Where no daemon is, to see what the programs on a cgroup cost who is not enrolled.
    pub(crate) bystanders: Bystanders,
    _nodes: [Node; 3],
    _network: Network,
}

/// Two places in one network namespace, neither enrolled.
pub(crate) struct Bystanders {
    /// Below the cgroup that the programs are attached to.
    pub(crate) hooked: Place,
    /// Elsewhere.
    pub(crate) free: Place,
    _servers: Vec<Process>,
}

/// Ports of the servers of one way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// iperf3.
    pub(crate) bulk: u16,
    /// `peer serve --mode answer`.
    pub(crate) answer: u16,
    /// `peer serve`.
    pub(crate) echo: u16,
    /// nginx.
    pub(crate) web: u16,
}

impl Way {
    /// Name in the result.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Tunnel => "tunnel",
        }
    }

    fn ports(self) -> Ports {
        let base = match self {
            Self::Plain => 5000,
            Self::Tunnel => 6000,
        };
        Ports {
            bulk: base,
            answer: base + 1,
            echo: base + 2,
            web: base + 3,
        }
    }
}

impl Scene {
    pub(crate) fn set() -> Self {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (one.pod("client"), two.pod("server"));
        let info = serde_json::json!("info");
        let client_daemon = one
            .reeve()
            .set("/log/level", info.clone())
            .enrol(&client)
            .peer(&server)
            .policy(POLICY)
            .start();
        let server_daemon = two
            .reeve()
            .set("/log/level", info)
            .enrol(&server)
            .peer(&client)
            .policy(POLICY)
            .start();

        let nowhere = Node::new(&network, "nowhere");
        let (plain_client, plain_server) = (nowhere.pod("client"), nowhere.pod("server"));
        for place in [&*client, &*server, &*plain_client, &*plain_server] {
            many_connections(place);
        }
        let mut servers = Vec::new();
        let mut start = |place: &Place, way: Way| {
            servers.extend(serve(place, way.ports()));
            Nginx::start_without_log(place, way.ports().web, PAGE)
        };
        let nginx = [
            start(&plain_server, Way::Plain),
            start(&server, Way::Tunnel),
        ];
        let bystanders = Bystanders::on(&one);
        Self {
            client_daemon,
            server_daemon,
            client,
            server,
            plain_client,
            plain_server,
            _servers: servers,
            _nginx: nginx,
            bystanders,
            _nodes: [one, two, nowhere],
            _network: network,
        }
    }

    /// Where the clients of a way run.
    pub(crate) fn client(&self, way: Way) -> &Place {
        match way {
            Way::Plain => &self.plain_client,
            Way::Tunnel => &self.client,
        }
    }

    /// The server's address, and the ports of a way.
    pub(crate) fn server(&self, way: Way) -> (String, Ports) {
        let server = match way {
            Way::Plain => &self.plain_server,
            Way::Tunnel => &self.server,
        };
        (server.addresses().v4.to_string(), way.ports())
    }

    /// Both daemons, named.
    pub(crate) fn daemons(&self) -> [(&'static str, &Daemon); 2] {
        [
            ("client", &self.client_daemon),
            ("server", &self.server_daemon),
        ]
    }
}

impl Bystanders {
    fn on(node: &Node) -> Self {
        let netns = Arc::new(Netns::new());
        let hooked = Place::new(
            Some(Arc::clone(&netns)),
            Arc::new(node.cgroup().child("bystander")),
        );
        let free = Place::new(Some(netns), Arc::new(Cgroup::outside("bystander")));
        hooked.exec(["ip", "link", "set", "lo", "up"]).ok();
        many_connections(&hooked);
        let servers = [(&hooked, Way::Tunnel), (&free, Way::Plain)]
            .into_iter()
            .flat_map(|(place, way)| serve(place, way.ports()))
            .collect();
        Self {
            hooked,
            free,
            _servers: servers,
        }
    }

    /// The places with the names of their measurements, and the ports of the servers in the same
    /// place.
    pub(crate) fn each(&self) -> [(&'static str, &Place, Ports); 2] {
        [
            ("with", &self.hooked, Way::Tunnel.ports()),
            ("without", &self.free, Way::Plain.ports()),
        ]
    }
}

/// Starts servers, nginx excepted.
fn serve(place: &Place, ports: Ports) -> Vec<Process> {
    let port = |port: u16| format!("0.0.0.0:{port}");
    let mut servers = vec![
        place.spawn_peer(["serve", "--mode", "answer", &port(ports.answer)]),
        place.spawn_peer(["serve", &port(ports.echo)]),
    ];
    for server in &mut servers {
        server.wait_for("listening");
    }
    let mut bulk = place.spawn([
        "iperf3",
        "--server",
        "--forceflush",
        "--port",
        &ports.bulk.to_string(),
    ]);
    bulk.wait_for("listening");
    servers.push(bulk);
    servers
}

/// Lets a namespace open connections as fast as it can: a port that has just been used may be
/// used again, and there are many.
fn many_connections(place: &Place) {
    for (name, value) in [
        ("ipv4/tcp_tw_reuse", "1"),
        ("ipv4/ip_local_port_range", "16384 65535"),
        ("core/somaxconn", "4096"),
    ] {
        place.sysctl(name, value);
    }
}

/// Processor time of a process and of the threads in it until now, in seconds.
pub(crate) fn processor_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields: Vec<_> = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').collect())
        .unwrap_or_default();
    // Fields 14 and 15 of the whole line, in ticks.
    ticks(fields.get(11..13).unwrap_or_default())
}

fn ticks(fields: &[&str]) -> f64 {
    /// `USER_HZ`, the same on every machine that reeve runs on.
    const PER_SECOND: f64 = 100.0;
    fields
        .iter()
        .filter_map(|field| field.parse::<f64>().ok())
        .sum::<f64>()
        / PER_SECOND
}
