//! One live daemon, and the test itself where the other daemon would be: a client or a server of
//! tunnels that does what no daemon would do.

use std::net::SocketAddr;

use harness::{
    Daemon, Network, Node, Output, Process, Reeve, SOON, Workload,
    certs::{Authority, Issued},
    hbone::{Client, Conduct, PORT, Server},
};

/// Port of the application.
pub(crate) const APP: u16 = 8080;

/// The identity of whoever may call the server.
pub(crate) const CLIENT: &str = "spiffe://example.org/ns/default/sa/client";
/// The identity of the server that a client expects.
pub(crate) const SERVER: &str = "spiffe://example.org/ns/default/sa/server";

/// A daemon that guards a server, which echoes; somebody elsewhere, whom no daemon guards, is the
/// test's client.
pub(crate) struct Guarded {
    pub(crate) daemon: Daemon,
    pub(crate) server: Workload,
    /// Another workload of the node, which nobody may call.
    pub(crate) neighbour: Workload,
    pub(crate) stranger: Workload,
    pub(crate) root: Authority,
    _echo: Process,
    elsewhere: Node,
    _node: Node,
    network: Network,
}

/// A daemon that serves a client; the test is where the tunnel of the peer `server` should be.
pub(crate) struct Calling {
    pub(crate) daemon: Daemon,
    pub(crate) client: Workload,
    pub(crate) impostor: Workload,
    pub(crate) root: Authority,
    _elsewhere: Node,
    _node: Node,
    network: Network,
}

// === impl Guarded ===

impl Guarded {
    /// Lets in [`CLIENT`] and nobody else.
    pub(crate) fn start() -> Self {
        Self::with(|reeve| reeve)
    }

    /// With other settings.
    pub(crate) fn with(change: impl FnOnce(Reeve<'_>) -> Reeve<'_>) -> Self {
        Self::started(|reeve| change(reeve).start())
    }

    /// With other settings, by which not every workload has a certificate; returns when the daemon
    /// listens.
    pub(crate) fn unready(change: impl FnOnce(Reeve<'_>) -> Reeve<'_>) -> Self {
        let guarded = Self::started(|reeve| change(reeve).start_unready());
        let listening = |workload: &serde_json::Value| workload["listening"] == true;
        harness::eventually("the daemon listens", || {
            let output = guarded.daemon.command(["status", "--json"]);
            output.status.success()
                && output.json()["workloads"]
                    .as_array()
                    .is_some_and(|workloads| workloads.iter().all(listening))
        });
        guarded
    }

    fn started(start: impl FnOnce(Reeve<'_>) -> Daemon) -> Self {
        let network = Network::new();
        let (node, elsewhere) = (
            Node::new(&network, "node"),
            Node::new(&network, "elsewhere"),
        );
        let (server, stranger) = (node.pod("server"), elsewhere.pod("stranger"));
        let neighbour = node.pod("neighbour");
        let mut echo = server.spawn_peer(["serve", &format!("[::]:{APP}")]);
        echo.wait_for("listening");
        let reeve = node.reeve().enrol(&server).enrol(&neighbour);
        let daemon = start(reeve.policy(LET_THE_CLIENT_IN));
        Self {
            daemon,
            server,
            neighbour,
            stranger,
            root: root_of(&network),
            _echo: echo,
            elsewhere,
            _node: node,
            network,
        }
    }

    /// A pod elsewhere, with an address of its own.
    pub(crate) fn another(&self, name: &str) -> Workload {
        self.elsewhere.pod(name)
    }

    /// The folder of the daemon's CA.
    pub(crate) fn ca(&self) -> &std::path::Path {
        self.network.trust()
    }

    /// The port at which the daemon takes tunnels for the server.
    pub(crate) fn tunnel_port(&self) -> SocketAddr {
        self.server.addresses().port4(PORT)
    }

    /// What the server is called in a CONNECT request.
    pub(crate) fn authority(&self) -> String {
        self.server.addresses().port4(APP).to_string()
    }

    /// The stranger, presenting this certificate.
    pub(crate) fn client(&self, certificate: &Issued) -> Client {
        Client::new(&self.stranger).presenting(certificate)
    }

    /// The stranger with a certificate as right as can be.
    pub(crate) fn right_client(&self) -> Client {
        self.client(&self.root.leaf(CLIENT))
    }

    /// Number of handshakes of the daemon's tunnels that ended like this.
    pub(crate) fn handshakes(&self, reason: &str) -> f64 {
        handshakes(&self.daemon, "server", reason)
    }

    /// Fails the test unless the daemon still serves those who do everything right.
    #[track_caller]
    pub(crate) fn still_serves(&self) {
        let tunnel = self.right_client().tunnel(self.tunnel_port()).unwrap();
        let mut stream = tunnel.connect(&self.authority()).unwrap();
        assert_eq!(stream.status, 200);
        stream.send("still there?").unwrap();
        stream.finish().unwrap();
        assert_eq!(stream.receive().unwrap(), b"still there?");
    }
}

// === impl Calling ===

impl Calling {
    /// The client may call the server.
    pub(crate) fn start() -> Self {
        Self::with(|reeve| reeve)
    }

    /// With other settings.
    pub(crate) fn with(change: impl FnOnce(Reeve<'_>) -> Reeve<'_>) -> Self {
        let network = Network::new();
        let (node, elsewhere) = (
            Node::new(&network, "node"),
            Node::new(&network, "elsewhere"),
        );
        let (client, impostor) = (node.pod("client"), elsewhere.pod("server"));
        let reeve = node.reeve().enrol(&client).peer(&impostor);
        let daemon = change(reeve.policy(LET_THE_CLIENT_OUT)).start();
        Self {
            daemon,
            client,
            impostor,
            root: root_of(&network),
            _elsewhere: elsewhere,
            _node: node,
            network,
        }
    }

    /// The folder of the daemon's CA.
    pub(crate) fn ca(&self) -> &std::path::Path {
        self.network.trust()
    }

    /// Stands where the server's tunnel should be.
    pub(crate) fn impostor(&self, certificate: &Issued, conduct: Conduct) -> Server {
        Server::start(&self.impostor, PORT, certificate, conduct)
    }

    /// The same, with a certificate as right as can be.
    pub(crate) fn right_server(&self, conduct: Conduct) -> Server {
        self.impostor(&self.root.leaf(SERVER), conduct)
    }

    /// The client calls the server, sends a few bytes, and reads until the end.
    pub(crate) fn call(&self) -> Output {
        self.start_call().wait(SOON)
    }

    /// Starts to.
    pub(crate) fn start_call(&self) -> Process {
        let to = self.impostor.addresses().port4(APP).to_string();
        self.client
            .spawn_peer(["send", &to, "--text", "is it really you?"])
    }

    /// Number of handshakes of the daemon's tunnels that ended like this.
    pub(crate) fn handshakes(&self, reason: &str) -> f64 {
        handshakes(&self.daemon, "client", reason)
    }

    /// Number of calls that failed for this reason.
    pub(crate) fn failures(&self, reason: &str) -> f64 {
        let labels = [
            ("direction", "egress"),
            ("transport", "tunnel"),
            ("reason", reason),
        ];
        let metrics = self.daemon.metrics();
        metrics.sum("reeve_connections_failed_total", &labels)
    }

    /// Fails the test unless the client reaches a server that does everything right.
    #[track_caller]
    pub(crate) fn still_calls(&self, server: &Server) {
        server.present(&self.root.leaf(SERVER));
        server.conduct(Conduct::Echo);
        let mut answer = None;
        // What failed lately is not tried again at once.
        harness::eventually("the client reaches its peer", || {
            let output = self.call();
            answer = output.status.success().then(|| output.json());
            answer.is_some()
        });
        assert_eq!(answer.unwrap()["received"]["head"], "is it really you?");
    }
}

/// Number of handshakes in a role that ended like this.
pub(crate) fn handshakes(daemon: &Daemon, role: &str, reason: &str) -> f64 {
    let result = if reason == "ok" { "ok" } else { "failed" };
    let labels = [("role", role), ("result", result), ("reason", reason)];
    daemon.metrics().sum("reeve_tls_handshakes_total", &labels)
}

/// The authority that the daemons of a network have made; another one where they were told of other
/// sources.
pub(crate) fn root_of(network: &Network) -> Authority {
    if !network.trust().exists() {
        return Authority::root("example.org");
    }
    let read = |name: &str| std::fs::read_to_string(network.trust().join(name)).unwrap();
    Authority::from_pem(&read("root.pem"), &read("root.key"))
}

const LET_THE_CLIENT_IN: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: into-the-server}
spec:
  workloads: {matchLabels: {app: server}}
  ingress:
    - from: [{identity: spiffe://example.org/ns/default/sa/client}]
      ports: [{port: 8080}]
";

const LET_THE_CLIENT_OUT: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: out-of-the-client}
spec:
  workloads: {matchLabels: {app: client}}
  egress:
    - to: [{identity: spiffe://example.org/ns/default/sa/server}]
";

/// The client may reach every port.
pub(crate) const EVERY_PORT: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: every-port}
spec:
  workloads: {}
  ingress:
    - from: [{identity: spiffe://example.org/ns/default/sa/client}]
";
