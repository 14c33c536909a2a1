//! gRPC to an agent over its Unix socket, plain or inside of mutual TLS.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Uri, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Streaming,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{feed::Failure, per_workload::OWN};
use crate::identity::{IdentityStore, RejectReason, SpiffeId, judged, server_name_for};

/// For the socket, and the TLS handshake where there is one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest message that is taken: bundles of many trust domains fit.
const LARGEST_ANSWER: usize = 16 << 20;

/// A method of a service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    /// `/package.Service/Method`.
    pub(super) path: &'static str,
    /// Metadata key whose value `true` the service asks for, so that nobody is talked into calling
    /// it (Workload Endpoint, section 3; Broker Endpoint, section 3).
    pub(super) header: Option<&'static str>,
}

/// How an agent is reached.
#[derive(Debug)]
pub(super) struct Connection {
    socket: PathBuf,
    tls: Option<MutualTls>,
    /// Made at first use, since it needs the event loop. It connects anew by itself.
    channel: OnceLock<Channel>,
    /// Who needs the own certificate.
    users: Mutex<usize>,
}

/// Has the own certificate of a connection looked after until it is dropped.
#[derive(Debug)]
pub(super) struct Prepared(Arc<Connection>);

/// Who is who on a connection that asks for it.
#[derive(Debug)]
pub(super) struct MutualTls {
    /// Has this node's own certificate.
    pub(super) identities: Arc<IdentityStore>,
    /// Under which reeve presents itself.
    pub(super) own: SpiffeId,
    /// That the agent must prove.
    pub(super) agent: SpiffeId,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

// === impl Connection ===

impl Connection {
    pub(super) fn new(socket: PathBuf, tls: Option<MutualTls>) -> Self {
        Self {
            socket,
            tls,
            channel: OnceLock::new(),
            users: Mutex::default(),
        }
    }

    /// Calls a method that answers with a stream.
    pub(super) async fn call<Q, A>(
        self: &Arc<Self>,
        method: Method,
        request: Q,
    ) -> Result<Streaming<A>, Failure>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let channel = self.channel.get_or_init(|| self.connect()).clone();
        let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(LARGEST_ANSWER);
        grpc.ready()
            .await
            .map_err(|error| self.unreachable(&error))?;
        let mut request = tonic::Request::new(request);
        if let Some(header) = method.header {
            request
                .metadata_mut()
                .insert(header, MetadataValue::from_static("true"));
        }
        let path = PathAndQuery::from_static(method.path);
        let codec = ProstCodec::<Q, A>::default();
        let answer = grpc.server_streaming(request, path, codec).await;
        answer.map(tonic::Response::into_inner).map_err(|status| {
            match std::error::Error::source(&status) {
                Some(source) => self.unreachable(source),
                None => status.into(),
            }
        })
    }

    /// With everything that lies below an error: the outermost says little.
    fn unreachable(&self, error: &dyn std::error::Error) -> Failure {
        let mut said = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            let next = error.to_string();
            if !said.ends_with(&next) {
                said = format!("{said}: {next}");
            }
            source = error.source();
        }
        Failure::Unreachable(format!("the agent at {}: {said}", self.socket.display()))
    }

    fn connect(self: &Arc<Self>) -> Channel {
        let connection = self.clone();
        // The address means nothing: the connector goes to the socket.
        Endpoint::from_static("http://agent.invalid")
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_with_connector_lazy(tower::service_fn(
                move |_: Uri| -> BoxFuture<'static, io::Result<TokioIo<Box<dyn Stream>>>> {
                    let connection = connection.clone();
                    Box::pin(async move { connection.open().await.map(TokioIo::new) })
                },
            ))
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let Some(tls) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let own = tls.identities.current(&tls.own).ok_or_else(|| {
            io::Error::other(format!("there is no valid certificate for {}", tls.own))
        })?;
        let connector = TlsConnector::from(own.client(&tls.agent));
        let stream = judged(connector.connect(server_name_for(&tls.agent), stream))
            .await
            .map_err(|error| io::Error::other(RejectReason::explain(&error)))?;
        Ok(Box::new(stream))
    }

    /// Under which reeve presents itself, where it has to.
    pub(super) fn own(&self) -> Option<&SpiffeId> {
        self.tls.as_ref().map(|tls| &tls.own)
    }

    /// Looks after the own certificate, where one is needed, for as long as what this gives is there.
    /// Needs the event loop.
    pub(super) fn prepare(self: &Arc<Self>) -> Prepared {
        self.count(|users| users + 1);
        Prepared(self.clone())
    }

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        // Held, so that who comes meanwhile comes after. Whoever panicked under it left it whole.
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        *users = change(*users);
        if let Some(tls) = &self.tls {
            let own = (*users > 0).then(|| (tls.own.clone(), OWN.to_owned()));
            tls.identities.ensure(&own.into_iter().collect());
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.0.count(|users| users - 1);
    }
}
