//! What `reeve upgrade` asks of the service's own reload, and what came of it: one file beside the
//! admin socket, written as a whole.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Mode of the file: its owner alone reads and writes it.
const MODE: u32 = 0o600;
/// Longest time from an order to its reload. An older order was given up, and a reload is a reload.
const VALID: Duration = Duration::from_secs(60);

/// What is to be done, or how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Order {
    /// A new daemon is to take over.
    #[serde(rename_all = "camelCase")]
    Upgrade {
        /// Seconds for which the daemons before may go on, if that is not left to their connections.
        end_old_after: Option<u64>,
    },
    /// The process that has taken over.
    Done(u32),
    /// Why none has.
    Failed(String),
}

// === impl Order ===

impl Order {
    /// Where the orders for the daemon with this admin socket are.
    #[must_use]
    pub fn path(admin_socket: &Path) -> PathBuf {
        let mut path = admin_socket.as_os_str().to_owned();
        path.push(".upgrade");
        path.into()
    }

    /// Reads an order; none where there is none, or it is older than a reload takes to begin.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let written = fs::metadata(path)?.modified()?;
        let order = serde_json::from_slice(&text)?;
        // A clock that was set back since makes it younger than it is.
        let old = written.elapsed().is_ok_and(|age| age > VALID);
        Ok((!old).then_some(order))
    }

    /// Writes it in place of any other.
    ///
    /// # Errors
    /// From the file system.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let _ = fs::remove_file(&new);
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&new)?;
        serde_json::to_writer(file, self)?;
        fs::rename(&new, path)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::SystemTime};

    use super::*;

    #[test]
    fn an_order_is_read_as_it_was_written_until_it_is_too_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = Order::path(&folder.path().join("admin.sock"));
        assert_eq!(path, folder.path().join("admin.sock.upgrade"));
        assert_eq!(Order::read(&path).unwrap(), None);
        for order in [
            Order::Upgrade {
                end_old_after: Some(90),
            },
            Order::Failed("no".to_owned()),
            Order::Done(7),
        ] {
            order.write(&path).unwrap();
            assert_eq!(Order::read(&path).unwrap(), Some(order));
        }
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - 2 * VALID).unwrap();
        assert_eq!(Order::read(&path).unwrap(), None);
        fs::write(&path, "nonsense").unwrap();
        assert!(Order::read(&path).is_err());
    }
}
