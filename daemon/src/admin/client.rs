//! The command line's side of the admin socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::protocol::{Answer, Command, PROTOCOL_VERSION, Request};
use crate::telemetry::ObserveRequest;

/// For each read and write.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Longest answer in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Why a daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there.
    #[error(
        "no daemon answers on {}: is `reeve run` running, and is this its `admin.socket`?", .path.display()
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// Not allowed.
    #[error("{} may be used by root and by the daemon's own user only", .0.display())]
    NotAllowed(PathBuf),
    /// The connection broke, or the answer took too long.
    #[error("the daemon did not answer in time, or not to the end")]
    Broken(#[from] io::Error),
    /// The answer is not one.
    #[error("the daemon's answer is not understood: is it another version?")]
    Answer(#[from] serde_json::Error),
}

/// What the daemon lets us see, one after another.
#[derive(Debug)]
pub struct Observing {
    lines: BufReader<UnixStream>,
}

/// Asks the daemon whose socket is at `path`.
///
/// # Errors
/// When there is no daemon, or no answer that is understood.
pub fn ask(path: &Path, command: Command) -> Result<Answer, AskError> {
    let stream = send(path, command)?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Asks the daemon whose socket is at `path` to tell what happens, for as long as the result
/// lives or, without [`ObserveRequest::follow`], what has happened.
///
/// # Errors
/// When there is no daemon.
pub fn observe(path: &Path, request: ObserveRequest) -> Result<Observing, AskError> {
    let follow = request.follow;
    let stream = send(path, Command::Observe(Box::new(request)))?;
    if follow {
        // Nothing may happen for a long time.
        stream.set_read_timeout(None)?;
    }
    Ok(Observing {
        lines: BufReader::new(stream),
    })
}

fn send(path: &Path, command: Command) -> Result<UnixStream, AskError> {
    let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::NotAllowed(path.to_owned()),
        _ => AskError::NoDaemon {
            path: path.to_owned(),
            source,
        },
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = serde_json::to_vec(&Request {
        version: PROTOCOL_VERSION,
        command,
    })?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(stream)
}

// === impl Observing ===

impl Iterator for Observing {
    type Item = Result<Answer, AskError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.lines).take(MAX_ANSWER);
        match bounded.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_slice(&line).map_err(AskError::Answer)),
            Err(error) => Some(Err(error.into())),
        }
    }
}
