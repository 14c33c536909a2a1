//! Accepts the tunnels of peers: picks the identity that the client asks for, verifies the
//! client's, and hands each stream to [`inbound`].

use std::{
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::server::{Builder, Connection};
use reeve_common::{Direction, protocol};
use rustls::{ServerConfig, server::Acceptor};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::spawn_local,
    time::{sleep, timeout},
};
use tokio_rustls::LazyConfigAcceptor;

use crate::{
    datapath::netns::Netns,
    identity::{
        ALPN, PROVABLE_ALPN, RejectReason, SpiffeId, Svid, judged, least_skew, peer_id,
        server_name_matches, skew_by_alert,
    },
    telemetry::{
        self, ConnectionLabels, Handshake, HandshakeReason, Limit, Role, Transport, UNKNOWN,
    },
    workload::RunningWorkload,
};

use super::{
    TunnelError,
    authority::canonical,
    bounds::{Arriving, TunnelPlace},
    client::SEND_BUFFER,
    driver::{Driver, End, Incoming, sending},
    error::of_handshake,
    frames::FrameMeter,
    inbound,
    link::{Ends, Link, Proven},
    proof::{self, Secret},
    sweep::judge,
    wire::{FULL_FRAME, SMALL_FRAMES, Wire, WireControl, wire},
    worker::Worker,
};

/// The record of a fatal TLS alert (RFC 8446, sections 5.1 and 6): there is no certificate for what the
/// client calls.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];
/// After accepting has failed, which is nearly always for want of file descriptors: time in which
/// some come free, instead of failing again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Streams that a peer may open and reset before anything was done for them, of which it is then
/// told off: "rapid reset" (CVE-2023-44487).
const MOST_UNSERVED_RESETS: usize = 32;
/// Streams reset by either side that are remembered for a while, so that frames under way for them
/// are no errors.
const REMEMBERED_RESETS: usize = 64;
/// Errors of a peer that HTTP/2 answers with a reset, before it ends the tunnel.
const MOST_ERRORS: usize = 64;

/// Accepts connections for as long as the future is polled, and calls `serve` with each.
pub(super) async fn accept<F: Future<Output = ()> + 'static>(
    listener: TcpListener,
    mut serve: impl FnMut(TcpStream, SocketAddr) -> F,
) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                spawn_local(serve(stream, canonical(from)));
            }
            Err(error) => {
                // A connection that is gone again is no reason to wait.
                if !matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                ) {
                    tracing::warn!(%error, "cannot accept a connection; is the limit on open files reached?");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Serves one tunnel from its first byte to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    netns: Arc<Netns>,
    tcp: TcpStream,
    remote: SocketAddr,
) {
    let started = Instant::now();
    let count = |reason| {
        worker.shared.metrics.handshake(Handshake {
            role: Role::Server,
            reason,
            duration: started.elapsed(),
        });
    };
    let local = tcp.local_addr().map(canonical);
    let limit = worker.timeouts.handshake;
    let shaken = match worker.bounds.arriving(remote.ip()) {
        Ok(arriving) => timeout(limit, shake(&worker, &netns, tcp, remote, arriving))
            .await
            .unwrap_or_else(|_| {
                Err(Refused {
                    reason: HandshakeReason::Timeout,
                    detail: format!("it took longer than {limit:?}"),
                })
            }),
        Err(limit) => Err(Refused::beyond(&worker, limit)),
    };
    match shaken {
        Ok(shaken) => {
            count(HandshakeReason::Ok);
            run(worker, netns, shaken).await;
        }
        Err(refused) => {
            count(refused.reason);
            tell(&worker, &netns, (remote, local.unwrap_or(remote)), &refused);
        }
    }
}

/// Tells log and observers of a tunnel that did not come to stand. Who its client is nobody has proven.
fn tell(
    worker: &Worker,
    netns: &Netns,
    (remote, local): (SocketAddr, SocketAddr),
    refused: &Refused,
) {
    let snapshot = worker.shared.snapshot.load();
    let mut there = snapshot.peers_at(remote.ip());
    let source = match (there.next(), there.next()) {
        (Some(one), None) => one.name.as_str(),
        _ => UNKNOWN,
    };
    let mut here = snapshot.workloads().filter(|running| {
        let netns_of = running.netns.as_ref();
        netns_of.is_some_and(|other| other.cookie == netns.cookie)
            && running.addresses.contains(&local.ip())
    });
    let destination = match (here.next(), here.next()) {
        (Some(one), None) => one.workload.name.as_str(),
        _ => UNKNOWN,
    };
    let connection = telemetry::Connection {
        labels: ConnectionLabels {
            direction: Direction::Ingress,
            transport: Transport::Tunnel,
            source,
            destination,
        },
        source_id: None,
        destination_id: None,
        source_address: remote,
        destination_address: local,
        protocol: protocol::TCP,
        id: None,
        rule: "",
        rule_place: None,
        time: SystemTime::now(),
    };
    let failed = of_handshake(refused.reason);
    let log = &worker.shared.log;
    log.handshake_failed(&connection, failed, refused.reason, &refused.detail);
}

struct Shaken {
    connection: Connection<Wire, Bytes>,
    control: WireControl,
    ends: Ends,
    proven: Proven,
    place: TunnelPlace,
}

struct Refused {
    reason: HandshakeReason,
    detail: String,
}

impl Refused {
    fn beyond(worker: &Worker, limit: Limit) -> Self {
        worker.shared.metrics.limit_reached(limit);
        Self {
            reason: HandshakeReason::Limit,
            detail: TunnelError::Limit(limit).to_string(),
        }
    }
}

impl Refused {
    /// A failed handshake of ours with this certificate.
    fn by_peer(error: io::Error, own: &Svid) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
        let said = tls.and_then(|tls| skew_by_alert(tls, own, SystemTime::now()));
        let refused = Self::from(error);
        match said {
            Some((_, detail)) => Self { detail, ..refused },
            None => refused,
        }
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self {
            reason: HandshakeReason::from(&error),
            detail: RejectReason::explain(&error),
        }
    }
}

/// TLS, and HTTP/2's preface.
async fn shake(
    worker: &Worker,
    netns: &Netns,
    tcp: TcpStream,
    remote: SocketAddr,
    arriving: Arriving,
) -> Result<Shaken, Refused> {
    let local = canonical(tcp.local_addr()?);
    let start = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let none = || Refused {
        reason: HandshakeReason::NoOwnCertificate,
        detail: format!("no workload with a valid certificate is at {local}"),
    };
    let svid = match pick(worker, netns, local, start.client_hello().server_name()) {
        Some(id) => worker.shared.identities.current_soon(&id).await,
        None => None,
    };
    let Some(svid) = svid else {
        // The client learns why instead of seeing a connection that ends.
        let mut tcp = start.io;
        let _ = tcp.write_all(&UNRECOGNIZED_NAME).await;
        let _ = tcp.shutdown().await;
        return Err(none());
    };
    let config = speaking(worker, &svid);
    let shaken = judged(start.into_stream(config)).await.map_err(|error| {
        if let Some(least) = least_skew(&error) {
            worker.shared.metrics.clock_skew(least);
        }
        Refused::by_peer(error, &svid)
    })?;
    let (tcp, tls) = shaken.into_inner();
    // A client that offers no protocol at all passes the TLS library.
    if !matches!(tls.alpn_protocol(), Some(ALPN | PROVABLE_ALPN)) {
        return Err(Refused {
            reason: HandshakeReason::Protocol,
            detail: "the client does not offer HTTP/2 in ALPN".into(),
        });
    }
    let chain = tls.peer_certificates().unwrap_or_default().to_vec();
    let peer = peer_id(&chain).map_err(|reason| Refused {
        reason: reason.handshake_reason(),
        detail: reason.to_string(),
    })?;
    let place = arriving
        .of(&peer)
        .map_err(|limit| Refused::beyond(worker, limit))?;
    let secret = Secret::of(&tls).map_err(io::Error::other)?;
    let provable = secret.is_some();
    let ends = Ends {
        role: Role::Server,
        own: svid.id.clone(),
        peer,
        remote,
        local,
        netns: netns.cookie,
        secret,
    };
    let proven = Proven {
        generation: svid.generation,
        own_not_after: svid.not_after,
        chain,
    };
    let meter = FrameMeter::of_client(worker.limits.control_frames);
    let (wire, control) = wire(tcp, tls.into(), meter);
    let connection = sending(&control, builder(worker, provable).handshake(wire))
        .await?
        .map_err(|error| Refused {
            reason: HandshakeReason::Protocol,
            detail: error.to_string(),
        })?;
    Ok(Shaken {
        connection,
        control,
        ends,
        proven,
        place,
    })
}

/// The identity to prove: of the workload here that the client's server name asks for, else
/// of the one that was declared first with the address.
fn pick(
    worker: &Worker,
    netns: &Netns,
    local: SocketAddr,
    server_name: Option<&str>,
) -> Option<SpiffeId> {
    let snapshot = worker.shared.snapshot.load();
    let id = |running: &Arc<RunningWorkload>| running.workload.attributes.spiffe_id.clone();
    let here = || {
        snapshot.workloads().filter(|running| {
            running
                .netns
                .as_ref()
                .is_some_and(|other| other.cookie == netns.cookie)
        })
    };
    let named =
        server_name.and_then(|name| here().map(id).find(|id| server_name_matches(name, id)));
    named.or_else(|| {
        here()
            .find(|running| running.addresses.contains(&local.ip()))
            .map(id)
    })
}

/// What the workload's certificate is presented with, without the protocol of tunnels that are proven
/// again where none are.
fn speaking(worker: &Worker, svid: &Svid) -> Arc<ServerConfig> {
    if worker.shared.proofs {
        return svid.server.clone();
    }
    let mut config = ServerConfig::clone(&svid.server);
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// In a tunnel that can be proven again there is one stream more, for the proof.
pub(super) fn builder(worker: &Worker, provable: bool) -> Builder {
    let limits = &worker.limits;
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(limits.streams_per_tunnel + u32::from(provable))
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(limits.tunnel_window)
        .max_frame_size(FULL_FRAME)
        .data_frame_budget(SMALL_FRAMES)
        .max_header_list_size(limits.header_list)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_pending_accept_reset_streams(MOST_UNSERVED_RESETS)
        .max_local_error_reset_streams(Some(MOST_ERRORS));
    builder
}

/// Carries the tunnel until it ends.
async fn run(worker: Rc<Worker>, netns: Arc<Netns>, shaken: Shaken) {
    let _place = shaken.place;
    let link = worker.links.insert(Link::new(shaken.ends, shaken.proven));
    judge(&worker, &link, SystemTime::now());
    if worker.draining.get() || (worker.leaving.get() && !link.is_provable()) {
        link.retire();
    }
    if !worker.is_home(netns.cookie) {
        link.abandon();
    }
    let on_stream = {
        let (worker, link) = (worker.clone(), link.value().clone());
        move |mut stream: Incoming| {
            if !link.is_in_time() {
                return;
            }
            if proof::is_asked(&link, &stream.0) {
                spawn_local(proof::answer(worker.clone(), link.clone(), stream));
                return;
            }
            // A GOAWAY would rule out proofs as well: so each stream is refused, and asked for again
            // in a tunnel to the other daemon.
            if worker.leaving.get() && link.is_provable() {
                stream.1.send_reset(h2::Reason::REFUSED_STREAM);
                return;
            }
            spawn_local(inbound::serve(
                worker.clone(),
                netns.clone(),
                link.clone(),
                stream,
            ));
        }
    };
    worker.shared.metrics.tunnels_open(Role::Server, 1);
    let last = shaken.control.last();
    let driver = Driver::new(
        &worker,
        shaken.connection,
        shaken.control,
        link.value().clone(),
        on_stream,
    );
    let end: End = driver.await;
    worker.shared.metrics.tunnels_open(Role::Server, -1);
    worker.ended(&link, &end);
    drop(link);
    last.linger().await;
}
