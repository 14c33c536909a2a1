//! Two nodes whose workloads' certificates are in files that are replaced again and again, for runs
//! that carry traffic meanwhile.

use std::{path::PathBuf, time::Duration};

use serde_json::json;

use crate::{Daemon, FileIssuer, Network, Node, Process, Reeve, Workload};

/// A client at one node, a server at the other, and a daemon at each.
pub(crate) struct RotatedPair {
    pub(crate) client: Workload,
    pub(crate) server: Workload,
    pub(crate) daemons: [Daemon; 2],
    issuer: FileIssuer,
    certificates: PathBuf,
    lifetime: String,
    _nodes: [Node; 2],
    _network: Network,
}

impl RotatedPair {
    /// `lifetime` is that of each certificate; `configure` adds to both daemons' configuration.
    pub(crate) fn start(
        policy: &str,
        lifetime: &str,
        configure: impl for<'n> Fn(Reeve<'n>) -> Reeve<'n>,
    ) -> Self {
        let network = Network::new();
        let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (one.pod("client"), two.pod("server"));
        let certificates = one.folder().join("certificates");
        let issuer = FileIssuer::new(one.folder().join("issuer"));
        for workload in [&client, &server] {
            issue(&issuer, workload, &certificates, lifetime);
        }
        let source = json!([FileIssuer::source(&certificates)]);
        let daemon = |node: &Node, own: &Workload, other: &Workload| {
            configure(node.reeve().set("/certificates/sources", source.clone()))
                .enrol(own)
                .peer(other)
                .policy(policy)
                .start()
        };
        let daemons = [
            daemon(&one, &client, &server),
            daemon(&two, &server, &client),
        ];
        for place in [&*client, &*server] {
            place.sysctl("ipv4/tcp_tw_reuse", "1");
            place.sysctl("ipv4/ip_local_port_range", "16384 65535");
        }
        Self {
            client,
            server,
            daemons,
            issuer,
            certificates,
            lifetime: lifetime.to_owned(),
            _nodes: [one, two],
            _network: network,
        }
    }

    /// Replaces every certificate.
    pub(crate) fn rotate(&self) {
        for workload in [&self.client, &self.server] {
            issue(&self.issuer, workload, &self.certificates, &self.lifetime);
        }
    }

    /// A TCP server of the tests' own program.
    pub(crate) fn serve(&self, port: u16, mode: &str) -> Process {
        let words = ["serve", &format!("[::]:{port}"), "--mode", mode];
        let mut server = self.server.spawn_peer(words);
        server.wait_for("listening");
        server
    }

    /// The server's address, as an argument.
    pub(crate) fn to(&self, port: u16) -> String {
        self.server.addresses().port4(port).to_string()
    }
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
