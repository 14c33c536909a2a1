//! One stream that a peer opened: judged with the client's authenticated identity and the real
//! port, and connected to the application.

use std::{future::poll_fn, net::SocketAddr, os::fd::AsFd, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use reeve_common::{Direction, WorkloadId};
use tokio::{net::TcpStream, select, time::timeout};

use crate::datapath::{netns::Netns, speak_as};

use super::{
    TunnelError, authority,
    bounds::Place,
    connection::{Call, Live, Parties, Would},
    copy::copy,
    driver::Incoming,
    link::Link,
    proof, said, socket,
    worker::Worker,
};

/// How often is asked whether an application that does not answer is the workload's.
const LISTENER_LOOK: Duration = Duration::from_millis(100);

/// Serves a stream to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    netns: Arc<Netns>,
    link: Rc<Link>,
    (request, mut respond): Incoming,
) {
    // What is beyond is the proof's, where the tunnel can be proven again.
    if link.streams() >= worker.limits.streams_per_tunnel as usize {
        respond.send_reset(h2::Reason::REFUSED_STREAM);
        return;
    }
    let _stream = StreamOf::new(&link);
    let destination = destination(&request);
    let mut call = Call {
        parties: Parties::Inbound {
            workload: None,
            own: link.ends.own.clone(),
            client: link.ends.peer.clone(),
        },
        source: link.ends.remote,
        destination: destination.unwrap_or(link.ends.local),
        netns: netns.cookie,
        rule: 0,
        would: Would::default(),
        id: said::id(&request),
    };
    let connected = match destination {
        Some(_) => connect(&worker, &netns, &link, &mut call, &mut respond).await,
        None => Err(TunnelError::BadRequest),
    };
    let refused = match connected {
        Ok((app, place)) => match begin(&link, &mut respond) {
            Ok(send) => {
                let live = call.open(&worker, &link, place);
                carry(&worker, live, app, send, request.into_body()).await;
                return;
            }
            Err(error) => error,
        },
        Err(error) => error,
    };
    call.refused(&worker, &refused);
    answer(&mut respond, &refused);
}

/// Copies until the connection ends.
async fn carry(
    worker: &Worker,
    live: Live,
    app: TcpStream,
    send: SendStream<Bytes>,
    recv: RecvStream,
) {
    let connection = live.connection().clone();
    // What changed while the application was connected to has not been judged yet.
    connection.judge_again(worker, &worker.shared.snapshot.load());
    let reason = copy(app, send, recv, connection).await;
    live.ended(reason);
}

/// The destination that a CONNECT names.
fn destination(request: &Request<RecvStream>) -> Option<SocketAddr> {
    let uri = request.uri();
    let plain = request.method() == Method::CONNECT
        && uri.scheme().is_none()
        && uri.path_and_query().is_none()
        && request.extensions().get::<h2::ext::Protocol>().is_none();
    plain.then(|| authority::parse(uri.authority()?)).flatten()
}

/// Judges the request, and connects to the application unless the client goes away first. What is
/// found out about the connection goes into `call`.
async fn connect(
    worker: &Worker,
    netns: &Arc<Netns>,
    link: &Link,
    call: &mut Call,
    respond: &mut SendResponse<Bytes>,
) -> Result<(TcpStream, Place), TunnelError> {
    let workload = admit(worker, link, call)?;
    let place = worker.bounds.place(workload, Some(&link.ends.peer))?;
    let limit = worker.timeouts.connect;
    let connecting = to_application(worker, netns, workload, call);
    select! {
        biased;
        connected = timeout(limit, connecting) => match connected {
            Ok(connected) => Ok((connected?, place)),
            Err(_) => Err(TunnelError::ApplicationTimeout(limit)),
        },
        _ = poll_fn(|cx| respond.poll_reset(cx)) => Err(TunnelError::ClientGone),
    }
}

/// Connects to the application with the client's address.
async fn to_application(
    worker: &Worker,
    netns: &Arc<Netns>,
    workload: WorkloadId,
    call: &Call,
) -> Result<TcpStream, TunnelError> {
    let failed = |error: std::io::Error| TunnelError::Application(error.into());
    let (source, destination) = (call.source, call.destination);
    let socket = worker
        .stash
        .to_application(netns, workload, destination)
        .await
        .map_err(failed)?;
    speak_as(&socket, source.ip(), destination).map_err(failed)?;
    // No TCP_USER_TIMEOUT: it would end an application that pauses reading for longer than that,
    // and within a host nothing goes missing unnoticed.
    let stream = socket::begin(socket, destination).map_err(failed)?;
    loop {
        // An application that runs has answered before this begins to wait.
        if let Ok(established) = timeout(LISTENER_LOOK, socket::established(&stream)).await {
            return established.map(|()| stream).map_err(failed);
        }
        if worker.shared.storage.met_wrong_listener(stream.as_fd()) {
            return Err(TunnelError::WrongListener);
        }
    }
}

/// The workload that the peer may talk to.
fn admit(worker: &Worker, link: &Link, call: &mut Call) -> Result<WorkloadId, TunnelError> {
    let snapshot = worker.shared.snapshot.load();
    let destination = call.destination;
    // Both the address that the tunnel was opened to, and one of the workload that it reaches.
    if destination.ip() != link.ends.local.ip() {
        return Err(TunnelError::WrongAuthority);
    }
    let running = snapshot
        .workload_at(call.netns, destination.ip(), destination.port())
        .filter(|running| running.workload.attributes.spiffe_id == link.ends.own)
        .ok_or(TunnelError::WrongAuthority)?;
    if let Parties::Inbound { workload, .. } = &mut call.parties {
        *workload = Some(running.workload.clone());
    }
    if [worker.ports.outbound, worker.ports.tunnel].contains(&destination.port()) {
        return Err(TunnelError::ReservedPort);
    }
    let decision = call.judge(&snapshot)?;
    call.allowed_by(&decision);
    let metrics = &worker.shared.metrics;
    metrics.verdict(Direction::Ingress, true, decision.reason);
    metrics.rule_verdict(Direction::Ingress, true, snapshot.rule_name(decision.rule));
    call.dry_run(worker, &decision);
    if worker.draining.get() {
        return Err(TunnelError::Shutdown);
    }
    Ok(running.workload.id)
}

/// Tells the client that the connection stands.
fn begin(link: &Link, respond: &mut SendResponse<Bytes>) -> Result<SendStream<Bytes>, TunnelError> {
    respond
        .send_response(proof::accepting(link), false)
        .map_err(|_| TunnelError::ClientGone)
}

fn status_for(error: &TunnelError) -> StatusCode {
    match error {
        TunnelError::BadRequest => StatusCode::BAD_REQUEST,
        TunnelError::WrongAuthority => StatusCode::MISDIRECTED_REQUEST,
        TunnelError::Denied(_) => StatusCode::UNAUTHORIZED,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn answer(respond: &mut SendResponse<Bytes>, error: &TunnelError) {
    let mut response = Response::new(());
    *response.status_mut() = status_for(error);
    said::say(&mut response, error);
    // A client that is gone needs no answer.
    let _ = respond.send_response(response, true);
}

/// Counts a stream among its tunnel's for as long as it is served.
struct StreamOf(Rc<Link>);

impl StreamOf {
    fn new(link: &Rc<Link>) -> Self {
        link.stream_opened();
        Self(link.clone())
    }
}

impl Drop for StreamOf {
    fn drop(&mut self) {
        self.0.stream_ended();
    }
}
