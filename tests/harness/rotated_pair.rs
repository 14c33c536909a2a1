//! Two nodes whose workloads' certificates are in files that are replaced again and again, for runs
//! that carry traffic meanwhile.

use std::{path::PathBuf, time::Duration};

use serde_json::json;

use crate::{Daemon, FileIssuer, Network, Node, Process, Reeve, Workload};

/// A client at one node and a server at the other.
pub(crate) struct RotatedPair {
    pub(crate) client: Workload,
    pub(crate) server: Workload,
    pub(crate) issuer: FileIssuer,
    certificates: PathBuf,
    _nodes: [Node; 2],
    pub(crate) network: Network,
}

impl RotatedPair {
    /// Starts a daemon at each node: the client's, and the server's. `issuer` makes who issues in a
    /// folder, `lifetime` is that of the first certificates, and `configure` adds to the configuration of
    /// the daemon of each number.
    pub(crate) fn start(
        policy: &str,
        issuer: impl FnOnce(PathBuf) -> FileIssuer,
        lifetime: &str,
        configure: impl for<'n> Fn(usize, Reeve<'n>) -> Reeve<'n>,
    ) -> (Self, [Daemon; 2]) {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (one.pod("client"), two.pod("server"));
        let certificates = one.folder().join("certificates");
        let issuer = issuer(one.folder().join("issuer"));
        for workload in [&client, &server] {
            issue(&issuer, workload, &certificates, lifetime);
        }
        let source = json!([FileIssuer::source(&certificates)]);
        let daemon = |number, node: &Node, own: &Workload, other: &Workload| {
            let reeve = node.reeve().set("/certificates/sources", source.clone());
            configure(number, reeve)
                .enrol(own)
                .peer(other)
                .policy(policy)
                .start()
        };
        let daemons = [
            daemon(0, &one, &client, &server),
            daemon(1, &two, &server, &client),
        ];
        for place in [&*client, &*server] {
            place.sysctl("ipv4/tcp_tw_reuse", "1");
            place.sysctl("ipv4/ip_local_port_range", "16384 65535");
        }
        let pair = Self {
            client,
            server,
            issuer,
            certificates,
            _nodes: [one, two],
            network,
        };
        (pair, daemons)
    }

    /// Replaces every certificate.
    pub(crate) fn rotate(&self, lifetime: &str) {
        for workload in [&self.client, &self.server] {
            issue(&self.issuer, workload, &self.certificates, lifetime);
        }
    }

    /// A TCP server of the tests' own program.
    pub(crate) fn serve(&self, port: u16, mode: &str) -> Process {
        serve(&self.server, port, mode)
    }

    /// The server's address, as an argument.
    pub(crate) fn to(&self, port: u16) -> String {
        self.server.addresses().port4(port).to_string()
    }
}

/// A TCP server of the tests' own program.
pub(crate) fn serve(at: &Workload, port: u16, mode: &str) -> Process {
    let words = ["serve", &format!("[::]:{port}"), "--mode", mode];
    let mut server = at.spawn_peer(words);
    server.wait_for("listening");
    server
}

fn issue(issuer: &FileIssuer, workload: &Workload, base: &std::path::Path, lifetime: &str) {
    let id = workload.spiffe_id("example.org");
    issuer.issue_for(&id, &base.join(workload.name()), lifetime);
}

/// What was wrong with a transfer that has ended.
pub(crate) fn transferred(transfer: Process, patience: Duration) -> Result<(), String> {
    let output = transfer.wait(patience);
    if !output.status.success() {
        return Err(format!("a transfer failed: {}", output.stderr));
    }
    let seen = output.json();
    if seen["received"]["head"] == seen["sent"]["sha256"] {
        Ok(())
    } else {
        Err(format!("a transfer was not whole: {seen}"))
    }
}
