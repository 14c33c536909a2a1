//! The newest that an agent has said to one subscription, kept for the identity store to fetch.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::answer::{Answer, AnswerError};
use crate::identity::{Denied, Material, RefusedBundle, SourceError, SpiffeId};

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
    /// The agent, or the workload's end, has taken back what there was, or there never was any.
    /// `fetched` once that was told.
    Denied {
        why: Denied,
        fetched: bool,
    },
    /// Nobody knows at the moment. What the store has is good until it expires.
    Failed(SourceError),
}

/// Why a subscription ended, or never came to be. The texts hold what the agent said.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no identity for whom it was asked.
    NotGranted(String),
    /// Whoever asks may not.
    Refused(String),
    /// The agent answers, but not this; or its answer cannot be understood.
    Unavailable(String),
    /// The agent cannot be reached.
    Unreachable(String),
}

/// What is said of an agent that has ended a stream without saying why.
pub(super) const ENDED: &str = "the agent has ended the stream";
/// Longest text of an agent that is repeated.
const LONGEST_TEXT: usize = 240;
/// The reason of the Broker API's error details for a workload that has no identity, where
/// `PERMISSION_DENIED` alone would say it of whoever asks.
const NOT_ENTITLED: &[u8] = b"WORKLOAD_NOT_ENTITLED";

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
        let before = self.refused();
        for bundle in answer.refused().iter().filter(|it| !before.contains(it)) {
            tracing::warn!(
                trust_domain = bundle.trust_domain,
                "a trust bundle of the agent is refused, everybody of the trust domain is denied: {}",
                bundle.reason
            );
        }
        self.set(State::Answered(Arc::new(answer)));
    }

    /// There is no identity: what was given is to be dropped.
    pub(super) fn denied(&self, denied: Denied) {
        let is_known = matches!(&*lock(&self.state), State::Denied { why, .. } if *why == denied);
        if !is_known {
            self.set(State::Denied {
                why: denied,
                fetched: false,
            });
        }
    }

    /// Nobody knows at the moment.
    pub(super) fn failed(&self, error: SourceError) {
        // What is denied stays so until everybody has seen it: the certificate has to be dropped.
        let is_alone = self.news.receiver_count() == 1;
        let stays = match &*lock(&self.state) {
            State::Denied { fetched, .. } => !(*fetched && is_alone),
            State::Failed(before) => *before == error,
            State::Waiting | State::Answered(_) => false,
        };
        if !stays {
            self.set(State::Failed(error));
        }
    }

    /// Bundles of the newest answer that are not used.
    fn refused(&self) -> Vec<RefusedBundle> {
        match &*lock(&self.state) {
            State::Answered(answer) => answer.refused().to_vec(),
            _ => Vec::new(),
        }
    }

    fn set(&self, state: State) {
        *lock(&self.state) = state;
        self.news
            .send_modify(|number| *number = number.wrapping_add(1));
    }

    fn material(&self, id: &SpiffeId) -> Result<Material, SourceError> {
        let answer = match &mut *lock(&self.state) {
            State::Waiting => return Err(SourceError::Pending("the agent has not answered yet")),
            State::Denied { why, fetched } => {
                *fetched = true;
                return Err(why.clone().into());
            }
            State::Failed(error) => return Err(error.clone()),
            State::Answered(answer) => answer.clone(),
        };
        answer.material(id)
    }
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

    /// Bundles of the newest answer to the subscription for `key` that are not used.
    pub(super) fn refused(&self, key: &K) -> Vec<RefusedBundle> {
        let feed = lock(&self.0).get(key).cloned();
        feed.map_or_else(Vec::new, |feed| feed.refused())
    }

    /// What the subscription for `key` has for `id`.
    pub(super) fn material(&self, key: &K, id: &SpiffeId) -> Result<Material, SourceError> {
        let feed = lock(&self.0).get(key).cloned();
        feed.ok_or(SourceError::Pending("the agent has not been asked yet"))?
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
        let said = said(&status);
        let not_entitled = || {
            let mut found = status.details().windows(NOT_ENTITLED.len());
            found.any(|part| part == NOT_ENTITLED)
        };
        match status.code() {
            _ if std::error::Error::source(&status).is_some() => {
                Self::Unreachable(format!("the agent has broken off: {said}"))
            }
            tonic::Code::NotFound => Self::NotGranted(said),
            tonic::Code::PermissionDenied if not_entitled() => Self::NotGranted(said),
            tonic::Code::PermissionDenied => Self::Refused(said),
            _ => Self::Unavailable(format!("the agent said {said}")),
        }
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        Self::Unavailable(format!("the agent's answer is refused: {error}"))
    }
}

/// The status of a call, in quotes.
fn said(status: &tonic::Status) -> String {
    format!("\"{:?}: {}\"", status.code(), plain(status.message()))
}

/// What an agent wrote, as plain text of one line and bounded length: it ends up in logs and on
/// terminals.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::new();
    for (position, c) in text.chars().enumerate() {
        if position == LONGEST_TEXT {
            plain.push_str("...");
            break;
        }
        match c {
            '\'' | '"' => plain.push(c),
            c => plain.extend(c.escape_debug()),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};

    use super::*;

    #[test]
    fn what_an_agent_says_is_repeated_as_plain_text_of_bounded_length() {
        assert_eq!(plain("it's \"so\""), "it's \"so\"");
        assert_eq!(
            plain("a\nb\u{1b}[2J\u{202e}c\\"),
            "a\\nb\\u{1b}[2J\\u{202e}c\\\\"
        );
        let long = plain(&"x".repeat(100_000));
        assert_eq!(long.len(), LONGEST_TEXT + 3);
        let status = Status::new(Code::Internal, "no\r\nway".repeat(1000));
        let Failure::Unavailable(text) = status.into() else {
            panic!("it is no denial");
        };
        assert!(
            text.starts_with("the agent said \"Internal: no\\r\\nway"),
            "{text}"
        );
        assert!(text.len() < 4 * LONGEST_TEXT, "{text}");
    }

    #[test]
    fn a_denial_stays_until_it_was_fetched_whatever_fails_meanwhile() {
        let id = SpiffeId::parse("spiffe://example.org/cart").unwrap();
        let feed = Feed::new();
        let _waiting = feed.news.subscribe();
        let away = || SourceError::Unreachable("no socket".into());
        feed.denied(Denied::NoProcess);
        feed.failed(away());
        assert_eq!(feed.material(&id).unwrap_err(), Denied::NoProcess.into());
        feed.failed(away());
        assert_eq!(feed.material(&id).unwrap_err(), away());
        // Of two that wait, one may not have seen it.
        let _another = feed.news.subscribe();
        feed.denied(Denied::NoProcess);
        feed.material(&id).unwrap_err();
        feed.failed(away());
        assert_eq!(feed.material(&id).unwrap_err(), Denied::NoProcess.into());
    }

    #[test]
    fn a_workload_without_an_entry_is_told_from_an_asker_that_may_not_ask() {
        let refused = Status::new(Code::PermissionDenied, "not an authorized delegate");
        assert!(matches!(refused.into(), Failure::Refused(said) if said.contains("authorized")));
        let details = b"\x08\x07reason: WORKLOAD_NOT_ENTITLED, domain: spiffe.io".as_slice();
        let none = Status::with_details(Code::PermissionDenied, "none", details.into());
        assert!(matches!(none.into(), Failure::NotGranted(_)));
        let gone = Status::new(Code::NotFound, "no such process");
        assert!(matches!(gone.into(), Failure::NotGranted(_)));
    }
}
