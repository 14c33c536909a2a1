//! The admin socket itself: its file, and who has it.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// Mode of the socket: its owner alone may connect.
const SOCKET_MODE: u32 = 0o600;
/// Mode of its folder, where the daemon has to make it.
const FOLDER_MODE: u32 = 0o755;

/// The socket, bound and not yet served. Its file goes with the value.
#[derive(Debug)]
pub struct AdminSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// The file of a socket, which is removed with this value unless it is another daemon's.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
    pub(super) is_own: bool,
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
    /// It is there, and nobody can answer at it.
    #[error("the admin socket {} cannot be served", .path.display())]
    Serve {
        /// Where it is.
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
            let metadata = fs::symlink_metadata(path).map_err(failed)?;
            if !metadata.file_type().is_socket() {
                return Err(AdminError::NotASocket(path.to_owned()));
            }
            if UnixStream::connect(path).is_ok() {
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
            file: SocketFile {
                path: path.to_owned(),
                inode,
                is_own: true,
            },
        })
    }

    /// Takes over the socket of a daemon before, which was bound at `path`. The file is the other
    /// daemon's until the socket is served.
    ///
    /// # Errors
    /// From the kernel.
    pub fn adopt(listener: UnixListener, path: &Path) -> Result<Self, AdminError> {
        let metadata = fs::symlink_metadata(path).map_err(|source| AdminError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            file: SocketFile {
                path: path.to_owned(),
                inode: metadata.ino(),
                is_own: false,
            },
        })
    }

    /// Another descriptor of the socket, for a daemon that takes over.
    ///
    /// # Errors
    /// From the kernel.
    pub fn share(&self) -> Result<OwnedFd, AdminError> {
        let socket = self.listener.as_fd().try_clone_to_owned();
        socket.map_err(|source| AdminError::Io {
            path: self.file.path.clone(),
            source,
        })
    }
}

// === impl SocketFile ===

impl SocketFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_there = || {
            let file = fs::symlink_metadata(&self.path);
            file.is_ok_and(|file| file.ino() == self.inode)
        };
        if self.is_own && is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
