//! The node's cgroup2 tree: where it is mounted, ids and depths of cgroups, their processes.

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
const MAX_CGROUPS: usize = 4096;

/// The cgroup2 hierarchy as this process sees it.
#[derive(Clone, Debug)]
pub struct CgroupTree {
    mount: PathBuf,
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
        let (mount, shown_root) = cgroup2_mount(&mountinfo).ok_or(CgroupError::NotMounted)?;
        let root = root.map_or_else(|| mount.clone(), Path::to_path_buf);
        if !root.starts_with(&mount) || id(&root).is_err() {
            return Err(CgroupError::Root { root, mount });
        }
        let mount_depth = match id(&mount) {
            Ok(ROOT_INODE) => Some(0),
            _ => depth_of_shown_root(&shown_root),
        };
        Ok(Self {
            mount,
            root,
            mount_depth,
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
        let (mut found, mut searched) = (Vec::new(), Vec::new());
        let mut waiting = vec![self.root.clone()];
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
    /// When the kernel does not say, or it lies outside the mount.
    pub fn own(&self) -> Result<PathBuf, CgroupError> {
        let error = |reason: String| CgroupError::Own { reason };
        let text = fs::read_to_string("/proc/self/cgroup")
            .map_err(|source| error(format!("/proc/self/cgroup: {source}")))?;
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .ok_or_else(|| error("/proc/self/cgroup has no line for cgroup2".to_owned()))?;
        if Path::new(path)
            .components()
            .any(|part| part == Component::ParentDir)
        {
            return Err(error(format!(
                "it is {path}, outside the cgroup namespace; run reeve in the host's cgroup namespace"
            )));
        }
        Ok(self.folder(path))
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
    let mut pids: Vec<u32> = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    let mut seen = 0;
    while let Some(folder) = waiting.pop() {
        if let Ok(text) = fs::read_to_string(folder.join("cgroup.procs")) {
            // 0 is a process that this pid namespace cannot see.
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse::<u32>().ok())
                    .filter(|pid| *pid != 0),
            );
        }
        seen += 1;
        if seen >= MAX_CGROUPS {
            break;
        }
        waiting.extend(children(&folder));
    }
    pids
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

/// Mount point of the first cgroup2 mount in the text of a mountinfo file, and what of the
/// hierarchy is mounted there.
fn cgroup2_mount(mountinfo: &str) -> Option<(PathBuf, String)> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let shown_root = unescape(fields.next()?);
        let mount_point = unescape(fields.next()?);
        Some((mount_point.into(), shown_root))
    })
}

/// mountinfo writes blanks and backslashes as octal numbers.
fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .into_iter()
    .fold(field.to_owned(), |text, (code, plain)| {
        text.replace(code, plain)
    })
}

/// Depth of a mount that shows a part of the tree. `/` alone says nothing here: it is what a
/// cgroup namespace shows in place of the path above it.
fn depth_of_shown_root(shown_root: &str) -> Option<u32> {
    if shown_root == "/" || shown_root.contains("..") {
        return None;
    }
    u32::try_from(
        shown_root
            .split('/')
            .filter(|part| !part.is_empty())
            .count(),
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_mount_is_found_in_both_layouts() {
        let (mount, root) = cgroup2_mount(HYBRID).unwrap();
        assert_eq!(mount, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(root, "/");
        let unified = "30 23 0:26 /docker/abc /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n";
        let (mount, root) = cgroup2_mount(unified).unwrap();
        assert_eq!(mount, Path::new("/sys/fs/c group"));
        assert_eq!(depth_of_shown_root(&root), Some(2));
        assert_eq!(cgroup2_mount("no mounts at all"), None);
    }

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
