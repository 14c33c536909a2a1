//! A process of a workload that cannot be mistaken for another one.
//!
//! An agent is told a process id, and looks the process up by it. A process that ends gives its id
//! free, and the next one that has it may be anybody's. A pidfd stands for one process only: while
//! it says that its process lives, nobody else can have the id.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

/// A living process, held by its pidfd.
#[derive(Debug)]
pub(super) struct Held {
    id: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Held {
    /// Any living process in one of these cgroups or below.
    ///
    /// # Errors
    /// When pidfds do not work at all, as on kernels before 5.3.
    pub(super) fn any_of(cgroups: &[PathBuf]) -> io::Result<Option<Self>> {
        for cgroup in cgroups {
            if let Some(held) = Self::below(cgroup)? {
                return Ok(Some(held));
            }
        }
        Ok(None)
    }

    /// A cgroup that is gone has nobody.
    fn below(cgroup: &Path) -> io::Result<Option<Self>> {
        for id in members(cgroup) {
            let Some(held) = Self::open(id)? else {
                continue;
            };
            // Only now: the id that was read may have become another process's before it was held.
            if members(cgroup).any(|member| member == id) && held.is_alive() {
                return Ok(Some(held));
            }
        }
        let Ok(entries) = fs::read_dir(cgroup) else {
            return Ok(None);
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && let Some(held) = Self::below(&entry.path())?
            {
                return Ok(Some(held));
            }
        }
        Ok(None)
    }

    fn open(id: i32) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(id) else {
            return Ok(None);
        };
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => Ok(Some(Self {
                id,
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
            assert!(Held::any_of(&[folder.path().to_owned()]).unwrap().is_none());
            // Of a cgroup's file only what lives counts, and only below it.
            let inner = folder.path().join("inner");
            fs::create_dir(&inner).unwrap();
            let own = std::process::id();
            fs::write(inner.join("cgroup.procs"), format!("0\n{own}\n")).unwrap();
            let held = Held::any_of(&[folder.path().to_owned()]).unwrap().unwrap();
            assert_eq!(held.id(), i32::try_from(own).unwrap());
        });
    }
}
