//! What the machine must offer to run reeve: each failure says what lacks and what to do.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use nix::{mount::MsFlags, unistd::Uid};

use super::say;

/// The oldest kernel on which reeve is tested, see `cargo xtask kernels`.
const KERNEL: (u32, u32) = (6, 1);

const BPFFS: &str = "/sys/fs/bpf";
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Capabilities by their number in `capability.h`.
const CAPABILITIES: [(u32, &str); 5] = [
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (39, "CAP_BPF"),
];

/// Looks at everything before it complains, so that one run tells the whole story.
pub(super) fn ensure() -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(
            "reeve loads kernel programs and makes network namespaces, which only root may: run this \
             as root, for example with `sudo -E env PATH=\"$PATH\" cargo xtask …`"
        );
    }
    let mut lacking = Vec::new();
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
    if version(&release).is_none_or(|found| found < KERNEL) {
        lacking.push(format!(
            "the kernel is {}, and reeve is tested on {}.{} and later: upgrade it",
            release.trim(),
            KERNEL.0,
            KERNEL.1
        ));
    }
    let held = effective_capabilities()?;
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| held & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        lacking.push(format!(
            "this root lacks {}: run outside of the container, or give the container these capabilities",
            missing.join(", ")
        ));
    }
    if !Path::new(BTF).exists() {
        lacking.push(format!(
            "{BTF} is absent: use a kernel built with CONFIG_DEBUG_INFO_BTF=y"
        ));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    if mount_point(&mounts, "cgroup2").is_none() {
        lacking.push(
            "no cgroup2 hierarchy is mounted: `mkdir -p /sys/fs/cgroup/unified && \
             mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`"
                .to_owned(),
        );
    }
    if mount_point(&mounts, "bpf").is_none() {
        say(&format!("mounting the BPF file system at {BPFFS}"));
        if let Err(error) = nix::mount::mount(
            Some("bpf"),
            BPFFS,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        ) {
            lacking.push(format!(
                "the BPF file system cannot be mounted at {BPFFS}: {error}"
            ));
        }
    }
    if !lacking.is_empty() {
        bail!(
            "this machine cannot run reeve:\n  - {}",
            lacking.join("\n  - ")
        );
    }
    Ok(())
}

/// Major and minor number of a kernel release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn effective_capabilities() -> Result<u64> {
    let status =
        fs::read_to_string("/proc/self/status").context("reading this process's status")?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .context("/proc/self/status has no CapEff")?;
    u64::from_str_radix(mask.trim(), 16).context("reading CapEff")
}

/// Where the first file system of this type is mounted, from the text of `mountinfo`.
fn mount_point<'a>(mountinfo: &'a str, kind: &str) -> Option<&'a str> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == kind).then(|| before.split(' ').nth(4))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_release_is_compared_by_number() {
        assert_eq!(version("6.18.44-fc-v669\n"), Some((6, 18)));
        assert_eq!(version("5.4.0+"), Some((5, 4)));
        assert_eq!(version("nonsense"), None);
    }

    #[test]
    fn mounts_are_found_by_type() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            mount_point(mounts, "cgroup2"),
            Some("/sys/fs/cgroup/unified")
        );
        assert_eq!(mount_point(mounts, "bpf"), None);
    }
}
