//! A SPIFFE agent for tests: a real gRPC server on a Unix socket that speaks the Workload API, the
//! Broker API and SPIRE's Delegated Identity API, and grants what a test tells it to.
//!
//! Like a real one it finds out for itself whom a process id belongs to.

mod grpc;
mod messages;

use std::{
    collections::HashMap,
    fs,
    future::poll_fn,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::Request;
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    certs::{Authority, Issued},
    hbone::{runtime, tls},
    run::Run,
};
use messages::{
    BrokerRequest, BundlesResponse, DelegatedRequest, DelegatedResponse, SpiffeId, Svid,
    SvidWithKey, WorkloadPidReference, X509Svid, X509SvidResponse,
};

/// Whom an agent gives something to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Whoever asks for itself, by the Workload API.
    Caller,
    /// The processes in this cgroup, as `/proc/PID/cgroup` names it.
    Cgroup(String),
    /// Those of these that are of this user.
    User(String, u32),
    /// Whoever has exactly these selectors, as in `k8s:ns:shop`.
    Selectors(Vec<String>),
}

/// What an agent gives: the whole of it.
#[derive(Clone, Debug, Default)]
pub struct Grant {
    svids: Vec<(String, Vec<Vec<u8>>, Vec<u8>)>,
    bundle: Vec<u8>,
    federated: HashMap<String, Vec<u8>>,
    lists: Vec<Vec<u8>>,
}

/// A running agent. Dropped, it is gone, with its socket.
#[derive(Debug)]
pub struct Agent {
    socket: PathBuf,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    grants: watch::Sender<Vec<(Subject, Grant)>>,
    /// What is said to whoever asks on behalf of others and may not.
    refusal: Mutex<Option<String>>,
    connections: Mutex<Vec<JoinHandle<()>>>,
    /// Who presented itself, where TLS is spoken.
    presented: Mutex<Vec<String>>,
    calls: AtomicUsize,
    open: AtomicUsize,
}

/// A call, for as long as it is answered.
struct Open(Arc<Shared>);

// === impl Grant ===

impl Grant {
    /// SVIDs by this authority, which is also the bundle.
    #[must_use]
    pub fn of(authority: &Authority, ids: &[&str]) -> Self {
        let issued = ids.iter().map(|id| (*id, authority.leaf(id)));
        Self::issued(authority, issued)
    }

    /// These certificates, with this authority as the bundle.
    #[must_use]
    pub fn issued<'a>(
        authority: &Authority,
        issued: impl IntoIterator<Item = (&'a str, Issued)>,
    ) -> Self {
        let svids = issued.into_iter().map(|(id, issued)| {
            let chain = issued.chain.iter().map(|der| der.to_vec()).collect();
            (id.to_owned(), chain, issued.key.secret_pkcs8_der().to_vec())
        });
        Self {
            svids: svids.collect(),
            bundle: authority.certificate().to_vec(),
            ..Self::default()
        }
    }

    /// Another trust domain's authority beside it.
    #[must_use]
    pub fn federated(mut self, trust_domain: &str, authority: &Authority) -> Self {
        let key = format!("spiffe://{trust_domain}");
        self.federated.insert(key, authority.certificate().to_vec());
        self
    }

    /// Bytes beside it that are to be another trust domain's bundle.
    #[must_use]
    pub fn federated_bytes(mut self, trust_domain: &str, bundle: &[u8]) -> Self {
        let key = format!("spiffe://{trust_domain}");
        self.federated.insert(key, bundle.to_vec());
        self
    }

    /// A revocation list beside it.
    #[must_use]
    pub fn list(mut self, list: &[u8]) -> Self {
        self.lists.push(list.to_vec());
        self
    }

    fn whole(&self) -> X509SvidResponse {
        let svid = |(id, chain, key): &(String, Vec<Vec<u8>>, Vec<u8>)| X509Svid {
            spiffe_id: id.clone(),
            x509_svid: chain.concat(),
            x509_svid_key: key.clone(),
            bundle: self.bundle.clone(),
            hint: String::new(),
        };
        X509SvidResponse {
            svids: self.svids.iter().map(svid).collect(),
            crl: self.lists.clone(),
            federated_bundles: self.federated.clone(),
        }
    }

    fn delegated(&self) -> DelegatedResponse {
        let svid = |(id, chain, key): &(String, Vec<Vec<u8>>, Vec<u8>)| {
            let (trust_domain, path) = split(id);
            SvidWithKey {
                x509_svid: Some(Svid {
                    cert_chain: chain.clone(),
                    id: Some(SpiffeId { trust_domain, path }),
                    expires_at: 0,
                }),
                x509_svid_key: key.clone(),
            }
        };
        DelegatedResponse {
            x509_svids: self.svids.iter().map(svid).collect(),
            federates_with: Vec::new(),
        }
    }
}

fn split(id: &str) -> (String, String) {
    let rest = id.strip_prefix("spiffe://").expect("it is a SPIFFE ID");
    let slash = rest.find('/').expect("it has a path");
    (rest[..slash].to_owned(), rest[slash..].to_owned())
}

// === impl Agent ===

impl Agent {
    /// An agent that grants nothing yet.
    #[must_use]
    pub fn start() -> Self {
        Self::at(Run::this().folder("agent").join("api.sock"), None)
    }

    /// An agent that shows who it is, and asks who comes.
    #[must_use]
    pub fn with_tls(certificate: &Issued) -> Self {
        let socket = Run::this().folder("agent").join("broker.sock");
        Self::at(socket, Some(certificate))
    }

    /// An agent at the socket of one that is gone.
    #[must_use]
    pub fn again_at(socket: &Path) -> Self {
        Self::at(socket.to_owned(), None)
    }

    fn at(socket: PathBuf, certificate: Option<&Issued>) -> Self {
        let listener = StdListener::bind(&socket)
            .unwrap_or_else(|error| panic!("listening at {}: {error}", socket.display()));
        listener
            .set_nonblocking(true)
            .expect("making a socket non-blocking");
        let acceptor =
            certificate.map(|issued| TlsAcceptor::from(Arc::new(tls::server_config(issued))));
        let shared = Arc::new(Shared {
            grants: watch::Sender::new(Vec::new()),
            refusal: Mutex::default(),
            connections: Mutex::default(),
            presented: Mutex::default(),
            calls: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        });
        let accepting = runtime().spawn(accept(listener, acceptor, shared.clone()));
        Self {
            socket,
            shared,
            accepting,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Gives this from now on, in place of what it gave before.
    pub fn grant(&self, subject: Subject, grant: Grant) {
        self.shared.grants.send_modify(|grants| {
            grants.retain(|(other, _)| *other != subject);
            grants.push((subject, grant));
        });
    }

    /// Gives nothing any more, and says so.
    pub fn withdraw(&self, subject: &Subject) {
        self.shared
            .grants
            .send_modify(|grants| grants.retain(|(other, _)| other != subject));
    }

    /// Lets nobody ask on behalf of others from now on, or again, and says this: as the text of a status is
    /// written in HTTP/2, with percent signs.
    pub fn refuse_delegates(&self, refusal: Option<&str>) {
        *lock(&self.shared.refusal) = refusal.map(str::to_owned);
        self.shared.grants.send_modify(|_| {});
    }

    /// Calls that there have been.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.shared.calls.load(Ordering::Relaxed)
    }

    /// Calls that are being answered: subscriptions.
    #[must_use]
    pub fn open_calls(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Who presented itself.
    #[must_use]
    pub fn presented(&self) -> Vec<String> {
        lock(&self.shared.presented).clone()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.accepting.abort();
        for connection in &*lock(&self.shared.connections) {
            connection.abort();
        }
        // It may be gone with its folder.
        let _ = fs::remove_file(&self.socket);
    }
}

impl Open {
    fn count(shared: &Arc<Shared>) -> Self {
        shared.calls.fetch_add(1, Ordering::Relaxed);
        shared.open.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Nothing that is done under these locks can fail half way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: StdListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let listener = UnixListener::from_std(listener).expect("watching a socket");
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, serving) = (tls.clone(), shared.clone());
        let connection = runtime().spawn(async move {
            let Some(tls) = tls else {
                return serve(stream, serving).await;
            };
            if let Ok(stream) = tls.accept(stream).await {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let id = chain.first().map(tls::spiffe_id).unwrap_or_default();
                lock(&serving.presented).push(id);
                serve(stream, serving).await;
            }
        });
        lock(&shared.connections).push(connection);
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, shared: Arc<Shared>) {
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    // Calls end with their connection.
    let mut calls = tokio::task::JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        calls.spawn(answer(request, respond, shared.clone()));
    }
}

/// What is answered now: a message, or a status with its text.
type Now = Result<Vec<u8>, (u8, String)>;

/// Answers a call: at once, and again whenever the answer has changed.
async fn answer(
    mut request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    shared: Arc<Shared>,
) -> Result<(), h2::Error> {
    let _open = Open::count(&shared);
    let path = request.uri().path().to_owned();
    let has = |key: &str| {
        request
            .headers()
            .get(key)
            .is_some_and(|value| value == "true")
    };
    let headers = (has("workload.spiffe.io"), has("broker.spiffe.io"));
    let message = grpc::message(&mut request).await?;
    let mut grants = shared.grants.subscribe();
    let mut stream = grpc::begin(respond)?;
    let mut last = None;
    loop {
        let refusal = lock(&shared.refusal)
            .clone()
            .filter(|_| !path.starts_with("/SpiffeWorkloadAPI/"));
        let now = match refusal {
            Some(text) => Err((grpc::PERMISSION_DENIED, text)),
            None => now(&path, headers, &message, &grants.borrow_and_update()),
        };
        match now {
            Ok(message) if last.as_ref() == Some(&message) => {}
            Ok(message) => {
                grpc::send(&mut stream, &message)?;
                last = Some(message);
            }
            Err((status, text)) => return grpc::end(&mut stream, status, &text),
        }
        let changed = tokio::select! {
            changed = grants.changed() => changed.is_ok(),
            _ = poll_fn(|cx| stream.poll_reset(cx)) => false,
        };
        if !changed {
            return Ok(());
        }
    }
}

fn now(path: &str, headers: (bool, bool), message: &Bytes, grants: &[(Subject, Grant)]) -> Now {
    let denied = || (grpc::PERMISSION_DENIED, "no identity issued".to_owned());
    let invalid = |text: &str| (grpc::INVALID_ARGUMENT, text.to_owned());
    let grant = |subject: &Subject| {
        let found = grants.iter().find(|(other, _)| other == subject);
        found.map(|(_, grant)| grant).ok_or_else(denied)
    };
    match path {
        "/SpiffeWorkloadAPI/FetchX509SVID" if !headers.0 => Err(invalid("no security header")),
        "/SpiffeWorkloadAPI/FetchX509SVID" => Ok(grant(&Subject::Caller)?.whole().encode_to_vec()),
        "/spiffe.broker.API/SubscribeToX509SVID" if !headers.1 => {
            Err(invalid("no security header"))
        }
        "/spiffe.broker.API/SubscribeToX509SVID" => {
            let request: BrokerRequest = grpc::read(message.clone());
            let reference = request.reference.and_then(|reference| reference.reference);
            let reference = reference.ok_or_else(|| invalid("no reference"))?;
            let kind = reference.type_url.rsplit('/').next();
            if kind != Some("spiffe.broker.WorkloadPIDReference") {
                return Err(invalid("another kind of reference"));
            }
            let process: WorkloadPidReference = grpc::read(reference.value.into());
            // No entry is an empty answer here.
            let grant = of_process(process.pid, grants).unwrap_or_default();
            Ok(grant.whole().encode_to_vec())
        }
        "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs" => {
            let request: DelegatedRequest = grpc::read(message.clone());
            let found = match (request.selectors.as_slice(), request.pid) {
                ([], 0) => return Err(invalid("neither selectors nor pid")),
                ([], pid) => of_process(pid, grants),
                (selectors, 0) => {
                    let selectors = selectors
                        .iter()
                        .map(|selector| format!("{}:{}", selector.r#type, selector.value));
                    let subject = Subject::Selectors(selectors.collect());
                    grant(&subject).ok().cloned()
                }
                _ => return Err(invalid("both selectors and pid")),
            };
            // No entry is an empty answer here.
            Ok(found.unwrap_or_default().delegated().encode_to_vec())
        }
        "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles" => {
            let mut response = BundlesResponse::default();
            for (_, grant) in grants {
                for (id, ..) in &grant.svids {
                    let domain = format!("spiffe://{}", split(id).0);
                    let certificates = &mut response.ca_certificates;
                    certificates.insert(domain, grant.bundle.clone());
                }
            }
            Ok(response.encode_to_vec())
        }
        _ => Err((grpc::UNIMPLEMENTED, format!("no method {path}"))),
    }
}

/// What this process is granted, by the cgroup and the user that it has now.
fn of_process(pid: i32, grants: &[(Subject, Grant)]) -> Option<Grant> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let (cgroup, status) = (read("cgroup"), read("status"));
    let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let user = users.split_whitespace().nth(1)?.parse().ok()?;
    let subjects = [
        Subject::Cgroup(cgroup.to_owned()),
        Subject::User(cgroup.to_owned(), user),
    ];
    let mut grants = grants.iter();
    let found = grants.find(|(subject, _)| subjects.contains(subject));
    found.map(|(_, grant)| grant.clone())
}
