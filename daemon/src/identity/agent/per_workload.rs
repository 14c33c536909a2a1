//! Certificates that an agent gives for a workload to whoever acts on its behalf: SPIRE's Delegated
//! Identity API, and the SPIFFE Broker API.
//!
//! One subscription for each identity, bound to a living process of a workload that has it. An agent may
//! tell the processes of a workload apart, by user and executable say, and have an entry for one of them
//! only; so it is asked for one of each, until one is entitled. When that process ends the subscription
//! does, and another process of the workload takes its place; when there is none, what the agent gave is
//! dropped at once: material lives no longer than the workload.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, interval_at, sleep},
};

use super::{
    answer::{self, Answer},
    connection::{Connection, Method, MutualTls},
    feed::{ENDED, Failure, Feed, Feeds},
    holders::{Holder, Holders, Selector},
    messages::{
        Any, BrokerRequest, BundlesRequest, BundlesResponse, DelegatedRequest, DelegatedResponse,
        ProcessReference, SelectorMessage, WorkloadReference, X509SvidResponse,
    },
    process::{Held, Kind, reeve},
};
use crate::identity::{
    CertificateSource, Denied, IdentityStore, Material, RefusedBundle, SourceError, SpiffeId,
    WorkloadApi, backoff::Backoff,
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
/// How often a workload of which no process is entitled is looked at for others, and how long the
/// agent may take to answer before that is said.
const LOOK_FOR_KINDS: Duration = Duration::from_secs(5);

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
    let _prepared = agent.connection.prepare();
    let mut backoff = Backoff::new();
    let mut entitled = None;
    loop {
        let holder = holders.holder(&id);
        let mut subscription = Subscription {
            agent: &agent,
            holder: &holder,
            id: &id,
            feed: &feed,
            entitled: &mut entitled,
            backoff: &mut backoff,
        };
        let pause = tokio::select! {
            ended = subscription.run() => match ended {
                Ended::Processes => continue,
                Ended::NoProcess => {
                    feed.denied(Denied::NoProcess);
                    LOOK
                }
                Ended::Failed => backoff.next(),
            },
            () = holders.changed_from(&id, &holder) => continue,
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = holders.changed_from(&id, &holder) => {}
        }
    }
}

/// Asking for one identity, until something is different.
struct Subscription<'a> {
    agent: &'a Agent,
    holder: &'a Holder,
    id: &'a SpiffeId,
    feed: &'a Feed,
    /// Which kind of process had the identity the last time.
    entitled: &'a mut Option<Kind>,
    backoff: &'a mut Backoff,
}

/// Why a subscription is over. The feed has been told.
enum Ended {
    /// There are other processes to ask for.
    Processes,
    /// There is no process to bind it to.
    NoProcess,
    Failed,
}

/// How asking for one process has ended.
enum Asked {
    /// The process has.
    ProcessEnded,
    /// Another process is entitled.
    NotNeeded,
    Failed(Failure),
}

/// Where the answers for one of the processes go.
struct Give {
    position: usize,
    sender: mpsc::Sender<(usize, Answer)>,
}

/// Which of the processes has the identity, by its position.
type Chosen = Option<usize>;

// === impl Subscription ===

impl Subscription<'_> {
    /// Asks for one process of each kind, and stays with the first that is entitled. That of the kind that was
    /// entitled before is asked for alone at first.
    async fn run(&mut self) -> Ended {
        let processes = match self.processes() {
            Ok(processes) if processes.is_empty() => return Ended::NoProcess,
            Ok(processes) => processes,
            Err(error) => {
                self.feed.failed(no_pidfd(&error));
                return Ended::Failed;
            }
        };
        let (sender, mut given) = mpsc::channel(1);
        let chosen = watch::Sender::new(Chosen::None);
        let mut asking = FuturesUnordered::new();
        for (position, held) in processes.iter().enumerate() {
            let give = Give {
                position,
                sender: sender.clone(),
            };
            let asked = self.agent.ask(held, self.holder, give, chosen.subscribe());
            asking.push(asked.boxed());
        }
        // What the agent has said of each, while none is entitled.
        let mut said: Vec<Option<Failure>> = processes.iter().map(|_| None).collect();
        let mut look = interval_at(Instant::now() + LOOK_FOR_KINDS, LOOK_FOR_KINDS);
        loop {
            tokio::select! {
                biased;
                // Before the end of the stream that it came on.
                Some((position, answer)) = given.recv() => {
                    if chosen.borrow().is_some_and(|it| it != position) {
                        continue;
                    }
                    // An answer counts only for a process that still lives: until then its id was
                    // nobody else's.
                    let held: &Held = &processes[position];
                    if !held.is_alive() {
                        return Ended::Processes;
                    }
                    self.backoff.reset();
                    if answer.has(self.id) {
                        *self.entitled = Some(held.kind().clone());
                        self.feed.answered(answer);
                        chosen.send_replace(Some(position));
                        // From now on it alone speaks.
                        said.fill_with(|| None);
                        continue;
                    }
                    said[position] = Some(Failure::NotGranted(answer.contents()));
                },
                Some((position, asked)) = asking.next() => match asked {
                    Asked::NotNeeded => continue,
                    // Whatever was said of a process that has ended was said of nobody.
                    _ if !processes[position].is_alive() => return Ended::Processes,
                    Asked::ProcessEnded => return Ended::Processes,
                    Asked::Failed(Failure::Unreachable(why)) => {
                        self.feed.failed(SourceError::Unreachable(why));
                        return Ended::Failed;
                    }
                    Asked::Failed(failure) => said[position] = Some(failure),
                },
                _ = look.tick() => {
                    if chosen.borrow().is_some() {
                        continue;
                    }
                    if self.has_other_kinds(&processes) {
                        return Ended::Processes;
                    }
                    for said in said.iter_mut().filter(|said| said.is_none()) {
                        *said = Some(Failure::Unavailable("the agent has not answered".to_owned()));
                    }
                }
            }
            let was_entitled = self.entitled.is_some();
            let asked = match *chosen.borrow() {
                Some(position) => position..position + 1,
                None => 0..processes.len(),
            };
            if said[asked.clone()].iter().any(Option::is_none) {
                continue;
            }
            self.tell(&processes[asked.clone()], &said[asked]);
            if was_entitled {
                // All of them, in a moment.
                *self.entitled = None;
                return Ended::Failed;
            }
            if asking.is_empty() {
                return Ended::Failed;
            }
        }
    }

    /// The processes to ask for.
    fn processes(&self) -> io::Result<Vec<Held>> {
        let mut processes = Held::one_of_each_kind(&self.holder.cgroups)?;
        let is_entitled = |held: &Held| self.entitled.as_ref() == Some(held.kind());
        if let Some(position) = processes.iter().position(is_entitled) {
            processes.swap(0, position);
            processes.truncate(1);
        } else if !self.holder.selectors.is_empty() {
            // Any: it is not asked for, but has to live.
            processes.truncate(1);
        }
        Ok(processes)
    }

    fn has_other_kinds(&self, processes: &[Held]) -> bool {
        let kinds = |of: &[Held]| {
            of.iter()
                .map(|held| held.kind().clone())
                .collect::<Vec<_>>()
        };
        self.processes()
            .is_ok_and(|now| kinds(&now) != kinds(processes))
    }

    /// Tells the feed that no process is entitled, and why.
    fn tell(&self, processes: &[Held], said: &[Option<Failure>]) {
        let said = processes.iter().zip(said);
        let said = said.filter_map(|(held, said)| Some((held, said.as_ref()?)));
        let (mut denied, mut refused, mut failed) = (Vec::new(), None, None);
        for (held, said) in said {
            match said {
                Failure::NotGranted(text) => denied.push((held, text)),
                Failure::Refused(text) => refused = refused.or(Some(text)),
                Failure::Unavailable(text) | Failure::Unreachable(text) => {
                    failed = failed.or(Some((held, text)));
                }
            }
        }
        if let Some(said) = refused {
            let denied = Denied::NotDelegate(self.agent.not_a_delegate(said));
            return self.feed.denied(denied);
        }
        if let Some((held, why)) = failed {
            let why = format!("{why}, asked for {held}");
            return self.feed.failed(SourceError::Unavailable(why));
        }
        self.feed
            .denied(Denied::NeverGranted(self.not_granted(&denied)));
    }

    fn not_granted(&self, denied: &[(&Held, &String)]) -> String {
        if !self.holder.selectors.is_empty() {
            let selectors = self.holder.selectors.iter();
            let selectors = selectors.map(|it| format!("{}:{}", it.kind, it.value));
            let selectors = selectors.collect::<Vec<_>>().join(", ");
            let said = denied.first().map_or("nothing", |(_, said)| said);
            return format!(
                "asked for the selectors {selectors}, the agent gave {said}; an entry with this identity \
                 has to have no other selectors than these"
            );
        }
        let asked = denied.iter().map(|(held, said)| format!("{held}: {said}"));
        let asked = asked.collect::<Vec<_>>().join("; ");
        format!(
            "the agent said of {asked}; an entry with this identity has to describe a process of the \
             workload, of which one of each user and executable is asked for"
        )
    }
}

// === impl Give ===

impl Give {
    async fn answer(&self, answer: Answer) {
        // Whoever waits for it is there as long as this is.
        let _ = self.sender.send((self.position, answer)).await;
    }
}

// === impl Agent ===

impl Agent {
    /// Passes on what the agent says of a process, until it says no more. Gives the position back.
    async fn ask(
        &self,
        held: &Held,
        holder: &Holder,
        give: Give,
        mut chosen: watch::Receiver<Chosen>,
    ) -> (usize, Asked) {
        let position = give.position;
        let listening = async {
            let ended = match self.api {
                Api::Broker => self.broker(held, give).await,
                Api::Delegated => self.delegated(held, &holder.selectors, give).await,
            };
            match ended {
                Ok(()) => Failure::Unavailable(ENDED.to_owned()),
                Err(failure) => failure,
            }
        };
        let asked = tokio::select! {
            // The process first: what arrives after its end is not looked at.
            biased;
            () = held.ended() => Asked::ProcessEnded,
            _ = chosen.wait_for(|chosen| chosen.is_some_and(|it| it != position)) => Asked::NotNeeded,
            failure = listening => Asked::Failed(failure),
        };
        (position, asked)
    }

    async fn broker(&self, held: &Held, give: Give) -> Result<(), Failure> {
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
            give.answer(Answer::whole(answer)?).await;
        }
        Ok(())
    }

    async fn delegated(
        &self,
        held: &Held,
        selectors: &[Selector],
        give: Give,
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
                give.answer(Answer::delegated(svids, bundles)?).await;
            }
        }
    }

    /// What to do where the agent does not let reeve ask for workloads.
    fn not_a_delegate(&self, said: &str) -> String {
        match self.api {
            Api::Delegated => format!(
                "the agent said {said} to reeve, {}; it has to have an entry that describes reeve's \
                 process, and the entry's SPIFFE ID among `authorized_delegates` in its configuration",
                reeve()
            ),
            Api::Broker => format!(
                "the agent said {said} to reeve, {}, as {}; it has to have that SPIFFE ID among \
                 `brokers` in its configuration, with the reference type WorkloadPIDReference",
                reeve(),
                self.connection.own().map_or("-", SpiffeId::as_str),
            ),
        }
    }
}

fn no_pidfd(error: &io::Error) -> SourceError {
    SourceError::Unavailable(format!(
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

    fn pushes(&self) -> bool {
        true
    }

    fn refused_bundles(&self, id: &SpiffeId) -> Vec<RefusedBundle> {
        self.0.feeds.refused(id)
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

    fn pushes(&self) -> bool {
        true
    }

    fn refused_bundles(&self, id: &SpiffeId) -> Vec<RefusedBundle> {
        self.0.feeds.refused(id)
    }
}
