//! Sockets inside network namespaces for threads that may not enter one.
//!
//! Entering a namespace, and writing to a map, take privileges that the tunnels' workers have given up,
//! since they read what strangers send. A thread of its own opens the sockets and hands them over, and
//! writes what the workers find out of destinations.

use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, mpsc},
    thread,
};

use reeve_common::{FailingEntry, FailingKey, Origin, WorkloadId};
use socket2::{Domain, Socket};
use tokio::sync::oneshot;

use super::{control_congestion, netns::Netns};
use crate::{config::CongestionControl, privileges::Confinement};

/// What the daemon and the kernel programs tell each other of single connections. What is told of a
/// socket ends with it.
pub trait SocketStorage: fmt::Debug + Send + Sync {
    /// Where a connection that the outbound listener accepted was meant to go. None: reeve has not
    /// redirected it.
    fn origin(&self, accepted: BorrowedFd<'_>) -> Option<Origin>;

    /// Lets one of [`Netns::onward_sockets`] connect to applications of a workload, and to no other.
    ///
    /// # Errors
    /// From the kernel.
    fn deliver_to(&self, socket: BorrowedFd<'_>, workload: WorkloadId) -> io::Result<()>;

    /// Whether the programs keep such a socket from its destination, since what listens there
    /// belongs to another workload, or to none. The socket itself gets no answer.
    fn met_wrong_listener(&self, socket: BorrowedFd<'_>) -> bool;

    /// Has `connect()` to a destination fail at once, or no longer.
    ///
    /// # Errors
    /// From the kernel.
    fn set_failing(&self, destination: FailingKey, how: FailingEntry) -> io::Result<()>;
}

/// The thread that opens sockets. It ends with the last clone.
#[derive(Clone, Debug)]
pub struct Sockets {
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
enum Request {
    Open(Open),
    /// [`SocketStorage::set_failing`].
    SetFailing(FailingKey, FailingEntry),
}

/// What to open in a namespace, and whom to give it to.
#[derive(Debug)]
struct Open {
    netns: Arc<Netns>,
    domain: Domain,
    wanted: Wanted,
}

#[derive(Debug)]
enum Wanted {
    /// [`Netns::tunnel_socket`].
    Tunnel(oneshot::Sender<io::Result<Socket>>),
    /// So many of [`Netns::onward_sockets`], for applications of a workload.
    Onward(WorkloadId, usize, oneshot::Sender<io::Result<Vec<Socket>>>),
}

// === impl Sockets ===

impl Sockets {
    /// Starts the thread. Tunnels' sockets get this congestion control.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        confinement: Confinement,
        congestion_control: CongestionControl,
        storage: Arc<dyn SocketStorage>,
    ) -> io::Result<Self> {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("sockets".into())
            .spawn(move || {
                if let Err(error) = confinement.enter_sockets() {
                    tracing::warn!(%error, "the thread that opens sockets keeps its privileges");
                }
                for request in inbox {
                    match request {
                        Request::Open(open) => open.serve(congestion_control, &*storage),
                        Request::SetFailing(destination, how) => {
                            if let Err(error) = storage.set_failing(destination, how) {
                                // Its connections are reset then, rather than refused.
                                tracing::debug!(%error, "cannot write to the map FAILING");
                            }
                        }
                    }
                }
            })?;
        Ok(Self { requests })
    }

    /// A [`Netns::tunnel_socket`] that can be connected to `to`.
    ///
    /// # Errors
    /// From the kernel.
    pub async fn tunnel(&self, netns: &Arc<Netns>, to: SocketAddr) -> io::Result<Socket> {
        self.ask(netns, to, Wanted::Tunnel).await
    }

    /// [`Netns::onward_sockets`] that can be connected to `to`, an application of `workload`: `count`
    /// of them, or none. Asking for several costs little more than asking for one.
    ///
    /// # Errors
    /// From the kernel.
    pub async fn onward(
        &self,
        netns: &Arc<Netns>,
        workload: WorkloadId,
        to: SocketAddr,
        count: usize,
    ) -> io::Result<Vec<Socket>> {
        self.ask(netns, to, |answer| Wanted::Onward(workload, count, answer))
            .await
    }

    /// [`SocketStorage::set_failing`], some time soon.
    pub fn set_failing(&self, destination: FailingKey, how: FailingEntry) {
        // The thread ends with the daemon.
        let _ = self.requests.send(Request::SetFailing(destination, how));
    }

    async fn ask<T>(
        &self,
        netns: &Arc<Netns>,
        to: SocketAddr,
        wanted: impl FnOnce(oneshot::Sender<io::Result<T>>) -> Wanted,
    ) -> io::Result<T> {
        let (answer, answered) = oneshot::channel();
        let request = Request::Open(Open {
            netns: netns.clone(),
            domain: Domain::for_address(to),
            wanted: wanted(answer),
        });
        let gone = || io::Error::other("the thread that opens sockets has ended");
        self.requests.send(request).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

// === impl Open ===

impl Open {
    /// Whoever asked may have given up: what is opened is closed then.
    fn serve(self, congestion_control: CongestionControl, storage: &dyn SocketStorage) {
        match self.wanted {
            Wanted::Tunnel(answer) => {
                let opened = self.netns.tunnel_socket(self.domain);
                let _ = answer
                    .send(opened.inspect(|socket| control_congestion(socket, congestion_control)));
            }
            Wanted::Onward(workload, count, answer) => {
                let opened = self.netns.onward_sockets(self.domain, count);
                let _ = answer.send(opened.and_then(|sockets| {
                    for socket in &sockets {
                        storage.deliver_to(socket.as_fd(), workload)?;
                    }
                    Ok(sockets)
                }));
            }
        }
    }
}
