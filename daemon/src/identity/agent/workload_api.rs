//! The SPIFFE Workload API: what the agent gives to this process itself.

use std::{path::PathBuf, sync::Arc};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{sync::watch, time::sleep};

use super::{
    answer::Answer,
    connection::{Connection, Method},
    feed::{ENDED, Failure, Feed, Feeds},
    messages::{X509SvidRequest, X509SvidResponse},
    process::reeve,
};
use crate::identity::{
    CertificateSource, Denied, Material, RefusedBundle, SourceError, SpiffeId, backoff::Backoff,
};

const FETCH: Method = Method {
    path: "/SpiffeWorkloadAPI/FetchX509SVID",
    header: Some("workload.spiffe.io"),
};

/// Certificates from the agent's Workload API: of every identity that the agent grants to reeve
/// itself, and the bundles of the trust domains that it names.
///
/// The agent is followed for as long as somebody waits for news. It is asked anew, at growing
/// intervals, when it cannot be reached; what it gave before then stays good until it expires. What
/// it takes back is dropped at once.
#[derive(Debug)]
pub struct WorkloadApi {
    connection: Arc<Connection>,
    /// One subscription for everybody: the agent answers with all identities.
    feeds: Feeds<()>,
}

impl WorkloadApi {
    /// The agent at this Unix socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            connection: Arc::new(Connection::new(socket, None)),
            feeds: Feeds::new(),
        }
    }
}

async fn follow(connection: Arc<Connection>, feed: Arc<Feed>) {
    let mut backoff = Backoff::new();
    loop {
        match listen(&connection, &feed, &mut backoff).await {
            Ok(()) => feed.failed(SourceError::Unavailable(ENDED.into())),
            Err(Failure::NotGranted(said) | Failure::Refused(said)) => {
                feed.denied(never_granted(&said));
            }
            Err(Failure::Unavailable(why)) => feed.failed(SourceError::Unavailable(why)),
            Err(Failure::Unreachable(why)) => feed.failed(SourceError::Unreachable(why)),
        }
        sleep(backoff.next()).await;
    }
}

/// Until the stream ends.
async fn listen(
    connection: &Arc<Connection>,
    feed: &Feed,
    backoff: &mut Backoff,
) -> Result<(), Failure> {
    let mut answers = connection
        .call::<_, X509SvidResponse>(FETCH, X509SvidRequest {})
        .await?;
    while let Some(answer) = answers.message().await? {
        let answer = Answer::whole(answer)?;
        if answer.is_empty() {
            feed.denied(never_granted(&answer.contents()));
        } else {
            feed.answered(answer);
        }
        backoff.reset();
    }
    Ok(())
}

fn never_granted(said: &str) -> Denied {
    Denied::NeverGranted(format!(
        "asked as {}, the agent said {said}; the agent has to have entries with the identities of the \
         workloads that describe reeve's own process",
        reeve()
    ))
}

impl CertificateSource for WorkloadApi {
    fn name(&self) -> &'static str {
        "workload_api"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready(self.feeds.material(&(), id)).boxed()
    }

    fn changes(&self, _: &SpiffeId) -> watch::Receiver<u64> {
        self.feeds
            .changes((), |feed| follow(self.connection.clone(), feed))
    }

    fn pushes(&self) -> bool {
        true
    }

    fn refused_bundles(&self, _: &SpiffeId) -> Vec<RefusedBundle> {
        self.feeds.refused(&())
    }
}
