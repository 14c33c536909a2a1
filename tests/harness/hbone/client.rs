//! A client of tunnels.

use std::{
    future::poll_fn,
    net::{SocketAddr, TcpStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::{Ping, RecvStream, SendStream, client::SendRequest};
use http::{Method, Request};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, pki_types::ServerName};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{PATIENCE, runtime, tls, wait_for};
use crate::{Place, certs::Issued};

/// In which a server answers that is willing to.
const BRIEFLY: Duration = Duration::from_millis(500);

/// Opens tunnels from somewhere, with whatever certificate it is given, to anybody.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
    config: ClientConfig,
    server_name: ServerName<'static>,
}

/// What a client learns from a TLS handshake that the server was content with.
#[derive(Clone, Debug)]
pub struct Handshake {
    /// The SPIFFE ID that the server presented; of a resumed session, the stored one.
    pub presented: String,
    /// The server accepted a session that the client offered.
    pub resumed: bool,
    /// Sessions that the server offered for later.
    pub tickets: u32,
}

/// A tunnel that the server was content with.
#[derive(Debug)]
pub struct Tunnel {
    /// The SPIFFE ID that the server presented.
    pub presented: String,
    request: SendRequest<Bytes>,
    connection: tokio::task::JoinHandle<Result<(), h2::Error>>,
    frozen: Arc<AtomicBool>,
}

/// The answer to a request, and the stream.
#[derive(Debug)]
pub struct Stream {
    /// HTTP status.
    pub status: u16,
    /// Number of headers beside it.
    pub headers: usize,
    send: SendStream<Bytes>,
    recv: RecvStream,
}

// === impl Client ===

impl Client {
    /// Without a certificate, and asking for no identity.
    #[must_use]
    pub fn new(place: &Place) -> Self {
        Self {
            place: place.clone(),
            config: tls::client_config(None),
            server_name: ServerName::try_from("none.invalid").expect("it is a name"),
        }
    }

    /// With a certificate.
    #[must_use]
    pub fn presenting(self, certificate: &Issued) -> Self {
        let mut config = tls::client_config(Some(certificate));
        config.alpn_protocols = self.config.alpn_protocols;
        config.enable_sni = self.config.enable_sni;
        Self { config, ..self }
    }

    /// With other protocols than `h2` in ALPN; none, without ALPN.
    #[must_use]
    pub fn alpn(mut self, protocols: &[&str]) -> Self {
        self.config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().into())
            .collect();
        self
    }

    /// Sends this name for the server to choose its certificate by.
    #[must_use]
    pub fn server_name(mut self, name: &str) -> Self {
        self.server_name = ServerName::try_from(name.to_owned()).expect("it is a DNS name");
        self.config.enable_sni = true;
        self
    }

    /// Asks for this identity as reeve's own client does.
    #[must_use]
    pub fn asking_for(self, spiffe_id: &str) -> Self {
        let hash = Sha256::digest(spiffe_id);
        let name: String = hash
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.server_name(&format!("{name}.svid.reeve.internal"))
    }

    /// The first message of a handshake, which nobody has sent.
    #[must_use]
    pub fn hello(&self) -> Vec<u8> {
        let config = Arc::new(self.config.clone());
        let mut tls = ClientConnection::new(config, self.server_name.clone())
            .expect("the configuration is right");
        let mut hello = Vec::new();
        tls.write_tls(&mut hello).expect("a vector takes it all");
        hello
    }

    /// A TLS handshake and nothing more.
    ///
    /// # Errors
    /// When the server is not content: in TLS 1.3 its alert comes after the client's own end.
    pub fn handshake(&self, to: SocketAddr) -> Result<Handshake, String> {
        wait_for("the TLS handshake", async {
            let mut stream = self.tls(to).await?;
            // What comes first of HTTP/2, after tickets.
            let mut first = [0];
            stream.read_exact(&mut first).await.map_err(text)?;
            let (_, tls) = stream.get_ref();
            Ok(Handshake {
                presented: presented(&stream),
                resumed: tls.handshake_kind() == Some(HandshakeKind::Resumed),
                tickets: tls.tls13_tickets_received(),
            })
        })
    }

    /// TLS, to its end, and then nothing: gives the TCP connection below.
    #[must_use]
    pub fn only_tls(&self, to: SocketAddr) -> TcpStream {
        let stream = wait_for("the TLS handshake", self.tls(to)).expect("a TLS handshake");
        let (tcp, _) = stream.into_inner();
        let tcp = tcp.into_std().expect("a socket");
        tcp.set_nonblocking(false).expect("a socket");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a socket");
        tcp
    }

    /// A tunnel.
    ///
    /// # Errors
    /// When the server does not want it.
    pub fn tunnel(&self, to: SocketAddr) -> Result<Tunnel, String> {
        self.tunnel_with(to, &h2::client::Builder::new())
    }

    /// A tunnel with other settings of HTTP/2.
    ///
    /// # Errors
    /// When the server does not want it.
    pub fn tunnel_with(
        &self,
        to: SocketAddr,
        settings: &h2::client::Builder,
    ) -> Result<Tunnel, String> {
        wait_for("the tunnel", async {
            let stream = self.tls(to).await?;
            let presented = presented(&stream);
            let (request, mut connection) = settings.handshake(stream).await.map_err(text)?;
            let mut pings = connection.ping_pong().ok_or("no PING")?;
            let frozen = Arc::new(AtomicBool::new(false));
            let freezing = frozen.clone();
            let connection = runtime().spawn(poll_fn(move |cx| {
                if freezing.load(Ordering::Relaxed) {
                    return Poll::Pending;
                }
                Pin::new(&mut connection).poll(cx)
            }));
            // The server is content once it answers.
            if let Err(error) = pings.ping(Ping::opaque()).await {
                // The connection itself knows better.
                let why = connection.await.map_err(text)?.err().unwrap_or(error);
                return Err(why.to_string());
            }
            Ok(Tunnel {
                presented,
                request,
                connection,
                frozen,
            })
        })
    }

    /// A TCP connection and nothing more.
    ///
    /// # Errors
    /// When it is refused.
    pub fn tcp(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        let netns = self.place.netns().expect("the place has a namespace");
        let stream = netns.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    pub(super) async fn tls(
        &self,
        to: SocketAddr,
    ) -> Result<TlsStream<tokio::net::TcpStream>, String> {
        let tcp = self.tcp(to).map_err(text)?;
        tcp.set_nonblocking(true).map_err(text)?;
        let tcp = tokio::net::TcpStream::from_std(tcp).map_err(text)?;
        TlsConnector::from(Arc::new(self.config.clone()))
            .connect(self.server_name.clone(), tcp)
            .await
            .map_err(text)
    }
}

fn connect_to(authority: &str) -> Result<Request<()>, String> {
    let request = Request::builder().method(Method::CONNECT).uri(authority);
    request.body(()).map_err(text)
}

fn presented(stream: &TlsStream<tokio::net::TcpStream>) -> String {
    let (_, tls) = stream.get_ref();
    let chain = tls.peer_certificates().unwrap_or_default();
    chain.first().map(tls::spiffe_id).unwrap_or_default()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

// === impl Tunnel ===

impl Tunnel {
    /// Asks for a connection to `authority`.
    ///
    /// # Errors
    /// When there is no answer, but an end of the stream or of the tunnel.
    pub fn connect(&self, authority: &str) -> Result<Stream, String> {
        self.ask(connect_to(authority)?)
    }

    /// Asks for a connection to `authority` and resets the stream without waiting for an answer.
    ///
    /// # Errors
    /// When the tunnel has ended.
    pub fn connect_and_leave(&self, authority: &str) -> Result<(), String> {
        let request = self.request.clone();
        wait_for("a request to be sent", async {
            let mut ready = request.ready().await.map_err(text)?;
            let sent = ready.send_request(connect_to(authority)?, false);
            sent.map(drop).map_err(text)
        })
    }

    /// Sends any request.
    ///
    /// # Errors
    /// When there is no answer, but an end of the stream or of the tunnel.
    pub fn ask(&self, request: Request<()>) -> Result<Stream, String> {
        let request_sent = self.request.clone();
        wait_for("an answer", async {
            let mut ready = request_sent.ready().await.map_err(text)?;
            let (response, send) = ready.send_request(request, false).map_err(text)?;
            let response = response.await.map_err(text)?;
            Ok(Stream {
                status: response.status().as_u16(),
                headers: response.headers().len(),
                send,
                recv: response.into_body(),
            })
        })
    }

    /// Reads and sends nothing from now on, and stays connected.
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// Whether a request for `authority` is answered at once, and does not have to wait for others.
    #[must_use]
    pub fn takes_more(&self, authority: &str) -> bool {
        let request = self.request.clone();
        let answered = async {
            let mut ready = request.ready().await.map_err(text)?;
            let sent = ready.send_request(connect_to(authority)?, false);
            let (response, _send) = sent.map_err(text)?;
            response.await.map_err(text)
        };
        runtime().block_on(async {
            let answered = tokio::time::timeout(BRIEFLY, answered).await;
            answered.is_ok_and(|answer| answer.is_ok())
        })
    }

    /// Whether the tunnel has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.connection.is_finished()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

// === impl Stream ===

impl Stream {
    /// Sends bytes, as the window allows.
    ///
    /// # Errors
    /// When the stream has ended.
    pub fn send(&mut self, bytes: impl Into<Bytes>) -> Result<(), String> {
        self.send.send_data(bytes.into(), false).map_err(text)
    }

    /// Ends the direction to the server.
    ///
    /// # Errors
    /// When the stream has ended.
    pub fn finish(&mut self) -> Result<(), String> {
        self.send.send_data(Bytes::new(), true).map_err(text)
    }

    /// What comes next, this many bytes of it.
    ///
    /// # Errors
    /// When the stream ends before.
    pub fn receive_exactly(&mut self, bytes: usize) -> Result<Vec<u8>, String> {
        wait_for("bytes of a stream", async {
            let mut received = Vec::new();
            while received.len() < bytes {
                let chunk = self.recv.data().await.ok_or("the stream has ended")?;
                let chunk = chunk.map_err(text)?;
                self.recv
                    .flow_control()
                    .release_capacity(chunk.len())
                    .map_err(text)?;
                received.extend_from_slice(&chunk);
            }
            Ok(received)
        })
    }

    /// Everything that comes, until its end.
    ///
    /// # Errors
    /// When the stream is reset.
    pub fn receive(&mut self) -> Result<Vec<u8>, String> {
        wait_for("the end of a stream", async {
            let mut received = Vec::new();
            while let Some(chunk) = self.recv.data().await {
                let chunk = chunk.map_err(text)?;
                self.recv
                    .flow_control()
                    .release_capacity(chunk.len())
                    .map_err(text)?;
                received.extend_from_slice(&chunk);
            }
            Ok(received)
        })
    }
}
