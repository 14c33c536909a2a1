//! Reading a file as a whole: never the half of what somebody is writing.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    thread,
    time::Duration,
};

use super::{Mistake, Mistakes};
use crate::watch::Print;

/// Largest file that is read, in bytes: far above a configuration of 10,000 peers.
const MAX_FILE_SIZE: u64 = 16 << 20;
/// Times that a file is read while somebody writes it.
const ATTEMPTS: u32 = 5;
/// Between two of these.
const PAUSE: Duration = Duration::from_millis(20);

/// Reads a file that must be a regular one, of UTF-8, and not too large.
///
/// # Errors
/// What to tell the operator.
pub(crate) fn read_file(path: &Path) -> Result<String, Mistakes> {
    let mut mistakes = Mistakes::default();
    match read_whole(path, read_once) {
        Err(error) => mistakes.file(
            path,
            format!("could not be read: {error}; give the path of a readable file"),
        ),
        Ok(bytes) if bytes.len() as u64 > MAX_FILE_SIZE => mistakes.file(
            path,
            format!("is larger than {MAX_FILE_SIZE} bytes; split it"),
        ),
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(error) => {
                let good = error.utf8_error().valid_up_to();
                let line = error.as_bytes().get(..good).map_or(1, |before| {
                    1 + before.iter().filter(|byte| **byte == b'\n').count()
                });
                mistakes.push(Mistake {
                    file: path.to_owned(),
                    place: Some((line, 1)),
                    field: String::new(),
                    what: "is not UTF-8; save the file as UTF-8".to_owned(),
                });
            }
        },
    }
    Err(mistakes)
}

/// Reads until the file is the same afterwards as before: what was read while it was written is the
/// half of something.
fn read_whole(
    path: &Path,
    mut read: impl FnMut(&Path) -> io::Result<Vec<u8>>,
) -> io::Result<Vec<u8>> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let before = Print::of([path]);
        let bytes = read(path)?;
        if Print::of([path]) == before {
            return Ok(bytes);
        }
    }
    Err(io::Error::other("it changes while it is read"))
}

fn read_once(path: &Path) -> io::Result<Vec<u8>> {
    // Without waiting, for a pipe that nobody writes to.
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        fs::write(&path, "before").unwrap();
        (folder, path)
    }

    #[test]
    fn what_changes_under_the_readers_eyes_is_read_again() {
        let (_folder, path) = file();
        let mut readings = 0;
        let bytes = read_whole(&path, |path| {
            readings += 1;
            if readings == 1 {
                // Read as empty, and whole right after.
                fs::write(path, "")?;
                let torn = read_once(path);
                fs::write(path, "after")?;
                return torn;
            }
            read_once(path)
        });
        assert_eq!(bytes.unwrap(), b"after");
        assert_eq!(readings, 2);
    }

    #[test]
    fn what_never_rests_is_refused() {
        let (_folder, path) = file();
        let mut readings = 0;
        let error = read_whole(&path, |path| {
            readings += 1;
            fs::write(path, "x".repeat(readings))?;
            read_once(path)
        });
        assert!(error.unwrap_err().to_string().contains("changes while"));
        assert_eq!(readings, ATTEMPTS as usize);
    }

    #[test]
    fn a_pipe_keeps_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe.yaml");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mistakes = read_file(&path).unwrap_err().to_string();
        assert!(mistakes.contains("not a regular file"), "{mistakes}");
    }
}
