//! Being told of changes in the cgroup tree.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::SyncSender,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher, event::ModifyKind};

use super::Message;

/// Watches folders with inotify; where that fails the registry polls.
pub(super) struct Watches {
    watcher: Option<RecommendedWatcher>,
    /// What is watched. A path can come to name another folder, hence the inodes.
    folders: HashMap<PathBuf, u64>,
}

// === impl Watches ===

impl Watches {
    pub(super) fn new(messages: SyncSender<Message>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.as_ref().map_or(true, is_change) {
                // A full queue already holds what this message would say.
                let _ = messages.try_send(Message::Look);
            }
        });
        let watcher = watcher.inspect_err(|error| {
            tracing::warn!(%error, "cgroups cannot be watched; workloads are looked for once a second");
        });
        Self {
            watcher: watcher.ok(),
            folders: HashMap::new(),
        }
    }

    /// Watches these folders and no others. Whether a watch was added.
    pub(super) fn follow(&mut self, folders: &HashSet<PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else {
            return false;
        };
        let inode = |folder: &Path| fs::metadata(folder).ok().map(|metadata| metadata.ino());
        self.folders.retain(|folder, watched| {
            let keep = folders.contains(folder) && inode(folder) == Some(*watched);
            if !keep {
                let _ = watcher.unwatch(folder);
            }
            keep
        });
        let mut added = false;
        for folder in folders {
            if self.folders.contains_key(folder) {
                continue;
            }
            let Some(inode) = inode(folder) else {
                continue;
            };
            match watcher.watch(folder, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    added = true;
                    self.folders.insert(folder.clone(), inode);
                }
                Err(error) => {
                    tracing::debug!(%error, folder = %folder.display(), "a cgroup cannot be watched");
                }
            }
        }
        added
    }
}

fn is_change(event: &notify::Event) -> bool {
    matches!(
        event.kind,
        EventKind::Any
            | EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Name(_) | ModifyKind::Any)
    )
}
