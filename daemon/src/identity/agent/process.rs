//! A process of a workload that cannot be mistaken for another one.
//!
//! An agent is told a process id, and looks the process up by it. A process that ends gives its id
//! free, and the next one that has it may be anybody's. A pidfd stands for one process only: while
//! it says that its process lives, nobody else can have the id.

use std::{
    fmt, fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

use super::feed::plain;

/// At most so many processes of a workload are asked for.
const MOST_KINDS: usize = 8;
/// At most so many processes of a workload are looked at.
const MOST_PROCESSES: usize = 512;

/// A living process, held by its pidfd.
#[derive(Debug)]
pub(super) struct Held {
    id: i32,
    fd: AsyncFd<OwnedFd>,
    kind: Kind,
}

/// What agents tell the processes of one workload apart by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// Effective user.
    user: Option<u32>,
    executable: Option<PathBuf>,
}

/// A look at the processes of a workload.
struct Survey {
    found: Vec<Held>,
    left: usize,
}

// === impl Held ===

impl Held {
    /// Of the living processes in these cgroups or below, one of each kind, in the order of their ids within a
    /// cgroup. Of a workload of very many kinds or processes, the first.
    ///
    /// # Errors
    /// When pidfds do not work at all, as on kernels before 5.3.
    pub(super) fn one_of_each_kind(cgroups: &[PathBuf]) -> io::Result<Vec<Self>> {
        let mut survey = Survey {
            found: Vec::new(),
            left: MOST_PROCESSES,
        };
        for cgroup in cgroups {
            survey.look_below(cgroup)?;
        }
        Ok(survey.found)
    }

    fn open(id: i32) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(id) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => Ok(Some(Self {
                id,
                // Of the process that is held, unless it has ended, as callers check.
                kind: Kind::of(id),
                // SAFETY: the descriptor is owned by the `AsyncFd`, which alone closes it.
                fd: unsafe { AsyncFd::register(fd)? },
            })),
            // It has ended, or is a thread of a process in another cgroup.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Its process id, which is its own while it lives.
    pub(super) fn id(&self) -> i32 {
        self.id
    }

    /// What it was when it was found.
    pub(super) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Whether it lives.
    pub(super) fn is_alive(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        // A pidfd becomes readable when its process ends.
        let mut fds = [PollFd::new(self.fd.get_ref(), PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Comes back when it has ended.
    pub(super) async fn ended(&self) {
        // An error of the event loop itself: better to let go of a living process than to go on
        // for a dead one.
        let _ = self.fd.readable().await;
    }
}

// === impl Survey ===

impl Survey {
    fn is_over(&self) -> bool {
        self.found.len() == MOST_KINDS || self.left == 0
    }

    fn has(&self, kind: &Kind) -> bool {
        self.found.iter().any(|held| held.kind == *kind)
    }

    /// A cgroup that is gone has nobody.
    fn look_below(&mut self, cgroup: &Path) -> io::Result<()> {
        for id in members(cgroup) {
            if self.is_over() {
                return Ok(());
            }
            self.left -= 1;
            // At first without holding it: most processes are like one that was found.
            if self.has(&Kind::of(id)) {
                continue;
            }
            let Some(held) = Held::open(id)? else {
                continue;
            };
            // Only now: the id that was read may have become another process's before it was held.
            if members(cgroup).any(|member| member == id)
                && held.is_alive()
                && !self.has(held.kind())
            {
                self.found.push(held);
            }
        }
        let Ok(entries) = fs::read_dir(cgroup) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            if self.is_over() {
                return Ok(());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.look_below(&entry.path())?;
            }
        }
        Ok(())
    }
}

// === impl Kind ===

impl Kind {
    /// Of whichever process has this id now.
    fn of(id: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        // Real, effective, saved, and that of the file system.
        let user = users.and_then(|users| users.split_whitespace().nth(1)?.parse().ok());
        Self {
            user,
            executable: fs::read_link(format!("/proc/{id}/exe")).ok(),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.user {
            Some(user) => write!(f, "user {user}")?,
            None => f.write_str("unknown user")?,
        }
        match &self.executable {
            Some(path) => write!(f, ", {}", plain(&path.to_string_lossy())),
            None => f.write_str(", unknown executable"),
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.id, self.kind)
    }
}

/// This process, in the same words.
pub(super) fn reeve() -> String {
    let id = std::process::id();
    let kind = i32::try_from(id).map(Kind::of);
    kind.map_or_else(
        |_| format!("process {id}"),
        |kind| format!("process {id} ({kind})"),
    )
}

/// Processes in this cgroup, not below it.
fn members(cgroup: &Path) -> impl Iterator<Item = i32> + use<> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let ids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    // A process of another PID namespace reads as 0.
    ids.into_iter().filter(|id| *id > 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_process_is_held_until_it_ends() {
        runtime().block_on(async {
            let mut child = Command::new("sleep").arg("60").spawn().unwrap();
            let id = i32::try_from(child.id()).unwrap();
            let held = Held::open(id).unwrap().unwrap();
            assert_eq!(held.id(), id);
            assert!(held.is_alive());
            child.kill().unwrap();
            // Before its parent has taken note: what has ended is not alive as a zombie either.
            held.ended().await;
            assert!(!held.is_alive());
            child.wait().unwrap();
            assert!(Held::open(id).unwrap().is_none());
        });
    }

    #[test]
    fn the_members_of_a_folder_that_is_no_cgroup_are_nobody() {
        runtime().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let found = || Held::one_of_each_kind(&[folder.path().to_owned()]).unwrap();
            assert!(found().is_empty());
            // Of a cgroup's file only what lives counts, and only below it.
            let inner = folder.path().join("inner");
            fs::create_dir(&inner).unwrap();
            let own = std::process::id();
            fs::write(inner.join("cgroup.procs"), format!("0\n{own}\n")).unwrap();
            let found = found();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].id(), i32::try_from(own).unwrap());
            assert_eq!(found[0].to_string(), reeve());
        });
    }

    #[test]
    fn of_many_processes_one_of_each_user_and_executable_is_held() {
        use std::os::unix::process::CommandExt;

        runtime().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let users = [0, 33, 0, 33, 1, 2, 3, 4, 5, 6, 7, 8];
            let mut children = users.map(|user| {
                let mut command = Command::new("sleep");
                command.arg("60").uid(user).spawn().unwrap()
            });
            let ids = children.each_ref().map(std::process::Child::id);
            let lines: String = ids.iter().map(|id| format!("{id}\n")).collect();
            fs::write(folder.path().join("cgroup.procs"), lines).unwrap();
            let found = Held::one_of_each_kind(&[folder.path().to_owned()]).unwrap();
            let held: Vec<_> = found
                .iter()
                .map(|held| (held.id(), held.kind().user))
                .collect();
            let expected = [0, 1, 4, 5, 6, 7, 8, 9];
            let expected =
                expected.map(|n: usize| (i32::try_from(ids[n]).unwrap(), Some(users[n])));
            for child in &mut children {
                child.kill().unwrap();
                child.wait().unwrap();
            }
            assert_eq!(held, expected);
        });
    }
}
