//! The processes of a cgroup and of all below it, read again and again at a bounded cost.
//!
//! Whoever has a delegated cgroup makes as many below it as it likes, and the kernel tells of none of
//! them what it tells of the first. So the ones that have processes are read each time, and all of them
//! only as often as that takes a small part of the time. What is changed by how many there are is when
//! a process is seen that has come to a new one.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{MAX_CGROUPS, children};

/// After all cgroups were read they are not read again for this long for each of them, which is some
/// hundred times what reading one takes.
const PAUSE_FOR_EACH: Duration = Duration::from_millis(1);

/// Processes that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// Their numbers, from the top of the tree.
    pub numbers: Vec<u32>,
    /// There are some of which this process's PID namespace has no number.
    pub hidden: bool,
    /// These are all that there are; else there may be others in cgroups that have had none before.
    pub all: bool,
}

/// What is known of the processes of one cgroup.
#[derive(Debug, Default)]
pub struct Members {
    /// Cgroups that had some when all were read last.
    populated: Vec<PathBuf>,
    /// When all may be read again; at once where they never were.
    next: Option<Instant>,
}

// === impl Members ===

impl Members {
    /// The processes that are known now: all of them if there are few cgroups, of many those that are
    /// where others were before. None where there are some, and it is too soon to look for them or
    /// they are not found among [`MAX_CGROUPS`].
    pub fn look(&mut self, folder: &Path, now: Instant) -> Option<Processes> {
        if !is_populated(folder) {
            self.populated.clear();
            return Some(Processes {
                all: true,
                ..Processes::default()
            });
        }
        let mut found = Processes::default();
        if self.next.is_none_or(|next| next <= now) {
            let read;
            (found, self.populated, read) = walk(folder);
            self.next = Some(now + PAUSE_FOR_EACH * read);
        } else {
            for folder in &self.populated {
                found.read(folder);
            }
        }
        (found.hidden || !found.numbers.is_empty()).then_some(found)
    }
}

// === impl Processes ===

impl Processes {
    /// Adds those of a single cgroup. Whether there were any.
    fn read(&mut self, folder: &Path) -> bool {
        // One that has gone meanwhile has none.
        let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for number in text.lines().filter_map(|line| line.parse::<u32>().ok()) {
            if number == 0 {
                self.hidden = true;
            } else {
                self.numbers.push(number);
            }
        }
        !text.is_empty()
    }
}

/// Processes of a cgroup and of all below it, the cgroups that have some, and how many cgroups were
/// read for it. What goes away while it is read is left out.
pub(super) fn walk(folder: &Path) -> (Processes, Vec<PathBuf>, u32) {
    let (mut found, mut populated) = (Processes::default(), Vec::new());
    // From the top: what is made further down, by whoever may, hides nothing above it.
    let mut waiting = VecDeque::from([folder.to_path_buf()]);
    let mut seen = 1;
    while let Some(folder) = waiting.pop_front() {
        for child in children(&folder) {
            seen += 1;
            if seen >= MAX_CGROUPS {
                break;
            }
            if is_populated(&child) {
                waiting.push_back(child);
            }
        }
        if found.read(&folder) {
            populated.push(folder);
        }
    }
    found.all = true;
    (found, populated, seen)
}

/// Whether a cgroup or one below it has processes, as far as the kernel says.
fn is_populated(folder: &Path) -> bool {
    let events = fs::read_to_string(folder.join("cgroup.events"));
    // The first of all has no such file.
    events.map_or(true, |events| {
        !events.lines().any(|line| line == "populated 0")
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::workload::cgroup::CgroupTree;

    /// A cgroup with others below it, gone with the value.
    struct Cgroups(PathBuf);

    impl Cgroups {
        fn new(name: &str) -> Self {
            let tree = CgroupTree::open(None).unwrap();
            let name = format!("reeve-members-{name}-{}", std::process::id());
            let folder = tree.mount().join(name);
            fs::create_dir(&folder).expect("these tests make cgroups: run them as root");
            Self(folder)
        }

        fn child(&self, name: &str) -> PathBuf {
            let folder = self.0.join(name);
            fs::create_dir_all(&folder).unwrap();
            folder
        }
    }

    impl Drop for Cgroups {
        fn drop(&mut self) {
            let _ = fs::write(self.0.join("cgroup.kill"), "1");
            while is_populated(&self.0) {
                std::thread::sleep(Duration::from_millis(1));
            }
            for child in children(&self.0) {
                let _ = fs::remove_dir(child);
            }
            let _ = fs::remove_dir(&self.0);
        }
    }

    fn start_in(folder: &Path) -> Child {
        let child = Command::new("sleep").arg("100").spawn().unwrap();
        move_to(&child, folder);
        child
    }

    fn move_to(child: &Child, folder: &Path) {
        fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
    }

    #[test]
    fn empty_cgroups_are_read_seldom_and_those_with_processes_each_time() {
        const MANY: u32 = 300;
        let cgroups = Cgroups::new("many");
        for number in 0..MANY {
            cgroups.child(&number.to_string());
        }
        let now = Instant::now();
        let mut members = Members::default();
        // Without a process nothing below is read at all.
        assert!(members.look(&cgroups.0, now).unwrap().numbers.is_empty());
        assert_eq!(members.next, None);
        let mut first = start_in(&cgroups.child("7"));
        let found = members.look(&cgroups.0, now).unwrap();
        assert_eq!((found.numbers, found.all), (vec![first.id()], true));
        let again = now + PAUSE_FOR_EACH * MANY;
        assert!(members.next >= Some(again));
        // One more is not seen at once, and the one that is known is.
        let mut second = start_in(&cgroups.child("8"));
        let soon = now + Duration::from_millis(20);
        let found = members.look(&cgroups.0, soon).unwrap();
        assert_eq!((found.numbers, found.all), (vec![first.id()], false));
        // Whoever is gone from where it was may be elsewhere.
        move_to(&first, &cgroups.child("9"));
        assert_eq!(members.look(&cgroups.0, soon), None);
        let later = members.next.unwrap();
        let mut found = members.look(&cgroups.0, later).unwrap();
        found.numbers.sort_unstable();
        let mut both = vec![first.id(), second.id()];
        both.sort_unstable();
        assert_eq!((found.numbers, found.all), (both, true));
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(members.look(&cgroups.0, later).unwrap().numbers.is_empty());
    }

    #[test]
    fn of_few_cgroups_all_are_read_between_any_two_looks() {
        let cgroups = Cgroups::new("few");
        let mut child = start_in(&cgroups.child("pod"));
        let now = Instant::now();
        let mut members = Members::default();
        assert!(members.look(&cgroups.0, now).unwrap().all);
        move_to(&child, &cgroups.child("other"));
        let next = members.look(&cgroups.0, now + Duration::from_millis(20));
        assert_eq!(next.unwrap().numbers, [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
