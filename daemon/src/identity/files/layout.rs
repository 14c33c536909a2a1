//! Where each identity's files are.

use std::path::PathBuf;

use super::{Paths, SourceError};
use crate::identity::SpiffeId;

/// The parts of an identity that a path may name.
const PLACEHOLDERS: [&str; 3] = ["{namespace}", "{serviceAccount}", "{path}"];

/// A path in which parts of the identity may stand: `{namespace}` and `{serviceAccount}` of an ID
/// of the usual form, and `{path}`, the whole of the ID behind the trust domain. No part of a
/// SPIFFE ID is `.` or `..`, so an identity stays below what is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern(String);

/// Which files hold an identity's set. Several may be the same file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesLayout {
    /// Folder, where the names of files start.
    pub folder: PathPattern,
    /// The workload's certificate, then the intermediates. Default `tls.crt`.
    pub certificate: PathPattern,
    /// The private key. Default `tls.key`.
    pub key: PathPattern,
    /// The authorities of the identity's trust domain; none where `trustBundles` says them. Default
    /// `ca.crt`.
    pub bundle: Option<PathPattern>,
    /// Revocation lists of the identity's trust domain. Default none.
    pub revocation_lists: Option<PathPattern>,
}

// === impl PathPattern ===

impl PathPattern {
    /// A pattern without placeholders is a path.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.contains('\0') {
            return Err("found an empty path".to_owned());
        }
        if text.contains("-----BEGIN ") {
            return Err("found PEM; expected the path of the file that holds it".to_owned());
        }
        let mut rest = text.to_owned();
        for placeholder in PLACEHOLDERS {
            rest = rest.replace(placeholder, "");
        }
        if rest.contains(['{', '}']) {
            return Err(format!(
                "`{text}` has braces around something else; expected one of {}",
                PLACEHOLDERS.join(", ")
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The same, starting at a folder.
    #[must_use]
    pub fn below(&self, folder: &std::path::Path) -> Self {
        // A folder's name may hold braces; those are no placeholders, and none are made of them
        // unless somebody names a folder so.
        Self(folder.join(&self.0).to_string_lossy().into_owned())
    }

    fn expand(&self, id: &SpiffeId) -> Result<PathBuf, SourceError> {
        let mut path = self.0.replace("{path}", id.path().trim_start_matches('/'));
        let (namespace, account) = ("{namespace}", "{serviceAccount}");
        if path.contains(namespace) || path.contains(account) {
            let (found_namespace, found_account) = id.service_account().ok_or_else(|| {
                SourceError::Unavailable(format!(
                    "the source's files are found by namespace and service account, and {id} has \
                     none: give this workload a source whose paths use `{{path}}`"
                ))
            })?;
            path = path
                .replace(namespace, found_namespace)
                .replace(account, found_account);
        }
        Ok(path.into())
    }
}

// === impl FilesLayout ===

impl FilesLayout {
    /// An identity's files.
    pub(super) fn paths(&self, id: &SpiffeId) -> Result<Paths, SourceError> {
        let folder = self.folder.expand(id)?;
        let file = |pattern: &PathPattern| Ok::<_, SourceError>(folder.join(pattern.expand(id)?));
        Ok(Paths {
            certificate: file(&self.certificate)?,
            key: file(&self.key)?,
            bundle: self.bundle.as_ref().map(file).transpose()?,
            revocation_lists: self.revocation_lists.as_ref().map(file).transpose()?,
        })
    }
}
