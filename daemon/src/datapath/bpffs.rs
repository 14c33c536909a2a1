//! The bpf file system, in which programs and maps outlive the daemon.

use std::{
    fs::{self, DirBuilder, File, Metadata},
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

/// Mode of the folder of pins.
const FOLDER_MODE: u32 = 0o700;
/// Bits of a mode that let a group or everybody write.
const OTHERS_WRITE: u32 = 0o022;
/// In a folder with this bit, others rename and remove only what is their own.
const STICKY: u32 = 0o1000;

/// Makes `folder` on a bpf file system, and mounts one on its parent where there is none and the
/// parent is empty. Refuses a folder that is not root's alone.
pub(super) fn prepare(folder: &Path) -> Result<(), Error> {
    let own_mounts = has_own_mounts();
    let parent = folder.parent().unwrap_or(Path::new("/"));
    // A symbolic link that leads nowhere is there as well, and is refused below.
    if fs::symlink_metadata(folder).is_err() {
        if !is_bpffs(parent) {
            mount_at(parent, own_mounts).map_err(|source| Error::Bpffs {
                path: parent.to_owned(),
                source,
            })?;
        }
        DirBuilder::new()
            .mode(FOLDER_MODE)
            .create(folder)
            .map_err(|source| Error::Pin {
                doing: "make the folder",
                path: folder.to_owned(),
                source,
            })?;
    }
    verify(folder)?;
    if is_bpffs(folder) {
        return Ok(());
    }
    Err(Error::Bpffs {
        path: folder.to_owned(),
        source: io::Error::other("a folder of another file system is in the way"),
    })
}

/// Makes sure that nobody but root can change what is in `folder`, or put another folder in its
/// place. A bpf file system may be everybody's to write, as `mount -t bpf` makes it.
///
/// # Errors
///
/// [`Error::NotRoots`] where that is not so, for the folder or for one above it.
pub(super) fn verify(folder: &Path) -> Result<(), Error> {
    let refused = |path: &Path, why: String| Error::NotRoots {
        path: path.to_owned(),
        why,
    };
    let look = |path: &Path| -> Result<Metadata, Error> {
        let metadata = fs::symlink_metadata(path).map_err(|source| Error::Pin {
            doing: "look at the folder",
            path: path.to_owned(),
            source,
        })?;
        is_roots(&metadata).map_err(|why| refused(path, why))?;
        Ok(metadata)
    };
    let metadata = look(folder)?;
    if !metadata.is_dir() {
        return Err(refused(folder, "it is no folder".to_owned()));
    }
    let mode = metadata.mode();
    if mode & OTHERS_WRITE != 0 {
        return Err(refused(folder, others_may_write(mode)));
    }
    let parent = folder.parent().unwrap_or(Path::new("/"));
    let parent = fs::canonicalize(parent).map_err(|source| Error::Pin {
        doing: "look at the folder",
        path: parent.to_owned(),
        source,
    })?;
    for above in parent.ancestors() {
        let mode = look(above)?.mode();
        if mode & OTHERS_WRITE != 0 && mode & STICKY == 0 {
            return Err(refused(above, others_may_write(mode)));
        }
    }
    Ok(())
}

/// Makes sure that a pin is root's.
///
/// # Errors
///
/// [`Error::NotRoots`] where it is not, or [`Error::Pin`] where it cannot be looked at.
pub(super) fn verify_pin(pin: &Path) -> Result<(), Error> {
    let metadata = fs::symlink_metadata(pin).map_err(|source| Error::Pin {
        doing: "look at",
        path: pin.to_owned(),
        source,
    })?;
    let regular = match metadata.is_file() {
        true => Ok(()),
        false => Err("it is no pin".to_owned()),
    };
    regular
        .and_then(|()| is_roots(&metadata))
        .map_err(|why| Error::NotRoots {
            path: pin.to_owned(),
            why,
        })
}

/// Whether its owner is root, or who runs reeve.
fn is_roots(metadata: &Metadata) -> Result<(), String> {
    let owner = metadata.uid();
    if owner == 0 || owner == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    Err(format!("its owner is the user {owner}"))
}

fn others_may_write(mode: u32) -> String {
    format!("its mode {:04o} lets others write in it", mode & 0o7777)
}

/// Inode of the machine's first PID namespace (`PID_NS_INIT_INO` of `linux/nsfs.h`).
const FIRST_PROCESS_NUMBERS: u64 = 0xEFFF_FFFC;

/// Whether this process has other mounts than the machine's first one, as services and containers
/// have. Found out once: later the daemon has not the privilege to look.
fn has_own_mounts() -> bool {
    static OWN: OnceLock<bool> = OnceLock::new();
    let inode = |process: &str, kind: &str| {
        fs::metadata(format!("/proc/{process}/ns/{kind}")).map(|file| file.ino())
    };
    // In a container with process numbers of its own, the first process is the container's.
    if inode("self", "pid").is_ok_and(|own| own != FIRST_PROCESS_NUMBERS) {
        return true;
    }
    *OWN.get_or_init(|| match (inode("self", "mnt"), inode("1", "mnt")) {
        (Ok(own), Ok(first)) => own != first,
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
    // Whatever is in a folder is hidden by what is mounted there.
    if let Some(entry) = fs::read_dir(folder)?.next() {
        let name = entry?.file_name();
        return Err(io::Error::other(format!(
            "it is not empty (it has {}), and a mount would hide what is in it",
            name.display()
        )));
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

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_bpffs_is_mounted_over_an_empty_folder_only() {
        let folder = tempfile::tempdir().unwrap();
        let (full, empty) = (folder.path().join("full"), folder.path().join("empty"));
        fs::create_dir(&full).unwrap();
        fs::create_dir(&empty).unwrap();
        fs::write(full.join("kept"), "here").unwrap();
        // Mounts of a thread of its own, which nobody else sees.
        let mounting = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let refused = mount_at(&full, false).unwrap_err().to_string();
            assert!(
                refused.contains("it is not empty (it has kept)"),
                "{refused}"
            );
            assert_eq!(fs::read_to_string(full.join("kept")).unwrap(), "here");
            mount_at(&empty, false).unwrap();
            assert!(is_bpffs(&empty));
        });
        mounting.join().unwrap();
    }
}
