//! Certificates in files, written by `reeve ca`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{Programs, clock};

/// A CA of the `reeve` command, which writes certificates to folders.
#[derive(Debug)]
pub struct FileIssuer {
    ca: PathBuf,
    /// Offset of its clock from the machine's, if it has one.
    clock: Option<String>,
}

// === impl FileIssuer ===

impl FileIssuer {
    /// Makes a CA for `example.org` in a folder that is not there yet.
    #[must_use]
    pub fn new(ca: PathBuf) -> Self {
        let issuer = Self { ca, clock: None };
        issuer.ca(&["init", "--trust-domain", "example.org"], None);
        issuer
    }

    /// The same with a clock that is behind the machine's by an offset as in `-2h`: what it issues is
    /// valid since then.
    #[must_use]
    pub fn behind(ca: PathBuf, offset: &str) -> Self {
        let issuer = Self {
            ca,
            clock: Some(offset.to_owned()),
        };
        issuer.ca(&["init", "--trust-domain", "example.org"], None);
        issuer
    }

    /// Writes `svid.pem`, `svid.key` and `bundle.pem`, one after the other.
    pub fn issue(&self, id: &str, out: &Path) {
        self.issue_for(id, out, "1h");
    }

    /// The same with another lifetime.
    pub fn issue_for(&self, id: &str, out: &Path, lifetime: &str) {
        self.ca(&["issue", "--id", id, "--lifetime", lifetime], Some(out));
    }

    /// A step of the root's replacement: none prepares the next root, then `--switch` and `--finish`.
    pub fn rotate(&self, step: &[&str]) {
        self.ca(&[&["rotate"], step].concat(), None);
    }

    fn ca(&self, words: &[&str], out: Option<&Path>) {
        let mut command = Command::new(&Programs::get().reeve);
        command.arg("ca").args(words).arg("--dir").arg(&self.ca);
        if let Some(out) = out {
            command.arg("--out").arg(out);
        }
        if let Some(offset) = &self.clock {
            command.envs(clock::at(offset));
        }
        let output = command.output().expect("`reeve` can be run");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "`reeve ca {words:?}` of {}: {error}",
            self.ca.display()
        );
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
