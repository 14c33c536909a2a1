//! A kernel of Debian's: its image, its modules, and the first file system that finds the disks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::Kernel;
use crate::{
    run,
    setup::{self, Mirror, Suite},
};

/// The package that depends on a suite's newest kernel for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Modules without which no disk is found, where they are not part of the kernel.
const FOR_DISKS: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// What is booted.
#[derive(Debug)]
pub(super) struct Booted {
    /// As `uname -r` says it.
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) initrd: PathBuf,
    /// The folder of its modules, without the release.
    pub(super) modules: PathBuf,
}

/// The kernel of the last time, or what Debian has now.
pub(super) fn kernel(kernel: &Kernel, folder: &Path, update: bool) -> Result<Booted> {
    let place = folder.join("kernel").join(kernel.name);
    if update || !place.exists() {
        let unfinished = place.with_extension("new");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        fs::create_dir_all(&unfinished)?;
        fetch(kernel, &unfinished, &folder.join("packages"))
            .with_context(|| format!("fetching the kernel {} of {}", kernel.name, kernel.suite))?;
        // Renamed when it is whole.
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        fs::rename(&unfinished, &place)?;
    }
    Ok(Booted {
        release: release(&place.join("modules"))?,
        image: place.join("vmlinuz"),
        initrd: place.join("initrd"),
        modules: place.join("modules"),
    })
}

fn fetch(kernel: &Kernel, place: &Path, packages: &Path) -> Result<()> {
    let mirror = Mirror::of_this_machine()?;
    let unpacked = place.join("unpacked");
    let unpack = |suite: &Suite, name: &str| -> Result<()> {
        let package = suite.download(name)?;
        run::output(Command::new("dpkg").arg("-x").args([&package, &unpacked]))?;
        Ok(())
    };
    // Backports have kernels, and not all that goes with them.
    unpack(
        &Suite::open(&mirror, kernel.release, packages)?,
        "busybox-static",
    )?;
    let suite = Suite::open(&mirror, kernel.suite, packages)?;
    let image = suite
        .dependencies(NEWEST)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{NEWEST} depends on no kernel"))?;
    setup::say(&format!("fetching {image} of Debian {}", kernel.suite));
    // Newer ones have image and modules in packages of their own.
    let mut parts = suite.dependencies(&image)?;
    parts.retain(|name| {
        ["linux-binary-", "linux-modules-"]
            .iter()
            .any(|start| name.starts_with(start))
    });
    parts.push(image);
    for part in parts {
        unpack(&suite, &part)?;
    }
    // Directories that Debian has merged into /usr meanwhile.
    let either = |below: &str| {
        [unpacked.join(below), unpacked.join("usr").join(below)]
            .into_iter()
            .find(|path| path.exists())
            .with_context(|| format!("the packages have no {below}"))
    };
    let modules = place.join("modules");
    fs::rename(either("lib/modules")?, &modules)?;
    let release = release(&modules)?;
    let image = either(&format!("boot/vmlinuz-{release}"))
        .or_else(|_| either(&format!("lib/modules/{release}/vmlinuz")))
        .or_else(|_| Ok::<_, anyhow::Error>(modules.join(&release).join("vmlinuz")))?;
    fs::rename(image, place.join("vmlinuz")).context("the packages have no kernel image")?;
    depmod(&modules, &release, place)?;
    initrd(&either("bin/busybox")?, &modules.join(&release), place)?;
    fs::remove_dir_all(unpacked)?;
    fs::remove_dir_all(packages)?;
    Ok(())
}

fn release(modules: &Path) -> Result<String> {
    let mut entries =
        fs::read_dir(modules).with_context(|| format!("reading {}", modules.display()))?;
    let entry = entries.next().context("there are no modules")??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// Writes which module needs which. `depmod` wants them in a root of theirs.
fn depmod(modules: &Path, release: &str, place: &Path) -> Result<()> {
    let root = place.join("root");
    fs::create_dir_all(root.join("lib"))?;
    let there = root.join("lib/modules");
    fs::rename(modules, &there)?;
    run::output(Command::new("depmod").arg("-b").arg(&root).arg(release))?;
    fs::rename(&there, modules)?;
    fs::remove_dir_all(root)?;
    Ok(())
}

/// The first file system: busybox, and what the disks need.
fn initrd(busybox: &Path, modules: &Path, place: &Path) -> Result<()> {
    let root = place.join("initrd.d");
    for folder in ["bin", "proc", "sys", "dev", "root", "modules"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    let init = root.join("init");
    fs::write(&init, include_str!("guest/init.sh"))?;
    run::output(Command::new("chmod").arg("755").arg(&init))?;
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    for (number, file) in needed(&dependencies).iter().enumerate() {
        let name = Path::new(file)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let (plain, compressed) = match name.split_once(".ko") {
            Some((name, compressed)) => (format!("{number:02}-{name}.ko"), compressed),
            None => bail!("{file} is no module"),
        };
        let to = root.join("modules").join(plain);
        match compressed {
            "" => {
                fs::copy(modules.join(file), to)?;
            }
            ".xz" => {
                let out = Command::new("xz")
                    .arg("-dc")
                    .arg(modules.join(file))
                    .output()
                    .context("starting xz")?;
                if !out.status.success() {
                    bail!("xz cannot unpack {file}");
                }
                fs::write(to, out.stdout)?;
            }
            other => bail!("{file} is compressed as {other}, which is not known here"),
        }
    }
    run::output(
        Command::new("sh")
            .args(["-c", "find . | cpio --quiet -o -H newc > ../initrd"])
            .current_dir(&root),
    )?;
    fs::remove_dir_all(root)?;
    Ok(())
}

/// Files of the modules for disks and of what they need, each after what it needs.
fn needed(dependencies: &str) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    for name in FOR_DISKS {
        let line = dependencies.lines().find_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let stem = Path::new(file).file_name()?.to_str()?.split('.').next()?;
            (stem.replace('-', "_") == name).then_some((file, needs))
        });
        // What is not there is part of the kernel.
        let Some((file, needs)) = line else { continue };
        for file in needs.split_whitespace().rev().chain([file]) {
            if !files.iter().any(|known| known == file) {
                files.push(file.to_owned());
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::needed;

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let dependencies = "kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz\n\
                            kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
                            kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
                            kernel/drivers/net/veth.ko.xz:\n";
        let names: Vec<_> = needed(dependencies)
            .iter()
            .map(|file| file.rsplit('/').next().unwrap().to_owned())
            .collect();
        assert_eq!(
            names,
            [
                "virtio.ko.xz",
                "virtio_ring.ko.xz",
                "virtio_pci.ko.xz",
                "virtio_blk.ko.xz",
                "jbd2.ko.xz",
                "crc16.ko.xz",
                "ext4.ko.xz"
            ]
        );
    }
}
