//! Cgroups of the cgroup2 hierarchy.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use crate::run::Run;

/// For killed processes to leave a cgroup.
const DEATH: Duration = Duration::from_secs(10);

/// Where the cgroup2 hierarchy is mounted: `/sys/fs/cgroup`, or elsewhere beside cgroup v1.
pub(crate) fn mount() -> PathBuf {
    static MOUNT: OnceLock<PathBuf> = OnceLock::new();
    MOUNT
        .get_or_init(|| {
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("reading the mounts");
            mounts
                .lines()
                .filter_map(|line| line.split_once(" - "))
                .find(|(_, after)| after.starts_with("cgroup2 "))
                .and_then(|(before, _)| before.split(' ').nth(4))
                .map(PathBuf::from)
                .expect("no cgroup2 hierarchy is mounted: `cargo xtask setup` says what to do")
        })
        .clone()
}

/// A cgroup; dropping it kills what runs inside.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(crate) fn new(path: &Path) -> Self {
        fs::create_dir(path)
            .unwrap_or_else(|error| panic!("making the cgroup {}: {error}", path.display()));
        Self {
            path: path.to_owned(),
        }
    }

    /// A cgroup at this path, whose parent is there already.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self::new(path)
    }

    /// A cgroup below no node's.
    #[must_use]
    pub fn outside(name: &str) -> Self {
        Run::this().cgroup(name)
    }

    /// A cgroup below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Cgroup {
        Cgroup::new(&self.path.join(name))
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path below the cgroup2 mount, with a leading slash.
    #[must_use]
    pub fn below_mount(&self) -> String {
        let below = self
            .path
            .strip_prefix(mount())
            .expect("cgroups are made below the mount");
        format!("/{}", below.display())
    }

    /// The number by which the kernel knows it.
    #[must_use]
    pub fn id(&self) -> u64 {
        fs::metadata(&self.path).expect("the cgroup exists").ino()
    }

    /// Processor time of everything that ever ran inside and below.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        processor_time(&self.path)
    }

    /// Kills everything inside and below, and waits until it is gone.
    pub fn kill(&self) {
        kill(&self.path);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

pub(crate) fn processor_time(path: &Path) -> Duration {
    let stat = fs::read_to_string(path.join("cpu.stat")).expect("reading processor time");
    let usage = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    Duration::from_micros(usage.expect("every cgroup counts its processor time"))
}

fn kill(path: &Path) {
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        return;
    }
    let deadline = Instant::now() + DEATH;
    while Instant::now() < deadline {
        match fs::read_to_string(path.join("cgroup.events")) {
            Ok(events) if events.contains("populated 1") => thread::sleep(Duration::from_millis(2)),
            _ => return,
        }
    }
    eprintln!("processes in {} do not die", path.display());
}

/// Kills what runs in a cgroup and below, and removes them all. Does nothing where there is none.
pub(crate) fn remove(path: &Path) {
    if !path.exists() {
        return;
    }
    kill(path);
    if let Err(error) = remove_tree(path) {
        eprintln!("removing the cgroup {}: {error}", path.display());
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    // A dead process leaves its cgroup a moment after `populated` has changed.
    let deadline = Instant::now() + DEATH;
    loop {
        match fs::remove_dir(path) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
}
