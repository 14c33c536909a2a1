//! The guests' disks: a small Debian with systemd, and what is tried there.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{Kernel, debian::Booted};
use crate::{
    run,
    setup::{self, Mirror},
};

/// What the tests run beside systemd.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,iptables,nftables,kmod,procps,curl,nginx-light,openssl,tcpdump,iputils-ping";

/// Raised when [`PACKAGES`] or what is changed below is other than it was.
const EDITION: u32 = 1;

/// Units that only take time.
const NEEDLESS: [&str; 8] = [
    "nginx.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
];

/// Runs `run.sh` of the payload.
const UNIT: &str = "[Unit]\nDescription=runs what is on the second disk\n\
    After=multi-user.target\n\
    [Service]\nType=exec\nExecStart=/bin/bash /mnt/run.sh\nStandardOutput=file:/dev/ttyS1\n\
    StandardError=inherit\nSlice=kernels.slice\nDelegate=yes\nTimeoutStopSec=1\n\
    [Install]\nWantedBy=multi-user.target\n";

/// The root disk of a release; made once.
pub(super) fn root(kernel: &Kernel, folder: &Path) -> Result<PathBuf> {
    let disk = folder.join(format!("{}-{EDITION}.ext4", kernel.release));
    if disk.exists() {
        return Ok(disk);
    }
    setup::say(&format!(
        "installing Debian {} into {} (about a minute)",
        kernel.release,
        disk.display()
    ));
    let files = folder.join(format!("{}.new", kernel.release));
    if files.exists() {
        fs::remove_dir_all(&files)?;
    }
    run::output(
        Command::new("debootstrap")
            .args(["--variant=minbase", &format!("--include={PACKAGES}")])
            .arg(kernel.release)
            .arg(&files)
            .arg(&Mirror::of_this_machine()?.uri),
    )
    .with_context(|| format!("installing Debian {}", kernel.release))?;
    let units = files.join("etc/systemd/system");
    fs::write(units.join("kernels.service"), UNIT)?;
    symlink(
        "../kernels.service",
        units.join("multi-user.target.wants/kernels.service"),
    )?;
    for unit in NEEDLESS {
        for wants in ["multi-user.target", "timers.target", "getty.target"] {
            // Where it is not wanted there is nothing to take away.
            let _ = fs::remove_file(units.join(format!("{wants}.wants")).join(unit));
        }
    }
    fs::write(
        files.join("etc/machine-id"),
        "0123456789abcdef0123456789abcdef\n",
    )?;
    fs::write(files.join("etc/hostname"), "guest\n")?;
    fs::write(files.join("etc/fstab"), "")?;
    // Root without a password, at a console that only this machine's root reaches.
    let shadow = files.join("etc/shadow");
    let text = fs::read_to_string(&shadow)?;
    fs::write(&shadow, text.replace("root:*:", "root::"))?;
    for cache in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        fs::remove_dir_all(files.join(cache))?;
    }
    let unfinished = disk.with_extension("new");
    make(&files, &unfinished, 400)?;
    fs::rename(&unfinished, &disk)?;
    fs::remove_dir_all(files).context("removing what is no longer needed")?;
    Ok(disk)
}

/// The second disk: the kernel's modules, and what is tried.
pub(super) fn payload(kernel: &Booted, payload: &Path, folder: &Path) -> Result<PathBuf> {
    let files = folder.join("payload.d");
    if files.exists() {
        fs::remove_dir_all(&files)?;
    }
    run::output(
        Command::new("cp")
            .args(["-r", "-T"])
            .args([payload, &files]),
    )?;
    run::output(
        Command::new("cp")
            .args(["-r", "-T"])
            .args([&kernel.modules, &files.join("modules")]),
    )?;
    let disk = folder.join("payload.ext4");
    make(&files, &disk, 32)?;
    fs::remove_dir_all(files)?;
    Ok(disk)
}

/// A disk with these files, and some room.
fn make(files: &Path, disk: &Path, room: u64) -> Result<()> {
    let used = run::output(Command::new("du").arg("-sm").arg(files))?;
    let used: u64 = used
        .split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .context("reading what `du` printed")?;
    if disk.exists() {
        fs::remove_file(disk)?;
    }
    run::output(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"])
            .args([files, disk])
            .arg(format!("{}M", used * 5 / 4 + room)),
    )?;
    Ok(())
}
