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

use super::netns::Netns;
use crate::privileges::Confinement;

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// [`Netns::tunnel_socket`].
    Tunnel,
    /// [`Netns::onward_socket`].
    Onward,
}

/// The thread that opens sockets. It ends with the last clone.
#[derive(Clone, Debug)]
pub struct Sockets {
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Request {
    netns: Arc<Netns>,
    purpose: Purpose,
    domain: Domain,
    answer: oneshot::Sender<io::Result<Socket>>,
}

// === impl Sockets ===

impl Sockets {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(confinement: Confinement) -> io::Result<Self> {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("sockets".into())
            .spawn(move || {
                if let Err(error) = confinement.enter_sockets() {
                    tracing::warn!(%error, "the thread that opens sockets keeps its privileges");
                }
                for request in inbox {
                    let opened = request.purpose.open(&request.netns, request.domain);
                    // Whoever asked may have given up.
                    let _ = request.answer.send(opened);
                }
            })?;
        Ok(Self { requests })
    }

    /// A non-blocking TCP socket in `netns` that can be connected to addresses of the family of
    /// `to`.
    ///
    /// # Errors
    /// From the kernel.
    pub async fn open(
        &self,
        netns: &Arc<Netns>,
        purpose: Purpose,
        to: SocketAddr,
    ) -> io::Result<Socket> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            netns: netns.clone(),
            purpose,
            domain: Domain::for_address(to),
            answer,
        };
        let gone = || io::Error::other("the thread that opens sockets has ended");
        self.requests.send(request).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

// === impl Purpose ===

impl Purpose {
    fn open(self, netns: &Netns, domain: Domain) -> io::Result<Socket> {
        match self {
            Self::Tunnel => netns.tunnel_socket(domain),
            Self::Onward => netns.onward_socket(domain),
        }
    }
}
