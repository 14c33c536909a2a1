//! The new daemon's side: asks the old one, and takes over once it is ready itself.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::sync::watch;

use super::{
    material::Pass,
    old::Comer,
    packet::Connection,
    protocol::{Draining, FromNew, FromOld, Hello, Offer, Uses, Word},
    socket_beside,
};
use crate::{
    config::Ports,
    identity::{Passed, SpiffeId},
    privileges::Confinement,
};

/// For an answer of the old daemon.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Identities that an old daemon may say it uses.
const MOST_IDENTITIES: usize = 10_000;

/// A hand-over that has begun. Dropping it has the old daemon go on.
#[derive(Debug)]
pub struct Takeover {
    /// To take; nobody to take any more has the connection closed.
    take: mpsc::SyncSender<()>,
    taken: mpsc::Receiver<Result<(), TakeoverError>>,
    heard: Heard,
    connection: Arc<Connection>,
    /// What the old daemon said.
    pub offer: Offer,
}

/// The way to a daemon from which this one has taken over.
#[derive(Debug)]
pub struct Before {
    /// What it says.
    pub heard: Heard,
    /// Cgroups (id and depth) of it and of those before it, which must not be judged.
    pub own_cgroups: Vec<(u64, u32)>,
    connection: Arc<Connection>,
}

/// What an old daemon says, as often as it does; closed when its process ends.
#[derive(Clone, Debug)]
pub struct Heard {
    /// What is left of it, and of those before it.
    pub left: watch::Receiver<Vec<Draining>>,
    /// The identities that its connections use, where it takes certificates.
    pub used: watch::Receiver<BTreeSet<SpiffeId>>,
}

/// Where what an old daemon says goes.
struct Hearer {
    left: watch::Sender<Vec<Draining>>,
    used: watch::Sender<BTreeSet<SpiffeId>>,
}

/// Passes certificates to an old daemon.
#[derive(Debug)]
pub struct Passer(Arc<Connection>);

/// What the thread does that alone hears what the old daemon says.
struct Talk {
    connection: Arc<Connection>,
    path: PathBuf,
    hello: Hello,
    answered: mpsc::SyncSender<Result<(Offer, Vec<OwnedFd>), TakeoverError>>,
    take: mpsc::Receiver<()>,
    taken: mpsc::SyncSender<Result<(), TakeoverError>>,
    hearer: Hearer,
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
    /// Whoever has ordered the upgrade has given up.
    #[error("`reeve upgrade` has given up waiting, so the running daemon goes on")]
    Withdrawn,
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
/// where no daemon is. `own_cgroups` (id and depth) are those of the daemon that asks.
///
/// # Errors
/// When the daemon refuses. It goes on as before then.
pub fn ask(
    admin_socket: &Path,
    ports: Ports,
    own_cgroups: &[(u64, u32)],
    confinement: Confinement,
) -> Result<Option<(Takeover, Vec<OwnedFd>)>, TakeoverError> {
    let path = socket_beside(admin_socket);
    let broken = |source| TakeoverError::Broken {
        path: path.clone(),
        source,
    };
    let connection = match Connection::connect(&path) {
        Ok(connection) => Arc::new(connection),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(broken(error)),
    };
    let (answered, answer) = mpsc::sync_channel(1);
    let (take, asked) = mpsc::sync_channel(1);
    let (told_taken, taken) = mpsc::sync_channel(1);
    let (hearer, heard) = Hearer::new();
    let talk = Talk {
        connection: connection.clone(),
        path: path.clone(),
        hello: Hello {
            own_cgroups: own_cgroups.to_owned(),
            ..Hello::new(ports)
        },
        answered,
        take: asked,
        taken: told_taken,
        hearer,
    };
    confinement
        .start_exposed("predecessor", || Ok(()), move |()| talk.run())
        .map_err(broken)?;
    let ended = |_| broken(io::Error::other("the thread that asks has ended"));
    let (offer, sockets) = answer.recv().map_err(ended)??;
    let takeover = Takeover {
        take,
        taken,
        heard,
        connection,
        offer,
    };
    Ok(Some((takeover, sockets)))
}

// === impl Takeover ===

impl Takeover {
    /// Tells the old daemon that this one accepts connections now, and waits until the old one
    /// does not any more. Gives the way to it.
    ///
    /// # Errors
    /// When the old daemon neither answers nor ends.
    pub fn take(self) -> Result<Before, TakeoverError> {
        let ended = || TakeoverError::Broken {
            path: PathBuf::from("the hand-over socket"),
            source: io::Error::other("the thread that asks has ended"),
        };
        self.take.send(()).map_err(|_| ended())?;
        self.taken.recv().map_err(|_| ended())??;
        Ok(Before {
            heard: self.heard,
            own_cgroups: self.offer.own_cgroups,
            connection: self.connection,
        })
    }
}

// === impl Before ===

impl Before {
    /// Tells the daemon what to do. One that does not listen is not waited for.
    pub fn tell(&self, word: Word) {
        if let Err(error) = self.connection.try_send(&FromNew::Tell(word), &[]) {
            tracing::debug!(%error, ?word, "the daemon before is not told");
        }
    }

    /// Tells the daemon which cgroups are those of the one that serves, or is about to.
    pub fn tell_of(&self, cgroups: &[(u64, u32)]) {
        let serves = FromNew::Serves(cgroups.to_owned());
        if let Err(error) = self.connection.try_send(&serves, &[]) {
            tracing::debug!(%error, "the daemon before is not told who serves");
        }
    }

    /// Hears an old daemon that has come to say that it is there.
    ///
    /// # Errors
    /// When the daemon has gone, or there can be no thread.
    pub fn hear(comer: Comer, confinement: Confinement) -> io::Result<Self> {
        let connection = Arc::new(comer.connection);
        connection.try_send(&FromNew::Heard, &[])?;
        let (hearer, heard) = Hearer::new();
        let other = connection.clone();
        confinement.start_exposed("predecessor", || Ok(()), move |()| hearer.hear(&other))?;
        Ok(Self {
            heard,
            own_cgroups: comer.own_cgroups,
            connection,
        })
    }

    /// What passes certificates to it.
    #[must_use]
    pub fn passer(&self) -> Passer {
        Passer(self.connection.clone())
    }

    /// Ends its process, which has not done so when it was told to. Its connection is still open, so
    /// the number is still its own.
    ///
    /// # Errors
    /// Where it cannot be ended, or its number is unknown here.
    pub fn kill(&self) -> io::Result<()> {
        let process = Pid::from_raw(self.connection.peer()?.pid());
        if process.as_raw() <= 0 || process == Pid::this() {
            return Err(io::Error::other("its process number is not known here"));
        }
        Ok(kill(process, Signal::SIGKILL)?)
    }
}

// === impl Passer ===

impl Passer {
    /// Passes what there is of an identity.
    ///
    /// # Errors
    /// `WouldBlock` where there is no room for it now, and another one when the daemon has ended.
    pub fn pass(&self, identity: &SpiffeId, passed: &Passed) -> io::Result<()> {
        let (pass, file) = Pass::pack(identity, passed)?;
        let file = file.as_ref().map(AsFd::as_fd);
        self.0.try_send(&FromNew::Pass(pass), file.as_slice())
    }
}

// === impl Talk ===

impl Talk {
    fn run(self) {
        let offer = match self.greet() {
            Ok((offer, sockets)) => {
                let said = offer.clone();
                if self.answered.send(Ok((offer, sockets))).is_err() {
                    return;
                }
                said
            }
            Err(error) => {
                // Nobody to tell means that this daemon is ending, here and below.
                let _ = self.answered.send(Err(error));
                return;
            }
        };
        if self.take.recv().is_err() {
            return;
        }
        match self.take() {
            Ok(true) => {
                let beginning = vec![Draining::beginning(&offer)];
                self.hearer.left.send_replace(beginning);
                let _ = self.taken.send(Ok(()));
                self.hearer.hear(&self.connection);
            }
            // It has ended meanwhile, of itself.
            Ok(false) => {
                let _ = self.taken.send(Ok(()));
            }
            Err(error) => {
                let _ = self.taken.send(Err(error));
            }
        }
    }

    /// Says who we are, and hears what is handed over.
    fn greet(&self) -> Result<(Offer, Vec<OwnedFd>), TakeoverError> {
        let broken = |source| self.broken(source);
        self.connection.check_peer().map_err(broken)?;
        let hello = FromNew::Hello(self.hello.clone());
        self.connection.send(&hello, &[]).map_err(broken)?;
        let next = || self.connection.receive(ANSWER_TIMEOUT).map_err(broken);
        let offer = match next()? {
            (FromOld::Offer(offer), _) => offer,
            (FromOld::Refused(why), _) => return Err(TakeoverError::Refused(why)),
            _ => return Err(broken(io::Error::other("it answered something else"))),
        };
        let mut sockets = Vec::new();
        while sockets.len() < offer.sockets {
            match next()? {
                (FromOld::Sockets, some) if !some.is_empty() => sockets.extend(some),
                _ => return Err(broken(io::Error::other("it sent no sockets"))),
            }
        }
        Ok((offer, sockets))
    }

    /// Whether the old daemon accepts no more and goes on; false where it has ended.
    fn take(&self) -> Result<bool, TakeoverError> {
        let answer = self
            .connection
            .send(&FromNew::Take, &[])
            .and_then(|()| self.connection.receive(ANSWER_TIMEOUT));
        match answer {
            Ok((FromOld::Taken, _)) => Ok(true),
            Ok(_) => Err(self.broken(io::Error::other("it answered something else"))),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, source: io::Error) -> TakeoverError {
        TakeoverError::Broken {
            path: self.path.clone(),
            source,
        }
    }
}

// === impl Hearer ===

impl Hearer {
    fn new() -> (Self, Heard) {
        let (left, heard_left) = watch::channel(Vec::new());
        let (used, heard_used) = watch::channel(BTreeSet::new());
        let heard = Heard {
            left: heard_left,
            used: heard_used,
        };
        (Self { left, used }, heard)
    }

    /// Passes on what the old daemon says, until it has ended.
    fn hear(&self, connection: &Connection) {
        let mut used = BTreeSet::new();
        loop {
            match connection.receive(None) {
                Ok((FromOld::Left(now), _)) => {
                    self.left.send_replace(now);
                }
                Ok((FromOld::Uses(Uses { identities, more }), _)) => {
                    used.extend(identities);
                    while used.len() > MOST_IDENTITIES {
                        used.pop_last();
                    }
                    if !more {
                        self.used.send_replace(std::mem::take(&mut used));
                    }
                }
                Ok(_) => {}
                // A later version may say more than this one understands.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn what_a_draining_daemon_says_is_heard_until_it_ends_and_nothing_else_is_an_end() {
        let (old, new) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let (old, new) = (Connection::new(old).unwrap(), Connection::new(new).unwrap());
        let (hearer, heard) = Hearer::new();
        let hearing = std::thread::spawn(move || hearer.hear(&new));
        for later in ["", "of a later version"] {
            old.send(&later, &[]).unwrap();
        }
        let draining = Draining {
            process: 7,
            ..Draining::default()
        };
        let said = FromOld::Left(vec![draining.clone()]);
        old.send(&said, &[]).unwrap();
        let ids = ["a", "b"].map(|name| format!("spiffe://example.org/{name}"));
        let ids = ids.map(|id| SpiffeId::parse(&id).unwrap());
        for (id, more) in ids.iter().zip([true, false]) {
            let identities = vec![id.clone()];
            let uses = FromOld::Uses(Uses { identities, more });
            old.send(&uses, &[]).unwrap();
        }
        drop(old);
        hearing.join().unwrap();
        assert_eq!(*heard.left.borrow(), [draining]);
        assert_eq!(*heard.used.borrow(), BTreeSet::from(ids));
        assert!(
            heard.left.has_changed().is_err(),
            "its end is heard as well"
        );
    }
}
