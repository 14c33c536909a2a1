//! Workers, identities and sockets for the tests of the data path.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    net::SocketAddr,
    os::fd::BorrowedFd,
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use h2::{RecvStream, SendStream, client::ResponseFuture};
use http::{Request, Response};
use reeve_common::{FailingEntry, FailingKey, Origin, WorkloadId};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, LocalOptions},
    sync::{oneshot, watch},
    task::spawn_local,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    config::{CongestionControl, Limits, Ports, Timeouts},
    datapath::{SocketStorage, Sockets},
    identity::{
        CertificateSource, Denied, EmbeddedCa, IdentityStore, Material, SourceError, SpiffeId,
        Svid, TrustBundle, TrustDomain, server_name_for,
    },
    privileges::Confinement,
    telemetry::{ConnectionLog, Metrics, Observers, Role},
    tunnel::{
        Shared,
        bounds::Bounds,
        connection::{Call, Connection, Parties, Would},
        copy::copy,
        driver::{Driver, Incoming, sending},
        failing::Failing,
        frames::FrameMeter,
        link::{Ends, Link, Proven},
        registry::Registered,
        wire::{Wire, WireControl, wire},
        worker::Worker,
    },
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test on an event loop like a worker's.
pub(super) fn run<T>(test: impl Future<Output = T>) -> T {
    Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
        .unwrap()
        .block_on(async {
            tokio::time::timeout(PATIENCE, test)
                .await
                .expect("too slow")
        })
}

pub(super) fn id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/ns/shop/sa/{name}")).unwrap()
}

/// Original destinations as a table, by the addresses of clients.
#[derive(Debug, Default)]
pub(super) struct Table(pub(super) Mutex<HashMap<SocketAddr, Origin>>);

impl SocketStorage for Table {
    fn origin(&self, accepted: BorrowedFd<'_>) -> Option<Origin> {
        let client = SockRef::from(&accepted).peer_addr().ok()?.as_socket()?;
        self.0.lock().unwrap().remove(&client)
    }

    fn deliver_to(&self, _: BorrowedFd<'_>, _: WorkloadId) -> io::Result<()> {
        Ok(())
    }

    fn met_wrong_listener(&self, _: BorrowedFd<'_>) -> bool {
        false
    }

    fn set_failing(&self, _: FailingKey, _: FailingEntry) -> io::Result<()> {
        Ok(())
    }
}

/// A CA that gives new certificates whenever [`Authority::rotate`] is called.
#[derive(Debug)]
pub(super) struct Authority {
    ca: EmbeddedCa,
    /// By identity.
    changes: Mutex<BTreeMap<SpiffeId, watch::Sender<u64>>>,
    withdrawn: AtomicBool,
}

pub(super) fn authority() -> Arc<Authority> {
    authority_for(Duration::from_secs(3600))
}

/// Whose certificates live this long.
pub(super) fn authority_for(lifetime: Duration) -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    let domain = TrustDomain::parse("example.org").unwrap();
    Arc::new(Authority {
        ca: EmbeddedCa::open(&folder.path().join("ca"), &domain, lifetime).unwrap(),
        changes: Mutex::default(),
        withdrawn: AtomicBool::new(false),
    })
}

impl Authority {
    pub(super) fn bundle(&self) -> Arc<TrustBundle> {
        self.ca.bundle()
    }

    pub(super) fn rotate(&self) {
        self.rotate_those(|_| true);
    }

    pub(super) fn rotate_those(&self, meant: impl Fn(&SpiffeId) -> bool) {
        let changes = self.changes.lock().unwrap();
        for (_, change) in changes.iter().filter(|(id, _)| meant(id)) {
            change.send_modify(|number| *number += 1);
        }
    }

    pub(super) fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::Relaxed);
        self.rotate();
    }
}

impl CertificateSource for Authority {
    fn name(&self) -> &'static str {
        "test"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        async move {
            match self.withdrawn.load(Ordering::Relaxed) {
                true => Err(Denied::NoProcess.into()),
                false => self.ca.issue(id),
            }
        }
        .boxed()
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        let mut changes = self.changes.lock().unwrap();
        changes.entry(id.clone()).or_default().subscribe()
    }
}

/// A store with certificates for `names`.
pub(super) async fn identities_from(
    source: Arc<dyn CertificateSource>,
    names: &[&str],
) -> Arc<IdentityStore> {
    let sources = [("test".to_owned(), source)];
    let store = Arc::new(IdentityStore::new(sources.into()));
    let ids: BTreeMap<_, _> = names.iter().map(|name| (id(name), "test".into())).collect();
    store.ensure(&ids);
    for id in ids.keys() {
        while store.current(id).is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    store
}

pub(super) fn worker(
    identities: Arc<IdentityStore>,
    limits: Limits,
    timeouts: Timeouts,
) -> Rc<Worker> {
    let metrics = Metrics::default();
    let shared = Shared {
        snapshot: Arc::default(),
        identities,
        storage: Arc::new(Table::default()),
        log: ConnectionLog::new(metrics.clone(), Observers::new(0)),
        metrics,
        proofs: true,
    };
    let sockets = sockets();
    Worker::new(
        shared,
        limits,
        timeouts,
        Ports::default(),
        Bounds::new(&limits),
        Arc::new(Failing::new(sockets.clone())),
        sockets,
    )
}

/// A thread that opens sockets, and keeps nothing with them.
pub(in crate::tunnel) fn sockets() -> Sockets {
    Sockets::start(
        Confinement::default(),
        CongestionControl::default(),
        Arc::new(Table::default()),
    )
    .unwrap()
}

/// A connected pair of TCP sockets.
pub(super) async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, server) = tokio::join!(client, listener.accept());
    (client.unwrap(), server.unwrap().0)
}

/// A TLS connection between two identities: the client's end and the server's.
async fn secured(client: &Svid, server: &Svid) -> [(TcpStream, rustls::Connection); 2] {
    let (near, far) = tcp_pair().await;
    let connector = TlsConnector::from(client.client(&server.id));
    let acceptor = TlsAcceptor::from(server.server.clone());
    let (near, far) = tokio::join!(
        connector.connect(server_name_for(&server.id), near),
        acceptor.accept(far)
    );
    let (near, near_tls) = near.unwrap().into_inner();
    let (far, far_tls) = far.unwrap().into_inner();
    [(near, near_tls.into()), (far, far_tls.into())]
}

/// The two ends of a TLS connection, of cart's and of stock's.
async fn cart_and_stock() -> [(TcpStream, rustls::Connection); 2] {
    let store = identities_from(authority(), &["cart", "stock"]).await;
    let [cart, stock] = ["cart", "stock"].map(|name| store.current(&id(name)).unwrap());
    secured(&cart, &stock).await
}

/// HTTP/2's end of a tunnel, and the socket of a peer that reads nothing.
pub(super) async fn unread_wire() -> (Wire, TcpStream) {
    let [(near, tls), (far, _)] = cart_and_stock().await;
    let (wire, _) = wire(near, tls, FrameMeter::of_server(1000));
    (wire, far)
}

/// Both ends of what lies below a tunnel.
pub(super) async fn wires() -> [(Wire, WireControl); 2] {
    let ends = cart_and_stock().await;
    ends.map(|(tcp, tls)| wire(tcp, tls, FrameMeter::of_server(1000)))
}

/// A tunnel between two ends in this thread.
pub(super) struct Pair {
    pub(super) worker: Rc<Worker>,
    client: Registered<Link>,
    server: Registered<Link>,
    request: RefCell<h2::client::SendRequest<Bytes>>,
    incoming: RefCell<tokio::sync::mpsc::UnboundedReceiver<Incoming>>,
}

/// An application connection through a tunnel.
pub(super) struct Pipe {
    /// The application that connected.
    pub(super) near: TcpStream,
    /// The application that was connected to.
    pub(super) far: TcpStream,
    /// How the client's and the server's side ended.
    pub(super) ends: [oneshot::Receiver<reeve_common::Reason>; 2],
    /// Both sides.
    pub(super) connections: [Rc<Connection>; 2],
}

fn link(role: Role, own: &Svid, peer: &Svid) -> Link {
    let ends = Ends {
        role,
        own: own.id.clone(),
        peer: peer.id.clone(),
        remote: "127.0.0.1:1".parse().unwrap(),
        local: "127.0.0.1:2".parse().unwrap(),
        netns: 0,
        secret: None,
    };
    let proven = Proven {
        generation: own.generation,
        own_not_after: own.not_after,
        chain: peer.chain().to_vec(),
    };
    Link::new(ends, proven)
}

impl Pair {
    pub(super) async fn new(limits: Limits, timeouts: Timeouts) -> Self {
        let store = identities_from(authority(), &["cart", "stock"]).await;
        let (cart, stock) = (store.current(&id("cart")), store.current(&id("stock")));
        let (cart, stock) = (cart.unwrap(), stock.unwrap());
        let worker = worker(store, limits, timeouts);
        let [(near, near_tls), (far, far_tls)] = secured(&cart, &stock).await;
        let meter = |of: fn(usize) -> FrameMeter| of(limits.control_frames);
        let (near_wire, near_control) = wire(near, near_tls, meter(FrameMeter::of_server));
        let (far_wire, far_control) = wire(far, far_tls, meter(FrameMeter::of_client));
        let server = crate::tunnel::server::builder(&worker, false);
        let client = crate::tunnel::client::builder(&worker);
        let (client, server) =
            tokio::join!(sending(&near_control, client.handshake(near_wire)), async {
                sending(&far_control, server.handshake(far_wire)).await
            });
        let ((request, client), server) = (client.unwrap().unwrap(), server.unwrap().unwrap());
        let near = worker.links.insert(link(Role::Client, &cart, &stock));
        let far = worker.links.insert(link(Role::Server, &stock, &cart));
        let (accepted, incoming) = tokio::sync::mpsc::unbounded_channel();
        spawn_local(Driver::new(
            &worker,
            client,
            near_control,
            near.value().clone(),
            |_| {},
        ));
        spawn_local(Driver::new(
            &worker,
            server,
            far_control,
            far.value().clone(),
            move |stream| {
                let _ = accepted.send(stream);
            },
        ));
        Self {
            worker,
            client: near,
            server: far,
            request: RefCell::new(request),
            incoming: RefCell::new(incoming),
        }
    }

    /// A stream with its far end.
    pub(super) async fn stream(&self) -> [(SendStream<Bytes>, RecvStream); 2] {
        let (response, near_send, (far, mut respond)) = self.asked().await;
        let far_send = respond.send_response(Response::new(()), false).unwrap();
        let near_recv = response.await.unwrap().into_body();
        [(near_send, near_recv), (far_send, far.into_body())]
    }

    /// A request that waits for its answer, and what the far end has of it.
    pub(super) async fn asked(&self) -> (ResponseFuture, SendStream<Bytes>, Incoming) {
        let mut request = self.request.borrow().clone();
        std::future::poll_fn(|cx| request.poll_ready(cx))
            .await
            .unwrap();
        let connect = Request::connect("10.0.0.7:80").body(()).unwrap();
        let (response, send) = request.send_request(connect, false).unwrap();
        let incoming = std::future::poll_fn(|cx| self.incoming.borrow_mut().poll_recv(cx));
        (response, send, incoming.await.unwrap())
    }

    /// An application connection.
    pub(super) async fn pipe(&self) -> Pipe {
        let [near, far] = self.stream().await;
        let (near_app, near_tcp) = tcp_pair().await;
        let (far_tcp, far_app) = tcp_pair().await;
        let (near_end, near_connection) = self.carry(self.client.value(), near_tcp, near);
        let (far_end, far_connection) = self.carry(self.server.value(), far_tcp, far);
        Pipe {
            near: near_app,
            far: far_app,
            ends: [near_end, far_end],
            connections: [near_connection, far_connection],
        }
    }

    /// A stream that HTTP/2 itself is at the near end of, and at the far end an application for
    /// which the kernel keeps next to nothing.
    pub(super) async fn half_pipe(&self) -> (SendStream<Bytes>, RecvStream, TcpStream) {
        let [(near_send, near_recv), far] = self.stream().await;
        let (far_tcp, far_app) = tcp_pair().await;
        for socket in [&far_tcp, &far_app] {
            let socket = socket2::SockRef::from(socket);
            socket.set_send_buffer_size(4 << 10).unwrap();
            socket.set_recv_buffer_size(4 << 10).unwrap();
        }
        self.carry(self.server.value(), far_tcp, far);
        (near_send, near_recv, far_app)
    }

    fn carry(
        &self,
        link: &Rc<Link>,
        app: TcpStream,
        (send, recv): (SendStream<Bytes>, RecvStream),
    ) -> (oneshot::Receiver<reeve_common::Reason>, Rc<Connection>) {
        let call = Call {
            parties: Parties::Outbound {
                workload: None,
                peer: None,
            },
            source: "127.0.0.1:1".parse().unwrap(),
            destination: "10.0.0.7:80".parse().unwrap(),
            netns: 0,
            rule: 0,
            would: Would::default(),
            id: None,
        };
        let live = call.open(
            &self.worker,
            link,
            self.worker.bounds.place(1, None).unwrap(),
        );
        let connection = live.connection().clone();
        let (ended, end) = oneshot::channel();
        let copied = copy(app, send, recv, connection.clone());
        let link = link.clone();
        link.stream_opened();
        spawn_local(async move {
            let reason = copied.await;
            link.stream_ended();
            live.ended(reason);
            let _ = ended.send(reason);
        });
        (end, connection)
    }

    pub(super) fn links(&self) -> [&Rc<Link>; 2] {
        [self.client.value(), self.server.value()]
    }
}
