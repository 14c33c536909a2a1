//! Network namespaces without names: they live as long as somebody holds them.

use std::{fs::File, os::fd::AsRawFd, path::PathBuf, thread};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// A new one, with nothing in it but a loopback interface that is down.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes something")]
    pub fn new() -> Self {
        // The namespace is the thread's, so the caller stays where it is.
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("making a network namespace");
            File::open("/proc/thread-self/ns/net").expect("opening the new namespace")
        })
        .join()
        .expect("the thread of the new namespace ends well");
        Self { file }
    }

    /// A path at which other processes find it while this value lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Does something inside: sockets made there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)
                        .expect("entering a network namespace");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
