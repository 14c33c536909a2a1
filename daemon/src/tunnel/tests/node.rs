//! A whole data path in a network namespace of its own: two workloads, `cart` at 10.0.0.1 and
//! `stock` at 10.0.0.2, and an `other` node's workload at 10.0.0.3 that a test plays itself.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use reeve_common::{Origin, ipv4_mapped};
use socket2::Domain;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::spawn_local,
};
use tokio_rustls::TlsAcceptor;

use super::rig::{Table, id, identities_from};
use crate::{
    config::{CongestionControl, Limits, Ports, Timeouts},
    datapath::netns::Netns,
    identity::{CertificateSource, IdentityStore},
    policy::{Inputs, Known, PolicySet, Snapshot, Unselected},
    privileges::Confinement,
    telemetry::{ConnectionLog, Metrics, Observers},
    tunnel::{Shared, Tunnels, TunnelsStatus},
    workload::{
        Attributes, CgroupSelector, NamedPorts, Namespaces, Peer, RunningWorkload, Workload,
    },
};

pub(super) const CART: &str = "10.0.0.1";
pub(super) const STOCK: &str = "10.0.0.2";
pub(super) const OTHER: &str = "10.0.0.3";
/// Number of the peer at [`OTHER`].
const OTHER_PEER: u32 = 0x10000;

/// Cart may talk to everybody, and everybody to stock's port 80.
pub(super) const ALLOW: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: allow}
spec:
  workloads: {names: [cart, stock]}
  egress:
    - to: [{namespace: shop}]
  ingress:
    - from: [{namespace: shop}]
      ports: [{port: 80}]
";

/// Cart may talk to everybody, and nobody to stock.
pub(super) const NO_INGRESS: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: no-ingress}
spec:
  workloads: {names: [cart]}
  egress:
    - to: [{namespace: shop}]
";

/// The data path and what it works on.
pub(super) struct Node {
    pub(super) tunnels: Tunnels,
    pub(super) netns: Arc<Netns>,
    pub(super) shared: Shared,
    pub(super) identities: Arc<IdentityStore>,
    origins: Arc<Table>,
}

fn attributes(name: &str) -> Attributes {
    Attributes {
        namespace: "shop".into(),
        service_account: name.into(),
        labels: Default::default(),
        spiffe_id: id(name),
    }
}

fn running(number: u32, name: &str, address: &str, netns: &Arc<Netns>) -> Arc<RunningWorkload> {
    Arc::new(RunningWorkload {
        link_local: Vec::new(),
        workload: Arc::new(Workload {
            id: number,
            name: name.into(),
            attributes: attributes(name),
            selector: CgroupSelector::Cgroup(format!("/{name}")),
            ports: vec![],
            addresses: vec![],
            certificates: None,
            named_ports: NamedPorts::new(),
            permissive: false,
        }),
        cgroups: vec![],
        netns: Some(netns.clone()),
        owns_netns: false,
        addresses: vec![address.parse().unwrap()],
    })
}

/// A namespace with the three addresses on its loopback device.
fn namespace() -> Arc<Netns> {
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let mut commands = vec!["link set lo up".to_owned()];
        for address in [CART, STOCK, OTHER] {
            commands.push(format!("address add {address}/32 dev lo"));
        }
        for arguments in commands {
            let status = Command::new("ip").args(arguments.split(' ')).status();
            assert!(status.unwrap().success());
        }
        Netns::open("/proc/thread-self/ns/net").unwrap()
    });
    Arc::new(made.join().unwrap())
}

impl Node {
    pub(super) async fn new(policy: &str) -> Self {
        Self::with(policy, Limits::default(), Timeouts::default()).await
    }

    pub(super) async fn with(policy: &str, limits: Limits, timeouts: Timeouts) -> Self {
        let source = super::rig::authority();
        Self::with_source(policy, limits, timeouts, source).await
    }

    pub(super) async fn with_source(
        policy: &str,
        limits: Limits,
        timeouts: Timeouts,
        source: Arc<dyn CertificateSource>,
    ) -> Self {
        Self::made(policy, limits, timeouts, source, true).await
    }

    /// One whose tunnels are not proven again, as between reeve and a peer that does not do so.
    pub(super) async fn without_proofs(
        limits: Limits,
        timeouts: Timeouts,
        source: Arc<dyn CertificateSource>,
    ) -> Self {
        Self::made(ALLOW, limits, timeouts, source, false).await
    }

    async fn made(
        policy: &str,
        limits: Limits,
        timeouts: Timeouts,
        source: Arc<dyn CertificateSource>,
        proofs: bool,
    ) -> Self {
        let netns = namespace();
        let identities = identities_from(source, &["cart", "stock", "other"]).await;
        let (metrics, origins) = (Metrics::default(), Arc::new(Table::default()));
        let shared = Shared {
            snapshot: Arc::default(),
            identities: identities.clone(),
            storage: origins.clone(),
            log: ConnectionLog::new(metrics.clone(), Observers::new(0)),
            metrics,
            proofs,
        };
        let tunnels = Tunnels::start(
            shared.clone(),
            &limits,
            &timeouts,
            Ports::default(),
            CongestionControl::default(),
            Confinement::default(),
        )
        .unwrap();
        let node = Self {
            tunnels,
            netns,
            shared,
            identities,
            origins,
        };
        node.set_policy(policy);
        for (_, result) in node.tunnels.serve(std::slice::from_ref(&node.netns)) {
            result.unwrap();
        }
        node
    }

    pub(super) fn set_policy(&self, policy: &str) {
        self.set_policy_and_other(policy, "other");
    }

    /// The identity that is expected at [`OTHER`] is `other`'s.
    pub(super) fn set_policy_and_other(&self, policy: &str, other: &str) {
        let workloads = [
            running(1, "cart", CART, &self.netns),
            running(2, "stock", STOCK, &self.netns),
        ];
        let peers = [Arc::new(Peer {
            id: OTHER_PEER,
            name: "other".into(),
            addresses: vec![format!("{OTHER}/32").parse().unwrap()],
            ports: vec![],
            attributes: Some(attributes(other)),
            tunnel_port: Some(Ports::default().tunnel),
            named_ports: NamedPorts::new(),
        })];
        let declared: Vec<_> = workloads.iter().map(|w| w.workload.clone()).collect();
        let namespaces = Namespaces::default();
        let known = Known {
            workloads: &declared,
            peers: &peers,
            namespaces: &namespaces,
        };
        let policies = PolicySet::parse(Path::new("test.yaml"), policy, &known).unwrap();
        self.shared
            .snapshot
            .store(Arc::new(Snapshot::compile(&Inputs {
                workloads: &workloads,
                peers: &peers,
                namespaces: &namespaces,
                policies: &policies,
                unselected: Unselected::Deny,
                node_addresses: &[],
                tunnel_port: Ports::default().tunnel,
            })));
        self.tunnels.judge_again();
    }

    /// An application's listener.
    pub(super) fn listen(&self, address: &str) -> TcpListener {
        let listener = self
            .netns
            .run(|| std::net::TcpListener::bind(address))
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// A socket in the namespace.
    pub(super) fn socket(&self) -> TcpSocket {
        let socket = self.netns.tunnel_socket(Domain::IPV4);
        TcpSocket::from_std_stream(socket.unwrap().into())
    }

    /// What the kernel does with cart's `connect()`: the connection arrives at the outbound
    /// listener, and its destination is on record.
    pub(super) async fn connect(&self, destination: &str) -> TcpStream {
        self.try_connect(destination).await.unwrap()
    }

    /// As [`Self::connect`], for connections that may be reset before this looks.
    pub(super) async fn try_connect(&self, destination: &str) -> io::Result<TcpStream> {
        let destination: SocketAddr = destination.parse().unwrap();
        let IpAddr::V4(ip) = destination.ip() else {
            panic!("an IPv6 destination");
        };
        let peer = match ip.to_string().as_str() {
            CART => 1,
            STOCK => 2,
            _ => OTHER_PEER,
        };
        let origin = Origin {
            address: ipv4_mapped(ip.octets()),
            port: destination.port(),
            workload: 1,
            peer,
            ..Origin::default()
        };
        let socket = self.socket();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let local = socket.local_addr().unwrap();
        self.origins.0.lock().unwrap().insert(local, origin);
        self.redirected(socket).await
    }

    /// A connection to the outbound listener.
    pub(super) async fn redirected(&self, socket: TcpSocket) -> io::Result<TcpStream> {
        let outbound = SocketAddr::from(([127, 0, 0, 1], Ports::default().outbound));
        socket.connect(outbound).await
    }

    /// The tunnel port of [`OTHER`], which the test serves.
    pub(super) fn other(&self) -> TcpListener {
        let socket = self.socket();
        socket.set_reuseport(true).unwrap();
        socket.set_reuseaddr(true).unwrap();
        let address = format!("{OTHER}:{}", Ports::default().tunnel);
        socket.bind(address.parse().unwrap()).unwrap();
        socket.listen(1).unwrap()
    }

    /// Serves tunnels at [`OTHER`] with `serve`.
    pub(super) fn serve_other<F: Future<Output = ()> + 'static>(
        &self,
        serve: impl Fn(TcpStream) -> F + 'static,
    ) {
        let listener = self.other();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(serve(stream));
            }
        });
    }

    /// The server's side of TLS, with the certificate of `name`.
    pub(super) fn acceptor(&self, name: &str) -> TlsAcceptor {
        let svid = self.identities.current(&id(name)).unwrap();
        TlsAcceptor::from(svid.server.clone())
    }

    pub(super) async fn status(&self) -> TunnelsStatus {
        self.tunnels.status().await
    }

    /// Number of tunnels that this node's client side has open.
    pub(super) async fn client_tunnels(&self) -> usize {
        let status = self.status().await;
        let clients = status.tunnels.iter().filter(|t| t.role == "client");
        clients.count()
    }

    /// Waits until the metrics have a line that contains all of `parts`, and counts something.
    pub(super) async fn counts(&self, parts: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let text = self.shared.metrics.render().unwrap();
            let counted = text
                .lines()
                .any(|line| !line.ends_with(" 0") && parts.iter().all(|part| line.contains(part)));
            if counted {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "not counted: {parts:?} in\n{text}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Expects a connection to be reset, and soon.
pub(super) async fn is_reset(stream: io::Result<impl AsyncRead + Unpin>) {
    let read = async { stream?.read(&mut [0; 64]).await };
    let read = tokio::time::timeout(Duration::from_secs(10), read).await;
    let error = read.expect("not reset in time").expect_err("not reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}
