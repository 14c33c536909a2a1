//! Sockets inside network namespaces for threads that may not enter one.
//!
//! Entering a namespace takes privileges that the tunnels' workers have given up, since they read
//! what strangers send. A thread of its own opens the sockets and hands them over.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
};

use socket2::{Domain, Socket};
use tokio::sync::oneshot;

use super::{control_congestion, netns::Netns};
use crate::{config::CongestionControl, privileges::Confinement};

/// The thread that opens sockets. It ends with the last clone.
#[derive(Clone, Debug)]
pub struct Sockets {
    requests: mpsc::Sender<Request>,
}

/// What to open in a namespace, and whom to give it to.
#[derive(Debug)]
struct Request {
    netns: Arc<Netns>,
    domain: Domain,
    wanted: Wanted,
}

#[derive(Debug)]
enum Wanted {
    /// [`Netns::tunnel_socket`].
    Tunnel(oneshot::Sender<io::Result<Socket>>),
    /// So many of [`Netns::onward_sockets`].
    Onward(usize, oneshot::Sender<io::Result<Vec<Socket>>>),
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
    ) -> io::Result<Self> {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("sockets".into())
            .spawn(move || {
                if let Err(error) = confinement.enter_sockets() {
                    tracing::warn!(%error, "the thread that opens sockets keeps its privileges");
                }
                for request in inbox {
                    request.serve(congestion_control);
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

    /// [`Netns::onward_sockets`] that can be connected to `to`: `count` of them, or none. Asking
    /// for several costs little more than asking for one.
    ///
    /// # Errors
    /// From the kernel.
    pub async fn onward(
        &self,
        netns: &Arc<Netns>,
        to: SocketAddr,
        count: usize,
    ) -> io::Result<Vec<Socket>> {
        self.ask(netns, to, |answer| Wanted::Onward(count, answer))
            .await
    }

    async fn ask<T>(
        &self,
        netns: &Arc<Netns>,
        to: SocketAddr,
        wanted: impl FnOnce(oneshot::Sender<io::Result<T>>) -> Wanted,
    ) -> io::Result<T> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            netns: netns.clone(),
            domain: Domain::for_address(to),
            wanted: wanted(answer),
        };
        let gone = || io::Error::other("the thread that opens sockets has ended");
        self.requests.send(request).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

// === impl Request ===

impl Request {
    /// Whoever asked may have given up: what is opened is closed then.
    fn serve(self, congestion_control: CongestionControl) {
        match self.wanted {
            Wanted::Tunnel(answer) => {
                let opened = self.netns.tunnel_socket(self.domain);
                let _ = answer
                    .send(opened.inspect(|socket| control_congestion(socket, congestion_control)));
            }
            Wanted::Onward(count, answer) => {
                let _ = answer.send(self.netns.onward_sockets(self.domain, count));
            }
        }
    }
}
