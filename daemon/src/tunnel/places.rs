//! Places that are waited for, shared so that there is always one for whoever has none.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

/// A number of places. A user has at most as many as are free: half of all where it is the only one,
/// a third beside another one that takes what it gets. So no user keeps others from having some.
#[derive(Debug)]
pub(super) struct SharedPlaces<K: Clone + Eq + Hash> {
    most: usize,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K: Clone + Eq + Hash> {
    free: usize,
    /// Those who have places, or wait for some.
    users: HashMap<K, User<K>>,
    /// How often somebody has begun to wait.
    waits: u64,
}

#[derive(Debug)]
struct User<K: Clone + Eq + Hash> {
    taken: usize,
    /// With a number that tells who came before whom.
    waiting: VecDeque<(u64, oneshot::Sender<SharedPlace<K>>)>,
}

/// One of the places; given back when dropped.
#[derive(Debug)]
pub(super) struct SharedPlace<K: Clone + Eq + Hash> {
    of: Arc<SharedPlaces<K>>,
    user: K,
}

/// Why there was no place in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// All are taken.
    AllTaken,
    /// The user has its share.
    ShareTaken,
}

// === impl SharedPlaces ===

impl<K: Clone + Eq + Hash> SharedPlaces<K> {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            state: Mutex::new(State {
                free: most,
                users: HashMap::new(),
                waits: 0,
            }),
        })
    }

    /// Waits for a place, for no longer than this. Of those who wait, the user with the fewest places
    /// is the next, and of several such and with each user whoever has waited longest.
    pub(super) async fn take_within(
        self: &Arc<Self>,
        user: &K,
        patience: Duration,
    ) -> Result<SharedPlace<K>, NoPlace> {
        match timeout(patience, self.take(user)).await {
            Ok(Some(place)) => Ok(place),
            _ => Err(self.why_none(user)),
        }
    }

    /// Waits for a place for as long as it takes.
    pub(super) async fn take(self: &Arc<Self>, user: &K) -> Option<SharedPlace<K>> {
        let (sender, place) = oneshot::channel();
        {
            let mut state = self.state();
            state.waits += 1;
            let number = state.waits;
            let user = state.users.entry(user.clone()).or_insert_with(|| User {
                taken: 0,
                waiting: VecDeque::new(),
            });
            user.waiting.push_back((number, sender));
        }
        self.serve();
        place.await.ok()
    }

    /// Whether anybody has a place.
    pub(super) fn is_used(&self) -> bool {
        self.state().free < self.most
    }

    fn why_none(&self, user: &K) -> NoPlace {
        let state = self.state();
        match state.users.get(user) {
            Some(user) if user.taken > 0 && state.free > 0 => NoPlace::ShareTaken,
            _ => NoPlace::AllTaken,
        }
    }

    /// Gives free places to those who wait and may have one.
    fn serve(self: &Arc<Self>) {
        loop {
            let Some((sender, user)) = self.state().next() else {
                return;
            };
            let place = SharedPlace {
                of: self.clone(),
                user,
            };
            // Whoever went away in between gives it back by dropping it.
            let _ = sender.send(place);
        }
    }

    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl<K: Clone + Eq + Hash> State<K> {
    /// Takes a place for the next who waits, if there is one for it.
    fn next(&mut self) -> Option<(oneshot::Sender<SharedPlace<K>>, K)> {
        self.users.retain(|_, user| {
            while user.waiting.front().is_some_and(|(_, one)| one.is_closed()) {
                user.waiting.pop_front();
            }
            user.taken > 0 || !user.waiting.is_empty()
        });
        let waiting = self.users.iter_mut().filter_map(|(key, user)| {
            let (number, _) = user.waiting.front()?;
            Some(((user.taken, *number), key, user))
        });
        let (_, key, user) = waiting.min_by_key(|(order, ..)| *order)?;
        if user.taken >= self.free {
            return None;
        }
        let (_, sender) = user.waiting.pop_front()?;
        user.taken += 1;
        self.free -= 1;
        Some((sender, key.clone()))
    }
}

// === impl SharedPlace ===

impl<K: Clone + Eq + Hash> Drop for SharedPlace<K> {
    fn drop(&mut self) {
        {
            let mut state = self.of.state();
            state.free += 1;
            if let Some(user) = state.users.get_mut(&self.user) {
                user.taken -= 1;
            }
        }
        self.of.serve();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    type Places = Arc<SharedPlaces<&'static str>>;

    /// As many places as the user gets at once.
    fn take_all(places: &Places, user: &'static str) -> Vec<SharedPlace<&'static str>> {
        std::iter::from_fn(|| places.take(&user).now_or_never()?).collect()
    }

    #[test]
    fn nobody_has_more_places_than_are_free() {
        let places = SharedPlaces::new(12);
        let one = take_all(&places, "one");
        assert_eq!(one.len(), 6, "half, where it is the only one");
        let two = take_all(&places, "two");
        assert_eq!(two.len(), 3);
        let three = take_all(&places, "three");
        assert_eq!(three.len(), 2);
        // There is always one for who has none.
        assert_eq!(take_all(&places, "four").len(), 1);
        drop((two, three));
        assert_eq!(take_all(&places, "one").len(), 0, "it has its share");
        drop(one);
        assert!(!places.is_used());
        assert!(places.state().users.is_empty(), "nobody is remembered");
    }

    #[test]
    fn of_a_single_place_everybody_may_have_it() {
        let places = SharedPlaces::new(1);
        let place = take_all(&places, "one");
        assert_eq!(place.len(), 1);
        assert_eq!(take_all(&places, "two").len(), 0);
        drop(place);
        assert_eq!(take_all(&places, "two").len(), 1);
    }

    #[tokio::test]
    async fn who_has_none_gets_one_at_once_however_many_wait_for_another() {
        let places = SharedPlaces::new(4);
        let mut held = take_all(&places, "many");
        assert_eq!(held.len(), 2);
        let waits = |user: &'static str| {
            let places = places.clone();
            tokio::spawn(async move { places.take(&user).await.unwrap() })
        };
        let many: Vec<_> = (0..100).map(|_| waits("many")).collect();
        tokio::task::yield_now().await;
        let _few = waits("few").await.unwrap();
        assert_eq!(places.state().free, 1);
        assert!(many.iter().all(|waiting| !waiting.is_finished()));
        // What is given up goes to whoever has waited longest, as long as the share is not taken.
        drop(held.pop());
        let mut many = many.into_iter();
        let _next = many.next().unwrap().await.unwrap();
        assert!(many.all(|waiting| !waiting.is_finished()));
    }

    #[tokio::test]
    async fn of_those_with_equally_few_whoever_has_waited_longest_is_the_next() {
        let places = SharedPlaces::new(1);
        let held = take_all(&places, "first");
        let served = Arc::new(Mutex::new(Vec::new()));
        let names = ["h", "c", "a", "f", "b", "g", "d", "e"];
        let mut all = Vec::new();
        for name in names {
            let (places, served) = (places.clone(), served.clone());
            all.push(tokio::spawn(async move {
                let _place = places.take(&name).await.unwrap();
                served.lock().unwrap().push(name);
            }));
            tokio::task::yield_now().await;
        }
        drop(held);
        for one in all {
            one.await.unwrap();
        }
        assert_eq!(*served.lock().unwrap(), names);
    }

    #[tokio::test]
    async fn who_waits_in_vain_is_told_why_and_takes_nothing() {
        let places = SharedPlaces::new(2);
        let short = Duration::from_millis(10);
        let one = places.take_within(&"one", short).await.unwrap();
        let beyond = places.take_within(&"one", short).await;
        assert_eq!(beyond.unwrap_err(), NoPlace::ShareTaken);
        let two = places.take_within(&"two", short).await.unwrap();
        let beyond = places.take_within(&"three", short).await;
        assert_eq!(beyond.unwrap_err(), NoPlace::AllTaken);
        drop((one, two));
        assert!(!places.is_used());
    }
}
