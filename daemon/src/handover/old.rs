//! The old daemon's side: waits for a new one, and lets it have what it needs.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use socket2::{SockAddr, Socket};
use tokio::sync::{mpsc, oneshot};

use super::{
    packet::{self, Connection, MAX_DESCRIPTORS},
    protocol::{Draining, FromNew, FromOld, Offer, Old, Uses, Word},
    socket_beside,
};
use crate::{
    config::Ports,
    identity::{Passed, SpiffeId},
    privileges::Confinement,
};

/// Mode of the socket: its owner alone may connect.
const MODE: u32 = 0o600;
/// For a new daemon to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// For a new daemon to become ready. It gives up before.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// For the daemon that serves to answer an old one that has come.
const HEARD_TIMEOUT: Duration = Duration::from_secs(15);
/// Daemons that may wait to be heard.
const BACKLOG: i32 = 16;
/// Identities in one message: as many as fit, however long they are.
const IDENTITIES: usize = 24;
/// After `accept` failed, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a new daemon asks of this one's control.
#[derive(Debug)]
pub enum Request {
    /// Leave the kernel's maps alone, unless they have another layout, and say what there is to hand over;
    /// or why there is nothing.
    Freeze {
        /// Who asks.
        asker: Asker,
        /// To be told.
        answer: oneshot::Sender<Result<(Offer, Vec<OwnedFd>), String>>,
    },
    /// The new daemon accepts connections: leave that to it.
    Take {
        /// The new daemon's process.
        process: i32,
        /// To be told that there is no way back. What a worker accepts before it hears of it is
        /// served like what it has accepted before.
        done: oneshot::Sender<()>,
        /// To be told again and again what is left, for the new daemon to know.
        rest: mpsc::Sender<Rest>,
    },
    /// The new daemon has given up: go on as before.
    Resume,
    /// The new daemon, which has taken over, says this.
    Told(Word),
    /// The daemon that serves passes this of an identity.
    Passed(SpiffeId, Passed),
    /// The daemon that took over does not listen any more; another one may.
    Unheard,
    /// Another daemon listens to what is left of this one.
    Heard,
    /// An old daemon has come, which nobody hears.
    Came(Comer),
    /// Cgroups (id and depth) of the daemon that serves, or is about to.
    Serves(Vec<(u64, u32)>),
}

/// An old daemon that has come to the one that serves, since the daemon that took over from it has
/// ended.
#[derive(Debug)]
pub struct Comer {
    pub(super) connection: Connection,
    pub(super) own_cgroups: Vec<(u64, u32)>,
}

/// What an old daemon has left.
#[derive(Clone, Debug)]
pub struct Rest {
    /// Of its connections, and of daemons before it.
    pub left: Vec<Draining>,
    /// The identities that its connections use.
    pub used: BTreeSet<SpiffeId>,
}

/// A new daemon that asks.
#[derive(Clone, Debug)]
pub struct Asker {
    /// Its process.
    pub process: i32,
    /// A service manager hears it.
    pub is_notifying: bool,
    /// Its maps have another layout.
    pub beside: bool,
    /// Its cgroups (id and depth), which must not be judged.
    pub own_cgroups: Vec<(u64, u32)>,
}

/// The socket at which this daemon is asked to hand over.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
}

/// How a hand-over went.
enum Outcome {
    NotBegun,
    GivenUp,
    /// With what is to be told from now on, and to whom.
    Taken(mpsc::Receiver<Rest>, Connection),
}

// === impl Listener ===

impl Listener {
    /// Listens beside the admin socket, in place of a socket that is there.
    ///
    /// # Errors
    /// From the kernel.
    pub fn bind(admin_socket: &Path) -> io::Result<Self> {
        let path = socket_beside(admin_socket);
        // Made under another name and moved: nobody ever finds it with a wider mode.
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let _ = fs::remove_file(&new);
        let socket = packet::socket()?;
        socket.bind(&SockAddr::unix(&new)?)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(MODE))?;
        socket.listen(BACKLOG)?;
        fs::rename(&new, &path)?;
        Ok(Self { socket })
    }

    /// Waits for new daemons, on a thread of its own which has no privileges, until one has taken
    /// over or nobody takes `requests` any more.
    ///
    /// # Errors
    /// When the thread cannot be made, or keeps what it must not have.
    pub fn serve(
        self,
        ports: Ports,
        confinement: Confinement,
        requests: mpsc::Sender<Request>,
    ) -> io::Result<()> {
        confinement.start_exposed(
            "handover",
            || Ok(()),
            move |()| self.accept(ports, &requests),
        )
    }

    fn accept(self, ports: Ports, requests: &mpsc::Sender<Request>) {
        while !requests.is_closed() {
            let socket = match self.socket.accept() {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "the hand-over socket could not accept a connection");
                    thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
            };
            match serve(socket, ports, requests) {
                Ok(Outcome::Taken(rest, connection)) => {
                    tell(connection, rest, requests);
                    return;
                }
                Ok(Outcome::NotBegun | Outcome::GivenUp) => {}
                Err(error) => tracing::warn!(%error, "a hand-over was not begun"),
            }
        }
    }
}

/// Says at the hand-over socket of whoever serves now that this daemon is still there, and tells the
/// `rest` of it from then on. Whether it is heard is asked of control.
///
/// # Errors
/// When nobody is there, or there can be no thread.
pub fn come(
    admin_socket: &Path,
    own_cgroups: Vec<(u64, u32)>,
    confinement: Confinement,
    rest: mpsc::Receiver<Rest>,
    requests: mpsc::Sender<Request>,
) -> io::Result<()> {
    let connection = Connection::connect_at_once(&socket_beside(admin_socket))?;
    connection.check_peer()?;
    let come = move |()| {
        let greeted = connection
            .send(&FromNew::Old(Old { own_cgroups }), &[])
            .and_then(|()| connection.receive(HEARD_TIMEOUT));
        match greeted {
            Ok((FromNew::Heard, _)) => {
                if requests.blocking_send(Request::Heard).is_ok() {
                    tell(connection, rest, &requests);
                }
            }
            _ => {
                // Nobody to tell means that this daemon is ending.
                let _ = requests.blocking_send(Request::Unheard);
            }
        }
    };
    confinement.start_exposed("handover", || Ok(()), come)
}

/// Tells the new daemon what is left of this one, and hears what it says, for as long as either goes on.
fn tell(connection: Connection, mut rest: mpsc::Receiver<Rest>, requests: &mpsc::Sender<Request>) {
    // Nobody to tell means that this daemon is ending.
    let ask = |request| drop(requests.blocking_send(request));
    let (mut passes, mut told) = (false, None);
    while let Some(Rest { left, used }) = rest.blocking_recv() {
        loop {
            match connection.try_receive() {
                Ok((FromNew::Tell(word), _)) => {
                    passes |= word == Word::Certificates;
                    ask(Request::Told(word));
                }
                Ok((FromNew::Pass(pass), files)) => {
                    let identity = pass.identity.clone();
                    match pass.unpack(files.into_iter().next()) {
                        Ok(passed) => ask(Request::Passed(identity, passed)),
                        Err(error) => tracing::warn!(
                            spiffe_id = %identity,
                            "the certificate that the daemon that serves passes is refused, the one in \
                             force stays so until it expires: {error}"
                        ),
                    }
                }
                Ok((FromNew::Serves(cgroups), _)) => {
                    ask(Request::Serves(cgroups));
                }
                Ok(_) => {}
                // A later version may say more than this one understands.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                // Nothing for now, or nothing more: sending will tell.
                Err(_) => break,
            }
        }
        let mut sent = connection.send(&FromOld::Left(left), &[]);
        if passes && told.as_ref() != Some(&used) {
            sent = sent.and_then(|()| tell_used(&connection, &used));
            told = Some(used);
        }
        if let Err(error) = sent {
            tracing::debug!(%error, "the daemon that took over does not listen");
            ask(Request::Unheard);
            return;
        }
    }
    // Nothing more is told here because another daemon is told, or because this one ends.
    if requests.is_closed() {
        // Closed at the very end of the process, which is what its closing says.
        std::mem::forget(connection);
    }
}

fn tell_used(connection: &Connection, used: &BTreeSet<SpiffeId>) -> io::Result<()> {
    let all: Vec<_> = used.iter().cloned().collect();
    let mut parts = all.chunks(IDENTITIES).peekable();
    loop {
        let uses = Uses {
            identities: parts.next().unwrap_or_default().to_vec(),
            more: parts.peek().is_some(),
        };
        let more = uses.more;
        connection.send(&FromOld::Uses(uses), &[])?;
        if !more {
            return Ok(());
        }
    }
}

fn serve(socket: Socket, ports: Ports, requests: &mpsc::Sender<Request>) -> io::Result<Outcome> {
    let connection = Connection::new(socket)?;
    let peer = connection.peer()?;
    let own = nix::unistd::geteuid().as_raw();
    let refuse = |why: String| {
        tracing::warn!(process = peer.pid(), "nothing is handed over: {why}");
        connection.send(&FromOld::Refused(why), &[])
    };
    if peer.uid() != 0 && peer.uid() != own {
        refuse(format!("user {} may not take over", peer.uid()))?;
        return Ok(Outcome::NotBegun);
    }
    let hello = match connection.receive(HELLO_TIMEOUT) {
        Ok((FromNew::Hello(hello), _)) => hello,
        Ok((FromNew::Old(_), _)) if peer.pid().unsigned_abs() == std::process::id() => {
            return Ok(Outcome::NotBegun);
        }
        Ok((FromNew::Old(old), _)) => {
            tracing::info!(process = peer.pid(), "an old daemon is there, and is heard");
            let comer = Comer {
                connection,
                own_cgroups: old.own_cgroups,
            };
            // Nobody to tell means that this daemon is ending.
            let _ = requests.blocking_send(Request::Came(comer));
            return Ok(Outcome::NotBegun);
        }
        Ok((
            FromNew::Take
            | FromNew::Tell(_)
            | FromNew::Heard
            | FromNew::Pass(_)
            | FromNew::Serves(_),
            _,
        )) => {
            refuse("a hand-over begins with a hello".to_owned())?;
            return Ok(Outcome::NotBegun);
        }
        Err(error) => {
            refuse(format!("the hello is not understood: {error}"))?;
            return Ok(Outcome::NotBegun);
        }
    };
    if let Some(why) = hello.refusal(ports) {
        refuse(why)?;
        return Ok(Outcome::NotBegun);
    }
    tracing::info!(
        version = hello.version,
        process = peer.pid(),
        "another daemon is about to take over"
    );
    let asker = Asker {
        process: peer.pid(),
        is_notifying: hello.notifies,
        beside: hello.is_beside(),
        own_cgroups: hello.own_cgroups,
    };
    let outcome = match offer(&connection, asker, requests) {
        Ok(Offered::Taken(rest)) => return Ok(Outcome::Taken(rest, connection)),
        Ok(Offered::Refused(why)) => {
            refuse(why)?;
            Outcome::NotBegun
        }
        Err(error) => {
            tracing::warn!(%error, "the other daemon has not taken over: this one goes on");
            // Nobody to tell means that this daemon is ending.
            let _ = requests.blocking_send(Request::Resume);
            Outcome::GivenUp
        }
    };
    Ok(outcome)
}

/// What came of an offer.
enum Offered {
    /// There was none, and why.
    Refused(String),
    /// With what is to be told from now on.
    Taken(mpsc::Receiver<Rest>),
}

/// From the freeze to the end of accepting.
fn offer(
    connection: &Connection,
    asker: Asker,
    requests: &mpsc::Sender<Request>,
) -> io::Result<Offered> {
    let ending = || io::Error::other("this daemon is ending");
    let (answer, answered) = oneshot::channel();
    let process = asker.process;
    requests
        .blocking_send(Request::Freeze { asker, answer })
        .map_err(|_| ending())?;
    let (mut offer, sockets) = match answered.blocking_recv().map_err(|_| ending())? {
        Ok(offered) => offered,
        Err(why) => return Ok(Offered::Refused(why)),
    };
    offer.sockets = sockets.len();
    connection.send(&FromOld::Offer(offer), &[])?;
    for some in sockets.chunks(MAX_DESCRIPTORS) {
        let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        connection.send(&FromOld::Sockets, &some)?;
    }
    drop(sockets);
    match connection.receive(READY_TIMEOUT)? {
        (FromNew::Take, _) => {}
        _ => return Err(io::Error::other("it said something else")),
    }
    let (done, taken) = oneshot::channel();
    let (rest, told) = mpsc::channel(1);
    requests
        .blocking_send(Request::Take {
            process,
            done,
            rest,
        })
        .map_err(|_| ending())?;
    // A daemon that is ending accepts no more either.
    let _ = taken.blocking_recv();
    if let Err(error) = connection.send(&FromOld::Taken, &[]) {
        // It has said that it accepts; there is nobody to go back to.
        tracing::warn!(%error, "the daemon that took over is not told that it may");
    }
    Ok(Offered::Taken(told))
}
