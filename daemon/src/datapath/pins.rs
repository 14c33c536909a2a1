//! The folder of pins, and how one layout takes the place of another.
//!
//! What a reeve with other maps pinned cannot be adopted, and may not be removed before something
//! else refuses what it refuses. So this reeve's programs are pinned and attached beside it, in
//! `NAME-next`: both judge, and what either refuses is refused. Once the maps here hold everything,
//! what was there before goes, and the folder takes over its name.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapType};
use reeve_common::{LAYOUT_VERSION, Settings as KernelSettings};

use super::{
    Error, bpffs, links,
    load::{self, map_error},
    sys,
};

/// The map whose layout version stands for all. The version stands first in it, in every layout.
pub(super) const SETTINGS: &str = "SETTINGS";

/// Where this reeve pins.
#[derive(Debug)]
pub(super) struct Pins {
    folder: PathBuf,
    /// The folder of another layout, to be removed once this one is in force.
    replaces: Option<PathBuf>,
}

// === impl Pins ===

impl Pins {
    /// Finds out what is pinned already, and where to pin. Makes the folder.
    pub(super) fn find(pins: &Path) -> Result<Self, Error> {
        let next = successor(pins);
        // Before anything in them is believed.
        for folder in [pins, &next] {
            if is_there(folder) {
                bpffs::verify(folder)?;
            }
        }
        if !pins.exists() && next.exists() {
            // A replacement ended between its last two steps.
            rename(&next, pins)?;
        }
        let found = match layout(pins)? {
            None | Some(LAYOUT_VERSION) => Self {
                folder: pins.to_owned(),
                replaces: next.exists().then_some(next),
            },
            Some(other) => {
                if layout(&next)?.is_some_and(|layout| layout != LAYOUT_VERSION) {
                    // It never came to replace what is there, which goes on refusing.
                    links::remove_all(&next)?;
                }
                tracing::warn!(
                    found = other,
                    expected = LAYOUT_VERSION,
                    "what is pinned has another layout: it goes on refusing until all of this \
                     layout is in force, and is removed then"
                );
                Self {
                    folder: next,
                    replaces: Some(pins.to_owned()),
                }
            }
        };
        bpffs::prepare(&found.folder)?;
        Ok(found)
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
        links::remove_all(other)?;
        if *other != successor(&self.folder) {
            rename(&self.folder, other)?;
            self.folder.clone_from(other);
        }
        self.replaces = None;
        Ok(true)
    }
}

/// Removes everything that is pinned, of whatever layout, and gives the pins.
pub(super) fn remove_all(pins: &Path) -> Result<Vec<PathBuf>, Error> {
    for folder in [pins, &successor(pins)] {
        if is_there(folder) {
            // In another's folder, paths can come to lead elsewhere.
            bpffs::verify(folder)?;
        }
    }
    let mut removed = links::remove_all(pins)?;
    removed.extend(links::remove_all(&successor(pins))?);
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

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    match fs::rename(from, to) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Pin {
            doing: "give its final name to",
            path: from.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
