//! The daemon's side of the admin socket.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

use super::protocol::{Answer, Command, MAX_REQUEST, PROTOCOL_VERSION, Request};
use crate::telemetry::{Observation, ObserveRequest};

/// Mode of the socket: its owner alone may connect.
const SOCKET_MODE: u32 = 0o600;
/// Mode of its folder, where the daemon has to make it.
const FOLDER_MODE: u32 = 0o755;
/// Connections served at the same time.
const MAX_CONNECTIONS: usize = 16;
/// From the connection to the last byte of the answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that gather for one write to an observer.
const WRITE_AT_ONCE: usize = 16 << 10;
/// After `accept` failed, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers the commands.
pub trait Responder: Send + Sync + 'static {
    /// The answer to a command.
    fn respond(&self, command: Command) -> impl Future<Output = Answer> + Send;

    /// What an observer sees; an error is a sentence.
    fn observe(&self, request: ObserveRequest) -> Result<Observation, String>;
}

/// The socket, bound. Its file goes with the value.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
    /// Whether the file goes with the value.
    owns_file: Arc<AtomicBool>,
}

/// Why there can be no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Another daemon answers there.
    #[error(
        "another daemon answers on the admin socket {}: stop it, or give this one another `admin.socket`", .0.display()
    )]
    InUse(PathBuf),
    /// The path is something else.
    #[error(
        "{} is there and is no socket: move it away, or set another `admin.socket`", .0.display()
    )]
    NotASocket(PathBuf),
    /// From the kernel.
    #[error("the admin socket {} cannot be made", .path.display())]
    Io {
        /// Where it should be.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

// === impl AdminSocket ===

impl AdminSocket {
    /// Binds the socket at `path`, in place of one that nobody serves any more.
    ///
    /// # Errors
    /// When another daemon serves it, the path is something else, or from the kernel.
    pub fn bind(path: &Path) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(FOLDER_MODE)
                .create(folder)
                .map_err(failed)?;
        }
        if path.exists() {
            use std::os::unix::fs::FileTypeExt;
            let metadata = fs::symlink_metadata(path).map_err(failed)?;
            if !metadata.file_type().is_socket() {
                return Err(AdminError::NotASocket(path.to_owned()));
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(AdminError::InUse(path.to_owned()));
            }
        }
        // Made under another name and moved: nobody ever finds it with a wider mode, and a left
        // over socket is replaced in one step.
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let _ = fs::remove_file(&new);
        let listener = UnixListener::bind(&new).map_err(failed)?;
        let inode = fs::set_permissions(&new, fs::Permissions::from_mode(SOCKET_MODE))
            .and_then(|()| fs::rename(&new, path))
            .and_then(|()| fs::symlink_metadata(path))
            .map_err(|error| {
                let _ = fs::remove_file(&new);
                failed(error)
            })?
            .ino();
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode,
            owns_file: Arc::new(AtomicBool::new(true)),
        })
    }

    /// Takes over the socket of a daemon before, which was bound at `path`. The file goes with
    /// this value only once [`AdminSocket::share`]'s flag says so: until then it is the other
    /// daemon's.
    ///
    /// # Errors
    /// From the kernel.
    pub fn adopt(
        listener: std::os::unix::net::UnixListener,
        path: &Path,
    ) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Io {
            path: path.to_owned(),
            source,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        let inode = fs::symlink_metadata(path).map_err(failed)?.ino();
        Ok(Self {
            listener: UnixListener::from_std(listener).map_err(failed)?,
            path: path.to_owned(),
            inode,
            owns_file: Arc::new(AtomicBool::new(false)),
        })
    }

    /// Another descriptor of the socket, for a daemon that takes over, and what says whether
    /// the file shall go with this value: not once the socket has been handed over.
    ///
    /// # Errors
    /// From the kernel.
    pub fn share(&self) -> io::Result<(OwnedFd, Arc<AtomicBool>)> {
        let socket = self.listener.as_fd().try_clone_to_owned()?;
        Ok((socket, self.owns_file.clone()))
    }

    /// Serves for as long as the future is polled.
    pub async fn serve(self, responder: Arc<impl Responder>) {
        self.serve_within(CONNECTION_TIMEOUT, responder).await;
    }

    /// The same, with so long for each connection.
    async fn serve_within(self, limit: Duration, responder: Arc<impl Responder>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let responder = responder.clone();
                    tokio::spawn(async move {
                        let answered = timeout(limit, connection(stream, &*responder)).await;
                        let observer = match answered {
                            Ok(Ok(observer)) => observer,
                            Ok(Err(error)) => {
                                tracing::debug!(%error, "an admin request was not answered");
                                None
                            }
                            Err(_) => {
                                tracing::debug!("an admin request took too long");
                                None
                            }
                        };
                        // Observers stay, within a bound of their own.
                        drop(place);
                        if let Some((stream, observation)) = observer
                            && let Err(error) = observe(stream, observation).await
                        {
                            tracing::debug!(%error, "an observer has gone");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the admin socket could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let own = fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode);
        if own && self.owns_file.load(Ordering::Relaxed) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Answers a request. Who observes is given back, to be told what happens from now on.
async fn connection(
    mut stream: UnixStream,
    responder: &impl Responder,
) -> io::Result<Option<(UnixStream, Observation)>> {
    // The mode already says so; it does not hold for a descriptor that was passed on.
    let user = stream.peer_cred()?.uid();
    let own = nix::unistd::geteuid().as_raw();
    let answer = if user == 0 || user == own {
        match read_request(&mut stream).await? {
            Ok(Request {
                command: Command::Observe(request),
                ..
            }) => match responder.observe(*request) {
                Ok(observation) => return Ok(Some((stream, observation))),
                Err(refusal) => Answer::Error(refusal),
            },
            Ok(request) => responder.respond(request.command).await,
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
        let server = tokio::spawn(socket.serve(Arc::new(Fixed)));

        let asked = path.clone();
        let answer = tokio::task::spawn_blocking(move || ask(&asked, Command::Status))
            .await
            .unwrap();
        assert!(matches!(answer, Ok(Answer::Status(status)) if status.node == "here"));

        server.abort();
        let _ = server.await;
        assert!(!path.exists(), "the file goes with the socket");
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_with_the_reason() {
        let folder = Folder::new();
        let path = folder.socket();
        tokio::spawn(AdminSocket::bind(&path).unwrap().serve(Arc::new(Fixed)));
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
        tokio::spawn(socket.serve_within(limit, Arc::new(Fixed)));
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
