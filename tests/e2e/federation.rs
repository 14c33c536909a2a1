//! Two trust domains that fetch each other's bundles from bundle endpoints, which are real HTTPS
//! servers: who is trusted follows what is published, while connections go on.

use std::{fs, net::TcpListener, path::PathBuf, process::Command, time::Duration};

use harness::{
    Daemon, Node, Place, Programs, Workload,
    bundles::{BundleServer, document, web_certificate},
    certs::Authority,
    eventually,
    hbone::{Client, Tunnel},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, Pair},
    opposite::root_of,
};

const ENDPOINT: u16 = 8443;
const OTHER: &str = "other.example";
const ALIEN: &str = "spiffe://other.example/ns/default/sa/client";
const PUBLISHER: &str = "spiffe://other.example/publisher";

/// A bundle endpoint in a place's namespace.
fn endpoint_at(place: &Place, certificate: &harness::certs::Issued) -> BundleServer {
    let netns = place.netns().unwrap();
    let listener = netns.enter(|| TcpListener::bind(("::", ENDPOINT)).unwrap());
    BundleServer::start(listener, certificate)
}

fn url(node: &Node) -> String {
    format!("https://{}/bundle.json", node.addresses().port4(ENDPOINT))
}

/// What status says of the only bundle endpoint.
fn endpoint(daemon: &Daemon) -> Value {
    daemon.status()["bundleEndpoints"][0].clone()
}

// === traffic between two trust domains ===

/// A trust domain of its own: its daemon's CA, and where its bundle is published.
struct Domain<'a> {
    name: &'static str,
    node: &'a Node,
    ca: PathBuf,
    published: u64,
    server: BundleServer,
}

impl<'a> Domain<'a> {
    fn new(name: &'static str, node: &'a Node, web: &Authority) -> Self {
        let ca = node.folder().join("own-ca");
        reeve_ca(&["init", "--trust-domain", name, "--dir"], &ca);
        let address = node.addresses().v4.to_string();
        let certificate = web_certificate(web, &[&address]);
        let mut domain = Self {
            name,
            node,
            ca,
            published: 0,
            server: endpoint_at(node.host(), &certificate),
        };
        domain.publish();
        domain
    }

    /// Publishes what its CA's bundle is now.
    fn publish(&mut self) {
        let pem = fs::read(self.ca.join("bundle.pem")).unwrap();
        let authorities = CertificateDer::pem_slice_iter(&pem);
        let authorities: Vec<_> = authorities.map(|der| der.unwrap()).collect();
        self.published += 1;
        self.server.serve(&document(&authorities, self.published));
    }

    /// A daemon of this trust domain that follows the other one's endpoint.
    fn daemon(
        &self,
        own: &Workload,
        other: &Workload,
        elsewhere: &Self,
        web: &Authority,
    ) -> Daemon {
        let authorities = self.node.folder().join("web.pem");
        fs::write(&authorities, web.certificate_pem()).unwrap();
        let id = other.spiffe_id(elsewhere.name);
        let reeve = self
            .node
            .reeve()
            .enrol(own)
            .peer_with(other, json!({"spiffeId": id, "tunnel": true}));
        reeve
            .set("/trustDomain", json!(self.name))
            .set(
                "/certificates/sources",
                json!([{"embedded": {"caDir": self.ca}}]),
            )
            .set(
                "/certificates/bundleEndpoints",
                json!([{
                    "trustDomain": elsewhere.name,
                    "url": url(elsewhere.node),
                    "profile": "https_web",
                    "authorities": authorities,
                }]),
            )
            .policy(&between(&id))
            .start()
    }

    /// Does something to its CA, publishes the result, and waits until the other daemon has it.
    fn rotate(&mut self, step: &[&str], other: &Daemon) {
        let words: Vec<&str> = ["rotate"].iter().chain(step).copied().collect();
        reeve_ca(&[&words[..], &["--dir"]].concat(), &self.ca);
        self.publish();
        eventually("the other trust domain has the bundle", || {
            endpoint(other)["sequence"] == self.published
        });
    }
}

fn reeve_ca(words: &[&str], folder: &std::path::Path) {
    let mut command = Command::new(&Programs::get().reeve);
    let output = command.arg("ca").args(words).arg(folder).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
}

/// Everything may pass between a workload and this identity.
fn between(id: &str) -> String {
    format!(
        "apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {{name: between}}\n\
         spec:\n  workloads: {{}}\n  ingress: [{{from: [{{identity: '{id}'}}]}}]\n  \
         egress: [{{to: [{{identity: '{id}'}}]}}]\n"
    )
}

#[test]
fn a_root_is_replaced_under_traffic_between_two_trust_domains_and_nothing_fails() {
    let pair = Pair::new();
    let web = Authority::root("web.example");
    let near = Domain::new("example.org", &pair.one, &web);
    let mut far = Domain::new(OTHER, &pair.two, &web);
    let one = near.daemon(&pair.client, &pair.server, &far, &web);
    let two = far.daemon(&pair.server, &pair.client, &near, &web);
    for daemon in [&one, &two] {
        eventually("the other's bundle", || {
            endpoint(daemon)["origin"] == "fetched"
        });
    }
    let mut answers =
        pair.server
            .spawn_peer(["serve", &format!("[::]:{PORT}"), "--mode", "answer"]);
    answers.wait_for("listening");
    let to = pair.server.addresses().port4(PORT).to_string();
    let traffic =
        pair.client
            .spawn_peer(["connect-rate", &to, "--threads", "2", "--seconds", "40"]);

    let issuer = || two.status()["certificates"][0]["issuer"].clone();
    let old = issuer();
    far.rotate(&[], &one);
    assert_eq!(issuer(), old);
    far.rotate(&["--switch"], &one);
    eventually("a certificate of the new root", || issuer() != old);
    far.rotate(&["--finish"], &one);

    let result = traffic.wait(Duration::from_secs(90)).json();
    assert_eq!(result["failed"], 0, "{result}");
    assert!(result["connections"].as_u64() > Some(500), "{result}");
    let bundles = one.status()["bundles"].clone();
    let mut all = bundles.as_array().unwrap().iter();
    assert!(all.any(|it| it["trustDomain"] == OTHER && it["certificates"] == 1));
}

// === what is refused ===

/// A daemon that follows an endpoint of `other.example` by SPIFFE ID, and a client from there.
struct Following {
    daemon: Daemon,
    root: Authority,
    server: Option<BundleServer>,
    pair: Pair,
}

impl Following {
    fn start() -> Self {
        let (pair, root) = (Pair::new(), Authority::root(OTHER));
        let bootstrap = pair.one.folder().join("bootstrap.pem");
        fs::write(&bootstrap, root.certificate_pem()).unwrap();
        let server = endpoint_at(pair.two.host(), &root.leaf(PUBLISHER));
        server.serve(&document(&[root.certificate()], 1));
        let endpoint = json!({
            "trustDomain": OTHER,
            "url": url(&pair.two),
            "profile": "https_spiffe",
            "spiffeId": PUBLISHER,
            "bootstrap": bootstrap,
        });
        let reeve = pair.one.reeve().enrol(&pair.client);
        let daemon = reeve
            .set("/certificates/bundleEndpoints", json!([endpoint]))
            .start();
        let following = Self {
            daemon,
            root,
            server: Some(server),
            pair,
        };
        eventually("the bundle", || following.endpoint()["origin"] == "fetched");
        following
    }

    fn server(&self) -> &BundleServer {
        self.server.as_ref().unwrap()
    }

    fn endpoint(&self) -> Value {
        endpoint(&self.daemon)
    }

    /// Why the endpoint's answer is refused now.
    fn refusal(&self) -> Value {
        let output = self.daemon.command(["reload"]);
        assert!(!output.status.success(), "{}", output.stdout);
        assert!(output.stdout.contains(OTHER), "{}", output.stdout);
        self.endpoint()["reason"].clone()
    }

    /// Publishes these authorities, and waits until that counts.
    fn publish(&self, authorities: &[&Authority], sequence: u64) {
        let all: Vec<_> = authorities.iter().map(|it| it.certificate()).collect();
        self.server().serve(&document(&all, sequence));
        eventually("the bundle", || self.endpoint()["sequence"] == sequence);
    }

    /// A tunnel of somebody with this ID, by a certificate of this authority.
    fn tunnel(&self, authority: &Authority, id: &str) -> Result<Tunnel, String> {
        let client = Client::new(&self.pair.server).presenting(&authority.leaf(id));
        client.tunnel(self.pair.client.addresses().port4(harness::hbone::PORT))
    }
}

#[test]
fn an_endpoint_that_is_down_leaves_the_bundle_before_over_a_restart_too() {
    let mut following = Following::start();
    let up = |following: &Following| {
        let labels = [("trust_domain", OTHER)];
        let metrics = following.daemon.metrics();
        metrics.sum("reeve_bundle_endpoint_up", &labels)
    };
    assert_eq!(up(&following), 1.0);
    following.tunnel(&following.root, ALIEN).unwrap();
    following.server = None;
    assert_eq!(following.refusal(), "unreachable");
    assert_eq!(up(&following), 0.0);
    following.tunnel(&following.root, ALIEN).unwrap();

    following.daemon.stop();
    following.daemon.start_again();
    following.daemon.wait_until_ready();
    assert_eq!(following.endpoint()["origin"], "kept");
    assert_eq!(following.endpoint()["sequence"], 1);
    following.tunnel(&following.root, ALIEN).unwrap();
}

#[test]
fn nobody_but_the_endpoint_itself_says_whom_to_trust() {
    let following = Following::start();
    let attacker = Authority::root(OTHER);
    following
        .server()
        .serve(&document(&[attacker.certificate()], 2));
    for impostor in [
        following.root.leaf("spiffe://other.example/somebody"),
        attacker.leaf(PUBLISHER),
        root_of(&following.pair.network).leaf("spiffe://example.org/publisher"),
    ] {
        following.server().present(&impostor);
        assert_eq!(following.refusal(), "handshake");
    }
    following.tunnel(&attacker, ALIEN).unwrap_err();
    following.tunnel(&following.root, ALIEN).unwrap();
}

#[test]
fn what_a_trust_domain_publishes_counts_for_itself_alone_and_for_tunnels_that_stand() {
    let following = Following::start();
    let near = root_of(&following.pair.network);
    let near_id = "spiffe://example.org/ns/default/sa/somebody";
    // It publishes our own root, too, as if that were its own.
    following.publish(&[&following.root, &near], 2);
    following.tunnel(&following.root, near_id).unwrap_err();
    following.tunnel(&near, near_id).unwrap();
    following.tunnel(&near, ALIEN).unwrap();

    let (theirs, ours) = (
        following.tunnel(&following.root, ALIEN).unwrap(),
        following.tunnel(&near, near_id).unwrap(),
    );
    let new = Authority::root(OTHER);
    following.server().present(&following.root.leaf(PUBLISHER));
    following.publish(&[&new], 3);
    eventually("the tunnel of the root that is gone is closed", || {
        theirs.ended()
    });
    assert!(!ours.ended());
    following.tunnel(&following.root, ALIEN).unwrap_err();
    following.tunnel(&new, ALIEN).unwrap();
}
