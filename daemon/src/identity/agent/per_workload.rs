//! Certificates that an agent gives for a workload to whoever acts on its behalf: SPIRE's Delegated
//! Identity API, and the SPIFFE Broker API.
//!
//! One subscription for each identity, bound to a living process of a workload that has it. When
//! the process ends the subscription does, and another process of the workload takes its place;
//! when there is none, what the agent gave is dropped at once: material lives no longer than the
//! workload.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use prost::Message;
use tokio::{sync::watch, time::sleep};

use super::{
    answer::{self, Answer},
    connection::{Connection, Method, MutualTls},
    feed::{Failure, Feed, Feeds},
    holders::{Holder, Holders, Selector},
    messages::{
        Any, BrokerRequest, BundlesRequest, BundlesResponse, DelegatedRequest, DelegatedResponse,
        ProcessReference, SelectorMessage, WorkloadReference, X509SvidResponse,
    },
    process::Held,
};
use crate::identity::{
    CertificateSource, IdentityStore, Material, SourceError, SpiffeId, WorkloadApi,
    backoff::Backoff,
};

const BROKER: Method = Method {
    path: "/spiffe.broker.API/SubscribeToX509SVID",
    header: Some("broker.spiffe.io"),
};
const BROKER_PROCESS: &str = "type.googleapis.com/spiffe.broker.WorkloadPIDReference";
const DELEGATED_SVIDS: Method = Method {
    path: "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs",
    header: None,
};
const DELEGATED_BUNDLES: Method = Method {
    path: "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles",
    header: None,
};
/// Name of the source of reeve's own certificate.
pub(super) const OWN: &str = "workload_api";
/// How often a workload without processes is looked at, beside what [`Holders`] tells.
const LOOK: Duration = Duration::from_secs(1);

/// Certificates of workloads from SPIRE's Delegated Identity API, on the agent's admin socket.
#[derive(Debug)]
pub struct DelegatedIdentity(PerWorkload);

/// Certificates of workloads from the SPIFFE Broker API.
#[derive(Debug)]
pub struct Broker(PerWorkload);

#[derive(Debug)]
struct PerWorkload {
    agent: Arc<Agent>,
    holders: Holders,
    feeds: Feeds<SpiffeId>,
}

#[derive(Debug)]
struct Agent {
    connection: Arc<Connection>,
    api: Api,
}

#[derive(Clone, Copy, Debug)]
enum Api {
    Delegated,
    Broker,
}

/// Who reeve is to the agent of a [`Broker`], and who the agent must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerPeers {
    /// Under which reeve presents itself; from the Workload API.
    pub own: SpiffeId,
    /// The Workload API's socket.
    pub workload_api: PathBuf,
    /// That the agent must prove.
    pub agent: SpiffeId,
}

// === impl DelegatedIdentity ===

impl DelegatedIdentity {
    /// The agent with this admin socket, asked for whoever is in `holders`.
    #[must_use]
    pub fn new(socket: PathBuf, holders: Holders) -> Self {
        Self(PerWorkload::new(socket, None, Api::Delegated, holders))
    }
}

// === impl Broker ===

impl Broker {
    /// The agent with this socket, asked for whoever is in `holders`.
    #[must_use]
    pub fn new(socket: PathBuf, peers: BrokerPeers, holders: Holders) -> Self {
        // Of its own: what the agent says of itself is nothing that workloads are to trust.
        let api: Arc<dyn CertificateSource> = Arc::new(WorkloadApi::new(peers.workload_api));
        let own = IdentityStore::new([(OWN.to_owned(), api)].into());
        let tls = MutualTls {
            identities: Arc::new(own),
            own: peers.own,
            agent: peers.agent,
        };
        Self(PerWorkload::new(socket, Some(tls), Api::Broker, holders))
    }
}

// === impl PerWorkload ===

impl PerWorkload {
    fn new(socket: PathBuf, tls: Option<MutualTls>, api: Api, holders: Holders) -> Self {
        let agent = Agent {
            connection: Arc::new(Connection::new(socket, tls)),
            api,
        };
        Self {
            agent: Arc::new(agent),
            holders,
            feeds: Feeds::new(),
        }
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        self.feeds.changes(id.clone(), |feed| {
            follow(self.agent.clone(), self.holders.clone(), id.clone(), feed)
        })
    }
}

async fn follow(agent: Arc<Agent>, holders: Holders, id: SpiffeId, feed: Arc<Feed>) {
    agent.connection.prepare();
    let mut backoff = Backoff::new();
    loop {
        let holder = holders.holder(&id);
        let pause = tokio::select! {
            ended = agent.listen(&holder, &feed, &mut backoff) => match ended {
                Ended::Process => continue,
                Ended::NoProcess => {
                    feed.failed(Failure::Withdrawn("no process of a workload has it".into()));
                    LOOK
                }
                Ended::Failed(failure) => {
                    feed.failed(failure);
                    backoff.next()
                }
            },
            () = holders.changed_from(&id, &holder) => continue,
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = holders.changed_from(&id, &holder) => {}
        }
    }
}

/// Why a subscription is over.
enum Ended {
    /// The process that it was bound to has ended.
    Process,
    /// There is no process to bind it to.
    NoProcess,
    Failed(Failure),
}

impl Agent {
    async fn listen(&self, holder: &Holder, feed: &Feed, backoff: &mut Backoff) -> Ended {
        let held = match Held::any_of(&holder.cgroups) {
            Ok(Some(held)) => held,
            Ok(None) => return Ended::NoProcess,
            Err(error) => return Ended::Failed(no_pidfd(&error)),
        };
        let listening = async {
            let ended = match self.api {
                Api::Broker => self.broker(&held, feed, backoff).await,
                Api::Delegated => {
                    self.delegated(&held, &holder.selectors, feed, backoff)
                        .await
                }
            };
            match ended {
                // Whatever was said of a process that has ended was said of nobody.
                _ if !held.is_alive() => Ended::Process,
                Ok(()) => Ended::Failed(Failure::Unavailable(
                    "the agent has ended the stream".into(),
                )),
                Err(failure) => Ended::Failed(failure),
            }
        };
        tokio::select! {
            // The process first: what arrives after its end is not looked at.
            biased;
            () = held.ended() => Ended::Process,
            ended = listening => ended,
        }
    }

    async fn broker(&self, held: &Held, feed: &Feed, backoff: &mut Backoff) -> Result<(), Failure> {
        let process = ProcessReference { pid: held.id() };
        let request = BrokerRequest {
            reference: Some(WorkloadReference {
                reference: Some(Any {
                    type_url: BROKER_PROCESS.to_owned(),
                    value: process.encode_to_vec(),
                }),
            }),
        };
        let mut answers = self
            .connection
            .call::<_, X509SvidResponse>(BROKER, request)
            .await?;
        while let Some(answer) = answers.message().await? {
            take(held, feed, Answer::whole(answer)?);
            backoff.reset();
        }
        Ok(())
    }

    async fn delegated(
        &self,
        held: &Held,
        selectors: &[Selector],
        feed: &Feed,
        backoff: &mut Backoff,
    ) -> Result<(), Failure> {
        let request = DelegatedRequest {
            selectors: selectors.iter().map(Into::into).collect(),
            // One or the other, never both.
            pid: if selectors.is_empty() { held.id() } else { 0 },
        };
        let connection = &self.connection;
        let mut bundles = connection
            .call::<_, BundlesResponse>(DELEGATED_BUNDLES, BundlesRequest {})
            .await?;
        let mut svids = connection
            .call::<_, DelegatedResponse>(DELEGATED_SVIDS, request)
            .await?;
        let (mut known, mut latest) = (None, None);
        loop {
            tokio::select! {
                message = bundles.message() => match message? {
                    Some(message) => known = Some(answer::bundles(message)?),
                    None => return Ok(()),
                },
                message = svids.message() => match message? {
                    Some(message) => latest = Some(message),
                    None => return Ok(()),
                },
            }
            if let (Some(bundles), Some(svids)) = (&known, &latest) {
                take(held, feed, Answer::delegated(svids, bundles)?);
                backoff.reset();
            }
        }
    }
}

/// An answer counts only for a process that still lives: until then its id was nobody else's.
fn take(held: &Held, feed: &Feed, answer: Answer) {
    if held.is_alive() {
        feed.answered(answer);
    }
}

fn no_pidfd(error: &io::Error) -> Failure {
    Failure::Unavailable(format!(
        "no process of the workload can be held by a pidfd, which Linux 5.3 and later have: {error}"
    ))
}

impl From<&Selector> for SelectorMessage {
    fn from(selector: &Selector) -> Self {
        Self {
            r#type: selector.kind.clone(),
            value: selector.value.clone(),
        }
    }
}

// === both are sources ===

impl CertificateSource for DelegatedIdentity {
    fn name(&self) -> &'static str {
        "delegated_identity"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready(self.0.feeds.material(id, id)).boxed()
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        self.0.changes(id)
    }
}

impl CertificateSource for Broker {
    fn name(&self) -> &'static str {
        "broker"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready(self.0.feeds.material(id, id)).boxed()
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        self.0.changes(id)
    }
}
