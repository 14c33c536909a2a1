//! The files of a CA: nobody else may reach the keys, and each file is whole or not there.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `root.key`, `root.pem` | the root that signs |
//! | `intermediate.key`, `intermediate.pem` | instead of a root: the intermediate that signs, with those above it |
//! | `next.key`, `next.pem` | a root that is trusted and does not sign yet |
//! | `bundle.pem` | every root that is trusted; where it is missing, `root.pem` is |
//! | `crl.pem` | revocation lists; where it is missing, revocation is not checked |
//!
//! Whoever works in the folder holds a lock of the folder itself, which needs no room on its disk.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use zeroize::Zeroizing;

use super::{CaError, changes::Changes};
use crate::identity::{PemError, pem_file};

pub(super) const ROOT: Names = Names("root.key", "root.pem");
pub(super) const NEXT: Names = Names("next.key", "next.pem");
pub(super) const INTERMEDIATE: Names = Names("intermediate.key", "intermediate.pem");
pub(super) const BUNDLE: &str = "bundle.pem";
pub(super) const LISTS: &str = "crl.pem";

const FOLDER_MODE: u32 = 0o700;
pub(super) const KEY_MODE: u32 = 0o600;

/// Names of a key and of its certificate.
#[derive(Clone, Copy)]
pub(super) struct Names(pub(super) &'static str, pub(super) &'static str);

/// A key and its certificate, with those above it but the root.
pub(super) struct Pair {
    pub(super) key: KeyPair,
    pub(super) key_path: PathBuf,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) chain_path: PathBuf,
}

/// Everything in a folder.
pub(super) struct Contents {
    /// Who signs.
    pub(super) signer: Pair,
    /// Whether that is an intermediate.
    pub(super) is_intermediate: bool,
    /// The root that is to sign next.
    pub(super) next: Option<Pair>,
    /// The roots that are trusted, each once, the signing one first.
    pub(super) trusted: Vec<CertificateDer<'static>>,
    /// Revocation lists.
    pub(super) lists: Vec<CertificateRevocationListDer<'static>>,
}

/// A folder that nobody else works in for as long as this value lives.
pub(super) struct Folder {
    path: PathBuf,
    /// Locked.
    opened: File,
}

// === impl Folder ===

impl Folder {
    /// Opens and locks a folder, and makes it where it is not there.
    pub(super) fn create(path: &Path) -> Result<Self, CaError> {
        make(path)?;
        Self::open(path)
    }

    /// Opens and locks a folder.
    pub(super) fn open(path: &Path) -> Result<Self, CaError> {
        let opened = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => CaError::Missing {
                folder: path.to_owned(),
            },
            _ => io_error("open", path)(error),
        })?;
        check_private(&opened, path, FOLDER_MODE)?;
        // Waits until nobody else is at work here.
        opened.lock().map_err(io_error("lock", path))?;
        Ok(Self {
            path: path.to_owned(),
            opened,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything in it; none where no CA was ever made.
    pub(super) fn read(&self) -> Result<Option<Contents>, CaError> {
        let next = self.file(NEXT.1)?;
        // A switch of roots renames the key first: where it was interrupted, the key's certificate
        // is still the next one.
        let next_key = self.file(NEXT.0)?;
        let root = match (&next_key, &next) {
            (None, Some(_)) => Names(ROOT.0, NEXT.1),
            _ => ROOT,
        };
        let root_key = self.file(ROOT.0)?;
        let intermediate = self.pair(INTERMEDIATE)?;
        let (signer, is_intermediate) = match intermediate {
            Some(_) if root_key.is_some() => {
                return Err(CaError::TwoKeys {
                    folder: self.path.clone(),
                });
            }
            Some(pair) => (pair, true),
            None => match self.pair(root)? {
                Some(pair) => (pair, false),
                None => return Ok(None),
            },
        };
        let next = match next_key {
            Some(_) => self.pair(NEXT)?,
            None => None,
        };

        let mut trusted = match is_intermediate {
            true => Vec::new(),
            false => signer.chain.clone(),
        };
        match self.file(BUNDLE)? {
            Some(file) => {
                for root in read(
                    file,
                    &self.path.join(BUNDLE),
                    "certificate",
                    pem_file::certificates,
                )? {
                    if !trusted.contains(&root) {
                        trusted.push(root);
                    }
                }
            }
            None if is_intermediate => {
                return Err(CaError::NoRoots {
                    path: self.path.join(BUNDLE),
                });
            }
            None => {}
        }
        let lists = match self.file(LISTS)? {
            Some(file) => {
                let path = self.path.join(LISTS);
                read(file, &path, "revocation list", pem_file::revocation_lists)?
            }
            None => Vec::new(),
        };
        Ok(Some(Contents {
            signer,
            is_intermediate,
            next,
            trusted,
            lists,
        }))
    }

    /// Everything in it.
    pub(super) fn contents(&self) -> Result<Contents, CaError> {
        self.read()?.ok_or_else(|| CaError::Missing {
            folder: self.path.clone(),
        })
    }

    /// Writes files, all of them or none. What is there already and the same is left alone.
    pub(super) fn write(&self, changes: Changes) -> Result<(), CaError> {
        changes.write_in(&self.path)?;
        self.sync()
    }

    /// Makes the next root the one that signs. The old one's key is overwritten where it lay, as far
    /// as the file system lets anybody do that.
    pub(super) fn switch_root(&self) -> Result<(), CaError> {
        let (from, to) = (self.path.join(NEXT.0), self.path.join(ROOT.0));
        if from.exists() {
            let old = OpenOptions::new().write(true).open(&to);
            fs::rename(&from, &to).map_err(io_error("rename a file to", &to))?;
            self.sync()?;
            if let Ok(mut old) = old {
                let length = old.metadata().map_or(0, |file| file.len());
                // Nothing depends on it: the file has no name any more.
                let _ = io::copy(&mut io::repeat(0).take(length), &mut old);
                let _ = old.sync_all();
            }
        }
        let (from, to) = (self.path.join(NEXT.1), self.path.join(ROOT.1));
        fs::rename(&from, &to).map_err(io_error("rename a file to", &to))?;
        self.sync()
    }

    /// A key and its certificates that are about to be written.
    pub(super) fn new_pair(
        &self,
        names: Names,
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
    ) -> Pair {
        Pair {
            key,
            key_path: self.path.join(names.0),
            chain,
            chain_path: self.path.join(names.1),
        }
    }

    fn pair(&self, names: Names) -> Result<Option<Pair>, CaError> {
        let (key_path, chain_path) = (self.path.join(names.0), self.path.join(names.1));
        let half = |present: &Path, missing: &Path| CaError::Half {
            present: present.to_owned(),
            missing: missing.to_owned(),
        };
        match (self.file(names.0)?, self.file(names.1)?) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(half(&key_path, &chain_path)),
            (None, Some(_)) => Err(half(&chain_path, &key_path)),
            (Some(key), Some(chain)) => {
                check_private(&key, &key_path, KEY_MODE)?;
                Ok(Some(Pair {
                    key: read_key(key, &key_path)?,
                    chain: read(chain, &chain_path, "certificate", pem_file::certificates)?,
                    key_path,
                    chain_path,
                }))
            }
        }
    }

    fn file(&self, name: &str) -> Result<Option<File>, CaError> {
        let path = self.path.join(name);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("open", &path)(error)),
        }
    }

    fn sync(&self) -> Result<(), CaError> {
        self.opened.sync_all().map_err(io_error("sync", &self.path))
    }
}

/// Makes a folder that is its owner's alone, where there is none.
pub(super) fn make(path: &Path) -> Result<(), CaError> {
    DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(path)
        .map_err(io_error("create", path))
}

/// PEM of DER values.
pub(super) fn pem_of(label: &str, ders: &[impl AsRef<[u8]>]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let block =
        |der: &dyn AsRef<[u8]>| pem::encode_config(&pem::Pem::new(label, der.as_ref()), config);
    ders.iter().map(|der| block(der)).collect()
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

fn read_key(file: File, path: &Path) -> Result<KeyPair, CaError> {
    let key = Zeroizing::new(read(file, path, "private key", pem_file::private_key)?);
    // The library's error could repeat what it has read.
    KeyPair::try_from(key.secret_der()).map_err(|_| CaError::Unreadable {
        path: path.to_owned(),
        what: "private key",
        error: "it is of a kind that cannot sign here".to_owned(),
    })
}

/// What a PEM file holds. Any of them may hold a key.
fn read<T>(
    mut file: File,
    path: &Path,
    what: &'static str,
    parse: impl FnOnce(&[u8]) -> Result<T, PemError>,
) -> Result<T, CaError> {
    let mut text = Zeroizing::new(Vec::new());
    file.read_to_end(&mut text)
        .map_err(io_error("read", path))?;
    parse(&text).map_err(|error| CaError::Unreadable {
        path: path.to_owned(),
        what,
        error: error.to_string(),
    })
}

pub(super) fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> CaError + 'a {
    move |error| CaError::Io {
        action,
        path: path.to_owned(),
        error,
    }
}
