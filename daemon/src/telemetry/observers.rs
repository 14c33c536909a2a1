//! Those who watch: what happened lately, and a queue for each who wants to know what happens.
//!
//! Whoever tells never waits. An event is made once for all, and only when somebody watches or
//! recent ones are kept; a queue that is full loses the event and counts it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::timeout_at,
};

use super::observed::{Filter, Happening, Lost, LostIn, Observed};

/// Events that wait for one observer: some two megabytes, several of the batches in which the
/// kernel's events come, and a pause of a second at two thousand connections in it.
const QUEUE: usize = 4096;
/// An event is held for so long before it is shown, so that one that happened earlier and arrives later
/// comes before it: the kernel's events come in batches, the tunnels' at once.
const HOLD: Duration = Duration::from_millis(300);
/// Observers at the same time.
const MAX_OBSERVERS: usize = 8;

/// What an observer wants to see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ObserveRequest {
    /// Which events.
    pub filter: Filter,
    /// Recent ones of this many last milliseconds.
    pub since_milliseconds: Option<u64>,
    /// At most this many recent ones, the newest.
    pub last: Option<usize>,
    /// And then those to come.
    pub follow: bool,
}

/// Everybody who watches. Cheap to clone.
#[derive(Clone)]
pub struct Observers {
    inner: Arc<Inner>,
}

struct Inner {
    /// Recent events that are kept.
    kept: usize,
    /// Whether anybody wants to be told.
    wanted: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    recent: VecDeque<Arc<Observed>>,
    /// Time of the newest event that had to make room.
    displaced: Option<SystemTime>,
    observers: Vec<Observer>,
}

struct Observer {
    filter: Filter,
    queue: mpsc::Sender<Arc<Observed>>,
    lost: Arc<AtomicU64>,
}

/// What one observer sees, in order.
#[derive(Debug)]
pub struct Observation {
    recent: VecDeque<Arc<Observed>>,
    live: Option<mpsc::Receiver<Arc<Observed>>>,
    /// What has arrived, by its time and by the order of arrival, with the moment of arrival.
    held: BTreeMap<(SystemTime, u64), (Instant, Arc<Observed>)>,
    arrived: u64,
    hold: Duration,
    lost: Arc<AtomicU64>,
}

// === impl Observers ===

impl Observers {
    /// Nobody yet. `kept` recent events are kept for those who come later.
    #[must_use]
    pub fn new(kept: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                kept,
                wanted: AtomicBool::new(kept > 0),
                state: Mutex::default(),
            }),
        }
    }

    /// Tells of an event, which is made only when somebody wants it.
    pub(super) fn tell(&self, time: SystemTime, happening: impl FnOnce() -> Happening) {
        if !self.inner.wanted.load(Ordering::Relaxed) {
            return;
        }
        let observed = Arc::new(Observed {
            time,
            happening: happening(),
        });
        let mut state = self.state();
        state.observers.retain(|observer| observer.tell(&observed));
        self.inner.note_wanted(&state);
        if self.inner.kept > 0 {
            if state.recent.len() >= self.inner.kept
                && let Some(oldest) = state.recent.pop_front()
            {
                state.displaced = state.displaced.max(Some(oldest.time));
            }
            state.recent.push_back(observed);
        }
    }

    /// Tells that the kernel's ring buffer was full.
    pub(super) fn lost_in_kernel(&self, events: u64) {
        self.tell(SystemTime::now(), || {
            Happening::Lost(Lost {
                place: LostIn::Kernel,
                events: Some(events),
            })
        });
    }

    /// Begins to watch.
    ///
    /// # Errors
    /// A sentence, when too many watch already.
    pub fn observe(&self, request: ObserveRequest) -> Result<Observation, String> {
        let mut state = self.state();
        let recent = state.recent(&request);
        let lost = Arc::new(AtomicU64::new(0));
        let mut live = None;
        if request.follow {
            state
                .observers
                .retain(|observer| !observer.queue.is_closed());
            if state.observers.len() >= MAX_OBSERVERS {
                return Err(format!(
                    "{MAX_OBSERVERS} observers watch already: end one of them, or use \
                     `--no-follow`"
                ));
            }
            let (queue, receiver) = mpsc::channel(QUEUE);
            state.observers.push(Observer {
                filter: request.filter,
                queue,
                lost: lost.clone(),
            });
            live = Some(receiver);
        }
        self.inner.note_wanted(&state);
        Ok(Observation {
            recent,
            live,
            held: BTreeMap::new(),
            arrived: 0,
            hold: HOLD,
            lost,
        })
    }

    /// The newest of the recent events that fit.
    pub fn newest(&self, fits: impl Fn(&Happening) -> bool) -> Option<Arc<Observed>> {
        let state = self.state();
        let fitting = state.recent.iter().filter(|it| fits(&it.happening));
        fitting.max_by_key(|observed| observed.time).cloned()
    }

    /// What a panicking thread left behind is whole: each step leaves it so.
    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observers")
            .field("kept", &self.inner.kept)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn note_wanted(&self, state: &State) {
        let wanted = self.kept > 0 || !state.observers.is_empty();
        self.wanted.store(wanted, Ordering::Relaxed);
    }
}

// === impl State ===

impl State {
    /// The recent events that a request wants, after a word on those that are gone.
    fn recent(&self, request: &ObserveRequest) -> VecDeque<Arc<Observed>> {
        // An observer that follows and asks for nothing older begins with now.
        if request.follow && request.since_milliseconds.is_none() && request.last.is_none() {
            return VecDeque::new();
        }
        let now = SystemTime::now();
        let from = request
            .since_milliseconds
            .and_then(|since| now.checked_sub(Duration::from_millis(since)));
        let in_time = |time: SystemTime| from.is_none_or(|from| time >= from);
        let mut chosen: VecDeque<_> = self
            .recent
            .iter()
            .filter(|observed| in_time(observed.time) && request.filter.chooses(observed))
            .cloned()
            .collect();
        // In order of time, which is not that of arrival.
        chosen
            .make_contiguous()
            .sort_by_key(|observed| observed.time);
        let wanted = request.last.unwrap_or(usize::MAX);
        let complete = chosen.len() >= wanted;
        chosen.drain(..chosen.len().saturating_sub(wanted));
        if let Some(displaced) = self.displaced.filter(|time| !complete && in_time(*time)) {
            chosen.push_front(Arc::new(Observed {
                time: displaced,
                happening: Happening::Lost(Lost {
                    place: LostIn::Recent,
                    events: None,
                }),
            }));
        }
        chosen
    }
}

// === impl Observer ===

impl Observer {
    /// False when nobody reads any more.
    fn tell(&self, observed: &Arc<Observed>) -> bool {
        if !self.filter.chooses(observed) {
            return !self.queue.is_closed();
        }
        match self.queue.try_send(Arc::clone(observed)) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }
}

// === impl Observation ===

impl Observation {
    /// The next event; none at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Arc<Observed>> {
        loop {
            if let Some(observed) = self.ready() {
                return Some(observed);
            }
            let first = self.held.first_key_value();
            let due = first.map(|(_, (at, _))| *at + self.hold);
            let live = self.live.as_mut()?;
            let arrived = match due {
                Some(due) => timeout_at(due.into(), live.recv()).await.ok(),
                None => Some(live.recv().await),
            };
            match arrived {
                Some(Some(observed)) => self.hold(observed),
                // Nobody tells any more.
                Some(None) => return self.held.pop_first().map(|(_, (_, observed))| observed),
                None => {}
            }
        }
    }

    fn hold(&mut self, observed: Arc<Observed>) {
        self.arrived += 1;
        let key = (observed.time, self.arrived);
        self.held.insert(key, (Instant::now(), observed));
    }

    /// The next event, if it need not be waited for.
    pub fn ready(&mut self) -> Option<Arc<Observed>> {
        if let Some(observed) = self.recent.pop_front() {
            return Some(observed);
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            return Some(Arc::new(Observed {
                time: SystemTime::now(),
                happening: Happening::Lost(Lost {
                    place: LostIn::Queue,
                    events: Some(lost),
                }),
            }));
        }
        // What waits is bounded: the rest stays in the queue.
        while self.held.len() < QUEUE
            && let Some(observed) = self.live.as_mut().and_then(|live| live.try_recv().ok())
        {
            self.hold(observed);
        }
        let (_, (arrived, _)) = self.held.first_key_value()?;
        let is_due = arrived.elapsed() >= self.hold;
        (is_due || self.held.len() >= QUEUE)
            .then(|| self.held.pop_first())?
            .map(|(_, (_, observed))| observed)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::observed::tests::facts, *};

    fn tell(observers: &Observers, port: u16) {
        let mut facts = facts();
        facts.destination_address = Some(([192, 0, 2, 1], port).into());
        observers.tell(SystemTime::now(), || Happening::Refused(facts));
    }

    /// What one sees who follows, without the wait for what arrives late.
    fn following(observers: &Observers) -> Observation {
        let follow = ObserveRequest {
            follow: true,
            ..ObserveRequest::default()
        };
        Observation {
            hold: Duration::ZERO,
            ..observers.observe(follow).unwrap()
        }
    }

    #[test]
    fn recent_events_are_shown_in_the_order_of_their_time() {
        let observers = Observers::new(8);
        let now = SystemTime::now();
        for (port, ago) in [(3, 1), (1, 3), (2, 2)] {
            let mut facts = facts();
            facts.destination_address = Some(([192, 0, 2, 1], port).into());
            let time = now - Duration::from_millis(ago);
            observers.tell(time, || Happening::Refused(facts));
        }
        let ask = |request| seen(&mut observers.observe(request).unwrap());
        assert_eq!(ask(recent(None, None)), [1, 2, 3]);
        assert_eq!(ask(recent(Some(2), None)), [2, 3]);
    }

    #[tokio::test]
    async fn an_event_that_arrives_late_is_shown_in_its_place() {
        let observers = Observers::new(0);
        let follow = ObserveRequest {
            follow: true,
            ..ObserveRequest::default()
        };
        let mut observation = observers.observe(follow).unwrap();
        let now = SystemTime::now();
        for (port, ago) in [(2, 0), (1, 5)] {
            let mut facts = facts();
            facts.destination_address = Some(([192, 0, 2, 1], port).into());
            let time = now - Duration::from_millis(ago);
            observers.tell(time, || Happening::Refused(facts));
        }
        for port in [1, 2] {
            let observed = observation.next().await.unwrap();
            let facts = observed.happening.facts().unwrap();
            assert_eq!(facts.destination_address.unwrap().port(), port);
        }
    }

    /// The ports of what is seen, and 0 for what was lost.
    fn seen(observation: &mut Observation) -> Vec<u16> {
        std::iter::from_fn(|| observation.ready())
            .map(|observed| {
                let facts = observed.happening.facts();
                facts.map_or(0, |facts| facts.destination_address.unwrap().port())
            })
            .collect()
    }

    fn recent(last: Option<usize>, since: Option<u64>) -> ObserveRequest {
        ObserveRequest {
            last,
            since_milliseconds: since,
            ..ObserveRequest::default()
        }
    }

    #[test]
    fn recent_events_are_kept_within_a_bound_and_what_is_gone_is_said() {
        let observers = Observers::new(3);
        for port in 1..=5 {
            tell(&observers, port);
        }
        let ask = |request| seen(&mut observers.observe(request).unwrap());
        assert_eq!(ask(recent(None, None)), [0, 3, 4, 5]);
        assert_eq!(ask(recent(Some(2), None)), [4, 5]);
        assert_eq!(ask(recent(None, Some(60_000))), [0, 3, 4, 5]);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(ask(recent(None, Some(1))), Vec::<u16>::new());
    }

    #[test]
    fn without_anybody_nothing_is_made() {
        let observers = Observers::new(0);
        observers.tell(SystemTime::now(), || panic!("nobody wants it"));
        let mut observation = following(&observers);
        tell(&observers, 7);
        assert_eq!(seen(&mut observation), [7]);
        drop(observation);
        // The first one after it has gone notices that.
        tell(&observers, 8);
        observers.tell(SystemTime::now(), || panic!("nobody wants it"));
    }

    #[test]
    fn an_observer_that_does_not_read_loses_events_and_learns_how_many() {
        let observers = Observers::new(0);
        let mut slow = following(&observers);
        let mut quick = following(&observers);
        for _ in 0..QUEUE {
            tell(&observers, 1);
        }
        assert_eq!(seen(&mut quick).len(), QUEUE);
        for _ in 0..5 {
            tell(&observers, 2);
        }
        assert_eq!(seen(&mut quick), [2; 5]);
        let first = slow.ready().unwrap();
        assert_eq!(
            first.happening,
            Happening::Lost(Lost {
                place: LostIn::Queue,
                events: Some(5)
            })
        );
        assert_eq!(seen(&mut slow), [1; QUEUE]);
    }

    #[test]
    fn only_so_many_watch_at_once() {
        let observers = Observers::new(0);
        let follow = ObserveRequest {
            follow: true,
            ..ObserveRequest::default()
        };
        let mut watching: Vec<_> = (0..MAX_OBSERVERS)
            .map(|_| observers.observe(follow.clone()).unwrap())
            .collect();
        assert!(observers.observe(follow.clone()).is_err());
        watching.pop();
        assert!(observers.observe(follow).is_ok());
    }
}
