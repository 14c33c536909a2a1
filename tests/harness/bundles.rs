//! A SPIFFE bundle endpoint: a real HTTPS server that answers whatever a test wants.
//!
//! The daemon's unit tests include this file as well, so it knows nothing of reeve.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use rcgen::SanType;
use rustls::{ServerConfig, crypto::aws_lc_rs, version::TLS13};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Builder,
    sync::Notify,
};
use tokio_rustls::TlsAcceptor;

use super::certs::{Authority, Issued};

/// The server. It ends when dropped, and its port is free then.
pub struct BundleServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    end: Notify,
}

struct State {
    config: Arc<ServerConfig>,
    answer: Vec<u8>,
    /// Bytes of the answer, then a pause, and so on.
    drip: Option<usize>,
    asked: Vec<String>,
}

// === impl BundleServer ===

impl BundleServer {
    /// Serves at a listener, with this certificate, the bundle of nobody at first.
    pub fn start(listener: TcpListener, certificate: &Issued) -> Self {
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                config: config(certificate),
                answer: Vec::new(),
                drip: None,
                asked: Vec::new(),
            }),
            end: Notify::new(),
        });
        let serving = shared.clone();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, &serving) => {}
                    () = serving.end.notified() => {}
                }
            });
        });
        Self {
            address,
            shared,
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Presents another certificate from now on.
    pub fn present(&self, certificate: &Issued) {
        self.state().config = config(certificate);
    }

    /// Answers with a document from now on.
    pub fn serve(&self, document: &Value) {
        let body = document.to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.answer((head + &body).as_bytes());
    }

    /// Answers with these very bytes from now on.
    pub fn answer(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.answer = bytes.to_vec();
        state.drip = None;
    }

    /// Sends so many bytes of its answer every 100 ms from now on.
    pub fn drip(&self, bytes: usize) {
        self.state().drip = Some(bytes);
    }

    /// The heads of the requests until now.
    pub fn asked(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }
}

impl Drop for BundleServer {
    fn drop(&mut self) {
        self.shared.end.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A bundle document with these authorities and sequence number, to be asked for again at once.
pub fn document(authorities: &[CertificateDer<'_>], sequence: u64) -> Value {
    let key = |der: &CertificateDer<'_>| {
        let pem = pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()));
        let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        json!({"kty": "EC", "use": "x509-svid", "x5c": [base64.trim()]})
    };
    let mut keys: Vec<Value> = authorities.iter().map(key).collect();
    keys.push(json!({"kty": "EC", "use": "jwt-svid", "kid": "1", "crv": "P-256"}));
    json!({"keys": keys, "spiffe_sequence": sequence, "spiffe_refresh_hint": 1})
}

/// A certificate as web servers have it, for names or addresses.
pub fn web_certificate(authority: &Authority, names: &[&str]) -> Issued {
    authority.leaf_with("spiffe://unused.example/web", |params| {
        let name = |name: &&str| match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName((*name).try_into().unwrap()),
        };
        params.subject_alt_names = names.iter().map(name).collect();
    })
}

fn config(certificate: &Issued) -> Arc<ServerConfig> {
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificate.chain.clone(), certificate.private_key());
    Arc::new(config.unwrap())
}

async fn accept(listener: TcpListener, shared: &Arc<Shared>) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((tcp, _)) = listener.accept().await {
        let shared = shared.clone();
        // Whatever becomes of it: the test asks the daemon for its view.
        tokio::spawn(async move { serve(tcp, &shared).await.ok() });
    }
}

async fn serve(tcp: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let config = lock(&shared.state).config.clone();
    let mut stream = TlsAcceptor::from(config).accept(tcp).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let (answer, drip) = {
        let mut state = lock(&shared.state);
        state.asked.push(String::from_utf8_lossy(&head).into());
        (state.answer.clone(), state.drip)
    };
    match drip {
        None => stream.write_all(&answer).await?,
        Some(bytes) => {
            for part in answer.chunks(bytes) {
                stream.write_all(part).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    stream.shutdown().await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
