//! The daemon's side of the admin socket.
//!
//! Requests are read, and answers written, by a thread without privileges. What has been understood
//! crosses to where it may be answered, as a [`Command`].

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    runtime::Handle,
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};

use super::{
    protocol::{Answer, Command, MAX_REQUEST, PROTOCOL_VERSION, Request},
    socket::{AdminError, AdminSocket, SocketFile},
};
use crate::{
    endpoint::{self, Place},
    privileges::Confinement,
    telemetry::{Observation, ObserveRequest},
};

/// Connections served at the same time.
const MAX_CONNECTIONS: u32 = 16;
/// From the connection to the last byte of the answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that gather for one write to an observer.
const WRITE_AT_ONCE: usize = 16 << 10;

/// Answers the commands.
pub trait Responder: Send + Sync + 'static {
    /// The answer to a command.
    fn respond(&self, command: Command) -> impl Future<Output = Answer> + Send;

    /// What an observer sees; an error is a sentence.
    fn observe(&self, request: ObserveRequest) -> Result<Observation, String>;
}

/// The socket, served until this is dropped; its file goes with it.
#[derive(Debug)]
pub struct AdminServing {
    file: SocketFile,
    _serving: oneshot::Sender<()>,
}

/// Where answers come from.
struct Shared<R> {
    responder: Arc<R>,
    /// Where the responder runs: what it knows and does needs privileges that reading requests must
    /// not have.
    control: Handle,
    /// For each connection.
    limit: Duration,
}

// === impl AdminSocket ===

impl AdminSocket {
    /// Answers on a thread of its own, which has no privileges, until what is given back is
    /// dropped. Called in the runtime in which the responder is to run.
    ///
    /// # Errors
    /// When the thread cannot be made, or keeps what it must not have.
    pub fn start(
        self,
        responder: Arc<impl Responder>,
        confinement: Confinement,
    ) -> Result<AdminServing, AdminError> {
        self.start_within(CONNECTION_TIMEOUT, responder, confinement)
    }

    /// The same, with so long for each connection.
    fn start_within(
        self,
        limit: Duration,
        responder: Arc<impl Responder>,
        confinement: Confinement,
    ) -> Result<AdminServing, AdminError> {
        let Self { listener, mut file } = self;
        let shared = Arc::new(Shared {
            responder,
            control: Handle::current(),
            limit,
        });
        let (serving, stopped) = oneshot::channel();
        listener
            .set_nonblocking(true)
            .and_then(|()| confinement.serve_exposed("admin", || serve(listener, shared, stopped)))
            .map_err(|source| AdminError::Serve {
                path: file.path().to_owned(),
                source,
            })?;
        file.is_own = true;
        Ok(AdminServing {
            file,
            _serving: serving,
        })
    }
}

// === impl AdminServing ===

impl AdminServing {
    /// Accepts no more, and leaves the file to the daemon that does.
    pub fn leave(mut self) {
        self.file.is_own = false;
    }
}

// === impl Shared ===

impl<R: Responder> Shared<R> {
    async fn respond(&self, command: Command) -> Answer {
        let responder = self.responder.clone();
        let answer = self.ask(async move { responder.respond(command).await });
        answer.await.unwrap_or_else(Answer::Error)
    }

    async fn observe(&self, request: ObserveRequest) -> Result<Observation, String> {
        let responder = self.responder.clone();
        let observation = self.ask(async move { responder.observe(request) });
        observation.await.flatten()
    }

    /// What comes of `work` where the responder runs. Nobody who waits has it ended.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, String> {
        let mut tasks = JoinSet::new();
        tasks.spawn_on(work, &self.control);
        match tasks.join_next().await {
            Some(Ok(done)) => Ok(done),
            Some(Err(error)) if error.is_panic() => {
                Err("it failed at this; its log says more".to_owned())
            }
            _ => Err("it is shutting down".to_owned()),
        }
    }
}

/// Serves whoever is accepted until it is stopped.
async fn serve<R: Responder>(
    listener: std::os::unix::net::UnixListener,
    shared: Arc<Shared<R>>,
    stopped: oneshot::Receiver<()>,
) {
    let listener = UnixListener::from_std(listener);
    let serve = |stream, place| client(stream, place, shared.clone());
    endpoint::serve(
        "the admin socket",
        listener,
        MAX_CONNECTIONS,
        stopped,
        serve,
    )
    .await;
}

async fn client<R: Responder>(stream: UnixStream, place: Place, shared: Arc<Shared<R>>) {
    let served = timeout(shared.limit, connection(stream, &shared)).await;
    // Observers stay, within a bound of their own.
    drop(place);
    match served {
        Ok(Ok(None)) => {}
        Ok(Ok(Some((stream, observation)))) => {
            if let Err(error) = observe(stream, observation).await {
                tracing::debug!(%error, "an observer has gone");
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "an admin request was not answered"),
        Err(_) => tracing::debug!("an admin request took too long"),
    }
}

/// Answers a request. Who observes is given back, to be told what happens from now on.
async fn connection<R: Responder>(
    mut stream: UnixStream,
    shared: &Shared<R>,
) -> io::Result<Option<(UnixStream, Observation)>> {
    // The mode already says so; it does not hold for a descriptor that was passed on.
    let user = stream.peer_cred()?.uid();
    let own = nix::unistd::geteuid().as_raw();
    let answer = if user == 0 || user == own {
        match read_request(&mut stream).await? {
            Ok(Request {
                command: Command::Observe(request),
                ..
            }) => match shared.observe(*request).await {
                Ok(observation) => return Ok(Some((stream, observation))),
                Err(refusal) => Answer::Error(refusal),
            },
            Ok(request) => shared.respond(request.command).await,
            Err(refusal) => Answer::Error(refusal),
        }
    } else {
        Answer::Error(format!("user {user} may not use the admin socket"))
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.shutdown().await?;
    Ok(None)
}

/// Writes what an observer sees, until its end or the observer's. One that does not read stops
/// nobody but itself: its queue is bounded.
async fn observe(stream: UnixStream, mut observation: Observation) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let mut lines = Vec::new();
    loop {
        let mut more = [0; 1];
        let mut next = tokio::select! {
            next = observation.next() => next,
            // It has said all that it had to say: this is its end.
            _ = reader.read(&mut more) => return Ok(()),
        };
        if next.is_none() {
            return writer.shutdown().await;
        }
        while let Some(observed) = next {
            serde_json::to_writer(&mut lines, &Answer::Observed(Box::new((*observed).clone())))?;
            lines.push(b'\n');
            next = if lines.len() < WRITE_AT_ONCE {
                observation.ready()
            } else {
                None
            };
        }
        writer.write_all(&lines).await?;
        lines.clear();
    }
}

async fn read_request(stream: &mut UnixStream) -> io::Result<Result<Request, String>> {
    let mut line = Vec::new();
    BufReader::new(stream)
        .take(MAX_REQUEST as u64)
        .read_until(b'\n', &mut line)
        .await?;
    if !line.ends_with(b"\n") {
        return Ok(Err(format!(
            "a request is one line of at most {MAX_REQUEST} bytes"
        )));
    }
    Ok(match serde_json::from_slice::<Request>(&line) {
        Ok(request) if request.version == PROTOCOL_VERSION => Ok(request),
        Ok(request) => Err(format!(
            "this daemon speaks version {PROTOCOL_VERSION} of the admin protocol, not {}: use the `reeve` that belongs to it",
            request.version
        )),
        Err(error) => Err(format!("the request is not understood: {error}")),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::MetadataExt,
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
        time::Instant,
    };

    use super::{super::*, *};

    struct Fixed;

    impl Responder for Fixed {
        async fn respond(&self, command: Command) -> Answer {
            match command {
                Command::Status => Answer::Status(Box::new(Status {
                    node: "here".into(),
                    ..Status::default()
                })),
                _ => Answer::Error("another question".into()),
            }
        }

        fn observe(&self, _: ObserveRequest) -> Result<Observation, String> {
            Err("there is nothing to see".into())
        }
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("reeve-admin-{}-{number}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            fs::create_dir(&folder).unwrap();
            Self(folder)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("run/admin.sock")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn serve_at(socket: AdminSocket) -> AdminServing {
        let confinement = Confinement::default();
        socket.start(Arc::new(Fixed), confinement).unwrap()
    }

    async fn raw(path: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let _ = stream.write_all(request).await;
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_status_is_asked_for_and_answered() {
        let folder = Folder::new();
        let path = folder.socket();
        let socket = AdminSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let server = serve_at(socket);

        let asked = path.clone();
        let answer = tokio::task::spawn_blocking(move || ask(&asked, Command::Status))
            .await
            .unwrap();
        assert!(matches!(answer, Ok(Answer::Status(status)) if status.node == "here"));

        drop(server);
        assert!(!path.exists(), "the file goes with the socket");
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_with_the_reason() {
        let folder = Folder::new();
        let path = folder.socket();
        let _server = serve_at(AdminSocket::bind(&path).unwrap());
        for (request, reason) in [
            (&b"status\n"[..], "not understood"),
            (br#"{"version":1,"command":"stop"}"#, "one line"),
            (b"{\"version\":1,\"command\":\"stop\"}\n", "unknown variant"),
            (b"{\"version\":9,\"command\":\"status\"}\n", "version 1"),
            (&[b'x'; 2 * MAX_REQUEST], "at most 4096 bytes"),
            (
                &[&[b'x'; MAX_REQUEST][..], b"\n"].concat(),
                "at most 4096 bytes",
            ),
        ] {
            let answer = raw(&path, request).await;
            assert!(answer.contains(reason), "{answer}");
        }
    }

    #[tokio::test]
    async fn who_says_nothing_is_left_in_time_and_makes_others_wait_no_longer() {
        let folder = Folder::new();
        let path = folder.socket();
        let limit = Duration::from_secs(1);
        let socket = AdminSocket::bind(&path).unwrap();
        let confinement = Confinement::default();
        let _server = socket.start_within(limit, Arc::new(Fixed), confinement);
        let started = Instant::now();
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        // As many as are served at once: the next one's turn comes with their end.
        let request = b"{\"version\":1,\"command\":\"status\"}\n";
        let answer = timeout(limit * 10, raw(&path, request)).await.unwrap();
        assert!(answer.contains("here"), "{answer}");
        assert!(started.elapsed() >= limit, "{:?}", started.elapsed());
        for mut one in silent {
            assert_eq!(one.read(&mut [0; 1]).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn a_second_daemon_does_not_take_the_socket_and_a_dead_ones_is_replaced() {
        let folder = Folder::new();
        let path = folder.socket();
        let first = AdminSocket::bind(&path).unwrap();
        assert!(matches!(
            AdminSocket::bind(&path),
            Err(AdminError::InUse(_))
        ));
        drop(first);

        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(AdminSocket::bind(&path).unwrap());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            AdminSocket::bind(&path),
            Err(AdminError::NotASocket(_))
        ));
    }
}
