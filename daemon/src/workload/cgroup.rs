//! The node's cgroup2 tree: where it is mounted, ids and depths of cgroups, their processes.

mod members;
mod mount;
mod namespace;

pub use members::{Members, Processes};
pub use namespace::{ViewError, enter_host_view, require_process_numbers};

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use reeve_common::MAX_CGROUP_DEPTH;

/// Name of the cgroup that the daemon makes for itself where it would otherwise be judged.
pub const OWN_CGROUP: &str = "reeve.daemon";

/// Inode of the hierarchy's true root; a container's mount shows another.
const ROOT_INODE: u64 = 1;

/// Cgroups of one workload that are looked at; a workload with more is found by the first ones.
const MAX_CGROUPS: u32 = 4096;

/// The cgroup2 hierarchy as this process sees it.
#[derive(Clone, Debug)]
pub struct CgroupTree {
    mount: PathBuf,
    /// What of the hierarchy the mount shows.
    shows: PathBuf,
    root: PathBuf,
    /// Depth of the mount in the whole tree; none where it cannot be known from here.
    mount_depth: Option<u32>,
}

/// Why the tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup2 mount.
    #[error(
        "no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`, or in a container mount the host's"
    )]
    NotMounted,
    /// `/proc/self/mountinfo` cannot be read.
    #[error("/proc/self/mountinfo cannot be read")]
    MountInfo(#[source] io::Error),
    /// The configured root is not a cgroup.
    #[error("`node.cgroupRoot` {} is not a folder of the cgroup2 mount {}", .root.display(), .mount.display())]
    Root {
        /// What was configured.
        root: PathBuf,
        /// Where cgroup2 is mounted.
        mount: PathBuf,
    },
    /// Of the hierarchy, only a part is mounted that paths cannot be told in.
    #[error(
        "the cgroup2 mount {} shows {shows} of the hierarchy, which is not how the host sees it: in a container, mount the host's cgroup2 (as `/sys/fs/cgroup` of the host), and start it with the host's processes (`hostPID: true`, `--pid=host`)",
        .mount.display()
    )]
    Partial {
        /// Where cgroup2 is mounted.
        mount: PathBuf,
        /// What it shows.
        shows: String,
    },
    /// A cgroup that is to be enforced lies where no program is attached.
    #[error(
        "{whose}: the cgroup {path} is not below {root}, where the programs are attached (`node.cgroupRoot`): nothing would be enforced there; choose a `node.cgroupRoot` above it, paths of cgroups start at the cgroup2 mount"
    )]
    Outside {
        /// Whose cgroup it is.
        whose: String,
        /// Its path.
        path: String,
        /// Path of the cgroup root.
        root: String,
    },
    /// The daemon's own cgroup cannot be found.
    #[error("the daemon's own cgroup cannot be found: {reason}")]
    Own {
        /// What went wrong.
        reason: String,
    },
    /// The daemon cannot be moved.
    #[error("the daemon cannot move itself into the cgroup {}", .to.display())]
    Move {
        /// Where it should go.
        to: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
}

// === impl CgroupTree ===

impl CgroupTree {
    /// Finds the cgroup2 mount. `root` is the folder at which programs are attached, the mount
    /// itself where none is given.
    ///
    /// # Errors
    /// When there is no cgroup2 mount, or `root` is not in it.
    pub fn open(root: Option<&Path>) -> Result<Self, CgroupError> {
        let mountinfo =
            fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::MountInfo)?;
        let mounts = mount::of(&mountinfo);
        let Some(mount) = mount::choose(mounts.clone(), root) else {
            return Err(match (mount::choose(mounts, None), root) {
                (Some(mount), Some(root)) => CgroupError::Root {
                    root: root.to_owned(),
                    mount: mount.point,
                },
                _ => CgroupError::NotMounted,
            });
        };
        let root = root.map_or_else(|| mount.point.clone(), Path::to_path_buf);
        if id(&root).is_err() {
            return Err(CgroupError::Root {
                root,
                mount: mount.point,
            });
        }
        let shows_all = matches!(id(&mount.point), Ok(ROOT_INODE));
        // A container's own cgroup, and nobody else's.
        let is_own = own_path().is_ok_and(|own| own == mount.shows && own != "/");
        if mount.is_outside() || (is_own && !shows_all) {
            return Err(CgroupError::Partial {
                mount: mount.point,
                shows: mount.shows,
            });
        }
        Ok(Self {
            mount_depth: if shows_all { Some(0) } else { mount.depth() },
            shows: mount.shows.into(),
            mount: mount.point,
            root,
        })
    }

    /// Makes sure that programs are attached above a cgroup.
    ///
    /// # Errors
    /// When the cgroup is not below the root: nothing would be enforced there.
    pub fn require_below_root(&self, whose: &str, path: &str) -> Result<(), CgroupError> {
        let folder = self.folder(path);
        if folder.starts_with(&self.root) && folder != self.root {
            return Ok(());
        }
        Err(CgroupError::Outside {
            whose: whose.to_owned(),
            path: path.to_owned(),
            root: self.path(&self.root),
        })
    }

    /// Where cgroup2 is mounted.
    #[must_use]
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The folder at which programs are attached.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of a cgroup path, which starts with a slash and counts from the mount.
    #[must_use]
    pub fn folder(&self, path: &str) -> PathBuf {
        self.mount.join(path.trim_start_matches('/'))
    }

    /// Cgroup path of a folder, with a leading slash.
    #[must_use]
    pub fn path(&self, folder: &Path) -> String {
        let below = folder.strip_prefix(&self.mount).unwrap_or(folder);
        format!("/{}", below.display())
    }

    /// Depths in the whole tree that the folder may have: one, or all that are possible where
    /// the mount hides what is above it. Empty when it lies too deep to be enrolled.
    #[must_use]
    pub fn depths(&self, folder: &Path) -> Vec<u32> {
        let below = folder.strip_prefix(&self.mount).map_or(0, |below| {
            u32::try_from(below.components().count()).unwrap_or(u32::MAX)
        });
        let (first, last) = match self.mount_depth {
            Some(above) => {
                let depth = above.saturating_add(below);
                (depth, depth)
            }
            None => (below, MAX_CGROUP_DEPTH),
        };
        (first..=last)
            .filter(|depth| *depth <= MAX_CGROUP_DEPTH)
            .collect()
    }

    /// Folders below the root whose name is that of a systemd unit, or of an instance where `name`
    /// is a template's (`web@.service`), and the folders that were searched.
    ///
    /// Only slices are searched: systemd itself makes units in slices alone, while what is below
    /// a service or a scope may have been delegated to somebody who is free to choose names.
    #[must_use]
    pub fn units(&self, name: &str) -> (Vec<PathBuf>, Vec<PathBuf>) {
        Self::units_below(&self.root, name)
    }

    /// Cgroup path of a unit of that name that is not below the root, where the root is not all.
    #[must_use]
    pub fn unit_outside(&self, name: &str) -> Option<String> {
        if self.root == self.mount {
            return None;
        }
        let found = Self::units_below(&self.mount, name).0;
        found.first().map(|folder| self.path(folder))
    }

    fn units_below(root: &Path, name: &str) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut found, mut searched) = (Vec::new(), Vec::new());
        let mut waiting = vec![root.to_owned()];
        while let Some(folder) = waiting.pop() {
            for child in children(&folder) {
                let Some(child_name) = child.file_name().and_then(|name| name.to_str()) else {
                    continue;
                };
                if is_unit(child_name, name) {
                    found.push(child);
                } else if child_name.ends_with(".slice") {
                    waiting.push(child);
                }
            }
            searched.push(folder);
        }
        found.sort();
        (found, searched)
    }

    /// What holds for each cgroup below the root: the value of the nearest of its ancestors, itself
    /// among them, that has one in `known`. Reads the tree.
    #[must_use]
    pub fn nearest<T: Copy>(&self, known: &HashMap<u64, T>) -> HashMap<u64, T> {
        let mut found = known.clone();
        let mut waiting = vec![(self.root.clone(), None)];
        while let Some((folder, inherited)) = waiting.pop() {
            let Ok(metadata) = fs::metadata(&folder) else {
                continue;
            };
            let value = known.get(&metadata.ino()).copied().or(inherited);
            if let Some(value) = value {
                found.insert(metadata.ino(), value);
            }
            waiting.extend(children(&folder).into_iter().map(|child| (child, value)));
        }
        found
    }

    /// Cgroup path of the cgroup with this id, if it is below the root. Reads the tree.
    #[must_use]
    pub fn find(&self, wanted: u64) -> Option<String> {
        let mut waiting = vec![self.root.clone()];
        while let Some(folder) = waiting.pop() {
            if id(&folder).is_ok_and(|id| id == wanted) {
                return Some(self.path(&folder));
            }
            waiting.extend(children(&folder));
        }
        None
    }

    /// The folder of the cgroup that this process is in.
    ///
    /// # Errors
    /// When the kernel does not say, it lies outside the mount, or the folder is another cgroup's,
    /// as where this process sees other paths than the mount has.
    pub fn own(&self) -> Result<PathBuf, CgroupError> {
        let error = |reason: String| CgroupError::Own { reason };
        let path = own_path().map_err(|source| error(format!("/proc/self/cgroup: {source}")))?;
        let below = Path::new(&path)
            .strip_prefix(&self.shows)
            .ok()
            .filter(|below| !below.components().any(|part| part == Component::ParentDir))
            .ok_or_else(|| {
                error(format!(
                    "it is {path}, outside of what the cgroup2 mount {} shows ({}); run reeve in \
                     the host's cgroup namespace",
                    self.mount.display(),
                    self.shows.display()
                ))
            })?;
        let folder = self.mount.join(below);
        let members = fs::read_to_string(folder.join("cgroup.procs"))
            .map_err(|source| error(format!("{}: {source}", folder.display())))?;
        let own = std::process::id().to_string();
        if members.lines().any(|process| process == own) {
            return Ok(folder);
        }
        Err(error(format!(
            "/proc/self/cgroup says {path}, and reeve is not in {}: it has a cgroup namespace of \
             its own, as containers have; start it with the host's processes (`hostPID: true`, \
             `--pid=host`), so that it can enter the host's",
            folder.display()
        )))
    }

    /// Moves this process into a cgroup of its own, [`OWN_CGROUP`] below the root.
    ///
    /// # Errors
    /// When it cannot be made or entered.
    pub fn move_self(&self) -> Result<PathBuf, CgroupError> {
        let to = self.root.join(OWN_CGROUP);
        let moved = match fs::create_dir(&to) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::write(to.join("cgroup.procs"), "0"),
        };
        match moved {
            Ok(()) => Ok(to),
            Err(source) => Err(CgroupError::Move { to, source }),
        }
    }
}

/// Id of a cgroup: the inode of its folder.
///
/// # Errors
/// When there is no such folder, or it is not a cgroup.
pub fn id(folder: &Path) -> io::Result<u64> {
    let metadata = fs::metadata(folder)?;
    if !metadata.is_dir() || !folder.join("cgroup.procs").exists() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a folder of a cgroup2 mount",
        ));
    }
    Ok(metadata.ino())
}

/// Processes of a cgroup and of all below it. What goes away while it is read is left out.
#[must_use]
pub fn processes(folder: &Path) -> Vec<u32> {
    members::walk(folder).0.numbers
}

/// Path of this process's cgroup, from the root of its cgroup namespace.
fn own_path() -> io::Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(str::to_owned)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no line for cgroup2"))
}

/// Whether `unit` is the unit `name`, or an instance of the template `name`.
fn is_unit(unit: &str, name: &str) -> bool {
    let is_instance = |(template, kind): (&str, &str)| {
        let instance = unit.strip_prefix(template)?.strip_prefix('@')?;
        let instance = instance.strip_suffix(kind)?.strip_suffix('.')?;
        Some(!instance.is_empty())
    };
    unit == name || name.split_once("@.").and_then(is_instance) == Some(true)
}

/// Folders of a folder.
fn children(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_means_its_instances_and_nothing_else() {
        for instance in ["web@1.service", "web@a-b.service", r"web@x\x2dy.service"] {
            assert!(is_unit(instance, "web@.service"), "{instance}");
        }
        for other in [
            "web@.service",
            "web.service",
            "web@1.socket",
            "web2@1.service",
            "my-web@1.service",
            "web@1service",
        ] {
            assert!(
                !is_unit(other, "web@.service") || other == "web@.service",
                "{other}"
            );
        }
        assert!(is_unit("web@1.service", "web@1.service"));
        assert!(!is_unit("web@2.service", "web@1.service"));
    }

    #[test]
    fn where_the_depth_is_hidden_every_possible_one_counts() {
        let mut tree = CgroupTree {
            mount: "/cg".into(),
            shows: "/".into(),
            root: "/cg".into(),
            mount_depth: Some(2),
        };
        assert_eq!(tree.depths(Path::new("/cg/a/b")), [4]);
        tree.mount_depth = None;
        assert_eq!(tree.depths(Path::new("/cg/a/b")).first(), Some(&2));
        assert_eq!(
            tree.depths(Path::new("/cg/a/b")).last(),
            Some(&MAX_CGROUP_DEPTH)
        );
        tree.mount_depth = Some(MAX_CGROUP_DEPTH);
        assert!(tree.depths(Path::new("/cg/a")).is_empty());
    }
}
