//! A wall clock of one daemon's own, which a test sets while the daemon runs. The kernel has one wall
//! clock for all, so the C library of the daemon tells it another time.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::Reeve;

/// The file by which a daemon's wall clock is set.
#[derive(Clone, Debug)]
pub struct WallClock {
    file: PathBuf,
}

// === impl WallClock ===

impl WallClock {
    /// Gives a daemon a wall clock of its own, which differs from the machine's by an offset.
    ///
    /// Monotonic clocks stay as they are. Landlock and seccomp are off in this daemon: its threads read
    /// the clock's file.
    #[must_use]
    pub fn of<'n>(reeve: Reeve<'n>, offset: &str) -> (Reeve<'n>, Self) {
        let clock = Self {
            file: reeve.folder().join("clock"),
        };
        clock.set(offset);
        let reeve = reeve
            .environment("LD_PRELOAD", library())
            .environment("FAKETIME_TIMESTAMP_FILE", &clock.file)
            .environment("FAKETIME_NO_CACHE", "1")
            .environment("DONT_FAKE_MONOTONIC", "1")
            .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .set("/sandbox/landlock", json!("off"))
            .set("/sandbox/seccomp", json!("off"));
        (reeve, clock)
    }

    /// Sets it to an offset from the machine's clock, as in `+5h`, `-90s` or `+0`.
    pub fn set(&self, offset: &str) {
        // In one step: a reader must not find an empty file.
        let new = self.file.with_extension("new");
        fs::write(&new, offset).expect("writing the offset of a clock");
        fs::rename(&new, &self.file).expect("putting the offset of a clock in place");
    }
}

/// Variables for a program that runs to its end at an offset from the machine's clock.
pub(crate) fn at(offset: &str) -> [(&'static str, OsString); 3] {
    [
        ("LD_PRELOAD", library().into()),
        ("FAKETIME", offset.into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
    ]
}

/// What moves the clock of one program, of the package `faketime`.
fn library() -> PathBuf {
    let folders = fs::read_dir("/usr/lib").expect("the folder of libraries is there");
    folders
        .flatten()
        .map(|folder| folder.path().join(Path::new("faketime/libfaketime.so.1")))
        .find(|file| file.exists())
        .expect("`cargo xtask setup` installs the package `faketime`")
}
