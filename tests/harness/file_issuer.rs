//! Certificates in files, written by `reeve ca`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::Programs;

/// A CA of the `reeve` command, which writes certificates to folders.
#[derive(Debug)]
pub struct FileIssuer {
    ca: PathBuf,
}

// === impl FileIssuer ===

impl FileIssuer {
    /// Makes a CA for `example.org` in a folder that is not there yet.
    #[must_use]
    pub fn new(ca: PathBuf) -> Self {
        let folder = ca.to_str().expect("a path is text");
        reeve([
            "ca",
            "init",
            "--trust-domain",
            "example.org",
            "--dir",
            folder,
        ]);
        Self { ca }
    }

    /// Writes `svid.pem`, `svid.key` and `bundle.pem`, one after the other.
    pub fn issue(&self, id: &str, out: &Path) {
        self.issue_for(id, out, "1h");
    }

    /// The same with another lifetime.
    pub fn issue_for(&self, id: &str, out: &Path, lifetime: &str) {
        let (ca, out) = (self.ca.to_str(), out.to_str());
        let (ca, out) = (ca.expect("a path is text"), out.expect("a path is text"));
        reeve([
            "ca",
            "issue",
            "--dir",
            ca,
            "--id",
            id,
            "--out",
            out,
            "--lifetime",
            lifetime,
        ]);
    }

    /// The source of a configuration that reads what this writes, a folder below `base` for each
    /// service account.
    #[must_use]
    pub fn source(base: &Path) -> Value {
        json!({"files": {
            "folder": base.join("{serviceAccount}"),
            "certificate": "svid.pem",
            "key": "svid.key",
            "bundle": "bundle.pem",
        }})
    }
}

fn reeve<const N: usize>(words: [&str; N]) {
    let output = Command::new(&Programs::get().reeve).args(words).output();
    let output = output.expect("`reeve` can be run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`reeve {words:?}`: {error}");
}
