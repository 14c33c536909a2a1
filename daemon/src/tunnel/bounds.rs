//! Limits that hold for all workers together, and the share of them that one workload, or one
//! address, may have.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use reeve_common::WorkloadId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Limits;

use super::TunnelError;

/// Counters of what all workers share.
#[derive(Debug)]
pub(super) struct Bounds {
    connections: AtomicUsize,
    most_connections: usize,
    workloads: Arc<Shares<WorkloadId>>,
    most_handshakes: usize,
    /// One permit for each TLS handshake that may be under way towards peers.
    pub(super) opening: Arc<Semaphore>,
    /// The same for those of peers: whoever floods these keeps nobody here from opening tunnels.
    accepting: Arc<Semaphore>,
    addresses: Arc<Shares<IpAddr>>,
}

/// One of the connections that may be open; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    bounds: Arc<Bounds>,
    _share: Option<Share<WorkloadId>>,
}

/// Leave for a handshake that a peer began; given back when dropped.
#[derive(Debug)]
pub(super) struct Handshaking {
    _permit: OwnedSemaphorePermit,
    _share: Share<IpAddr>,
}

/// How much of something each has.
#[derive(Debug)]
struct Shares<K> {
    most: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One part of what somebody has; given back when dropped.
#[derive(Debug)]
struct Share<K: Copy + Eq + Hash> {
    of: Arc<Shares<K>>,
    key: K,
}

// === impl Bounds ===

impl Bounds {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        let most_handshakes = limits.handshakes.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            connections: AtomicUsize::new(0),
            most_connections: limits.connections,
            workloads: Shares::new(limits.connections_per_workload),
            most_handshakes,
            opening: Arc::new(Semaphore::new(most_handshakes)),
            accepting: Arc::new(Semaphore::new(most_handshakes)),
            addresses: Shares::new(limits.handshakes_per_address),
        })
    }

    /// A place for one more connection of a workload.
    pub(super) fn place(self: &Arc<Self>, workload: WorkloadId) -> Result<Place, TunnelError> {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        let mut place = Place {
            bounds: self.clone(),
            _share: None,
        };
        if taken >= self.most_connections {
            return Err(TunnelError::Limit("connections"));
        }
        let share = self.workloads.take(workload);
        place._share = Some(share.ok_or(TunnelError::Limit("connectionsPerWorkload"))?);
        Ok(place)
    }

    /// Leave for one more handshake that a peer at this address began. None: it has enough of
    /// them under way, or all have.
    pub(super) fn handshake(&self, from: IpAddr) -> Option<Handshaking> {
        let share = self.addresses.take(from)?;
        let permit = self.accepting.clone().try_acquire_owned().ok()?;
        Some(Handshaking {
            _permit: permit,
            _share: share,
        })
    }

    /// Whether there is a connection, or a handshake that may bring some.
    pub(super) fn is_busy(&self) -> bool {
        let handshakes = [&self.opening, &self.accepting];
        self.connections() > 0
            || handshakes
                .iter()
                .any(|permits| permits.available_permits() < self.most_handshakes)
    }

    /// Connections open now.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.bounds.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Shares ===

impl<K: Copy + Eq + Hash> Shares<K> {
    fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    fn take(self: &Arc<Self>, key: K) -> Option<Share<K>> {
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.entry(key).or_default();
        if *taken >= self.most {
            return None;
        }
        *taken += 1;
        Some(Share {
            of: self.clone(),
            key,
        })
    }
}

impl<K: Copy + Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        let mut all = self.of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = all.get_mut(&self.key) {
            *taken -= 1;
            // Who has nothing is not remembered: there are many addresses.
            if *taken == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_workload_has_its_share_and_no_more() {
        let bounds = Bounds::new(&Limits {
            connections: 5,
            connections_per_workload: 3,
            ..Limits::default()
        });
        let mut first: Vec<_> = (0..3).map(|_| bounds.place(1).unwrap()).collect();
        let over = bounds.place(1).unwrap_err();
        assert!(
            over.to_string().contains("connectionsPerWorkload"),
            "{over}"
        );
        assert_eq!(bounds.connections(), 3);
        let _second: Vec<_> = (0..2).map(|_| bounds.place(2).unwrap()).collect();
        let over = bounds.place(3).unwrap_err();
        assert!(over.to_string().contains("limits.connections`"), "{over}");
        first.pop();
        first.push(bounds.place(1).unwrap());
        bounds.place(1).unwrap_err();
    }

    #[test]
    fn one_address_has_its_share_of_handshakes_and_nothing_is_kept_of_those_that_are_gone() {
        let bounds = Bounds::new(&Limits {
            handshakes: 3,
            handshakes_per_address: 2,
            ..Limits::default()
        });
        let [one, two] = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let held = [
            bounds.handshake(one).unwrap(),
            bounds.handshake(one).unwrap(),
        ];
        assert!(bounds.handshake(one).is_none());
        let other = bounds.handshake(two).unwrap();
        assert!(bounds.handshake(two).is_none(), "in all");
        assert_eq!(bounds.opening.available_permits(), 3);
        assert!(bounds.is_busy());
        drop((held, other));
        assert!(!bounds.is_busy());
        assert!(bounds.addresses.taken.lock().unwrap().is_empty());
    }
}
