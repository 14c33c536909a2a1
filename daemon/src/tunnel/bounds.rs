//! Limits that hold for all workers together, and the share of them that one workload, one peer's
//! identity, or one address, may have.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reeve_common::WorkloadId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{config::Limits, identity::SpiffeId, telemetry::Limit};

use super::{
    TunnelError,
    places::{NoPlace, SharedPlace, SharedPlaces},
};

/// Proofs of tunnels that may be under way at once: those that this node asks for, those that peers ask
/// for, and of these those of one identity. Strangers cannot ask for any.
const ASKING: usize = 64;
const PROOFS: usize = 256;
const PROOFS_PER_IDENTITY: usize = 128;

/// Who opens tunnels, and has them: an identity in a network namespace.
pub(super) type Opener = (u64, SpiffeId);

/// Counters of what all workers share.
#[derive(Debug)]
pub(super) struct Bounds {
    connections: AtomicUsize,
    most_connections: usize,
    workloads: Arc<Shares<WorkloadId>>,
    /// Connections by the identity of the peer that opened them.
    callers: Arc<Shares<SpiffeId>>,
    most_handshakes: usize,
    /// A place for each TLS handshake that may be under way towards peers.
    opening: Arc<SharedPlaces<Opener>>,
    /// The same for those of peers: whoever floods these keeps nobody here from opening tunnels.
    accepting: Arc<Semaphore>,
    addresses: Arc<Shares<IpAddr>>,
    /// One permit for each tunnel that peers may have opened.
    tunnels: Arc<Semaphore>,
    /// The same by their identities.
    tunnellers: Arc<Shares<SpiffeId>>,
    /// A place for each proof of a tunnel that may be under way towards peers.
    asking: Arc<SharedPlaces<Opener>>,
    /// One permit for each of those of peers.
    proofs: Arc<Semaphore>,
    /// The same by their identities.
    provers: Arc<Shares<SpiffeId>>,
}

/// One of the proofs that peers may have under way; given back when dropped.
#[derive(Debug)]
pub(super) struct ProofPlace {
    _proof: OwnedSemaphorePermit,
    _share: Share<SpiffeId>,
}

/// One of the connections that may be open; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    bounds: Arc<Bounds>,
    _workload: Option<Share<WorkloadId>>,
    _caller: Option<Share<SpiffeId>>,
}

/// Leave for a handshake that a peer began, and for the tunnel that it may bring; given back when
/// dropped.
#[derive(Debug)]
pub(super) struct Arriving {
    _handshake: OwnedSemaphorePermit,
    _address: Share<IpAddr>,
    tunnel: OwnedSemaphorePermit,
    tunnellers: Arc<Shares<SpiffeId>>,
}

/// One of the tunnels that peers may have opened; given back when dropped.
#[derive(Debug)]
pub(super) struct TunnelPlace {
    _tunnel: OwnedSemaphorePermit,
    _share: Share<SpiffeId>,
}

/// How much of something each has.
#[derive(Debug)]
struct Shares<K> {
    most: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One part of what somebody has; given back when dropped.
#[derive(Debug)]
struct Share<K: Eq + Hash> {
    of: Arc<Shares<K>>,
    key: K,
}

// === impl Bounds ===

impl Bounds {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        let permits = |number: usize| number.min(Semaphore::MAX_PERMITS);
        let most_handshakes = permits(limits.handshakes);
        Arc::new(Self {
            connections: AtomicUsize::new(0),
            most_connections: limits.connections,
            workloads: Shares::new(limits.connections_per_workload),
            callers: Shares::new(limits.connections_per_identity),
            most_handshakes,
            opening: SharedPlaces::new(most_handshakes),
            accepting: Arc::new(Semaphore::new(most_handshakes)),
            addresses: Shares::new(limits.handshakes_per_address),
            tunnels: Arc::new(Semaphore::new(permits(limits.tunnels))),
            tunnellers: Shares::new(limits.tunnels_per_identity),
            asking: SharedPlaces::new(ASKING),
            proofs: Arc::new(Semaphore::new(PROOFS)),
            provers: Shares::new(PROOFS_PER_IDENTITY),
        })
    }

    /// A place for one more connection of a workload, which the peer `caller` opened unless the
    /// workload itself did.
    pub(super) fn place(
        self: &Arc<Self>,
        workload: WorkloadId,
        caller: Option<&SpiffeId>,
    ) -> Result<Place, TunnelError> {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        let mut place = Place {
            bounds: self.clone(),
            _workload: None,
            _caller: None,
        };
        if taken >= self.most_connections {
            return Err(TunnelError::Limit(Limit::Connections));
        }
        if let Some(caller) = caller {
            let share = self.callers.take(caller);
            let beyond = TunnelError::Limit(Limit::ConnectionsPerIdentity);
            place._caller = Some(share.ok_or(beyond)?);
        }
        let share = self.workloads.take(&workload);
        let beyond = TunnelError::Limit(Limit::ConnectionsPerWorkload);
        place._workload = Some(share.ok_or(beyond)?);
        Ok(place)
    }

    /// Leave for one more handshake towards a peer, which is waited for no longer than this.
    pub(super) async fn opening(
        &self,
        opener: &Opener,
        patience: Duration,
    ) -> Result<SharedPlace<Opener>, Limit> {
        let place = self.opening.take_within(opener, patience).await;
        place.map_err(|why| match why {
            NoPlace::AllTaken => Limit::Handshakes,
            NoPlace::ShareTaken => Limit::HandshakesPerWorkload,
        })
    }

    /// Leave for one more proof that a peer is asked for, once there is one.
    pub(super) async fn asking(&self, opener: &Opener) -> Option<SharedPlace<Opener>> {
        self.asking.take(opener).await
    }

    /// Leave for one more handshake that a peer at this address began, unless it has enough of
    /// them under way, or all have.
    pub(super) fn arriving(&self, from: IpAddr) -> Result<Arriving, Limit> {
        let permit = |of: &Arc<Semaphore>| of.clone().try_acquire_owned();
        Ok(Arriving {
            _address: self
                .addresses
                .take(&network(from))
                .ok_or(Limit::HandshakesPerAddress)?,
            _handshake: permit(&self.accepting).map_err(|_| Limit::Handshakes)?,
            tunnel: permit(&self.tunnels).map_err(|_| Limit::Tunnels)?,
            tunnellers: self.tunnellers.clone(),
        })
    }

    /// Leave for one more proof of a tunnel that this peer asks for.
    pub(super) fn proof(&self, peer: &SpiffeId) -> Result<ProofPlace, Limit> {
        let proof = self.proofs.clone().try_acquire_owned();
        Ok(ProofPlace {
            _share: self.provers.take(peer).ok_or(Limit::Proofs)?,
            _proof: proof.map_err(|_| Limit::Proofs)?,
        })
    }

    /// Whether there is a connection, or a handshake that may bring some.
    pub(super) fn is_busy(&self) -> bool {
        self.connections() > 0
            || self.opening.is_used()
            || self.accepting.available_permits() < self.most_handshakes
    }

    /// Connections open now.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Connections open now, by workload.
    pub(super) fn connections_by_workload(&self) -> Vec<(WorkloadId, usize)> {
        self.workloads.all()
    }
}

/// By what the handshakes of an address are counted: of IPv6 its /64, in which any host has as many
/// addresses as it likes (RFC 4291, section 2.5.1).
fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

// === impl Arriving ===

impl Arriving {
    /// The handshake has shown who the peer is.
    pub(super) fn of(self, peer: &SpiffeId) -> Result<TunnelPlace, Limit> {
        let share = self.tunnellers.take(peer);
        Ok(TunnelPlace {
            _share: share.ok_or(Limit::TunnelsPerIdentity)?,
            _tunnel: self.tunnel,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.bounds.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Shares ===

impl<K: Clone + Eq + Hash> Shares<K> {
    fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    fn all(&self) -> Vec<(K, usize)> {
        let all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .map(|(key, taken)| (key.clone(), *taken))
            .collect()
    }

    fn take(self: &Arc<Self>, key: &K) -> Option<Share<K>> {
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.entry(key.clone()).or_default();
        if *taken >= self.most {
            return None;
        }
        *taken += 1;
        Some(Share {
            of: self.clone(),
            key: key.clone(),
        })
    }
}

impl<K: Eq + Hash> Drop for Share<K> {
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
        let mut first: Vec<_> = (0..3).map(|_| bounds.place(1, None).unwrap()).collect();
        let over = bounds.place(1, None).unwrap_err();
        assert!(
            over.to_string().contains("connectionsPerWorkload"),
            "{over}"
        );
        assert_eq!(bounds.connections(), 3);
        let _second: Vec<_> = (0..2).map(|_| bounds.place(2, None).unwrap()).collect();
        let mut whose = bounds.connections_by_workload();
        whose.sort_unstable();
        assert_eq!(whose, [(1, 3), (2, 2)]);
        let over = bounds.place(3, None).unwrap_err();
        assert!(over.to_string().contains("limits.connections`"), "{over}");
        first.pop();
        first.push(bounds.place(1, None).unwrap());
        bounds.place(1, None).unwrap_err();
    }

    #[test]
    fn one_address_has_its_share_of_handshakes_and_nothing_is_kept_of_those_that_are_gone() {
        let bounds = Bounds::new(&Limits {
            handshakes: 3,
            handshakes_per_address: 2,
            ..Limits::default()
        });
        let [one, two] = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let held = [bounds.arriving(one).unwrap(), bounds.arriving(one).unwrap()];
        assert_eq!(
            bounds.arriving(one).unwrap_err(),
            Limit::HandshakesPerAddress
        );
        let other = bounds.arriving(two).unwrap();
        assert_eq!(
            bounds.arriving(two).unwrap_err(),
            Limit::Handshakes,
            "in all"
        );
        assert!(!bounds.opening.is_used());
        assert!(bounds.is_busy());
        drop((held, other));
        assert!(!bounds.is_busy());
        assert!(bounds.addresses.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one() {
        let bounds = Bounds::new(&Limits {
            handshakes_per_address: 1,
            ..Limits::default()
        });
        let at = |ip: &str| bounds.arriving(ip.parse().unwrap());
        let _held = at("2001:db8:0:1::1").unwrap();
        assert_eq!(
            at("2001:db8:0:1:ffff::2").unwrap_err(),
            Limit::HandshakesPerAddress
        );
        let _others = [at("2001:db8:0:2::1"), at("192.0.2.1"), at("192.0.2.2")].map(Result::unwrap);
        // One of IPv4 is the same in either form.
        assert_eq!(
            at("::ffff:192.0.2.1").unwrap_err(),
            Limit::HandshakesPerAddress
        );
    }

    #[test]
    fn one_identity_has_its_share_of_connections_and_of_tunnels() {
        let bounds = Bounds::new(&Limits {
            connections_per_identity: 2,
            tunnels: 3,
            tunnels_per_identity: 2,
            ..Limits::default()
        });
        let [one, two] = ["one", "two"]
            .map(|name| SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap());
        let _connections: Vec<_> = (0..2)
            .map(|_| bounds.place(1, Some(&one)).unwrap())
            .collect();
        let over = bounds.place(1, Some(&one)).unwrap_err();
        assert!(
            over.to_string().contains("connectionsPerIdentity"),
            "{over}"
        );
        let _others = [
            bounds.place(1, Some(&two)).unwrap(),
            bounds.place(1, None).unwrap(),
        ];
        let arrive = |id| bounds.arriving("192.0.2.1".parse().unwrap())?.of(id);
        let tunnels = [arrive(&one).unwrap(), arrive(&one).unwrap()];
        assert_eq!(arrive(&one).unwrap_err(), Limit::TunnelsPerIdentity);
        let _other = arrive(&two).unwrap();
        assert_eq!(arrive(&two).unwrap_err(), Limit::Tunnels, "in all");
        drop(tunnels);
        arrive(&one).unwrap();
    }
}
