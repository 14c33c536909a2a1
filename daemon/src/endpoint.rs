//! Where others ask: a socket at which few connections are served at a time, until it is left to the
//! next daemon.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::{AbortHandle, JoinSet},
};

/// After `accept` failed, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One of the connections that are served at the same time; given back when dropped.
pub(crate) type Place = OwnedSemaphorePermit;

/// A socket that accepts.
pub(crate) trait Listener {
    /// What it accepts.
    type Stream;

    /// The next connection.
    async fn next(&self) -> io::Result<Self::Stream>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// The listener, if there is one; told where there is none.
fn usable<L>(what: &str, listener: io::Result<L>) -> Option<L> {
    listener
        .inspect_err(|error| tracing::error!(%error, "{what} cannot be served"))
        .ok()
}

/// Accepts until `stopped`, `most` connections at the same time, and lets those that it has accepted
/// be served to their end. `what` it is goes into the log.
pub(crate) async fn serve<L: Listener, F>(
    what: &str,
    listener: io::Result<L>,
    most: u32,
    mut stopped: oneshot::Receiver<()>,
    serve: impl Fn(L::Stream, Place) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let Some(listener) = usable(what, listener) else {
        return;
    };
    let places = Arc::new(Semaphore::new(most as usize));
    loop {
        // Taken before `accept`, so that a flood waits in the kernel's bounded queue.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            // What comes now is for the daemon that takes over.
            biased;
            _ = &mut stopped => {
                drop(place);
                break;
            }
            accepted = listener.next() => accepted,
        };
        match accepted {
            Ok(stream) => {
                tokio::spawn(serve(stream, place));
            }
            Err(error) => {
                tracing::warn!(%error, "{what} could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    // All places are free again: nobody is being served.
    let _ = places.acquire_many(most).await;
}

/// Accepts until `stopped`, serves `most` connections at the same time, and lets those that it has
/// accepted be served to their end. One more ends the oldest: whoever fills all places with
/// connections that say nothing keeps nobody else from an answer. `what` it is goes into the log.
pub(crate) async fn serve_newest<L: Listener, F>(
    what: &str,
    listener: io::Result<L>,
    most: usize,
    mut stopped: oneshot::Receiver<()>,
    serve: impl Fn(L::Stream) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let Some(listener) = usable(what, listener) else {
        return;
    };
    let mut served = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            // What comes now is for the daemon that takes over.
            biased;
            _ = &mut stopped => break,
            Some(_) = served.join_next() => {
                by_age.retain(|one| !one.is_finished());
                continue;
            }
            accepted = listener.next() => accepted,
        };
        match accepted {
            Ok(stream) => {
                if by_age.len() >= most
                    && let Some(oldest) = by_age.pop_front()
                {
                    oldest.abort();
                }
                by_age.push_back(served.spawn(serve(stream)));
            }
            Err(error) => {
                tracing::warn!(%error, "{what} could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while served.join_next().await.is_some() {}
}
