//! The folder of pins, and how one layout takes the place of another.
//!
//! What a reeve with other maps pinned cannot be adopted, and may not be removed before something
//! else refuses what it refuses. So this reeve's programs are pinned and attached beside it, in
//! `NAME-next`: both judge, and what either refuses is refused. Once the maps here hold everything,
//! what was there before goes, and the folder takes over its name.
//!
//! In a takeover, what was there before stays for as long as its daemon has connections, in `NAME-old-N`.
//! A daemon holds a lock on its folder. A folder that nobody holds was left by a daemon that was killed, and
//! is removed by the one that serves.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapType};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2},
};
use reeve_common::{LAYOUT_VERSION, Settings as KernelSettings};

use super::{
    Error, bpffs, links,
    load::{self, map_error},
    monotonic_nanoseconds, sys,
};

/// The map whose layout version stands for all. The version stands first in it, in every layout.
pub(super) const SETTINGS: &str = "SETTINGS";

/// Where this reeve pins.
#[derive(Debug)]
pub(super) struct Pins {
    folder: PathBuf,
    /// The folder of whoever serves.
    name: PathBuf,
    /// The folder of another layout, to be removed once this one is in force.
    replaces: Option<PathBuf>,
    /// Says that the folder is somebody's; none where that is another daemon.
    lock: Option<Flock<File>>,
}

// === impl Pins ===

impl Pins {
    /// Finds out what is pinned already, and where to pin. Makes the folder. `beside` has it be beside
    /// what another daemon has pinned, which stays.
    pub(super) fn find(pins: &Path, beside: bool) -> Result<Self, Error> {
        let next = successor(pins);
        // Before anything in them is believed.
        if is_there(pins) {
            bpffs::verify(pins)?;
        }
        if is_in_the_way(&next) {
            tracing::warn!(
                path = %next.display(),
                "somebody else's, where the folder above is everybody's: it is left alone"
            );
        }
        if beside {
            // What is there is of a daemon that has not taken over.
            if is_held(&next)? {
                return Err(Error::Pin {
                    doing: "pin in",
                    path: next,
                    source: io::Error::other("another daemon does"),
                });
            }
            links::remove_all(&next)?;
            return Self::take(next, pins, None);
        }
        if !is_there(pins) && is_own(&next) {
            // A replacement ended between its last two steps.
            put(&next, pins)?;
        }
        match layout(pins)? {
            None | Some(LAYOUT_VERSION) => {
                let replaces = is_own(&next).then_some(next);
                Self::take(pins.to_owned(), pins, replaces)
            }
            Some(other) => {
                let stale = |layout: u32| layout != LAYOUT_VERSION;
                if is_own(&next) && layout(&next)?.is_some_and(stale) {
                    // It never came to replace what is there, which goes on refusing.
                    links::remove_all(&next)?;
                }
                tracing::warn!(
                    found = other,
                    expected = LAYOUT_VERSION,
                    "what is pinned has another layout: it goes on refusing until all of this \
                     layout is in force, and is removed then"
                );
                Self::take(next, pins, Some(pins.to_owned()))
            }
        }
    }

    fn take(folder: PathBuf, name: &Path, replaces: Option<PathBuf>) -> Result<Self, Error> {
        if folder != name && is_in_the_way(&folder) {
            let made = unique(&folder);
            bpffs::prepare(&made)?;
            put(&made, &folder)?;
        }
        bpffs::prepare(&folder)?;
        let lock = Some(lock(&folder, FlockArg::LockShared).map_err(held(&folder))?);
        Ok(Self {
            folder,
            name: name.to_owned(),
            replaces,
            lock,
        })
    }

    /// Where the pins are now.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What is in force holds everything: another layout is needed no longer. True where there
    /// was one.
    pub(super) fn settle(&mut self) -> Result<bool, Error> {
        let Some(other) = &self.replaces else {
            return Ok(false);
        };
        if is_own(other) {
            links::remove_all(other)?;
        }
        if *other != successor(&self.folder) {
            put(&self.folder, other)?;
            self.folder.clone_from(other);
        }
        self.replaces = None;
        Ok(true)
    }

    /// Makes the folder and takes hold of it again, where others have removed it.
    pub(super) fn keep(&mut self) -> Result<(), Error> {
        bpffs::prepare(&self.folder)?;
        let Some(held_now) = &self.lock else {
            return Ok(());
        };
        let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|found| found.ino());
        let is_same = match (
            inode(held_now.metadata()),
            inode(fs::metadata(&self.folder)),
        ) {
            (Ok(held), Ok(there)) => held == there,
            _ => false,
        };
        if !is_same {
            let again = lock(&self.folder, FlockArg::LockShared);
            self.lock = Some(again.map_err(held(&self.folder))?);
        }
        Ok(())
    }

    /// Leaves the name to the next daemon, which has pinned beside.
    pub(super) fn step_aside(&mut self) -> Result<(), Error> {
        let is_free = |number: &u32| !is_there(&old(&self.name, *number));
        let to = old(&self.name, (1..).find(is_free).unwrap_or_default());
        put(&self.folder, &to)?;
        self.folder = to;
        Ok(())
    }

    /// Leaves the folder to the next daemon, which has adopted it.
    pub(super) fn let_go(&mut self) {
        self.lock = None;
    }

    /// Takes the name, after another daemon has left it, or has ended before it could.
    pub(super) fn take_name(&mut self) -> Result<(), Error> {
        // Where it replaces what was there, that is removed first.
        if self.folder == self.name || self.replaces.is_some() {
            return Ok(());
        }
        if is_held(&self.name)? {
            return Err(Error::Pin {
                doing: "give its final name to",
                path: self.folder.clone(),
                source: io::Error::other("another daemon has it still"),
            });
        }
        if is_own(&self.name) {
            links::remove_all(&self.name)?;
        }
        put(&self.folder, &self.name)?;
        self.folder.clone_from(&self.name);
        Ok(())
    }

    /// Removes what daemons have left that were killed: those that others have taken over from, and the
    /// one that was about to take over. Gives what was removed, and whether anything stays that another
    /// daemon has.
    pub(super) fn sweep(&self) -> Result<(Vec<PathBuf>, bool), Error> {
        let mut others = olds(&self.name)?;
        others.push(successor(&self.name));
        others.retain(|folder| *folder != self.folder && bpffs::verify(folder).is_ok());
        let (mut removed, mut stays) = (Vec::new(), false);
        for folder in others {
            if is_held(&folder)? {
                stays = true;
            } else {
                links::remove_all(&folder)?;
                removed.push(folder);
            }
        }
        Ok((removed, stays))
    }

    /// Whether daemons of other layouts are there, from which others have taken over.
    pub(super) fn has_olds(&self) -> Result<bool, Error> {
        for folder in olds(&self.name)? {
            if is_held(&folder)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes all that is pinned in the folder, since another daemon judges.
    pub(super) fn remove(&self) -> Result<(), Error> {
        links::remove_all(&self.folder).map(drop)
    }
}

/// Removes everything that is pinned, of whatever layout, and gives the pins.
pub(super) fn remove_all(pins: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut folders = olds(pins)?;
    folders.extend(Some(successor(pins)).filter(|next| is_own(next)));
    if is_there(pins) {
        // In another's folder, paths can come to lead elsewhere.
        bpffs::verify(pins)?;
        folders.insert(0, pins.to_owned());
    }
    let mut removed = Vec::new();
    for folder in &folders {
        removed.extend(links::remove_all(folder)?);
    }
    Ok(removed)
}

/// Layout of what is pinned in a folder. None: there is nothing, or nothing was written yet.
///
/// # Errors
/// When it cannot be read, or is not reeve's.
pub(super) fn layout(pins: &Path) -> Result<Option<u32>, Error> {
    let path = pins.join(SETTINGS);
    if !is_there(&path) {
        return Ok(None);
    }
    bpffs::verify_pin(&path)?;
    let failed = |source| map_error(SETTINGS, "read", source);
    let data = MapData::from_pin(&path).map_err(failed)?;
    let info = data.info().map_err(failed)?;
    let size = info.value_size() as usize;
    let is_array = info.map_type().is_ok_and(|kind| kind == MapType::Array);
    let version = size_of::<u32>();
    if !is_array || size < version {
        return Err(Error::Shape {
            path,
            found: load::type_name(&info),
            expected: format!("{:?}", MapType::Array),
            found_key: info.key_size(),
            found_value: info.value_size(),
            key: size_of::<u32>() as u32,
            value: size_of::<KernelSettings>() as u32,
        });
    }
    let value = sys::first_value(data.fd().as_fd(), size).map_err(|source| Error::Pin {
        doing: "read the map",
        path,
        source,
    })?;
    let bytes = value.first_chunk().copied().unwrap_or_default();
    Ok(match u32::from_ne_bytes(bytes) {
        // Whoever made the maps ended before it wrote anything.
        0 if size == size_of::<KernelSettings>() => None,
        layout => Some(layout),
    })
}

/// Whether there is anything, be it a symbolic link that leads nowhere.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Where the successor of another layout is pinned until it has taken its place.
fn successor(pins: &Path) -> PathBuf {
    let mut name = pins.as_os_str().to_owned();
    name.push("-next");
    name.into()
}

/// Where what a daemon has pinned is while another one serves.
fn old(pins: &Path, number: u32) -> PathBuf {
    let mut name = old_prefix(pins.as_os_str());
    name.push(number.to_string());
    name.into()
}

fn old_prefix(pins: &OsStr) -> OsString {
    let mut name = pins.to_owned();
    name.push("-old-");
    name
}

/// All of these that there are and are root's alone.
fn olds(pins: &Path) -> Result<Vec<PathBuf>, Error> {
    let (Some(parent), Some(name)) = (pins.parent(), pins.file_name()) else {
        return Ok(Vec::new());
    };
    let prefix = old_prefix(name);
    let failed = |source| Error::Pin {
        doing: "list",
        path: parent.to_owned(),
        source,
    };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let number = name.as_encoded_bytes();
        let number = number.strip_prefix(prefix.as_encoded_bytes());
        if number.is_some_and(|number| number.iter().all(u8::is_ascii_digit)) {
            let folder = parent.join(name);
            // Another user may have made it, where the folder above is everybody's.
            if bpffs::verify(&folder).is_ok() {
                found.push(folder);
            }
        }
    }
    Ok(found)
}

/// Whether it is root's alone. It stays so: where the folder above is everybody's to write, nobody else
/// can put another one in its place.
fn is_own(path: &Path) -> bool {
    bpffs::verify(path).is_ok()
}

/// Whether somebody else has put something there.
fn is_in_the_way(path: &Path) -> bool {
    is_there(path) && !is_own(path)
}

/// A name beside it that nobody can have foreseen.
fn unique(folder: &Path) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    let now = monotonic_nanoseconds();
    name.push(format!("-{}-{now}", std::process::id()));
    name.into()
}

fn lock(folder: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let mut options = File::options();
    options.custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW);
    Flock::lock(options.read(true).open(folder)?, how).map_err(|(_, error)| error.into())
}

/// Whether a daemon has the pins of a folder. What is not root's is nobody's.
fn is_held(folder: &Path) -> Result<bool, Error> {
    if !is_own(folder) {
        return Ok(false);
    }
    match lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(held(folder)(error)),
    }
}

fn held(folder: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Pin {
        doing: "take hold of",
        path: folder.to_owned(),
        source,
    }
}

/// Renames a folder of ours. Where the folder above is everybody's, another user may have put something in
/// the way, or does so at this very moment: the two change places, and what was in the way is removed as
/// far as that goes without looking into it.
fn put(from: &Path, to: &Path) -> Result<(), Error> {
    let rename = |flags| renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
    let failed = |error: Errno| Error::Pin {
        doing: "give its final name to",
        path: from.to_owned(),
        source: error.into(),
    };
    loop {
        match rename(RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EEXIST) if is_own(to) => return Err(failed(Errno::EEXIST)),
            Err(Errno::EEXIST) => {}
            // Others have removed it: it is pinned again.
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        match rename(RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => break,
            // It has gone again.
            Err(Errno::ENOENT) if is_there(from) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    // What stays is in nobody's way: whoever needs the name changes places with it as well.
    let removed = fs::remove_file(from).or_else(|_| fs::remove_dir(from));
    if let Err(error) = removed {
        tracing::warn!(%error, path = %from.display(), "somebody else's, and not removed");
    }
    Ok(())
}
