//! A server of tunnels.

use std::{
    future::poll_fn,
    net::{Ipv6Addr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Request, Response};
use rustls::{HandshakeKind, ServerConfig};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinHandle};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{raw, runtime, tls};
use crate::{Place, certs::Issued, wait};

/// What a server does with those who come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// Accepts the TCP connection and says nothing at all.
    Silence,
    /// Sends a byte of nonsense that begins like a TLS record, then another each 100 ms.
    Dripping,
    /// Speaks TLS and says nothing of HTTP/2.
    OnlyTls,
    /// Speaks HTTP/2 and answers no request.
    NoAnswer,
    /// Sends PINGs without end.
    Flooding,
    /// Answers every request with this status.
    Answer(u16),
    /// Answers 200 and reads nothing more.
    NoReading,
    /// Answers 200, and then nothing any more, no PING either.
    Freezing,
    /// Answers 200 and sends back what comes.
    Echo,
    /// As [`Conduct::Echo`], and ends each tunnel with its first stream.
    EchoOnce,
}

/// A client that came as far as a TLS handshake.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The SPIFFE ID that it presented.
    pub presented: String,
    /// The name that it asked for.
    pub server_name: Option<String>,
    /// It offered a session from before.
    pub resumed: bool,
}

/// Stands where a workload's tunnel should be, and checks nothing. It ends when dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Mutex<Shared>>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    config: Arc<ServerConfig>,
    conduct: Conduct,
    seen: Vec<Seen>,
    failed: Vec<String>,
    authorities: Vec<String>,
    connections: Vec<JoinHandle<()>>,
}

// === impl Server ===

impl Server {
    /// Listens at all addresses of a place.
    #[must_use]
    pub fn start(place: &Place, port: u16, certificate: &Issued, conduct: Conduct) -> Self {
        let netns = place.netns().expect("the place has a namespace");
        let listener = netns
            .enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))
            .unwrap_or_else(|error| panic!("listening on port {port}: {error}"));
        let shared = Arc::new(Mutex::new(Shared {
            config: Arc::new(tls::server_config(certificate)),
            conduct,
            seen: Vec::new(),
            failed: Vec::new(),
            authorities: Vec::new(),
            connections: Vec::new(),
        }));
        let accepting = runtime().spawn(accept(listener, shared.clone()));
        Self { shared, accepting }
    }

    /// Presents another certificate from now on.
    pub fn present(&self, certificate: &Issued) {
        lock(&self.shared).config = Arc::new(tls::server_config(certificate));
    }

    /// Does something else with those who come from now on.
    pub fn conduct(&self, conduct: Conduct) {
        lock(&self.shared).conduct = conduct;
    }

    /// Whoever finished a TLS handshake until now.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared).seen.clone()
    }

    /// Why TLS handshakes failed until now.
    #[must_use]
    pub fn failed(&self) -> Vec<String> {
        lock(&self.shared).failed.clone()
    }

    /// What was asked for until now.
    #[must_use]
    pub fn authorities(&self) -> Vec<String> {
        lock(&self.shared).authorities.clone()
    }

    /// Connections that the other side has not closed.
    #[must_use]
    pub fn open(&self) -> usize {
        let mut shared = lock(&self.shared);
        shared.connections.retain(|task| !task.is_finished());
        shared.connections.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&self.accepting);
        // Not under the lock, which they take themselves.
        let connections = std::mem::take(&mut lock(&self.shared).connections);
        connections.iter().for_each(end);
    }
}

/// Ends a task. Its sockets are closed, and their ports are free, only when it has gone.
fn end(task: &JoinHandle<()>) {
    task.abort();
    wait::until(wait::SOON, || task.is_finished().then_some(()));
}

/// Nothing that is done under this lock can fail half way.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, shared: Arc<Mutex<Shared>>) {
    listener
        .set_nonblocking(true)
        .expect("making a socket non-blocking");
    let listener = tokio::net::TcpListener::from_std(listener).expect("watching a socket");
    while let Ok((tcp, _)) = listener.accept().await {
        let connection = runtime().spawn(serve(tcp, shared.clone()));
        lock(&shared).connections.push(connection);
    }
}

async fn serve(tcp: TcpStream, shared: Arc<Mutex<Shared>>) {
    let (config, conduct) = {
        let shared = lock(&shared);
        (shared.config.clone(), shared.conduct)
    };
    if matches!(conduct, Conduct::Silence | Conduct::Dripping) {
        return until_closed(&tcp, conduct).await;
    }
    let stream = match TlsAcceptor::from(config).accept(tcp).await {
        Ok(stream) => stream,
        Err(error) => {
            lock(&shared).failed.push(error.to_string());
            return;
        }
    };
    lock(&shared).seen.push(seen(&stream));
    if conduct == Conduct::OnlyTls {
        return until_closed(stream.get_ref().0, conduct).await;
    }
    if conduct == Conduct::Flooding {
        return flood(stream).await;
    }
    // Whatever ends the tunnel: the test asks the daemon for its view.
    let _ = serve_http(stream, conduct, &shared).await;
}

fn seen(stream: &TlsStream<TcpStream>) -> Seen {
    let (_, tls) = stream.get_ref();
    let chain = tls.peer_certificates().unwrap_or_default();
    Seen {
        presented: chain.first().map(tls::spiffe_id).unwrap_or_default(),
        server_name: tls.server_name().map(str::to_owned),
        resumed: tls.handshake_kind() == Some(HandshakeKind::Resumed),
    }
}

/// Holds a connection until the other side closes it.
async fn until_closed(tcp: &TcpStream, conduct: Conduct) {
    let mut bytes = [22, 3, 3, 64, 0].into_iter();
    let mut sink = [0; 4096];
    loop {
        if conduct == Conduct::Dripping {
            let _ = tcp.try_write(&[bytes.next().unwrap_or(2)]);
        }
        tokio::time::sleep(wait::PAUSE * 20).await;
        match tcp.try_read(&mut sink) {
            Ok(0) => return,
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

/// Sends settings, so that the tunnel stands, and then PINGs until the other side hangs up.
async fn flood(mut stream: TlsStream<TcpStream>) {
    let pings = raw::ping().repeat(1000);
    let mut next = raw::settings(&[]);
    while stream.write_all(&next).await.is_ok() {
        next.clone_from(&pings);
    }
}

async fn serve_http(
    stream: TlsStream<TcpStream>,
    conduct: Conduct,
    shared: &Mutex<Shared>,
) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    let mut held = Vec::new();
    while let Some(stream) = connection.accept().await {
        let (request, response) = stream?;
        if let Some(authority) = request.uri().authority() {
            lock(shared).authorities.push(authority.to_string());
        }
        match conduct {
            Conduct::Answer(status) => {
                answer(response, status, true)?;
            }
            Conduct::NoReading => {
                let send = answer(response, 200, false)?;
                held.push((Some(send), None, request));
            }
            Conduct::Freezing => {
                let send = answer(response, 200, false)?;
                // The answer goes out, and that is all.
                let once = poll_fn(|cx| {
                    let _ = connection.poll_closed(cx);
                    Poll::Ready(())
                });
                once.await;
                let _held = (send, request);
                return std::future::pending().await;
            }
            Conduct::Echo | Conduct::EchoOnce => {
                let send = answer(response, 200, false)?;
                if conduct == Conduct::EchoOnce {
                    connection.graceful_shutdown();
                }
                runtime().spawn(echo(request, send));
            }
            _ => held.push((None, Some(response), request)),
        }
    }
    Ok(())
}

fn answer(
    mut response: SendResponse<Bytes>,
    status: u16,
    end: bool,
) -> Result<SendStream<Bytes>, h2::Error> {
    let mut head = Response::new(());
    *head.status_mut() = status.try_into().expect("it is an HTTP status");
    response.send_response(head, end)
}

async fn echo(request: Request<RecvStream>, mut send: SendStream<Bytes>) -> Result<(), h2::Error> {
    let mut body = request.into_body();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        // What ends a stream is often empty, and HTTP/2 takes but a hundred empty frames in a tunnel's life.
        if !chunk.is_empty() {
            send.send_data(chunk, false)?;
        }
    }
    send.send_data(Bytes::new(), true)
}
