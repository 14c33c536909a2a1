//! The thread that watches.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant, SystemTime},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind, RemoveKind},
};
use tokio::sync::watch;

use super::{Look, Polled, Print, Watched, places::places};

/// The look that nothing caused: inotify does not work on every file system.
const POLL: Duration = Duration::from_secs(5);
/// The same for files that cannot be watched: a change is to be seen within a second.
const FAST_POLL: Duration = Duration::from_millis(500);
/// Without a change for so long, whoever writes is taken to have finished.
const QUIET: Duration = Duration::from_millis(100);
/// Longest wait for that.
const LONGEST: Duration = Duration::from_millis(500);
/// Longest wait for the end of a writer who has a file open and has changed it in place: what
/// stands there until then may be the half of what is meant, or nothing.
const WRITING: Duration = Duration::from_secs(5);

/// A writer has closed a file.
const WRITTEN: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));

/// The thread's other end.
#[derive(Debug)]
pub(super) struct Watcher {
    messages: Sender<Message>,
}

enum Message {
    Add(Box<Entry>),
    Event(notify::Result<notify::Event>),
}

/// What is watched for one [`super::Files`].
struct Entry {
    watched: Watched,
    print: Print,
    /// Closed once nobody wants to know any more.
    sender: watch::Sender<u64>,
    polled: Polled,
    places: BTreeSet<PathBuf>,
    /// Since the first of the changes that were not looked at yet, and since the last.
    dirty: Option<(Instant, Instant)>,
    /// Files that were changed in place since, by somebody who has not closed them yet.
    writing: BTreeSet<PathBuf>,
    next_poll: Instant,
}

/// A folder that inotify watches.
struct Place {
    /// Which folder of this name it was.
    folder: Folder,
    users: BTreeSet<u64>,
}

/// Inode and time of birth: inode numbers are given again.
type Folder = (u64, Option<SystemTime>);

struct Thread {
    inbox: Receiver<Message>,
    watcher: Option<RecommendedWatcher>,
    entries: HashMap<u64, Entry>,
    places: HashMap<PathBuf, Place>,
    next: u64,
}

// === impl Watcher ===

impl Watcher {
    pub(super) fn start() -> Self {
        let (messages, inbox) = mpsc::channel();
        let events = messages.clone();
        let watcher = notify::recommended_watcher(move |event| {
            // The thread ends only with the process.
            let _ = events.send(Message::Event(event));
        });
        let watcher = watcher
            .inspect_err(|error| {
                tracing::warn!(%error, "files cannot be watched: they are looked at twice a second");
            })
            .ok();
        let thread = Thread {
            inbox,
            watcher,
            entries: HashMap::new(),
            places: HashMap::new(),
            next: 0,
        };
        let spawned = thread::Builder::new()
            .name("files".to_owned())
            .spawn(|| thread.run());
        if let Err(error) = spawned {
            tracing::error!(%error, "changes of files are not noticed: there can be no more threads");
        }
        Self { messages }
    }

    pub(super) fn add(&self, look: Look, sender: watch::Sender<u64>, polled: Polled) {
        let now = Instant::now();
        let entry = Entry {
            watched: look.watched,
            print: look.print,
            sender,
            polled,
            places: BTreeSet::new(),
            dirty: None,
            writing: BTreeSet::new(),
            next_poll: now,
        };
        // Without the thread, which was said, nobody is told of changes.
        let _ = self.messages.send(Message::Add(Box::new(entry)));
    }

    /// What inotify says when its queue was too short: a test cannot make the machine's so.
    #[cfg(test)]
    pub(super) fn has_lost_events(&self) {
        let lost = notify::Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan);
        let _ = self.messages.send(Message::Event(Ok(lost)));
    }
}

// === impl Thread ===

impl Thread {
    fn run(mut self) {
        loop {
            let wait = self.next_look().saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(wait) {
                Ok(message) => {
                    self.take(message);
                    while let Ok(message) = self.inbox.try_recv() {
                        self.take(message);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look_where_due();
        }
    }

    fn next_look(&self) -> Instant {
        let idle = Instant::now() + POLL;
        self.entries
            .values()
            .map(Entry::due)
            .fold(idle, Instant::min)
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Add(entry) => {
                self.next += 1;
                self.entries.insert(self.next, *entry);
            }
            Message::Event(Ok(event)) if event.kind == WRITTEN => self.written(&event),
            // Reading is no change, and would wake us by our own reading.
            Message::Event(Ok(event)) if event.kind.is_access() => {}
            Message::Event(Ok(event)) if event.need_rescan() => self.everything_changed(),
            Message::Event(Ok(event)) => self.changed(&event),
            Message::Event(Err(error)) => {
                tracing::debug!(%error, "watching files has failed; all are looked at");
                self.everything_changed();
            }
        }
    }

    fn changed(&mut self, event: &notify::Event) {
        let in_place = matches!(event.kind, EventKind::Modify(ModifyKind::Data(_)));
        let moved = matches!(event.kind, EventKind::Modify(ModifyKind::Name(_)));
        for path in &event.paths {
            self.each_user(path, |entry| {
                entry.touch();
                if in_place {
                    entry.is_written(path);
                } else if moved || event.kind.is_remove() {
                    entry.writing.remove(path);
                }
            });
            // The folder itself has gone, and inotify's watch with it, whatever comes in its place.
            let removed = matches!(event.kind, EventKind::Remove(RemoveKind::Folder));
            if removed || moved {
                self.forget_place(path);
            }
        }
    }

    /// What was written in place is whole now.
    fn written(&mut self, event: &notify::Event) {
        for path in &event.paths {
            self.each_user(path, |entry| {
                if entry.writing.remove(path) {
                    entry.touch();
                }
            });
        }
    }

    /// Does something to each entry that wants to know of a path.
    fn each_user(&mut self, path: &Path, mut act: impl FnMut(&mut Entry)) {
        for place in [Some(path), path.parent()].into_iter().flatten() {
            let users = self.places.get(place).into_iter();
            for user in users.flat_map(|place| &place.users) {
                if let Some(entry) = self.entries.get_mut(user) {
                    act(entry);
                }
            }
        }
    }

    fn everything_changed(&mut self) {
        self.entries.values_mut().for_each(Entry::touch);
    }

    fn look_where_due(&mut self) {
        let now = Instant::now();
        let due: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, entry)| now >= entry.due())
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            if let Some(mut entry) = self.entries.remove(&id)
                && self.look(id, &mut entry)
            {
                self.entries.insert(id, entry);
            }
        }
    }

    /// Watches what is there now, and only then looks whether it has changed: what changes later
    /// is an event. False where nobody wants to know any more.
    fn look(&mut self, id: u64, entry: &mut Entry) -> bool {
        if entry.sender.is_closed() {
            for place in std::mem::take(&mut entry.places) {
                self.leave(id, &place);
            }
            return false;
        }
        let watched = self.arm(id, entry);
        if !entry.polled.set(!watched) && !watched {
            tracing::warn!(
                files = ?entry.watched.folders.iter().chain(&entry.watched.files).collect::<Vec<_>>(),
                "files cannot be watched and are looked at twice a second: is \
                 fs.inotify.max_user_watches reached?"
            );
        }
        entry.next_poll = Instant::now() + if watched { POLL } else { FAST_POLL };
        let print = entry.watched.print();
        if print != entry.print {
            if entry.dirty.is_none() {
                // Found by looking: whoever writes is given the same time to finish.
                entry.touch();
                return true;
            }
            entry.print = print;
            entry.sender.send_modify(|number| *number += 1);
        }
        entry.dirty = None;
        entry.writing.clear();
        true
    }

    /// Makes inotify watch the entry's places. False where it does not watch all of them.
    fn arm(&mut self, id: u64, entry: &mut Entry) -> bool {
        let wanted = places(&entry.watched);
        for gone in entry.places.difference(&wanted) {
            self.leave(id, gone);
        }
        let mut all = true;
        for place in &wanted {
            all &= self.join(id, place);
        }
        entry.places = wanted;
        all
    }

    fn join(&mut self, id: u64, path: &PathBuf) -> bool {
        let Ok(found) = fs::metadata(path) else {
            // Gone since we looked: its parent tells.
            return true;
        };
        let folder = (found.ino(), found.created().ok());
        if let Some(place) = self.places.get_mut(path)
            && place.folder == folder
        {
            place.users.insert(id);
            return true;
        }
        let users = self.forget_place(path);
        let Some(watcher) = &mut self.watcher else {
            return false;
        };
        match watcher.watch(path, RecursiveMode::NonRecursive) {
            Ok(()) => {
                let mut users = users;
                users.insert(id);
                self.places.insert(path.clone(), Place { folder, users });
                true
            }
            Err(error) => {
                tracing::debug!(%error, folder = %path.display(), "a folder cannot be watched");
                matches!(error.kind, notify::ErrorKind::PathNotFound)
            }
        }
    }

    fn leave(&mut self, id: u64, path: &PathBuf) {
        let Some(place) = self.places.get_mut(path) else {
            return;
        };
        place.users.remove(&id);
        if place.users.is_empty() {
            self.forget_place(path);
        }
    }

    /// Stops watching a folder, and gives those who wanted it.
    fn forget_place(&mut self, path: &Path) -> BTreeSet<u64> {
        let Some(place) = self.places.remove(path) else {
            return BTreeSet::new();
        };
        if let Some(watcher) = &mut self.watcher {
            // Of a folder that has gone the watch has gone too.
            let _ = watcher.unwatch(path);
        }
        place.users
    }
}

// === impl Entry ===

impl Entry {
    fn touch(&mut self) {
        let now = Instant::now();
        let first = self.dirty.map_or(now, |(first, _)| first);
        self.dirty = Some((first, now));
    }

    /// Somebody writes a file in place, if it is one that matters.
    fn is_written(&mut self, path: &Path) {
        if !self.writing.contains(path) && self.watched.has(path) {
            self.writing.insert(path.to_owned());
        }
    }

    /// When it is to be looked at: for its changes, or without any for its next poll.
    fn due(&self) -> Instant {
        match self.dirty {
            Some((first, _)) if !self.writing.is_empty() => first + WRITING,
            Some((first, last)) => (last + QUIET).min(first + LONGEST),
            None => self.next_poll,
        }
    }
}
