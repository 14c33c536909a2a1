//! Which folders are watched in order to notice every change of a path.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::Watched;

/// The folders, by the one name that each has without links: inotify knows a folder, not its names.
///
/// For each path these are the folder that it is in, or the nearest one above that exists; the
/// folder above that, where it is seen when the first is deleted and made again; each folder in
/// which a link on the way lies, such as `..data` of a Kubernetes secret; and where the links lead.
pub(super) fn places(watched: &Watched) -> BTreeSet<PathBuf> {
    let mut places = BTreeSet::new();
    for folder in &watched.folders {
        add(&mut places, Some(folder));
        around(&mut places, folder);
    }
    for file in &watched.files {
        around(&mut places, file);
        if let Ok(target) = fs::canonicalize(file) {
            add(&mut places, target.parent());
        }
    }
    places
}

fn around(places: &mut BTreeSet<PathBuf>, path: &Path) {
    let existing = || path.ancestors().skip(1).filter(|above| above.is_dir());
    for above in existing().take(2) {
        add(places, Some(above));
    }
    for link in path.ancestors() {
        if fs::symlink_metadata(link).is_ok_and(|found| found.is_symlink()) {
            add(places, link.parent());
        }
    }
}

fn add(places: &mut BTreeSet<PathBuf>, folder: Option<&Path>) {
    if let Some(Ok(folder)) = folder.map(fs::canonicalize) {
        places.insert(folder);
    }
}
