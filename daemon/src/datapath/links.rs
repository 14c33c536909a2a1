//! Attaching programs so that they stay when the daemon goes, and replacing them when it is back.
//!
//! A link is pinned under the name of its program. A newer program takes its place within the
//! link, so there is no moment without either. Links are always added beside other owners'.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    Error, bpffs,
    sys::{self, AttachType},
};

/// Prefix of the pins of links that belong to a cgroup.
const CGROUP_LINK: &str = "link_";
/// Prefix of the pins of links that belong to a network namespace; its inode follows.
const NAMESPACE_LINK: &str = "netns_";
/// Pin of a link that is about to take another's place.
const FRESH_LINK: &str = "fresh";

/// What a program is attached to.
pub(super) struct Target<'a> {
    /// The cgroup or network namespace.
    pub(super) fd: BorrowedFd<'a>,
    /// A cgroup's id, or a network namespace's inode.
    pub(super) number: u64,
    /// For messages.
    pub(super) name: String,
}

/// Pin of a cgroup program's link.
pub(super) fn of_program(pins: &Path, name: &str) -> PathBuf {
    pins.join(format!("{CGROUP_LINK}{name}"))
}

/// Pin of a namespace's link.
pub(super) fn of_namespace(pins: &Path, inode: u64) -> PathBuf {
    pins.join(format!("{NAMESPACE_LINK}{inode}"))
}

/// Has `program` attached to `target` through the link pinned at `path`: by replacing the
/// program of the link that is there, or by a new link where there is none, or where the one
/// that is there belongs to something else. Gives the link: while it is held, the program stays
/// attached even where the pin is lost.
pub(super) fn attach(
    path: &Path,
    name: &'static str,
    program: BorrowedFd<'_>,
    target: &Target<'_>,
    attach_type: AttachType,
) -> Result<OwnedFd, Error> {
    let failed = |source| Error::Attach {
        name,
        target: target.name.clone(),
        source,
    };
    let pinned = match existing(path).map_err(failed)? {
        Some(link)
            if sys::link_place(link.as_fd()).map_err(failed)?
                == (target.number, attach_type as u32) =>
        {
            sys::link_update(link.as_fd(), program).map_err(failed)?;
            return Ok(link);
        }
        pinned => pinned,
    };
    let link = sys::link_create(program, target.fd, attach_type).map_err(failed)?;
    // The old link goes when the new one is in force, and one name changes hands at once.
    let fresh = path.with_file_name(FRESH_LINK);
    remove_link(&fresh)?;
    sys::pin(link.as_fd(), &fresh).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)?;
    if let Some(old) = pinned {
        detach(&old);
    }
    Ok(link)
}

/// Has the links of all namespaces run `program`, and removes those of namespaces that are gone.
/// Gives the links, with the inodes of their namespaces.
pub(super) fn adopt_namespaces(
    pins: &Path,
    name: &'static str,
    program: BorrowedFd<'_>,
) -> Result<Vec<(u64, OwnedFd)>, Error> {
    let mut adopted = Vec::new();
    for (path, inode) in namespaces(pins)? {
        let failed = |source| Error::Attach {
            name,
            target: format!("the network namespace {inode}"),
            source,
        };
        let Some(link) = existing(&path).map_err(failed)? else {
            continue;
        };
        let place = sys::link_place(link.as_fd()).map_err(failed)?;
        if place == (inode, AttachType::SkLookup as u32) {
            sys::link_update(link.as_fd(), program).map_err(failed)?;
            adopted.push((inode, link));
        } else {
            remove_link(&path)?;
        }
    }
    Ok(adopted)
}

/// Removes the links of namespaces that are gone.
pub(super) fn tidy_namespaces(pins: &Path) -> Result<(), Error> {
    for (path, inode) in namespaces(pins)? {
        let gone = existing(&path)
            .and_then(|link| link.map(|link| sys::link_place(link.as_fd())).transpose())
            .is_ok_and(|place| place.map(|(target, _)| target) != Some(inode));
        if gone {
            remove_link(&path)?;
        }
    }
    Ok(())
}

/// The pins of namespaces' links, with the inode that each is named after.
fn namespaces(pins: &Path) -> Result<Vec<(PathBuf, u64)>, Error> {
    let failed = |source| Error::Pin {
        doing: "list",
        path: pins.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(pins).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let inode = name
            .to_str()
            .and_then(|name| name.strip_prefix(NAMESPACE_LINK))
            .and_then(|inode| inode.parse().ok());
        if let Some(inode) = inode {
            found.push((pins.join(&name), inode));
        }
    }
    Ok(found)
}

/// Removes a link and its pin; none is as good.
pub(super) fn remove_link(path: &Path) -> Result<(), Error> {
    if let Ok(Some(link)) = existing(path) {
        detach(&link);
    }
    remove(path)
}

fn detach(link: &OwnedFd) {
    if let Err(error) = sys::link_detach(link.as_fd()) {
        // It ends by itself when nobody holds it any more.
        tracing::debug!(%error, "a link is not detached at once");
    }
}

/// Removes a pin; none is as good.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Pin {
            doing: "remove",
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// Removes every pin and the folder, and gives the pins. Links come first: with them, what is
/// enforced ends.
///
/// # Errors
///
/// [`Error::NotRoots`] where the folder is not root's alone: what is in another's may lead anywhere.
pub(super) fn remove_all(pins: &Path) -> Result<Vec<PathBuf>, Error> {
    if fs::symlink_metadata(pins).is_ok() {
        bpffs::verify(pins)?;
    }
    let failed = |doing| {
        move |source| Error::Pin {
            doing,
            path: pins.to_owned(),
            source,
        }
    };
    let mut entries = Vec::new();
    match fs::read_dir(pins) {
        Ok(folder) => {
            for entry in folder {
                entries.push(entry.map_err(failed("list"))?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
        Err(error) => return Err(failed("list")(error)),
    }
    let is_link = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(CGROUP_LINK) || name.starts_with(NAMESPACE_LINK))
    };
    let (mut removed, maps): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_link);
    for path in &removed {
        remove_link(path)?;
    }
    for path in &maps {
        remove(path)?;
    }
    fs::remove_dir(pins).map_err(failed("remove"))?;
    removed.extend(maps);
    Ok(removed)
}

/// Whether a link is still attached to something.
pub(super) fn is_attached(link: BorrowedFd<'_>) -> bool {
    sys::link_place(link).is_ok_and(|(target, _)| target != 0)
}

/// The link that root has pinned at `path`, if there is one.
fn existing(path: &Path) -> io::Result<Option<OwnedFd>> {
    if fs::symlink_metadata(path).is_ok() {
        bpffs::verify_pin(path).map_err(io::Error::other)?;
    }
    match sys::get_pinned(path) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
