//! Tells when files have changed: at once where inotify works, and by looking at them besides.
//!
//! In: paths. Out: a channel that wakes once whoever writes has finished: nothing has changed for a
//! while, and nobody who has changed a file in place has it open any more. Nothing is read here;
//! who reads compares [`Print`]s of before and after, and so has read nothing torn.
//!
//! One thread and one inotify instance serve the whole process: a user may have few of them, and a
//! node may have the files of a thousand identities. A file that is replaced is seen in its folder
//! only, so folders are watched; [`places`] says which.

mod places;
#[cfg(test)]
pub(crate) mod tests;
mod thread;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;

/// Files as they were before somebody read them: what changes while they are read must not be missed.
#[derive(Clone, Debug)]
pub struct Look {
    watched: Watched,
    print: Print,
}

/// Watches files for as long as it is kept.
#[derive(Clone, Debug)]
pub struct Files {
    changes: watch::Receiver<u64>,
    polled: Polled,
}

/// Whether files are only looked at now and then, since they cannot be watched.
#[derive(Clone, Debug, Default)]
pub struct Polled(Arc<AtomicBool>);

/// What is watched: single files, and folders with what is directly in them.
#[derive(Clone, Debug, Default)]
struct Watched {
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

/// Everything about files that changes when they do, without reading them: inode, size, and the time
/// of the last change, which nobody can set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Print(Vec<(PathBuf, u64, u64, i64, i64)>);

static WATCHER: LazyLock<thread::Watcher> = LazyLock::new(thread::Watcher::start);

// === impl Look ===

impl Look {
    /// Looks at the files in `folders` (subfolders not) and at `files`, and reads none of them.
    #[must_use]
    pub fn at(folders: Vec<PathBuf>, files: Vec<PathBuf>) -> Self {
        let watched = Watched { folders, files };
        let print = watched.print();
        Self { watched, print }
    }

    /// Watches them from now on. A change since the look is told.
    #[must_use]
    pub fn watch(self) -> Files {
        let (sender, changes) = watch::channel(0);
        let polled = Polled::default();
        WATCHER.add(self, sender, polled.clone());
        Files { changes, polled }
    }
}

// === impl Files ===

impl Files {
    /// Watches the files in `folders` (subfolders not) and `files`, which are read later. A change before
    /// this returns is not told, one after it is.
    #[must_use]
    pub fn watch(folders: Vec<PathBuf>, files: Vec<PathBuf>) -> Self {
        Look::at(folders, files).watch()
    }

    /// Waits for the next change.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The thread ended, which only a panic can have caused; the caller must not spin.
            std::future::pending::<()>().await;
        }
    }

    /// The channel itself. Watching ends with its last receiver.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// Whether the files are only looked at now and then.
    #[must_use]
    pub fn polled(&self) -> &Polled {
        &self.polled
    }
}

// === impl Polled ===

impl Polled {
    /// Whether it is so now.
    #[must_use]
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns what was so before.
    fn set(&self, polled: bool) -> bool {
        self.0.swap(polled, Ordering::Relaxed)
    }
}

// === impl Watched ===

impl Watched {
    fn print(&self) -> Print {
        let mut names = self.files.clone();
        for folder in &self.folders {
            let inside = fs::read_dir(folder).into_iter().flatten().flatten();
            let mut inside: Vec<PathBuf> = inside.map(|entry| entry.path()).collect();
            inside.sort();
            names.extend(inside);
        }
        Print::of(names)
    }

    /// Whether a path without links is one of the files. Hidden ones in the folders are none:
    /// editors keep theirs open for hours.
    fn has(&self, path: &Path) -> bool {
        let is =
            |own: &PathBuf, wanted: &Path| fs::canonicalize(own).is_ok_and(|own| own == wanted);
        let name = path.file_name().unwrap_or_default();
        let hidden = name.as_encoded_bytes().starts_with(b".");
        let inside = |folder: &PathBuf| path.parent().is_some_and(|parent| is(folder, parent));
        self.files.iter().any(|file| is(file, path)) || (!hidden && self.folders.iter().any(inside))
    }
}

// === impl Print ===

impl Print {
    /// Of these files as they are now. One that is not there has a print too.
    #[must_use]
    pub fn of<P: AsRef<Path>>(files: impl IntoIterator<Item = P>) -> Self {
        let print = |file: P| {
            let file = file.as_ref();
            match fs::metadata(file) {
                Ok(found) => (
                    file.to_owned(),
                    found.ino(),
                    found.size(),
                    found.ctime(),
                    found.ctime_nsec(),
                ),
                Err(_) => (file.to_owned(), 0, 0, 0, 0),
            }
        };
        Self(files.into_iter().map(print).collect())
    }
}
