//! The newest that an agent has said to one subscription, kept for the identity store to fetch.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::answer::{Answer, AnswerError};
use crate::identity::{Material, SourceError, SpiffeId};

/// One subscription's state.
#[derive(Debug)]
pub(super) struct Feed {
    state: Mutex<State>,
    news: watch::Sender<u64>,
}

#[derive(Debug)]
enum State {
    /// Nothing has been said yet.
    Waiting,
    Answered(Arc<Answer>),
    /// The agent, or the workload's end, has taken back what there was.
    Withdrawn,
    /// Nobody knows at the moment. What the store has is good until it expires.
    Failed(String),
}

/// Why a subscription ended, or never came to be.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no identity for the asker any longer.
    Withdrawn(String),
    /// The agent cannot be reached, or its answer not be understood.
    Unavailable(String),
}

/// Subscriptions that are under way, each for as long as somebody waits for its news.
#[derive(Debug)]
pub(super) struct Feeds<K>(Mutex<BTreeMap<K, Arc<Feed>>>);

// === impl Feed ===

impl Feed {
    fn new() -> Self {
        Self {
            state: Mutex::new(State::Waiting),
            news: watch::Sender::new(0),
        }
    }

    /// A whole new answer.
    pub(super) fn answered(&self, answer: Answer) {
        if answer.is_empty() {
            self.failed(Failure::Withdrawn(
                "the agent has no identity to give".into(),
            ));
        } else {
            self.set(State::Answered(Arc::new(answer)));
        }
    }

    /// The subscription ended.
    pub(super) fn failed(&self, failure: Failure) {
        match failure {
            Failure::Withdrawn(why) => {
                if !matches!(*lock(&self.state), State::Withdrawn) {
                    tracing::debug!(why, "an identity is withdrawn");
                    self.set(State::Withdrawn);
                }
            }
            Failure::Unavailable(why) => {
                // What is withdrawn stays so, and who waits is told why.
                let state = lock(&self.state);
                if !matches!(*state, State::Withdrawn) {
                    drop(state);
                    self.set(State::Failed(why));
                }
            }
        }
    }

    fn set(&self, state: State) {
        *lock(&self.state) = state;
        self.news
            .send_modify(|number| *number = number.wrapping_add(1));
    }

    fn material(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        let answer = match &*lock(&self.state) {
            State::Waiting => return Err(unavailable("the agent has not answered yet")),
            State::Withdrawn => return Err(SourceError::Withdrawn),
            State::Failed(why) => return Err(unavailable(why)),
            State::Answered(answer) => answer.clone(),
        };
        answer.material(id)
    }
}

fn unavailable(why: &str) -> SourceError {
    SourceError::Unavailable(why.to_owned())
}

// === impl Feeds ===

impl<K: Ord> Feeds<K> {
    pub(super) fn new() -> Self {
        Self(Mutex::default())
    }

    /// News of the subscription for `key`. The first to ask starts it, with `follow`, which ends
    /// with the last receiver.
    pub(super) fn changes<F: Future<Output = ()> + Send + 'static>(
        &self,
        key: K,
        follow: impl FnOnce(Arc<Feed>) -> F,
    ) -> watch::Receiver<u64> {
        let mut feeds = lock(&self.0);
        // One that nobody waits for is ending: it is not woken again.
        feeds.retain(|_, feed| feed.news.receiver_count() > 0);
        if let Some(feed) = feeds.get(&key) {
            return feed.news.subscribe();
        }
        let feed = Arc::new(Feed::new());
        let news = feed.news.subscribe();
        let following = follow(feed.clone());
        let watched = feed.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = watched.news.closed() => {}
                () = following => {}
            }
            // Keys are not kept for nobody.
            *lock(&watched.state) = State::Waiting;
        });
        feeds.insert(key, feed);
        news
    }

    /// What the subscription for `key` has for `id`.
    pub(super) fn material(&self, key: &K, id: &SpiffeId) -> Result<Material, SourceError> {
        let feed = lock(&self.0).get(key).cloned();
        feed.ok_or_else(|| unavailable("the agent has not been asked yet"))?
            .material(id)
    }
}

/// Nothing that is done under these locks leaves their contents half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Failure ===

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let said = format!("{:?}: {}", status.code(), status.message());
        match status.code() {
            // "Not entitled", and the Broker API's "no such workload".
            tonic::Code::PermissionDenied | tonic::Code::NotFound => Self::Withdrawn(said),
            _ => Self::Unavailable(said),
        }
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        Self::Unavailable(format!("the agent's answer is refused: {error}"))
    }
}
