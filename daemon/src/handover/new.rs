//! The new daemon's side: asks the old one, and takes over once it is ready itself.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    packet::Connection,
    protocol::{FromNew, FromOld, Hello, Offer},
    socket_beside,
};
use crate::config::Ports;

/// For an answer of the old daemon.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// A hand-over that has begun. Dropping it has the old daemon go on.
#[derive(Debug)]
pub struct Takeover {
    connection: Connection,
    /// What the old daemon said.
    pub offer: Offer,
}

/// What became of a hand-over.
#[derive(Debug)]
pub enum Taken {
    /// The old daemon accepts no more. The receiver ends when its process does.
    Over(oneshot::Receiver<()>),
    /// The old daemon has ended meanwhile, of itself.
    Alone,
}

/// Why nothing is taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The daemons do not fit.
    #[error("the running daemon does not hand over, and goes on as before: {0}")]
    Refused(String),
    /// The connection broke, or an answer took too long.
    #[error("the running daemon was asked at {path} to hand over, and this broke: {source}")]
    Broken {
        /// The hand-over socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// This daemon did not become ready.
    #[error(
        "not ready within {} s, so the running daemon goes on: {missing}", .within.as_secs()
    )]
    NotReady {
        /// For how long it was waited for.
        within: Duration,
        /// What was missing.
        missing: String,
    },
}

/// Asks the daemon whose admin socket this is to hand over: gives the sockets that it has. None
/// where no daemon is.
///
/// # Errors
/// When the daemon refuses. It goes on as before then.
pub fn ask(
    admin_socket: &Path,
    ports: Ports,
) -> Result<Option<(Takeover, Vec<OwnedFd>)>, TakeoverError> {
    let path = socket_beside(admin_socket);
    let connection = match Connection::connect(&path) {
        Ok(connection) => connection,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(source) => return Err(TakeoverError::Broken { path, source }),
    };
    let broken = |source| TakeoverError::Broken {
        path: path.clone(),
        source,
    };
    connection
        .send(&FromNew::Hello(Hello::new(ports)), &[])
        .map_err(broken)?;
    let offer = match connection.receive(ANSWER_TIMEOUT).map_err(broken)? {
        (FromOld::Offer(offer), _) => offer,
        (FromOld::Refused(why), _) => return Err(TakeoverError::Refused(why)),
        _ => return Err(broken(io::Error::other("it answered something else"))),
    };
    let mut sockets = Vec::with_capacity(offer.sockets);
    while sockets.len() < offer.sockets {
        match connection.receive(ANSWER_TIMEOUT).map_err(broken)? {
            (FromOld::Sockets, some) if !some.is_empty() => sockets.extend(some),
            _ => return Err(broken(io::Error::other("it sent no sockets"))),
        }
    }
    Ok(Some((Takeover { connection, offer }, sockets)))
}

// === impl Takeover ===

impl Takeover {
    /// Tells the old daemon that this one accepts connections now, and waits until the old one
    /// does not any more.
    ///
    /// # Errors
    /// When the old daemon neither answers nor ends.
    pub fn take(self) -> Result<Taken, TakeoverError> {
        let broken = |source| TakeoverError::Broken {
            path: PathBuf::from("the hand-over socket"),
            source,
        };
        let answer = self
            .connection
            .send(&FromNew::Take, &[])
            .and_then(|()| self.connection.receive::<FromOld>(ANSWER_TIMEOUT));
        match answer {
            Ok((FromOld::Taken, _)) => {}
            Ok(_) => return Err(broken(io::Error::other("it answered something else"))),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(Taken::Alone);
            }
            Err(error) => return Err(broken(error)),
        }
        let (gone, is_gone) = oneshot::channel();
        let connection = self.connection;
        let waiting = thread::Builder::new()
            .name("predecessor".into())
            .spawn(move || {
                connection.wait_until_closed();
                // Nobody to tell means that this daemon is ending.
                let _ = gone.send(());
            });
        if let Err(error) = waiting {
            // The channel is closed, which reads as its end.
            tracing::warn!(%error, "the end of the daemon before is not waited for");
        }
        Ok(Taken::Over(is_gone))
    }
}
