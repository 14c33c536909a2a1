//! The HTTP endpoint: `/metrics`, `/healthz`, `/readyz`.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{oneshot, watch},
    time::timeout,
};

use super::Metrics;
use crate::{endpoint, privileges::Confinement};

/// Connections served at the same time; one more ends the oldest.
const MAX_CONNECTIONS: usize = 32;
/// For the head of a request to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Life of a connection: no scraper may hold its place for ever.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);
/// Largest head of a request in bytes.
const MAX_HEAD: usize = 16 << 10;
/// For the daemon to start: programs are verified, and policies compiled.
const STARTING: Duration = Duration::from_secs(120);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");

/// What keeps the daemon from calling itself ready, each with the reason; ready when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Readiness {
    /// One sentence each.
    pub missing: Vec<String>,
}

/// Whether the daemon still works, when it was last looked at.
#[derive(Clone, Debug)]
pub struct Health {
    /// What does not answer.
    pub problem: Option<String>,
    /// When this was so.
    pub at: Instant,
    /// For how long it counts: whoever looks may hang as well.
    pub valid: Duration,
}

/// What the endpoint tells, besides metrics.
#[derive(Clone, Debug)]
pub struct Told {
    /// For `/readyz`.
    pub readiness: watch::Receiver<Readiness>,
    /// For `/healthz`.
    pub health: watch::Receiver<Health>,
}

/// The endpoint, bound and not yet serving.
#[derive(Debug)]
pub struct HttpServer {
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    /// Life of a connection.
    lifetime: Duration,
}

/// The endpoint, serving; it accepts nothing more once this is dropped.
#[derive(Debug)]
pub struct HttpServing(#[expect(dead_code, reason = "only its end counts")] oneshot::Sender<()>);

#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    told: Told,
    /// Where the metrics are gathered: what they are read from needs privileges that reading
    /// requests must not have.
    gather: Handle,
}

// === impl Readiness ===

impl Readiness {
    /// Of a daemon that has only begun.
    #[must_use]
    pub fn starting() -> Self {
        Self {
            missing: vec!["the daemon is starting".to_owned()],
        }
    }

    /// Whether nothing is missing.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.missing.is_empty()
    }
}

// === impl Health ===

impl Health {
    /// Of a daemon that has only begun: good for as long as starting may take.
    #[must_use]
    pub fn starting() -> Self {
        Self {
            problem: None,
            at: Instant::now(),
            valid: STARTING,
        }
    }

    /// What is wrong now.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let silent = self.at.elapsed();
        match &self.problem {
            Some(problem) => Some(problem.clone()),
            None if silent > self.valid => Some(format!(
                "nothing has been heard of the daemon for {} s",
                silent.as_secs()
            )),
            None => None,
        }
    }
}

// === impl HttpServer ===

impl HttpServer {
    /// Binds `address`. Called in the runtime in which metrics are to be gathered.
    ///
    /// # Errors
    /// From the kernel.
    pub fn bind(address: SocketAddr, metrics: Metrics, told: Told) -> io::Result<Self> {
        Self::adopt(std::net::TcpListener::bind(address)?, metrics, told)
    }

    /// Takes over the socket of a daemon before. Called in the runtime in which metrics are to be
    /// gathered.
    ///
    /// # Errors
    /// From the kernel.
    pub fn adopt(
        listener: std::net::TcpListener,
        metrics: Metrics,
        told: Told,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            shared: Arc::new(Shared {
                metrics,
                told,
                gather: Handle::current(),
            }),
            lifetime: CONNECTION_TIMEOUT,
        })
    }

    /// Another descriptor of the socket, for a daemon that takes over.
    ///
    /// # Errors
    /// From the kernel.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// Where it listens: the port that the kernel chose, when 0 was asked for.
    ///
    /// # Errors
    /// From the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves on a thread of its own, which has no privileges, until what is given back is dropped:
    /// then nothing more is accepted.
    ///
    /// # Errors
    /// When the thread cannot be made, or keeps what it must not have.
    pub fn start(self, confinement: Confinement) -> io::Result<HttpServing> {
        let (serving, stopped) = oneshot::channel();
        confinement.serve_exposed("http", move || self.serve(stopped))?;
        Ok(HttpServing(serving))
    }

    /// Serves whoever is accepted until it is stopped.
    async fn serve(self, stopped: oneshot::Receiver<()>) {
        let listener = TcpListener::from_std(self.listener);
        let (shared, lifetime) = (self.shared, self.lifetime);
        let serve = |stream| {
            let shared = shared.clone();
            async move {
                let _ = timeout(lifetime, connection(stream, shared)).await;
            }
        };
        endpoint::serve_newest(
            "the metrics endpoint",
            listener,
            MAX_CONNECTIONS,
            stopped,
            serve,
        )
        .await;
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(respond(&request, &shared).await) }
    });
    let result = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = result {
        tracing::debug!(%error, "a connection to the metrics endpoint ended badly");
    }
}

async fn respond(request: &Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => match gather(shared).await {
            Ok(body) => {
                let mut response = text(StatusCode::OK, body);
                response.headers_mut().insert(CONTENT_TYPE, METRICS_TEXT);
                response
            }
            Err(error) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("metrics could not be collected: {error}\n"),
            ),
        },
        "/healthz" => match shared.told.health.borrow().problem() {
            None => text(StatusCode::OK, "ok\n"),
            Some(problem) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
        },
        "/readyz" => {
            let readiness = shared.told.readiness.borrow();
            if readiness.is_ready() {
                text(StatusCode::OK, "ready\n")
            } else {
                let body = format!("not ready:\n- {}\n", readiness.missing.join("\n- "));
                text(StatusCode::SERVICE_UNAVAILABLE, body)
            }
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n",
        ),
    }
}

/// The metrics as text, gathered where that is allowed.
async fn gather(shared: &Shared) -> Result<String, String> {
    let metrics = shared.metrics.clone();
    let gathered = shared.gather.spawn(async move { metrics.render() });
    match gathered.await {
        Ok(text) => text.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}

#[cfg(test)]
mod tests;
