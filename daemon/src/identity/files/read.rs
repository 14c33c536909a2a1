//! Reading files that others write: all of one moment, or none.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use zeroize::Zeroizing;

use crate::{identity::SourceError, watch::Print};

/// Largest file: a revocation list may name many certificates.
const MAX_SIZE: u64 = 16 << 20;
/// Times that the files are read while somebody writes them.
const ATTEMPTS: u32 = 5;
/// Between two of these.
const PAUSE: Duration = Duration::from_millis(20);
/// Where systemd puts the credentials of its units, each in a folder of its own.
const CREDENTIALS: &str = "/run/credentials";
/// The link that a Kubernetes volume swaps in order to change all of its files at once.
const DATA: &str = "..data";

/// One identity's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Paths {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) bundle: Option<PathBuf>,
    pub(super) revocation_lists: Option<PathBuf>,
}

/// Their contents. Any of them may hold a key.
pub(super) struct Set {
    pub(super) certificate: Zeroizing<Vec<u8>>,
    pub(super) key: Zeroizing<Vec<u8>>,
    pub(super) bundle: Option<Zeroizing<Vec<u8>>>,
    pub(super) revocation_lists: Option<Zeroizing<Vec<u8>>>,
    /// One of them is a mount of its own.
    pub(super) mounted: bool,
    /// One of them is a systemd credential.
    pub(super) credential: bool,
}

// === impl Paths ===

impl Paths {
    pub(super) fn all(&self) -> impl Iterator<Item = &PathBuf> {
        let needed = [&self.certificate, &self.key];
        needed
            .into_iter()
            .chain(&self.bundle)
            .chain(&self.revocation_lists)
    }

    /// The same files by names that a swap of `..data` does not change: what is read through these
    /// is all of one version, however long it takes.
    pub(super) fn pinned(&self) -> Self {
        // Each folder's link is read once, for all of its files.
        let mut folders: HashMap<PathBuf, Option<PathBuf>> = HashMap::new();
        let mut pin = |path: &PathBuf| match (path.parent(), path.file_name()) {
            (Some(folder), Some(name)) if leads_through_data(path) => {
                let data = folders
                    .entry(folder.to_owned())
                    .or_insert_with(|| fs::canonicalize(folder.join(DATA)).ok());
                data.as_ref()
                    .map_or_else(|| path.clone(), |data| data.join(name))
            }
            _ => path.clone(),
        };
        Self {
            certificate: pin(&self.certificate),
            key: pin(&self.key),
            bundle: self.bundle.as_ref().map(&mut pin),
            revocation_lists: self.revocation_lists.as_ref().map(&mut pin),
        }
    }
}

/// Whether a file is a link to the one of the same name in `..data`.
fn leads_through_data(path: &Path) -> bool {
    let wanted = path.file_name().map(|name| Path::new(DATA).join(name));
    fs::read_link(path).is_ok_and(|target| Some(target) == wanted)
}

/// Reads all files, again and again while they change under our eyes.
pub(super) fn read(paths: &Paths) -> Result<Set, SourceError> {
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let pinned = paths.pinned();
        let before = Print::of(pinned.all());
        let set = read_once(&pinned);
        let whole = Print::of(pinned.all()) == before;
        match set {
            Ok(set) if whole => {
                return Ok(Set {
                    // By the names that were configured: a link into a folder is no mount.
                    mounted: paths.all().any(|path| is_mount(path)),
                    credential: paths.all().any(|path| is_credential(path)),
                    ..set
                });
            }
            Ok(_) => {}
            // Between two versions a file may not be there.
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| {
        SourceError::Unavailable("the files change while they are read".to_owned())
    }))
}

fn read_once(paths: &Paths) -> Result<Set, SourceError> {
    let optional = |path: &Option<PathBuf>| path.as_deref().map(read_file).transpose();
    Ok(Set {
        certificate: read_file(&paths.certificate)?,
        key: read_file(&paths.key)?,
        bundle: optional(&paths.bundle)?,
        revocation_lists: optional(&paths.revocation_lists)?,
        mounted: false,
        credential: false,
    })
}

/// A whole file, wiped from memory when it is not needed any more.
pub(in crate::identity) fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let failed = |error: io::Error| {
        SourceError::Unavailable(format!("{} cannot be read: {error}", path.display()))
    };
    // Without waiting, for a pipe that nobody writes to.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    if found.len() > MAX_SIZE {
        let error = format!("it has more than {MAX_SIZE} bytes");
        return Err(failed(io::Error::other(error)));
    }
    // All at once: a buffer that grows leaves what it held behind.
    let size = usize::try_from(found.len()).unwrap_or_default();
    let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
    file.take(MAX_SIZE)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}

/// Whether a file is mounted by itself, as a `subPath` of a Kubernetes volume is, or one file of
/// the host in a container: such a mount shows one inode for ever, and who replaces the file
/// replaces it elsewhere.
fn is_mount(path: &Path) -> bool {
    let mount = |path: &Path| -> Option<String> {
        let file = File::open(path).ok()?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
        let line = info.lines().find(|line| line.starts_with("mnt_id:"))?;
        Some(line.to_owned())
    };
    let Ok(target) = fs::canonicalize(path) else {
        return false;
    };
    match (mount(&target), target.parent().and_then(mount)) {
        (Some(file), Some(folder)) => file != folder,
        _ => false,
    }
}

/// Whether a file is a credential of a systemd unit: a copy that was made when the unit was started.
fn is_credential(path: &Path) -> bool {
    fs::canonicalize(path).is_ok_and(|target| target.starts_with(CREDENTIALS))
}
