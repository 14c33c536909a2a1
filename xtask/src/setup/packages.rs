//! Programs that the tests, the demo and the bench run, from Debian's packages.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::say;
use crate::run;

/// Programs, each with the Debian package that has it.
type Programs = [(&'static str, &'static str)];

/// What tests, demo and bench run.
pub(super) const TESTS: [(&str, &str); 19] = [
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("curl", "curl"),
    ("nginx", "nginx-light"),
    ("haproxy", "haproxy"),
    ("openssl", "openssl"),
    ("tcpdump", "tcpdump"),
    ("iperf3", "iperf3"),
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
    // A clock that a test can move for one program.
    ("faketime", "faketime"),
    // The alert rules' own tests.
    ("prometheus", "prometheus"),
    ("promtool", "prometheus"),
    ("debootstrap", "debootstrap"),
    ("systemd-nspawn", "systemd-container"),
    ("pip3", "python3-pip"),
    // What a release brings: its image as a cluster would run it, its manual as people read it.
    ("podman", "podman"),
    ("runc", "runc"),
    ("man", "man-db"),
];

/// What makes container images.
pub(super) const IMAGES: [(&str, &str); 1] = [("buildah", "buildah")];

/// What boots other kernels.
pub(super) const KERNELS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("debootstrap", "debootstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("depmod", "kmod"),
    ("cpio", "cpio"),
    ("xz", "xz-utils"),
];

/// Asked by Debian's maintainer scripts before they start a service.
const SERVICE_POLICY: &str = "/usr/sbin/policy-rc.d";

pub(super) fn ensure(programs: &Programs) -> Result<()> {
    let missing: Vec<_> = programs
        .iter()
        .filter(|(program, _)| run::find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if run::find("apt-get").is_none() {
        bail!(
            "these programs are missing, and there is no apt-get to install them with: {packages}"
        );
    }
    say(&format!("installing {packages} with apt-get"));
    let _services = NoServices::hold()?;
    if install(&missing).is_err() {
        // The usual cause on a fresh machine: no lists yet, or old ones.
        run::output(apt_get().arg("update")).context("updating apt's lists")?;
        install(&missing).with_context(|| format!("installing {packages}"))?;
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    run::output(
        apt_get()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )?;
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// While this lives, an installed package starts no service: the tests want the program of
/// nginx, not a web server on the machine. A policy that the machine has already is left alone.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn hold() -> Result<Self> {
        let ours = !Path::new(SERVICE_POLICY).exists();
        if ours {
            fs::write(SERVICE_POLICY, "#!/bin/sh\nexit 101\n")
                .and_then(|()| {
                    fs::set_permissions(SERVICE_POLICY, fs::Permissions::from_mode(0o755))
                })
                .with_context(|| format!("writing {SERVICE_POLICY}"))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(SERVICE_POLICY)
        {
            eprintln!("setup: {SERVICE_POLICY} could not be removed, please do: {error}");
        }
    }
}
