//! One test process and everything that it makes.
//!
//! All of it carries the process's name: a cgroup, a folder in bpffs and a temporary folder. A
//! reaper, a process of its own, sees the test process end, however it ends, and removes them; where
//! even the reaper was killed, the next test process does. Network namespaces have no names and
//! vanish with the processes inside, which die with the test process (`PR_SET_PDEATHSIG`, and
//! `cgroup.kill`).

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::{Cgroup, Programs, cgroup};

/// Start of every name, so that what is ours can be told from all else.
const PREFIX: &str = "reeve-test-";

const BPFFS: &str = "/sys/fs/bpf";

/// What this process makes things under.
#[derive(Debug)]
pub struct Run {
    name: Name,
    counter: AtomicU32,
    /// Ends when this process does, which is what the reaper waits for.
    _reaper: ChildStdin,
}

impl Run {
    /// The run of this process; the first call starts its reaper and removes what dead ones left.
    pub fn this() -> &'static Run {
        static RUN: OnceLock<Run> = OnceLock::new();
        RUN.get_or_init(Run::start)
    }

    #[expect(clippy::zombie_processes, reason = "the reaper outlives this process")]
    fn start() -> Run {
        sweep_dead();
        let name = Name::of_process(std::process::id()).expect("this process has a start time");
        let mut reaper = Command::new(&Programs::get().peer)
            .args(["reap", &name.0])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting the reaper");
        let reaper = reaper.stdin.take().expect("the reaper's input is a pipe");
        for folder in [name.cgroup(), name.temporary(), name.bpffs()] {
            fs::create_dir(&folder)
                .unwrap_or_else(|error| panic!("making {}: {error}", folder.display()));
        }
        Run {
            name,
            counter: AtomicU32::new(0),
            _reaper: reaper,
        }
    }

    /// Processor time of everything that this run ever started in a place.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        cgroup::processor_time(&self.name.cgroup())
    }

    /// A name for one thing of this run, such as `3-client`.
    pub(crate) fn unique(&self, name: &str) -> String {
        format!("{}-{name}", self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// A name for a machine, which may be short only: it is a host's name.
    pub(crate) fn name_of_machine(&self) -> String {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        format!("reeve-{}-{number}", std::process::id())
    }

    /// A new cgroup.
    pub(crate) fn cgroup(&self, name: &str) -> Cgroup {
        Cgroup::new(&self.name.cgroup().join(self.unique(name)))
    }

    /// A new empty folder.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let folder = self.name.temporary().join(self.unique(name));
        // A daemon uses no certificate authority that others can read.
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .unwrap_or_else(|error| panic!("making {}: {error}", folder.display()));
        folder
    }

    /// A path in bpffs at which there is nothing yet.
    pub(crate) fn pins(&self, name: &str) -> PathBuf {
        self.name.bpffs().join(self.unique(name))
    }
}

/// A run's name: it holds the process's id and start time, as ids are used again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name(String);

impl Name {
    fn of_process(id: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The program's name, in parentheses, may hold anything; the start time is field 22.
        let start = stat.rsplit_once(") ")?.1.split(' ').nth(19)?;
        Some(Self(format!("{PREFIX}{id}-{start}")))
    }

    fn is_dead(&self) -> bool {
        let id = self
            .0
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse().ok());
        id.is_some_and(|id| Name::of_process(id).as_ref() != Some(self))
    }

    fn cgroup(&self) -> PathBuf {
        cgroup::mount().join(&self.0)
    }

    fn temporary(&self) -> PathBuf {
        std::env::temp_dir().join(&self.0)
    }

    fn bpffs(&self) -> PathBuf {
        Path::new(BPFFS).join(&self.0)
    }

    /// Removes everything of this run.
    fn sweep(&self) {
        // Processes first: they hold the rest.
        cgroup::remove(&self.cgroup());
        for folder in [self.bpffs(), self.temporary()] {
            if let Err(error) = fs::remove_dir_all(&folder)
                && error.kind() != io::ErrorKind::NotFound
            {
                eprintln!("removing {}: {error}", folder.display());
            }
        }
    }
}

/// What the reaper does: waits for the end of `until`, which the test process holds open, and
/// removes everything that the test process made.
///
/// # Errors
/// When the reaper cannot leave the test process's session and cgroup, in which it might die with it.
pub fn reap(run: &str, mut until: impl io::Read) -> io::Result<()> {
    nix::unistd::setsid()?;
    fs::write(cgroup::mount().join("cgroup.procs"), "0")?;
    io::copy(&mut until, &mut io::sink())?;
    Name(run.to_owned()).sweep();
    Ok(())
}

/// Removes what test processes left that were killed together with their reapers.
fn sweep_dead() {
    for folder in [cgroup::mount(), std::env::temp_dir(), PathBuf::from(BPFFS)] {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = Name(entry.file_name().to_string_lossy().into_owned());
            if name.0.starts_with(PREFIX) && name.is_dead() {
                name.sweep();
            }
        }
    }
}
