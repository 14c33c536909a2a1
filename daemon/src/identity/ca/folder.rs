//! The files of the embedded CA: nobody else may reach them, and both are there or neither.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rcgen::{Certificate, KeyPair};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use zeroize::Zeroizing;

use super::CaError;

const KEY: &str = "root.key";
const CERTIFICATE: &str = "root.pem";
const LOCK: &str = "lock";

const FOLDER_MODE: u32 = 0o700;
const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

/// A root as it was found or made.
pub(super) struct Files {
    pub(super) key: KeyPair,
    pub(super) key_path: PathBuf,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) certificate_path: PathBuf,
}

/// Reads the root in `folder`; makes one where there is none.
pub(super) fn open(
    folder: &Path,
    make: impl FnOnce() -> Result<(Certificate, KeyPair), CaError>,
) -> Result<Files, CaError> {
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)
        .map_err(io_error("create", folder))?;
    let opened = File::open(folder).map_err(io_error("open", folder))?;
    check_private(&opened, folder, FOLDER_MODE)?;

    match read(folder) {
        Ok(None) | Err(CaError::Half { .. }) => {}
        Ok(Some(files)) => return Ok(files),
        Err(error) => return Err(error),
    }
    // Another daemon may be making one right now: whoever holds the lock sees what is really there.
    let _lock = lock(folder)?;
    if let Some(files) = read(folder)? {
        return Ok(files);
    }
    let (certificate, key) = make()?;
    let pem = Zeroizing::new(key.serialize_pem());
    write(folder, KEY, KEY_MODE, pem.as_bytes())?;
    write(
        folder,
        CERTIFICATE,
        CERTIFICATE_MODE,
        certificate.pem().as_bytes(),
    )?;
    opened.sync_all().map_err(io_error("sync", folder))?;
    tracing::info!(folder = %folder.display(), "made a new root certificate");
    Ok(Files {
        key,
        key_path: folder.join(KEY),
        certificate: certificate.into(),
        certificate_path: folder.join(CERTIFICATE),
    })
}

/// Waits until no other daemon is at work in the folder; the lock ends with the value.
fn lock(folder: &Path) -> Result<File, CaError> {
    let path = folder.join(LOCK);
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(KEY_MODE)
        .open(&path)
        .map_err(io_error("open", &path))?;
    lock.lock().map_err(io_error("lock", &path))?;
    Ok(lock)
}

/// Both files; none where neither is there.
fn read(folder: &Path) -> Result<Option<Files>, CaError> {
    let (key_path, certificate_path) = (folder.join(KEY), folder.join(CERTIFICATE));
    let half = |present: &Path, missing: &Path| CaError::Half {
        present: present.to_owned(),
        missing: missing.to_owned(),
    };
    match (open_existing(&key_path)?, open_existing(&certificate_path)?) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(half(&key_path, &certificate_path)),
        (None, Some(_)) => Err(half(&certificate_path, &key_path)),
        (Some(key), Some(certificate)) => {
            check_private(&key, &key_path, KEY_MODE)?;
            Ok(Some(Files {
                key: read_key(key, &key_path)?,
                certificate: read_certificate(certificate, &certificate_path)?,
                key_path,
                certificate_path,
            }))
        }
    }
}

fn open_existing(path: &Path) -> Result<Option<File>, CaError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("open", path)(error)),
    }
}

/// Looks at the open file, not at the path, which could be another file by now.
fn check_private(file: &File, path: &Path, wanted: u32) -> Result<(), CaError> {
    let metadata = file.metadata().map_err(io_error("stat", path))?;
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if mode & 0o077 != 0 {
        return Err(CaError::Permissions {
            path: path.to_owned(),
            mode,
            wanted,
        });
    }
    let user = nix::unistd::geteuid().as_raw();
    if owner != user {
        return Err(CaError::Owner {
            path: path.to_owned(),
            owner,
            user,
        });
    }
    Ok(())
}

fn read_key(mut file: File, path: &Path) -> Result<KeyPair, CaError> {
    let mut pem = Zeroizing::new(String::new());
    file.read_to_string(&mut pem)
        .map_err(io_error("read", path))?;
    KeyPair::from_pem(&pem).map_err(|error| CaError::Unreadable {
        path: path.to_owned(),
        what: "private key",
        error: error.to_string(),
    })
}

fn read_certificate(mut file: File, path: &Path) -> Result<CertificateDer<'static>, CaError> {
    let mut pem = Vec::new();
    file.read_to_end(&mut pem).map_err(io_error("read", path))?;
    CertificateDer::from_pem_slice(&pem).map_err(|error| CaError::Unreadable {
        path: path.to_owned(),
        what: "certificate",
        error: error.to_string(),
    })
}

/// Writes a file that is whole or not there, even after a power cut.
fn write(folder: &Path, name: &str, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    let path = folder.join(name);
    let unfinished = folder.join(format!(".{name}.new"));
    // Left by a daemon that was killed at this; nobody else is at it, since we hold the lock.
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(io_error("remove", &unfinished)(error));
        }
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&unfinished)
        .map_err(io_error("create", &unfinished))?;
    file.write_all(contents)
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", &unfinished))?;
    fs::rename(&unfinished, &path).map_err(io_error("rename a file to", &path))
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CaError + 'a {
    move |error| CaError::Io {
        action,
        path: path.to_owned(),
        error,
    }
}
