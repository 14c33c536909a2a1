//! Limits that hold for all workers together.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::Semaphore;

use crate::config::Limits;

use super::TunnelError;

/// Counters of what all workers share.
#[derive(Debug)]
pub(super) struct Bounds {
    connections: AtomicUsize,
    most_connections: usize,
    most_handshakes: usize,
    /// One permit for each TLS handshake that may be under way.
    pub(super) handshakes: Arc<Semaphore>,
}

/// One of the connections that may be open; given back when dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Bounds>);

impl Bounds {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        let most_handshakes = limits.handshakes.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            connections: AtomicUsize::new(0),
            most_connections: limits.connections,
            most_handshakes,
            handshakes: Arc::new(Semaphore::new(most_handshakes)),
        })
    }

    /// A place for one more connection.
    pub(super) fn place(self: &Arc<Self>) -> Result<Place, TunnelError> {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        let place = Place(self.clone());
        if taken >= self.most_connections {
            return Err(TunnelError::Limit("connections"));
        }
        Ok(place)
    }

    /// Whether there is a connection, or a handshake that may bring some.
    pub(super) fn is_busy(&self) -> bool {
        self.connections() > 0 || self.handshakes.available_permits() < self.most_handshakes
    }

    /// Connections open now.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
