//! The bpf file system, in which programs and maps outlive the daemon.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
    sync::OnceLock,
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::Error;

/// Makes `folder` on a bpf file system, and mounts one on its parent where there is none.
pub(super) fn prepare(folder: &Path) -> Result<(), Error> {
    let own_mounts = has_own_mounts();
    let parent = folder.parent().unwrap_or(Path::new("/"));
    if !folder.exists() {
        if !is_bpffs(parent) {
            mount_at(parent, own_mounts).map_err(|source| Error::Bpffs {
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

/// Whether this process has other mounts than the first one, as services and containers have. Found
/// out once: later the daemon has not the privilege to look.
fn has_own_mounts() -> bool {
    static OWN: OnceLock<bool> = OnceLock::new();
    let mounts = |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt"));
    *OWN.get_or_init(|| match (mounts("self"), mounts("1")) {
        (Ok(own), Ok(first)) => own.ino() != first.ino(),
        // Not root of all: whoever runs reeve so is trusted to have looked.
        _ => false,
    })
}

fn is_bpffs(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|info| info.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_at(folder: &Path, own_mounts: bool) -> io::Result<()> {
    // Two daemons that start together would mount one file system over the other's.
    let lock = Flock::lock(File::open(folder)?, FlockArg::LockExclusive)
        .map_err(|(_, error)| io::Error::from(error))?;
    if is_bpffs(folder) {
        return Ok(());
    }
    if own_mounts {
        return Err(io::Error::other(
            "what is mounted here ends with the daemon, and with it all that is enforced: mount it \
             on the host, and let the service or the container see it",
        ));
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
