//! A container's view is not the host's: the cgroup namespace and the process numbers that the
//! daemon needs, and how it gets them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

/// Of the process whose view counts: a container with the host's process numbers sees the host's
/// first process there.
const FIRST: &str = "/proc/1/ns/cgroup";
/// Of a thread of the kernel's, which is in the machine's first namespaces: it stands in for a first
/// process that lets nobody look at it.
const KERNEL: &str = "/proc/2/ns/cgroup";
const OWN: &str = "/proc/self/ns/cgroup";

/// Inode of the machine's first cgroup namespace (`CGROUP_NS_INIT_INO` of `linux/nsfs.h`).
const INITIAL: u64 = 0xEFFF_FFFB;

/// Why the host cannot be seen as it is.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The process has a cgroup namespace of its own, as containers have, and cannot leave it.
    #[error(
        "reeve has a cgroup namespace of its own, as containers have, and cannot enter that of process 1: in it, paths of cgroups are not the host's; in a container it needs the host's processes (`hostPID: true`, `--pid=host`), CAP_SYS_ADMIN and CAP_SYS_PTRACE; in a systemd unit, no `ProtectControlGroups=private`"
    )]
    CgroupNamespace(#[source] io::Error),
    /// The daemon has process numbers of its own.
    #[error(
        "reeve has process numbers of its own, as containers have, and not those of {} (`node.proc`): it cannot see workloads' processes; start it with the host's processes (`hostPID: true`, `--pid=host`)",
        .proc.display()
    )]
    ProcessNumbers {
        /// `node.proc`.
        proc: PathBuf,
    },
}

/// Has this process see the paths of cgroups as process 1 does. True where it had another view. To
/// be called before there is a second thread, and before mounts and cgroups are looked at.
///
/// # Errors
/// When the namespace of process 1 is another one, or may be, and cannot be entered.
pub fn enter_host_view() -> Result<bool, ViewError> {
    let own = match inode(OWN) {
        Ok(own) => own,
        // A kernel without cgroup namespaces has one view for all.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ViewError::CgroupNamespace(error)),
    };
    let (host, path) = match (inode(FIRST), inode(KERNEL)) {
        (Ok(first), _) => (first, FIRST),
        (Err(_), Ok(INITIAL)) => (INITIAL, KERNEL),
        // This is what the kernel's threads are in.
        (Err(_), _) if own == INITIAL => return Ok(false),
        (Err(error), _) => return Err(ViewError::CgroupNamespace(error)),
    };
    if host == own {
        return Ok(false);
    }
    let host = File::open(path).map_err(ViewError::CgroupNamespace)?;
    setns(host, CloneFlags::CLONE_NEWCGROUP)
        .map_err(|error| ViewError::CgroupNamespace(error.into()))?;
    Ok(true)
}

/// Makes sure that `proc`, which is the host's where a container has another, tells of processes by
/// the numbers that they have for this process: where it does not, no process of a workload is seen.
///
/// # Errors
/// When they are others'.
pub fn require_process_numbers(proc: &Path) -> Result<(), ViewError> {
    // This process, by the numbers of that mount; none where it has no number there.
    let there = fs::read_link(proc.join("self"));
    if there.is_ok_and(|there| there == Path::new(&std::process::id().to_string())) {
        return Ok(());
    }
    Err(ViewError::ProcessNumbers {
        proc: proc.to_owned(),
    })
}

fn inode(path: impl AsRef<Path>) -> io::Result<u64> {
    Ok(fs::metadata(path)?.ino())
}
