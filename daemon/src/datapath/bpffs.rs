//! The bpf file system, in which programs and maps outlive the daemon.

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::Error;

/// Makes `folder` on a bpf file system, and mounts one on its parent where there is none.
pub(super) fn prepare(folder: &Path) -> Result<(), Error> {
    let parent = folder.parent().unwrap_or(Path::new("/"));
    if !folder.exists() {
        if !is_bpffs(parent) {
            mount_at(parent).map_err(|source| Error::Bpffs {
                path: parent.to_owned(),
                source,
            })?;
        }
        DirBuilder::new()
            .mode(0o700)
            .create(folder)
            .map_err(|source| Error::Pin {
                doing: "make the folder",
                path: folder.to_owned(),
                source,
            })?;
    }
    if is_bpffs(folder) {
        return Ok(());
    }
    Err(Error::Bpffs {
        path: folder.to_owned(),
        source: io::Error::other("a folder of another file system is in the way"),
    })
}

fn is_bpffs(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|info| info.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_at(folder: &Path) -> io::Result<()> {
    // Two daemons that start together would mount one file system over the other's.
    let lock = Flock::lock(File::open(folder)?, FlockArg::LockExclusive)
        .map_err(|(_, error)| io::Error::from(error))?;
    if is_bpffs(folder) {
        return Ok(());
    }
    let mounted = mount(
        Some("bpf"),
        folder,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=700"),
    );
    drop(lock);
    mounted.map_err(io::Error::from)
}
