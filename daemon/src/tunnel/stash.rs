//! Sockets that a worker will need: it may not open any itself, and asking for one takes a
//! moment.
//!
//! Of sockets to applications some are kept ready for each workload that has been asked for, so
//! that a connection waits for none: a few, and more where many are used. They are fetched in
//! batches, since each time costs a change of threads and of namespaces. Sockets to peers are few,
//! and are asked for one by one.

use std::{cell::RefCell, collections::HashMap, io, net::SocketAddr, rc::Rc, sync::Arc};

use reeve_common::WorkloadId;
use socket2::Socket;
use tokio::task::spawn_local;

use crate::datapath::{Sockets, netns::Netns};

/// Sockets to applications that are kept ready, for each workload and address family, where few
/// are used.
const FEW: usize = 8;
/// The same where a second uses as many.
const MANY: usize = 64;
/// Seconds without use after which nothing is kept ready for a workload.
const LONG: usize = 600;

/// A worker's sockets.
pub(super) struct Stash {
    sockets: Sockets,
    /// By the cookie of the namespace, for as long as the worker listens there, and the workload.
    ready: RefCell<HashMap<u64, HashMap<WorkloadId, Ready>>>,
}

#[derive(Default)]
struct Ready {
    v4: Shelf,
    v6: Shelf,
}

struct Shelf {
    sockets: Vec<Socket>,
    /// How many there are when it is full: between [`FEW`] and [`MANY`].
    room: usize,
    /// Taken since the last [`Shelf::tidy`].
    taken: usize,
    /// Calls of [`Shelf::tidy`] since one was taken.
    unused: usize,
    /// Sockets are on their way.
    filling: bool,
}

// === impl Stash ===

impl Stash {
    pub(super) fn new(sockets: Sockets) -> Rc<Self> {
        Rc::new(Self {
            sockets,
            ready: RefCell::default(),
        })
    }

    /// Sockets may be kept ready for this namespace.
    pub(super) fn keep(&self, netns: &Netns) {
        self.ready.borrow_mut().entry(netns.cookie).or_default();
    }

    /// Lets go of what is ready for a namespace, and with it of the namespace.
    pub(super) fn forget(&self, cookie: u64) {
        self.ready.borrow_mut().remove(&cookie);
    }

    /// Closes what is more than is used. To be called once a second.
    pub(super) fn tidy(&self) {
        for workloads in self.ready.borrow_mut().values_mut() {
            workloads.retain(|_, ready| {
                ready.v4.tidy();
                ready.v6.tidy();
                // Of a workload that is gone nothing stays.
                ready.v4.is_used() || ready.v6.is_used()
            });
        }
    }

    /// A socket to the peer's tunnel port `to`.
    pub(super) async fn to_peer(&self, netns: &Arc<Netns>, to: SocketAddr) -> io::Result<Socket> {
        self.sockets.tunnel(netns, to).await
    }

    /// A socket to the application of `workload` at `to`.
    pub(super) async fn to_application(
        self: &Rc<Self>,
        netns: &Arc<Netns>,
        workload: WorkloadId,
        to: SocketAddr,
    ) -> io::Result<Socket> {
        let (ready, missing) = self
            .with_shelf(netns.cookie, workload, to, Shelf::take)
            .unwrap_or_default();
        if missing > 0 {
            spawn_local(self.clone().fill(netns.clone(), workload, to, missing));
        }
        if let Some(socket) = ready {
            return Ok(socket);
        }
        let opened = self.sockets.onward(netns, workload, to, 1).await?;
        let none = || io::Error::other("no socket was opened");
        opened.into_iter().next().ok_or_else(none)
    }

    /// Fetches sockets for a shelf.
    async fn fill(
        self: Rc<Self>,
        netns: Arc<Netns>,
        workload: WorkloadId,
        to: SocketAddr,
        count: usize,
    ) {
        let opened = self.sockets.onward(&netns, workload, to, count).await;
        self.with_shelf(netns.cookie, workload, to, |shelf| {
            shelf.filling = false;
            // Whoever needs a socket asks for itself, and is told of an error.
            shelf.sockets.extend(opened.into_iter().flatten());
        });
    }

    /// None where the worker does not listen in the namespace any more.
    fn with_shelf<T>(
        &self,
        cookie: u64,
        workload: WorkloadId,
        to: SocketAddr,
        work: impl FnOnce(&mut Shelf) -> T,
    ) -> Option<T> {
        let mut ready = self.ready.borrow_mut();
        let ready = ready.get_mut(&cookie)?.entry(workload).or_default();
        Some(work(match to {
            SocketAddr::V4(_) => &mut ready.v4,
            SocketAddr::V6(_) => &mut ready.v6,
        }))
    }
}

// === impl Shelf ===

impl Default for Shelf {
    fn default() -> Self {
        Self {
            sockets: Vec::new(),
            room: FEW,
            taken: 0,
            unused: 0,
            filling: false,
        }
    }
}

impl Shelf {
    /// A socket if there is one, and how many are to be fetched now.
    fn take(&mut self) -> (Option<Socket>, usize) {
        let socket = self.sockets.pop();
        self.taken += 1;
        self.unused = 0;
        if self.taken > self.room {
            self.room = (self.room * 2).min(MANY);
        }
        let fetch = !self.filling && self.sockets.len() <= self.room / 2;
        self.filling |= fetch;
        let missing = if fetch {
            self.room - self.sockets.len()
        } else {
            0
        };
        (socket, missing)
    }

    fn tidy(&mut self) {
        if self.taken < self.room {
            self.room = (self.room / 2).max(FEW);
            self.sockets.truncate(self.room);
        }
        self.taken = 0;
        self.unused += 1;
    }

    fn is_used(&self) -> bool {
        self.filling || self.unused < LONG
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Type};

    use super::*;

    /// Takes from a shelf that is filled at once.
    fn take(shelf: &mut Shelf, times: usize) {
        for _ in 0..times {
            let (_, missing) = shelf.take();
            let more = (0..missing).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
            shelf.sockets.extend(more);
            shelf.filling = false;
        }
    }

    #[test]
    fn a_shelf_grows_with_what_is_taken_and_shrinks_when_little_is() {
        let mut shelf = Shelf::default();
        take(&mut shelf, 1);
        assert_eq!(shelf.sockets.len(), FEW);
        take(&mut shelf, 1000);
        assert_eq!(shelf.room, MANY);
        assert!(shelf.sockets.len() > MANY / 2 && shelf.sockets.len() <= MANY);
        shelf.tidy();
        assert_eq!(shelf.room, MANY);
        for _ in 0..10 {
            shelf.tidy();
        }
        assert_eq!(shelf.sockets.len(), FEW);
    }

    #[test]
    fn a_shelf_is_filled_by_one_at_a_time() {
        let mut shelf = Shelf::default();
        let (nothing, missing) = shelf.take();
        assert!(nothing.is_none());
        assert_eq!(missing, FEW);
        assert_eq!(shelf.take().1, 0);
    }
}
