//! Tarballs and checksums in which nothing is of this machine or this moment.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use sha2::{Digest, Sha256};

use super::files_below;

/// Packs a folder, under its own name: files sorted, of nobody, at one time.
pub(super) fn pack(folder: &Path, epoch: u64, tarball: &Path) -> Result<()> {
    let name = folder.file_name().context("a release has a name")?;
    let file = File::create(tarball).with_context(|| format!("making {}", tarball.display()))?;
    // Neither a name nor a time in the header.
    let packed = GzBuilder::new().write(BufWriter::new(file), Compression::best());
    let mut archive = tar::Builder::new(packed);
    for path in files_below(folder)? {
        let file = folder.join(&path);
        let content = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(if path.starts_with("bin") {
            0o755
        } else {
            0o644
        });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(epoch);
        archive
            .append_data(&mut header, Path::new(name).join(&path), content.as_slice())
            .with_context(|| format!("packing {}", path.display()))?;
    }
    archive
        .into_inner()
        .and_then(|packed| packed.finish())
        .and_then(|mut file| file.flush())
        .with_context(|| format!("writing {}", tarball.display()))
}

/// Lines as `sha256sum` writes and checks them, with the files' paths below a folder.
pub(super) fn checksums(folder: &Path, files: &[PathBuf]) -> Result<String> {
    let mut lines = String::new();
    for file in files {
        let path = file.strip_prefix(folder).unwrap_or(file);
        writeln!(lines, "{}  {}", checksum(file)?, path.display())?;
    }
    Ok(lines)
}

/// The SHA-256 of a file, in hexadecimal.
pub(super) fn checksum(file: &Path) -> Result<String> {
    let content = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let mut text = String::new();
    for byte in Sha256::digest(content) {
        write!(text, "{byte:02x}")?;
    }
    Ok(text)
}
