//! Sockets that a worker will need: it may not open any itself, and asking for one takes a
//! moment.
//!
//! Of sockets to applications a few are kept ready for each namespace that has been asked for, so
//! that a connection waits for none. Sockets to peers are few, and are asked for one by one.

use std::{cell::RefCell, collections::HashMap, io, net::SocketAddr, rc::Rc, sync::Arc};

use socket2::Socket;
use tokio::task::spawn_local;

use crate::datapath::{Purpose, Sockets, netns::Netns};

/// Sockets to applications that are kept ready, for each namespace and address family.
const READY: usize = 8;

/// A worker's sockets.
pub(super) struct Stash {
    sockets: Sockets,
    /// By the cookie of the namespace, for as long as the worker listens there.
    ready: RefCell<HashMap<u64, Ready>>,
}

#[derive(Default)]
struct Ready {
    v4: Shelf,
    v6: Shelf,
}

#[derive(Default)]
struct Shelf {
    sockets: Vec<Socket>,
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

    /// A socket to the peer's tunnel port `to`.
    pub(super) async fn to_peer(&self, netns: &Arc<Netns>, to: SocketAddr) -> io::Result<Socket> {
        self.sockets.open(netns, Purpose::Tunnel, to).await
    }

    /// A socket to the application at `to`.
    pub(super) async fn to_application(
        self: &Rc<Self>,
        netns: &Arc<Netns>,
        to: SocketAddr,
    ) -> io::Result<Socket> {
        let ready = self.with_shelf(netns.cookie, to, |shelf| {
            let ready = shelf.sockets.pop();
            let fill = !shelf.filling;
            shelf.filling = true;
            (ready, fill)
        });
        let (ready, fill) = ready.unwrap_or_default();
        if fill {
            spawn_local(self.clone().fill(netns.clone(), to));
        }
        match ready {
            Some(socket) => Ok(socket),
            None => self.sockets.open(netns, Purpose::Onward, to).await,
        }
    }

    /// Asks for sockets until enough are ready.
    async fn fill(self: Rc<Self>, netns: Arc<Netns>, to: SocketAddr) {
        let mut more = true;
        while more {
            let opened = self.sockets.open(&netns, Purpose::Onward, to).await;
            // Whoever needs a socket asks for itself, and is told of an error.
            let shelved = self.with_shelf(netns.cookie, to, |shelf| {
                shelf.filling = opened.is_ok() && shelf.sockets.len() + 1 < READY;
                shelf.sockets.extend(opened);
                shelf.filling
            });
            more = shelved.unwrap_or(false);
        }
    }

    /// None where the worker does not listen in the namespace any more.
    fn with_shelf<T>(
        &self,
        cookie: u64,
        to: SocketAddr,
        work: impl FnOnce(&mut Shelf) -> T,
    ) -> Option<T> {
        let mut ready = self.ready.borrow_mut();
        let ready = ready.get_mut(&cookie)?;
        Some(work(match to {
            SocketAddr::V4(_) => &mut ready.v4,
            SocketAddr::V6(_) => &mut ready.v6,
        }))
    }
}
