//! Tells when files have changed: at once where inotify works, else after some seconds.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::timeout,
};

/// The look that nothing caused: inotify does not work on every file system.
const POLL: Duration = Duration::from_secs(5);
/// Without a change for so long, whoever writes is taken to have finished.
const QUIET: Duration = Duration::from_millis(200);
/// Longest wait for that.
const LONGEST: Duration = Duration::from_secs(2);

/// Watches folders and single files, from its making to its end.
#[derive(Debug)]
pub(super) struct Files {
    changes: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

/// Everything about a file that changes when it does, without reading it.
type Print = (PathBuf, u64, u64, i64, i64);

// === impl Files ===

impl Files {
    /// Watches the files in `folders` (subfolders not) and `files`. Needs a tokio runtime.
    #[must_use]
    pub(super) fn watch(folders: Vec<PathBuf>, files: Vec<PathBuf>) -> Self {
        let wake = Arc::new(Notify::new());
        let watcher = watcher(&folders, &files, wake.clone());
        let (sender, changes) = watch::channel(0);
        let mut before = fingerprint(&folders, &files);
        let task = tokio::spawn(async move {
            // Watches for as long as the task lives.
            let _watcher = watcher;
            while !sender.is_closed() {
                if timeout(POLL, wake.notified()).await.is_ok() {
                    settle(&wake).await;
                }
                let now = fingerprint(&folders, &files);
                if now != before {
                    before = now;
                    sender.send_modify(|number| *number += 1);
                }
            }
        });
        Self { changes, task }
    }

    /// Waits for the next change.
    pub(super) async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The task ended, which only a panic can have caused; the caller must not spin.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn settle(wake: &Notify) {
    let start = Instant::now();
    while start.elapsed() < LONGEST && timeout(QUIET, wake.notified()).await.is_ok() {}
}

fn watcher(
    folders: &[PathBuf],
    files: &[PathBuf],
    wake: Arc<Notify>,
) -> Option<RecommendedWatcher> {
    if folders.is_empty() && files.is_empty() {
        return None;
    }
    let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading is no change, and would wake us by our own reading.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            wake.notify_one();
        }
    });
    let mut watcher = made
        .inspect_err(|error| tracing::warn!(%error, "files cannot be watched and are looked at every few seconds"))
        .ok()?;
    // A file that is replaced by another is seen in its folder only.
    let parents = files
        .iter()
        .filter_map(|file| file.parent())
        .map(Path::to_owned);
    for folder in folders.iter().cloned().chain(parents) {
        if let Err(error) = watcher.watch(&folder, RecursiveMode::NonRecursive) {
            tracing::debug!(%error, folder = %folder.display(), "a folder cannot be watched and is looked at every few seconds");
        }
    }
    Some(watcher)
}

fn fingerprint(folders: &[PathBuf], files: &[PathBuf]) -> Vec<Print> {
    let mut names: Vec<PathBuf> = files.to_vec();
    for folder in folders {
        let inside = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut inside: Vec<OsString> = inside.map(|entry| entry.file_name()).collect();
        inside.sort();
        names.extend(inside.into_iter().map(|name| folder.join(name)));
    }
    names
        .into_iter()
        .map(|name| match fs::metadata(&name) {
            Ok(file) => (
                name,
                file.ino(),
                file.size(),
                file.ctime(),
                file.ctime_nsec(),
            ),
            Err(_) => (name, 0, 0, 0, 0),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_is_told_once_the_writer_has_finished() {
        let folder = std::env::temp_dir().join(format!("reeve-files-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a.yaml"), "1").unwrap();
        let mut files = Files::watch(vec![folder.clone()], Vec::new());

        let _ = fs::read(folder.join("a.yaml"));
        let quiet = timeout(Duration::from_millis(500), files.changed()).await;
        assert!(quiet.is_err(), "reading is no change");

        for number in 0..5 {
            fs::write(folder.join("a.yaml"), format!("{number}")).unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        timeout(Duration::from_secs(3), files.changed())
            .await
            .unwrap();
        let again = timeout(Duration::from_millis(500), files.changed()).await;
        assert!(again.is_err(), "five writes in a row are one change");

        fs::write(folder.join("b.yaml"), "new").unwrap();
        timeout(Duration::from_secs(3), files.changed())
            .await
            .unwrap();
        fs::remove_file(folder.join("a.yaml")).unwrap();
        timeout(Duration::from_secs(3), files.changed())
            .await
            .unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
