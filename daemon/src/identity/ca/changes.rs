//! Writing files of a CA: whole or not at all, one by one and together.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use zeroize::Zeroizing;

use super::{
    CaError,
    folder::{BUNDLE, KEY_MODE, LISTS, Names, io_error, pem_of},
};

const PUBLIC_MODE: u32 = 0o644;

/// Files that are to be written together.
#[derive(Default)]
pub(super) struct Changes(Vec<Change>);

struct Change {
    name: &'static str,
    mode: u32,
    contents: Zeroizing<Vec<u8>>,
}

/// A file that is written and has not got its name yet; removed if it never does.
struct Unfinished {
    at: PathBuf,
    path: PathBuf,
    named: bool,
}

// === impl Changes ===

impl Changes {
    /// With a key and its certificates.
    pub(super) fn pair(self, names: Names, key: &KeyPair, chain: &[CertificateDer<'_>]) -> Self {
        let pem = Zeroizing::new(key.serialize_pem().into_bytes());
        self.file(names.0, KEY_MODE, pem)
            .public(names.1, pem_of("CERTIFICATE", chain))
    }

    /// With the roots that are trusted.
    pub(super) fn bundle(self, roots: &[CertificateDer<'_>]) -> Self {
        self.public(BUNDLE, pem_of("CERTIFICATE", roots))
    }

    /// With the revocation lists.
    pub(super) fn lists(self, lists: &[CertificateRevocationListDer<'_>]) -> Self {
        self.public(LISTS, pem_of("X509 CRL", lists))
    }

    /// With a file that only its owner may read, be it secret or not.
    pub(super) fn private(self, name: &'static str, pem: String) -> Self {
        self.file(name, KEY_MODE, Zeroizing::new(pem.into_bytes()))
    }

    /// Writes them: each gets its name, in their order, once there was room for all of them. What is
    /// there already and the same is left alone.
    pub(super) fn write_in(self, folder: &Path) -> Result<(), CaError> {
        let is_new = |change: &Change| {
            fs::read(folder.join(change.name))
                .map(Zeroizing::new)
                .map_or(true, |there| *there != *change.contents)
        };
        let written: Vec<_> = self
            .0
            .iter()
            .filter(|change| is_new(change))
            .map(|change| Unfinished::write(folder, change.name, change.mode, &change.contents))
            .collect::<Result<_, _>>()?;
        written.into_iter().try_for_each(Unfinished::put_in_place)
    }

    fn public(self, name: &'static str, pem: String) -> Self {
        self.file(name, PUBLIC_MODE, Zeroizing::new(pem.into_bytes()))
    }

    fn file(mut self, name: &'static str, mode: u32, contents: Zeroizing<Vec<u8>>) -> Self {
        self.0.push(Change {
            name,
            mode,
            contents,
        });
        self
    }
}

// === impl Unfinished ===

impl Unfinished {
    /// Writes a file that is to be whole or not there, even after a power cut.
    fn write(folder: &Path, name: &str, mode: u32, contents: &[u8]) -> Result<Self, CaError> {
        let at = folder.join(format!(".{name}.new"));
        // Left by a process that was killed at this; nobody else is at it, since we hold the lock.
        match fs::remove_file(&at) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(io_error("remove", &at)(error));
            }
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&at)
            .map_err(io_error("create", &at))?;
        let unfinished = Self {
            at,
            path: folder.join(name),
            named: false,
        };
        file.write_all(contents)
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &unfinished.at))?;
        Ok(unfinished)
    }

    fn put_in_place(mut self) -> Result<(), CaError> {
        fs::rename(&self.at, &self.path).map_err(io_error("rename a file to", &self.path))?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.named {
            let _ = fs::remove_file(&self.at);
        }
    }
}
