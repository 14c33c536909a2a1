//! The program as people and scripts run it, on files that they wrote.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use harness::{Network, Node, Programs};

/// A folder of files that goes with the value.
pub(crate) struct Files(Node);

impl Files {
    pub(crate) fn new() -> Self {
        Self(Node::new(&Network::new(), "files"))
    }

    /// Where it is.
    pub(crate) fn folder(&self) -> &Path {
        self.0.folder()
    }

    /// Writes a file, and gives its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let file = self.0.folder().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

/// Runs `reeve` with these words, and nothing to read.
pub(crate) fn reeve(words: &[&str]) -> Output {
    let mut command = Command::new(&Programs::get().reeve);
    command.args(words).stdin(Stdio::null()).output().unwrap()
}

/// What a program that has ended said.
pub(crate) trait Said {
    /// Its exit code.
    fn code(&self) -> i32;
    /// What it printed.
    fn out(&self) -> String;
    /// What it complained of.
    fn err(&self) -> String;
    /// Both.
    fn said(&self) -> String {
        self.out() + &self.err()
    }
}

impl Said for Output {
    fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
