//! A tunnel that is proven again underneath its streams (docs/hbone.md).
//!
//! Each end presents the certificate that it has now in a fresh handshake inside of a stream of the
//! tunnel, and then shows that it is the same end as at the tunnel's beginning, by a value that only
//! these two can compute. So connections live on while the certificates change, and at every moment
//! both identities have been proven by certificates that are valid.
//!
//! The client [`ask`]s, at the times of its [`Plan`]; the server [`answer`]s. Each end replaces only what
//! it has verified of the other, and its own generation.

mod plan;
mod secret;
mod stream;

use std::{
    future::poll_fn,
    io,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::SendRequest, server::SendResponse};
use http::{
    Method, Request, Response, StatusCode,
    header::{HeaderName, HeaderValue},
};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    identity::{
        RejectReason, SpiffeId, Svid, UsedCertificate, judged, peer_id, server_name_for,
        verify_chain,
    },
    telemetry::{HandshakeReason, Limit, Role},
};

use super::{
    bounds::ProofPlace,
    driver::Incoming,
    link::{Link, Order, Proven},
    sweep::judge,
    worker::Worker,
};

pub(super) use plan::Plan;
pub(super) use secret::{Fresh, Secret, VALUE};
pub(super) use stream::ProofStream;

/// The authority that asks for a proof: a name, which no workload has.
const AUTHORITY: &str = "proof.reeve.internal:15008";
/// Field of a server's answer to any request: its certificate has been replaced since the tunnel was
/// proven last. Without it the client would learn of it at half of what is left of the old one.
const WANTED: HeaderName = HeaderName::from_static("reeve-proof");
/// The longest that a proof may take, on a slow or crowded wire. Never longer than a quarter of what is
/// left, nor shorter than a handshake.
const LONGEST: Duration = Duration::from_secs(60);
/// From one proof of a tunnel to the next, as a server answers at least.
const ANSWER_PAUSE: Duration = Duration::from_millis(100);
/// Certificates of the far end, not expired yet, that may have proven one tunnel: for each is looked in
/// revocation lists.
const MOST_USED: usize = 256;

/// How a proof succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With a certificate of the far end that is another than before.
    Renewed,
    /// With the same: the far end has none that is newer.
    Same,
}

/// Why a tunnel was not proven again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProofError {
    #[error("the peer answers {0}")]
    Answer(StatusCode),
    #[error("it took longer than {0:?}")]
    Timeout(Duration),
    #[error("{1}")]
    Handshake(HandshakeReason, String),
    #[error("the peer is {0} now")]
    Identity(SpiffeId),
    #[error("the peer does not know what the end of this tunnel knows")]
    Value,
    #[error("the tunnel has ended meanwhile, or what proved it last does not count any more")]
    Late,
    #[error("too many proofs are under way")]
    Limit,
    #[error("more than {MOST_USED} certificates that are still valid have proven it")]
    TooManyCertificates,
    #[error("there is no valid certificate of our own")]
    NoCertificate,
    #[error("the tunnel broke: {0}")]
    Broken(String),
}

/// What a fresh handshake has shown.
struct Shown {
    own: Arc<Svid>,
    chain: Vec<CertificateDer<'static>>,
}

// === The client ===

/// Has a tunnel proven again, unless that is under way.
pub(super) async fn ask(worker: Rc<Worker>, link: Rc<Link>, request: SendRequest<Bytes>) {
    if !link.is_provable() || !link.begin_proof(link.plan.pause(SystemTime::now())) {
        return;
    }
    let result = ask_in_time(&worker, &link, request).await;
    link.end_proof();
    link.plan.ended(result.is_ok());
    if result.is_err() && link.outdated(std::time::Instant::now()).is_some() {
        // A new tunnel may succeed where this one does not.
        link.pause();
    }
    tell(&worker, &link, &result);
}

async fn ask_in_time(
    worker: &Worker,
    link: &Link,
    request: SendRequest<Bytes>,
) -> Result<Outcome, ProofError> {
    let opener = (link.ends.netns, link.ends.own.clone());
    let _place = worker.bounds.asking(&opener).await;
    link.plan
        .asked(SystemTime::now(), worker.timeouts.tunnel_age);
    let limit = limit(worker, link);
    let asking = async {
        let (send, recv) = open(request).await?;
        let shown = show_as_client(worker, link, ProofStream::new(send, recv)).await?;
        put_in_force(worker, link, shown)
    };
    let in_time = timeout(limit, asking).await;
    in_time.map_err(|_| ProofError::Timeout(limit))?
}

/// Opens the stream for a proof.
pub(super) async fn open(
    mut request: SendRequest<Bytes>,
) -> Result<(SendStream<Bytes>, RecvStream), ProofError> {
    poll_fn(|cx| request.poll_ready(cx)).await?;
    let connect = Request::connect(AUTHORITY).body(());
    let connect = connect.map_err(|error| ProofError::Broken(error.to_string()))?;
    let (response, send) = request.send_request(connect, false)?;
    drop(request);
    let response = response.await?;
    match response.status() {
        StatusCode::OK => Ok((send, response.into_body())),
        status => Err(ProofError::Answer(status)),
    }
}

/// Gives what the server has presented, once it has shown to be the other end of the tunnel.
async fn show_as_client(
    worker: &Worker,
    link: &Link,
    stream: ProofStream,
) -> Result<Shown, ProofError> {
    let ends = &link.ends;
    let (own, secret) = own(worker, link)?;
    let connector = TlsConnector::from(own.proof_client(&ends.peer));
    let mut stream = judged(connector.connect(server_name_for(&ends.peer), stream)).await?;
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates().unwrap_or_default().to_vec();
    let (client, server) = (leaf(own.chain())?, leaf(&chain)?);
    let fresh = Fresh::of(session, client, server)?;
    stream
        .write_all(&secret.value(Role::Client, &fresh))
        .await?;
    stream.flush().await?;
    let mut value = [0; VALUE];
    stream.read_exact(&mut value).await?;
    if !secret.is_value(&value, Role::Server, &fresh) {
        return Err(ProofError::Value);
    }
    Ok(Shown { own, chain })
}

// === The server ===

/// The answer to a client whose connection stands.
pub(super) fn accepting(link: &Link) -> Response<()> {
    let mut response = Response::new(());
    if link.is_provable() && link.outdated(std::time::Instant::now()).is_some() {
        let wanted = HeaderValue::from_static("wanted");
        response.headers_mut().insert(WANTED, wanted);
    }
    response
}

/// Whether a server wants to be asked for a proof.
pub(super) fn is_wanted<T>(response: &Response<T>) -> bool {
    response.headers().contains_key(WANTED)
}

/// Whether a request asks for a proof of its tunnel.
pub(super) fn is_asked(link: &Link, request: &Request<RecvStream>) -> bool {
    let authority = request.uri().authority();
    link.is_provable()
        && request.method() == Method::CONNECT
        && authority.is_some_and(|authority| authority.as_str() == AUTHORITY)
}

/// Proves the own identity again, and has the client prove its own.
pub(super) async fn answer(worker: Rc<Worker>, link: Rc<Link>, (request, mut respond): Incoming) {
    let result = match admit(&worker, &link) {
        Ok(place) => {
            let limit = limit(&worker, &link);
            let answering = answer_admitted(&worker, &link, request, respond);
            let in_time = timeout(limit, answering).await;
            link.end_proof();
            drop(place);
            in_time.unwrap_or(Err(ProofError::Timeout(limit)))
        }
        Err(error) => {
            let status = match error {
                ProofError::Limit => StatusCode::TOO_MANY_REQUESTS,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            let mut response = Response::new(());
            *response.status_mut() = status;
            // A client that is gone needs no answer.
            let _ = respond.send_response(response, true);
            Err(error)
        }
    };
    tell(&worker, &link, &result);
}

/// One proof of a tunnel at a time, not too soon after the last, and so many of all tunnels.
fn admit(worker: &Worker, link: &Link) -> Result<ProofPlace, ProofError> {
    if worker.draining.get() {
        return Err(ProofError::Late);
    }
    let place = worker.bounds.proof(&link.ends.peer);
    let place = place.map_err(|limit: Limit| {
        worker.shared.metrics.limit_reached(limit);
        ProofError::Limit
    })?;
    if link.begin_proof(ANSWER_PAUSE) {
        Ok(place)
    } else {
        Err(ProofError::Limit)
    }
}

async fn answer_admitted(
    worker: &Worker,
    link: &Link,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Result<Outcome, ProofError> {
    let (own, secret) = own(worker, link)?;
    let send = respond.send_response(Response::new(()), false)?;
    let stream = ProofStream::new(send, request.into_body());
    let acceptor = TlsAcceptor::from(own.proof_server());
    let mut stream = judged(acceptor.accept(stream)).await?;
    let (_, session) = stream.get_ref();
    let chain = session.peer_certificates().unwrap_or_default().to_vec();
    let (client, server) = (leaf(&chain)?, leaf(own.chain())?);
    let fresh = Fresh::of(session, client, server)?;
    let mut value = [0; VALUE];
    stream.read_exact(&mut value).await?;
    if !secret.is_value(&value, Role::Client, &fresh) {
        return Err(ProofError::Value);
    }
    let answer = secret.value(Role::Server, &fresh);
    let outcome = put_in_force(worker, link, Shown { own, chain })?;
    // What is proven is proven: a client that does not hear of it asks again.
    let _ = stream.write_all(&answer).await;
    let _ = stream.shutdown().await;
    Ok(outcome)
}

// === Both ===

/// The own certificate in force, and what the ends of the tunnel know.
fn own<'a>(worker: &Worker, link: &'a Link) -> Result<(Arc<Svid>, &'a Secret), ProofError> {
    let ends = &link.ends;
    let own = worker.shared.identities.current(&ends.own);
    let secret = ends.secret.as_ref().ok_or(ProofError::Value)?;
    Ok((own.ok_or(ProofError::NoCertificate)?, secret))
}

fn leaf<'a>(
    chain: &'a [CertificateDer<'static>],
) -> Result<&'a CertificateDer<'static>, ProofError> {
    let none = || ProofError::Handshake(HandshakeReason::NoCertificate, "no certificate".into());
    chain.first().ok_or_else(none)
}

/// How long a proof may take.
fn limit(worker: &Worker, link: &Link) -> Duration {
    let left = link.not_after().duration_since(SystemTime::now());
    let shortest = worker.timeouts.handshake;
    (left.unwrap_or_default() / 4).clamp(shortest, LONGEST.max(shortest))
}

/// Takes what was shown in the place of what proved the tunnel before. Nothing changes where that comes
/// too late, or is of another identity.
fn put_in_force(worker: &Worker, link: &Link, shown: Shown) -> Result<Outcome, ProofError> {
    let (ends, now) = (&link.ends, SystemTime::now());
    let stands = judge(worker, link, now).is_some() && link.is_in_time();
    if !stands || matches!(link.order(), Order::Close(_)) {
        return Err(ProofError::Late);
    }
    let peer = peer_id(&shown.chain)?;
    if peer != ends.peer {
        return Err(ProofError::Identity(peer));
    }
    let bundles = worker.shared.identities.trust_of(&ends.own);
    let bundles = bundles.ok_or(ProofError::NoCertificate)?;
    let verify = |chain: &[CertificateDer<'_>]| {
        let (leaf, signers) = chain.split_first().ok_or(RejectReason::Malformed)?;
        verify_chain(&bundles, leaf, signers, now)
    };
    let verified = verify(&shown.chain)?;
    let (mut used, mut outcome) = (Vec::new(), Outcome::Same);
    if link.by().chain != shown.chain {
        let before = link.by();
        used = UsedCertificate::of_path(&before.chain, &verify(&before.chain)?)?;
        if leaf(&before.chain)? != leaf(&shown.chain)? {
            outcome = Outcome::Renewed;
        }
    }
    if link.used(now).len() + used.len() > MOST_USED {
        return Err(ProofError::TooManyCertificates);
    }
    let own_not_after = shown.own.not_after;
    let proven = Proven {
        generation: shown.own.generation,
        own_not_after,
        chain: shown.chain,
    };
    link.prove(proven, used);
    link.accepted(bundles, verified.not_after);
    link.expires(verified.not_after.min(own_not_after));
    Ok(outcome)
}

/// Counts and logs how a proof ended.
fn tell(worker: &Worker, link: &Link, result: &Result<Outcome, ProofError>) {
    let ends = &link.ends;
    let name = match result {
        Ok(Outcome::Renewed) => "ok",
        Ok(Outcome::Same) => "same",
        Err(error) => error.as_str(),
    };
    worker.shared.metrics.tunnel_proof(ends.role, name);
    link.note_proof(result.as_ref().err().map(ToString::to_string));
    match result {
        Ok(_) => tracing::debug!(
            role = ends.role.as_str(),
            id = %ends.own,
            peer_id = %ends.peer,
            peer = %ends.remote,
            result = name,
            "tunnel proven again"
        ),
        Err(error) => worker.shared.log.proof_failed(
            ends.role,
            (ends.remote, &ends.peer),
            &ends.own,
            link.not_after(),
            name,
            error,
        ),
    }
}

// === impl ProofError ===

impl ProofError {
    /// Label value: one of a closed set.
    const fn as_str(&self) -> &'static str {
        match self {
            Self::Answer(_) => "refused",
            Self::Timeout(_) => "timeout",
            Self::Handshake(reason, _) => reason.as_str(),
            Self::Identity(_) => "wrong_identity",
            Self::Value => "wrong_tunnel",
            Self::Late => "late",
            Self::Limit | Self::TooManyCertificates => "limit",
            Self::NoCertificate => "no_own_certificate",
            Self::Broken(_) => "transport",
        }
    }
}

impl From<h2::Error> for ProofError {
    fn from(error: h2::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<io::Error> for ProofError {
    fn from(error: io::Error) -> Self {
        let reason = HandshakeReason::from(&error);
        Self::Handshake(reason, RejectReason::explain(&error))
    }
}

impl From<rustls::Error> for ProofError {
    fn from(error: rustls::Error) -> Self {
        Self::Handshake(HandshakeReason::from(&error), error.to_string())
    }
}

impl From<RejectReason> for ProofError {
    fn from(reason: RejectReason) -> Self {
        Self::Handshake(reason.handshake_reason(), reason.to_string())
    }
}
