//! What passes a wire, as tcpdump sees it.

use std::{ffi::OsStr, fs, path::PathBuf, time::Duration};

use nix::sys::signal::Signal;

use crate::{Place, Process, eventually, run::Run};

/// A capture under way.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    place: Place,
    file: PathBuf,
}

impl Capture {
    pub(crate) fn start(place: Place, interface: &str) -> Self {
        let file = place.folder().join(Run::this().unique("capture"));
        let process = place.spawn([
            OsStr::new("tcpdump"),
            // As root it would otherwise become a user who may not write here.
            OsStr::new("--relinquish-privileges=root"),
            OsStr::new("--packet-buffered"),
            OsStr::new("--immediate-mode"),
            OsStr::new("--interface"),
            OsStr::new(interface),
            OsStr::new("-w"),
            file.as_os_str(),
        ]);
        eventually("tcpdump listens", || {
            process.stderr().contains("listening on")
        });
        Self {
            process,
            place,
            file,
        }
    }

    /// Ends the capture.
    #[must_use]
    pub fn finish(self) -> Captured {
        // What was sent last must pass the kernel's buffer first.
        std::thread::sleep(Duration::from_millis(200));
        self.process.signal(Signal::SIGINT);
        self.process.wait(Duration::from_secs(10)).ok();
        Captured {
            place: self.place,
            file: self.file,
        }
    }
}

/// A finished capture.
#[derive(Debug)]
pub struct Captured {
    place: Place,
    file: PathBuf,
}

impl Captured {
    /// Whether these bytes passed anywhere in the capture.
    #[must_use]
    pub fn contains(&self, bytes: impl AsRef<[u8]>) -> bool {
        let captured = fs::read(&self.file).expect("reading the capture");
        let bytes = bytes.as_ref();
        captured.windows(bytes.len()).any(|window| window == bytes)
    }

    /// The packets that a filter selects, one line each, as tcpdump prints them.
    #[must_use]
    pub fn packets(&self, filter: &str) -> Vec<String> {
        let file = self.file.as_os_str();
        let words = ["tcpdump", "-nn", "-r"]
            .map(OsStr::new)
            .into_iter()
            .chain([file, OsStr::new(filter)]);
        self.place
            .exec(words)
            .ok()
            .lines()
            .map(str::to_owned)
            .collect()
    }
}
