//! The last good bundle of each endpoint, in a file: a restart does not lose it, whether the
//! endpoint is up or not.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{BundleEndpoint, fetch::Fetched};
use crate::identity::TrustDomain;

const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const SUFFIX: &str = ".json";

/// A bundle that was fetched before.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) fetched: Fetched,
    pub(super) at: SystemTime,
    /// It was fetched from the same URL: sequence numbers of another mean nothing.
    pub(super) same_url: bool,
}

/// What is in the file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    url: String,
    /// Seconds since 1970.
    fetched_at: u64,
    /// Digest of the bundle that the operator gave to begin with. Another one says: begin anew.
    bootstrap: Option<String>,
    document: String,
}

/// The bundle that was kept for an endpoint that begins with `bootstrap`; none where there is
/// none, or where the operator has given another one to begin with since.
pub(super) fn read(
    folder: &Path,
    endpoint: &BundleEndpoint,
    bootstrap: Option<&str>,
) -> Option<Kept> {
    let path = path(folder, &endpoint.trust_domain);
    let unusable = |error: &dyn std::fmt::Display| {
        tracing::warn!(
            file = %path.display(),
            "the bundle that was fetched before cannot be used: {error}"
        );
    };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            unusable(&error);
            return None;
        }
    };
    let file: File = serde_json::from_slice(&text)
        .inspect_err(|error| unusable(error))
        .ok()?;
    if file.bootstrap.as_deref() != bootstrap {
        tracing::info!(
            trust_domain = %endpoint.trust_domain,
            "`bootstrap` has changed since its bundle was fetched, and counts instead"
        );
        return None;
    }
    let fetched = Fetched::read(file.document.as_bytes(), endpoint.trust_domain.clone())
        .inspect_err(|error| unusable(error))
        .ok()?;
    Some(Kept {
        fetched,
        at: SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(file.fetched_at))?,
        same_url: file.url == endpoint.url.as_str(),
    })
}

/// Keeps a bundle: the whole file, or the one before.
pub(super) fn write(
    folder: &Path,
    endpoint: &BundleEndpoint,
    bootstrap: Option<&str>,
    document: &str,
    at: SystemTime,
) -> io::Result<()> {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let file = File {
        url: endpoint.url.as_str().to_owned(),
        fetched_at: since.as_secs(),
        bootstrap: bootstrap.map(str::to_owned),
        document: document.to_owned(),
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(folder)?;
    let path = path(folder, &endpoint.trust_domain);
    let new = path.with_extension("new");
    let mut opened = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(&new)?;
    opened.write_all(&serde_json::to_vec_pretty(&file)?)?;
    opened.sync_all()?;
    fs::rename(&new, &path)
}

/// Removes what is kept of trust domains that are not followed any more (SPIFFE Federation,
/// section 6.3).
pub(super) fn forget_others(folder: &Path, wanted: impl Fn(&TrustDomain) -> bool) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str());
        let domain = name
            .and_then(|name| name.strip_suffix(SUFFIX))
            .and_then(|name| TrustDomain::parse(name).ok());
        if let Some(domain) = domain
            && !wanted(&domain)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(%error, file = %path.display(), "a bundle that nobody follows cannot be removed");
        }
    }
}

fn path(folder: &Path, domain: &TrustDomain) -> PathBuf {
    folder.join(format!("{domain}{SUFFIX}"))
}
