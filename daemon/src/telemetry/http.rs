//! The HTTP endpoint: `/metrics`, `/healthz`, `/readyz`.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

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
    sync::{Semaphore, watch},
    time::timeout,
};

use super::Metrics;

/// Connections served at the same time; the next one waits to be accepted.
const MAX_CONNECTIONS: usize = 32;
/// For the head of a request to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Life of a connection: no scraper may hold its place for ever.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);
/// Largest head of a request in bytes.
const MAX_HEAD: usize = 16 << 10;
/// After `accept` failed, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");

/// What keeps the daemon from calling itself ready, each with the reason; ready when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Readiness {
    /// One sentence each.
    pub missing: Vec<String>,
}

/// The endpoint, bound and not yet serving.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    readiness: watch::Receiver<Readiness>,
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

// === impl HttpServer ===

impl HttpServer {
    /// Binds `address`.
    ///
    /// # Errors
    /// From the kernel.
    pub async fn bind(
        address: SocketAddr,
        metrics: Metrics,
        readiness: watch::Receiver<Readiness>,
    ) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            shared: Arc::new(Shared { metrics, readiness }),
        })
    }

    /// Where it listens: the port that the kernel chose, when 0 was asked for.
    ///
    /// # Errors
    /// From the kernel.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves for as long as the future is polled.
    pub async fn serve(self) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Taken before `accept`, so that a flood waits in the kernel's bounded queue.
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let shared = self.shared.clone();
                    tokio::spawn(async move {
                        let _ = timeout(CONNECTION_TIMEOUT, connection(stream, shared)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the metrics endpoint could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = respond(&request, &shared);
        async move { Ok::<_, Infallible>(response) }
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

fn respond(request: &Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => match shared.metrics.render() {
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
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => {
            let readiness = shared.readiness.borrow();
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

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn start(readiness: Readiness) -> (SocketAddr, watch::Sender<Readiness>) {
        let (sender, receiver) = watch::channel(readiness);
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = HttpServer::bind(loopback, Metrics::default(), receiver)
            .await
            .unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(server.serve());
        (address, sender)
    }

    async fn request(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_are_prometheus_text() {
        let (address, _sender) = start(Readiness::default()).await;
        let answer = request(address, "GET /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("content-type: text/plain; version=0.0.4"));
        assert!(answer.contains("# TYPE reeve_build_info gauge"));
    }

    #[tokio::test]
    async fn readyz_says_what_is_missing_and_changes_with_it() {
        let (address, sender) = start(Readiness {
            missing: vec!["workload web has no certificate".into()],
        })
        .await;
        let answer = request(address, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("- workload web has no certificate\n"));
        assert!(
            request(address, "GET /healthz")
                .await
                .starts_with("HTTP/1.1 200")
        );

        sender.send(Readiness::default()).unwrap();
        assert!(
            request(address, "GET /readyz")
                .await
                .starts_with("HTTP/1.1 200")
        );
    }

    #[tokio::test]
    async fn other_methods_and_paths_are_refused() {
        let (address, _sender) = start(Readiness::default()).await;
        assert!(
            request(address, "POST /metrics")
                .await
                .starts_with("HTTP/1.1 405")
        );
        assert!(request(address, "GET /").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_is_dropped() {
        let (address, _sender) = start(Readiness::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer).await;
        assert!(read.is_err() || answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"));
    }
}
