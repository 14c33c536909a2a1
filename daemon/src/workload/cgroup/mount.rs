//! Mounts of the cgroup2 hierarchy, as `/proc/self/mountinfo` tells of them.

use std::path::{Path, PathBuf};

/// One mount of the hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Where it is.
    pub(super) point: PathBuf,
    /// What of the hierarchy it shows, as a path from the root of this process's cgroup namespace.
    pub(super) shows: String,
}

/// The mounts of a mountinfo file, without those that others lie on top of.
pub(super) fn of(mountinfo: &str) -> Vec<Mount> {
    let mut found: Vec<Mount> = Vec::new();
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else {
            continue;
        };
        let mut fields = mount.split(' ').skip(3);
        let (Some(shows), Some(point)) = (fields.next(), fields.next()) else {
            continue;
        };
        let point = PathBuf::from(unescape(point));
        // What is mounted later hides what was there, whatever it is.
        found.retain(|before| !before.point.starts_with(&point));
        if filesystem.split(' ').next() == Some("cgroup2") {
            let shows = unescape(shows);
            found.push(Mount { point, shows });
        }
    }
    found
}

/// The mount that `root` is in; without one, the one that shows most.
pub(super) fn choose(mounts: Vec<Mount>, root: Option<&Path>) -> Option<Mount> {
    let parts = |path: &Path| path.components().count();
    match root {
        Some(root) => mounts
            .into_iter()
            .filter(|mount| root.starts_with(&mount.point))
            .max_by_key(|mount| parts(&mount.point)),
        // Of equals the first.
        None => mounts.into_iter().min_by_key(|mount| {
            let is_outside = mount.is_outside();
            (is_outside, parts(Path::new(&mount.shows)))
        }),
    }
}

// === impl Mount ===

impl Mount {
    /// Whether it shows what lies outside of this process's cgroup namespace, so that a path in it
    /// is not the path that others know.
    pub(super) fn is_outside(&self) -> bool {
        self.shows.split('/').any(|part| part == "..")
    }

    /// How deep it lies in the tree. `/` says nothing here: it is what a cgroup namespace shows in
    /// place of the path above it.
    pub(super) fn depth(&self) -> Option<u32> {
        if self.shows == "/" || self.is_outside() {
            return None;
        }
        let parts = self.shows.split('/').filter(|part| !part.is_empty());
        u32::try_from(parts.count()).ok()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn only(mountinfo: &str) -> Mount {
        choose(of(mountinfo), None).unwrap()
    }

    #[test]
    fn the_mount_is_found_in_both_layouts() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let mount = only(hybrid);
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(mount.shows, "/");
        let unified = "30 23 0:26 /docker/abc /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n";
        let mount = only(unified);
        assert_eq!(mount.point, Path::new("/sys/fs/c group"));
        assert_eq!(mount.depth(), Some(2));
        assert_eq!(of("no mounts at all"), []);
    }

    #[test]
    fn a_mount_that_another_hides_is_none() {
        let own = "30 23 0:26 /../.. /sys/fs/cgroup ro - cgroup2 cgroup ro\n";
        let host = "31 30 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(only(&format!("{own}{host}")).shows, "/");
        let hidden = "31 30 0:40 / /sys/fs rw - tmpfs tmpfs rw\n";
        assert_eq!(of(&format!("{own}{hidden}")), []);
    }

    #[test]
    fn of_several_mounts_the_one_that_shows_most_or_holds_the_root_is_taken() {
        let mounts = of(
            "30 23 0:26 /kubepods/pod1/abc /sys/fs/cgroup ro - cgroup2 cgroup ro\n\
             31 23 0:26 / /host/cgroup rw - cgroup2 cgroup2 rw\n",
        );
        let taken = |root| choose(mounts.clone(), root).unwrap().point;
        assert_eq!(taken(None), Path::new("/host/cgroup"));
        let root = Path::new("/sys/fs/cgroup/web");
        assert_eq!(taken(Some(root)), Path::new("/sys/fs/cgroup"));
        assert_eq!(choose(mounts, Some(Path::new("/elsewhere"))), None);
    }
}
