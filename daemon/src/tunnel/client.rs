//! Opens a tunnel to a peer, and asks for a stream in one.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    client::{Builder, Connection, SendRequest},
};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use rustls::ClientConfig;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{
    datapath::{netns::Netns, speak_from},
    identity::{
        ALPN, PROVABLE_ALPN, RejectReason, SpiffeId, Svid, judged, least_skew, server_name_for,
        skew_by_alert,
    },
    policy::Snapshot,
    telemetry::{ConnectionId, Handshake, HandshakeReason, Role},
};

use super::{
    TunnelError, authority,
    driver::{Driver, End, Protocol},
    error::Stage,
    first::FirstBytes,
    frames::FrameMeter,
    link::{Ends, Link, Proven},
    proof::Secret,
    registry::Registered,
    said, socket,
    sweep::judge,
    wire::{FULL_FRAME, SMALL_FRAMES, Wire, WireControl, wire},
    worker::Worker,
};

/// Streams that a tunnel may have before the peer has said how many: none. Its settings are the
/// first thing that it sends once it has accepted our certificate, so they say that the tunnel
/// stands, which in TLS 1.3 the end of our own handshake does not.
const STREAMS_BEFORE_SETTINGS: usize = 0;
/// Bytes of one stream that HTTP/2 holds before it says that it is full: some reads ahead of what
/// the tunnel sends in one turn.
pub(super) const SEND_BUFFER: usize = 256 << 10;

/// Where a tunnel goes, and as whom.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) netns: Arc<Netns>,
    pub(super) svid: Arc<Svid>,
    /// The address that it comes from, where the kernel is not to choose one.
    pub(super) source: Option<IpAddr>,
    /// The peer's tunnel port.
    pub(super) peer: SocketAddr,
    /// The identity that the peer must prove.
    pub(super) expected: SpiffeId,
}

/// A tunnel that stands and takes streams.
pub(super) struct Tunnel {
    pub(super) link: Registered<Link>,
    pub(super) request: SendRequest<Bytes>,
    driver: Box<dyn Future<Output = End> + Unpin>,
    last: WireControl,
}

/// Why a CONNECT request got no stream.
pub(super) enum NoStream {
    /// The peer has not looked at it: another tunnel may be tried.
    Unprocessed,
    /// The tunnel's server does not have the address, or not any more: one that is opened now may reach
    /// who has it.
    Disowned(TunnelError),
    /// It failed for good.
    Failed(TunnelError),
}

/// A tunnel that is not finished: the client's side of TLS is, the peer has not answered.
struct Unanswered {
    request: SendRequest<Bytes>,
    connection: Connection<Wire, Bytes>,
    control: WireControl,
    ends: Ends,
    proven: Proven,
}

// === impl Target ===

impl Target {
    /// Whether a tunnel may come from an address.
    ///
    /// Who rules its own namespace says there by which address the kernel speaks, also by one of another
    /// workload of its identity, whose labels it would have at the far end; and in a namespace that
    /// several share, the kernel may choose one that another workload of the identity declares.
    pub(super) fn speaks_from_own(
        &self,
        snapshot: &Snapshot,
        from: IpAddr,
    ) -> Result<(), TunnelError> {
        match snapshot.owner_of(self.netns.cookie) {
            Some(owner) if !owner.addresses.contains(&from.to_canonical()) => {
                Err(TunnelError::ForgedSource(from))
            }
            // The one that was asked for is the workload's.
            None if self.source.is_none() && snapshot.is_declared(&self.svid.id, from) => {
                Err(TunnelError::DeclaredSource(from))
            }
            _ => Ok(()),
        }
    }
}

// === Opening ===

/// Opens a tunnel. It stands when the peer has sent its settings.
pub(super) async fn open(worker: &Rc<Worker>, target: &Target) -> Result<Tunnel, TunnelError> {
    let (to, limits) = (target.peer, &worker.timeouts);
    let late = |stage, limit| TunnelError::Timeout { stage, to, limit };
    // A peer that is not there holds no place from which others would shake hands.
    let tcp = connect(worker, target).await?;
    let opener = (target.netns.cookie, target.svid.id.clone());
    let waited = Instant::now();
    let place = worker.bounds.opening(&opener, limits.handshake).await;
    let _place = place.map_err(|limit| {
        worker.shared.metrics.handshake(Handshake {
            role: Role::Client,
            reason: HandshakeReason::Limit,
            duration: waited.elapsed(),
        });
        TunnelError::Limit(limit)
    })?;
    let started = Instant::now();
    let result = match timeout(limits.handshake, shake(worker, target, tcp)).await {
        Ok(result) => result,
        Err(_) => Err(late(Stage::Handshake, limits.handshake)),
    };
    worker.shared.metrics.handshake(Handshake {
        role: Role::Client,
        reason: match &result {
            Ok(_) => HandshakeReason::Ok,
            Err(TunnelError::Handshake { reason, .. }) => *reason,
            Err(_) => HandshakeReason::Timeout,
        },
        duration: started.elapsed(),
    });
    let answered = result?;
    let link = worker
        .links
        .insert(Link::new(answered.ends, answered.proven));
    judge(worker, &link, SystemTime::now());
    let last = answered.control.last();
    let driver = Driver::new(
        worker,
        answered.connection,
        answered.control,
        link.value().clone(),
        // A client is asked for nothing.
        |_| {},
    );
    Ok(Tunnel {
        link,
        request: answered.request,
        driver: Box::new(driver),
        last,
    })
}

async fn connect(worker: &Worker, target: &Target) -> Result<TcpStream, TunnelError> {
    let to = target.peer;
    let connecting = async {
        let socket = worker.stash.to_peer(&target.netns, to).await;
        let socket = socket.map_err(|source| TunnelError::Socket {
            to,
            source: source.into(),
        })?;
        if let Some(from) = target.source {
            speak_from(&socket, from, to).map_err(|source| TunnelError::Bind {
                from,
                source: source.into(),
            })?;
        }
        socket::connect(socket, to, Some(worker.timeouts.silent))
            .await
            .map_err(|source| TunnelError::Connect {
                to,
                source: source.into(),
            })
    };
    let limit = worker.timeouts.connect;
    let late = |_| TunnelError::Timeout {
        stage: Stage::Connect,
        to,
        limit,
    };
    let tcp = timeout(limit, connecting).await.map_err(late)??;
    let from = tcp.local_addr().map_err(|source| TunnelError::Connect {
        to,
        source: source.into(),
    })?;
    target.speaks_from_own(&worker.shared.snapshot.load(), from.ip())?;
    Ok(tcp)
}

/// TLS and HTTP/2 until the peer has answered.
async fn shake(
    worker: &Worker,
    target: &Target,
    tcp: TcpStream,
) -> Result<Unanswered, TunnelError> {
    let to = target.peer;
    let failed = |error: io::Error| {
        if let Some(least) = least_skew(&error) {
            worker.shared.metrics.clock_skew(least);
        }
        TunnelError::Handshake {
            to,
            reason: HandshakeReason::from(&error),
            detail: RejectReason::explain(&error).into(),
        }
    };
    let local = tcp.local_addr().map_err(failed)?;
    let config = speaking(worker, target.svid.client(&target.expected));
    let connecting = TlsConnector::from(config).connect(server_name_for(&target.expected), tcp);
    let stream = judged(connecting).await.map_err(failed)?;
    let (tcp, tls) = stream.into_inner();
    // A server that chooses no protocol at all passes the TLS library.
    if !matches!(tls.alpn_protocol(), Some(ALPN | PROVABLE_ALPN)) {
        return Err(TunnelError::Handshake {
            to,
            reason: HandshakeReason::Protocol,
            detail: "the server does not choose HTTP/2 in ALPN".into(),
        });
    }
    let chain = tls.peer_certificates().unwrap_or_default().to_vec();
    let secret = Secret::of(&tls).map_err(|error| failed(io::Error::other(error)))?;
    let ends = Ends {
        role: Role::Client,
        own: target.svid.id.clone(),
        peer: target.expected.clone(),
        remote: to,
        local,
        netns: target.netns.cookie,
        secret,
    };
    let proven = Proven {
        generation: target.svid.generation,
        own_not_after: target.svid.not_after,
        chain,
    };
    let meter = FrameMeter::of_server(worker.limits.control_frames);
    let (wire, control) = wire(tcp, tls.into(), meter);
    let (request, connection) = builder(worker)
        .handshake(wire)
        .await
        .map_err(|error| failed(io::Error::other(error)))?;
    let mut unanswered = Unanswered {
        request,
        connection,
        control,
        ends,
        proven,
    };
    unanswered.answered(worker, &target.svid).await?;
    Ok(unanswered)
}

/// The configuration, without the protocol of tunnels that are proven again where none are.
fn speaking(worker: &Worker, config: Arc<ClientConfig>) -> Arc<ClientConfig> {
    if worker.shared.proofs {
        return config;
    }
    let mut config = ClientConfig::clone(&config);
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

pub(super) fn builder(worker: &Worker) -> Builder {
    let limits = &worker.limits;
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_max_send_streams(STREAMS_BEFORE_SETTINGS)
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(limits.tunnel_window)
        .max_frame_size(FULL_FRAME)
        .data_frame_budget(SMALL_FRAMES)
        .max_header_list_size(limits.header_list)
        .max_send_buffer_size(SEND_BUFFER);
    builder
}

impl Unanswered {
    /// Waits for the peer's settings.
    async fn answered(&mut self, worker: &Worker, own: &Svid) -> Result<(), TunnelError> {
        let result = poll_fn(|cx| {
            if let Poll::Ready(end) = self.connection.poll_next(cx) {
                if self.is_retired(cx) {
                    return Poll::Ready(Ok(()));
                }
                let detail = match end {
                    Some(Err(error)) => error.to_string(),
                    _ => "the peer closed the connection".to_owned(),
                };
                return Poll::Ready(Err(detail));
            }
            if let Poll::Ready(Err(error)) = self.control.poll_send(cx) {
                return Poll::Ready(Err(error.to_string()));
            }
            match self.connection.max_concurrent_send_streams() {
                0 => Poll::Pending,
                _ => Poll::Ready(Ok(())),
            }
        })
        .await;
        result.map_err(|detail| match self.control.fault() {
            Some(fault) => TunnelError::Handshake {
                to: self.ends.remote,
                reason: HandshakeReason::from(&fault),
                detail: match skew_by_alert(&fault, own, SystemTime::now()) {
                    Some((least, said)) => {
                        // The server has proven who it is before it refuses us.
                        worker.shared.metrics.clock_skew(least);
                        said.into()
                    }
                    None => fault.to_string().into(),
                },
            },
            None => TunnelError::Handshake {
                to: self.ends.remote,
                reason: HandshakeReason::Transport,
                detail: detail.into(),
            },
        })
    }

    /// Whether the tunnel stood, and the peer wants no streams in it any more: its certificate was
    /// replaced in this moment, say. Whoever gets it is told so by HTTP/2, and takes another one.
    fn is_retired(&mut self, cx: &mut Context<'_>) -> bool {
        let takes_none = match self.request.poll_ready(cx) {
            Poll::Ready(Err(error)) => error.is_go_away() && error.is_remote(),
            _ => false,
        };
        takes_none && self.connection.max_concurrent_send_streams() > 0
    }
}

// === Running ===

impl Tunnel {
    /// The future carries the tunnel until it ends; then it is time for [`WireControl::linger`].
    pub(super) fn into_parts(
        self,
    ) -> (
        Registered<Link>,
        SendRequest<Bytes>,
        impl Future<Output = End>,
        WireControl,
    ) {
        (self.link, self.request, self.driver, self.last)
    }
}

// === Asking for a stream ===

/// Asks the peer for a connection to `destination`, and sends what the application says meanwhile.
pub(super) async fn request(
    worker: &Worker,
    mut request: SendRequest<Bytes>,
    peer: SocketAddr,
    (destination, id): (SocketAddr, Option<ConnectionId>),
    first: &mut FirstBytes<'_>,
) -> Result<(SendStream<Bytes>, Response<RecvStream>), NoStream> {
    poll_fn(|cx| request.poll_ready(cx))
        .await
        .map_err(|_| NoStream::Unprocessed)?;
    let connect = connect_to(destination, id).ok_or(NoStream::Failed(TunnelError::BadRequest))?;
    let (mut response, mut stream) = request
        .send_request(connect, false)
        .map_err(|_| NoStream::Unprocessed)?;
    drop(request);
    first.again();
    let answered = poll_fn(|cx| {
        if let Poll::Ready(answer) = Pin::new(&mut response).poll(cx) {
            return Poll::Ready(answer.map_err(|error| NoStream::of(&error, peer)));
        }
        match first.poll_send(cx, &mut stream) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(NoStream::Failed(error))),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    });
    let limit = worker.timeouts.request;
    let response = match timeout(limit, answered).await {
        Ok(answer) => answer?,
        Err(_) => {
            return Err(NoStream::Failed(TunnelError::Timeout {
                stage: Stage::Request,
                to: peer,
                limit,
            }));
        }
    };
    match response.status() {
        StatusCode::OK => {
            first.answered(&mut stream);
            Ok((stream, response))
        }
        status => {
            let error = TunnelError::Answer {
                to: peer,
                status: status.as_u16(),
                said: said::of(&response),
            };
            Err(match status {
                StatusCode::MISDIRECTED_REQUEST => NoStream::Disowned(error),
                _ => NoStream::Failed(error),
            })
        }
    }
}

fn connect_to(destination: SocketAddr, id: Option<ConnectionId>) -> Option<Request<()>> {
    let authority = authority::format(destination);
    let uri = Uri::builder().authority(authority).build().ok()?;
    let mut request = Request::builder().method(Method::CONNECT).uri(uri);
    if let Some(id) = id {
        let mut id = HeaderValue::try_from(id.to_string()).ok()?;
        // Never said twice, so it would only displace what is from HPACK's table (RFC 7541, section 7.1.3).
        id.set_sensitive(true);
        request = request.header(said::CONNECTION, id);
    }
    request.body(()).ok()
}

impl NoStream {
    fn of(error: &h2::Error, peer: SocketAddr) -> Self {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        // A stream that GOAWAY ends is one that the peer has not looked at.
        if error.is_remote() && (refused || error.is_go_away()) {
            return Self::Unprocessed;
        }
        Self::Failed(TunnelError::Broken {
            to: peer,
            detail: error.to_string().into(),
        })
    }
}
