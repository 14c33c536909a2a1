//! Who runs here now: looks at the cgroup tree whenever it changes, and once a second.
//!
//! The kernel tells of new and removed cgroups and of cgroups that become empty or populated
//! (inotify). It does not tell of a process that changes its namespace, nor of a new address,
//! and inotify can run out of watches; hence the second look each second.

mod claims;
mod remark;
mod scan;
#[cfg(test)]
mod tests;
mod watches;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use reeve_common::WorkloadId;
use tokio::sync::watch;

pub use self::remark::{Remark, Remarks};
use self::{
    scan::{SETTLE, Scanner},
    watches::Watches,
};
use super::{RunningWorkload, Workload, cgroup::CgroupTree};
use crate::datapath::netns::Netns;

/// The look that nothing caused.
const POLL: Duration = Duration::from_secs(1);
/// Between two looks: a storm of changes shall not keep a CPU busy.
const PAUSE: Duration = Duration::from_millis(20);
/// Messages that wait for the registry's thread. One is as good as many.
const QUEUE: usize = 16;

/// Whom to look for.
#[derive(Clone, Debug, Default)]
pub struct Declaration {
    /// The workloads.
    pub workloads: Vec<Arc<Workload>>,
    /// Cgroup paths below which everything that is no workload is denied.
    pub enforced_parents: Vec<String>,
    /// Addresses that no workload gets by having them in a namespace of its own.
    pub reserved: Arc<Reserved>,
}

/// Addresses that are known to be others'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Whose each is, in words.
    pub addresses: HashMap<IpAddr, String>,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// Every declared workload, in the order of the declaration.
    pub workloads: Vec<Arc<RunningWorkload>>,
    /// Cgroups of workloads that are to come, or come again.
    pub expected: Vec<Expected>,
    /// Ids and depths of the enforced parents that are there.
    pub enforced_parents: Vec<(u64, u32)>,
    /// What could not be found out, one sentence each.
    pub problems: Vec<String>,
}

/// A cgroup that will be a workload's when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Id of the cgroup above it.
    pub parent: u64,
    /// Its name.
    pub name: String,
    /// Its depth, or one of those that are possible.
    pub depth: u32,
    /// The workload.
    pub workload: WorkloadId,
}

/// Follows the declared workloads for as long as it lives.
#[derive(Debug)]
pub struct Registry {
    messages: SyncSender<Message>,
    discovery: watch::Receiver<Arc<Discovery>>,
    remarks: Remarks,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Message {
    /// Something in the tree may have changed.
    Look,
    /// Follow these from now on, and say when they have been looked at.
    Declare(Declaration, SyncSender<()>),
    Stop,
}

/// Why the registry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The daemon's own network namespace cannot be opened.
    #[error("the daemon's own network namespace cannot be opened")]
    OwnNamespace(#[source] std::io::Error),
    /// The thread cannot be started.
    #[error("the thread that follows workloads cannot be started")]
    Thread(#[source] std::io::Error),
}

// === impl Registry ===

impl Registry {
    /// Looks once, and starts a thread that goes on looking. Blocks for the first look. `held` are
    /// addresses that workloads, by their ids, had when an earlier daemon looked last.
    ///
    /// # Errors
    /// When the daemon's own namespace cannot be opened or no thread can be started.
    pub fn start(
        tree: CgroupTree,
        declared: Declaration,
        held: HashMap<IpAddr, WorkloadId>,
    ) -> Result<Self, RegistryError> {
        let own = Netns::of_pid(std::process::id()).map_err(RegistryError::OwnNamespace)?;
        let mut scanner = Scanner::new(tree, own, declared, held);
        scanner.look(Instant::now());
        let remarks = scanner.remarks.clone();
        let (sender, discovery) = watch::channel(scanner.discovery.clone());
        let (messages, receiver) = sync_channel(QUEUE);
        let watches = Watches::new(messages.clone());
        let thread = thread::Builder::new()
            .name("workloads".into())
            .spawn(move || follow(scanner, &receiver, watches, &sender))
            .map_err(RegistryError::Thread)?;
        Ok(Self {
            messages,
            discovery,
            remarks,
            thread: Some(thread),
        })
    }

    /// The newest state. Wakes only when something is different.
    #[must_use]
    pub fn discovery(&self) -> watch::Receiver<Arc<Discovery>> {
        self.discovery.clone()
    }

    /// What there is to say of workloads. What changes here alone wakes nobody.
    #[must_use]
    pub fn remarks(&self) -> Remarks {
        self.remarks.clone()
    }

    /// Follows other workloads from now on. Blocks until they have been looked at.
    pub fn declare(&self, declaration: Declaration) {
        let (done, wait) = sync_channel(1);
        if self
            .messages
            .send(Message::Declare(declaration, done))
            .is_ok()
        {
            let _ = wait.recv();
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Looks whenever something may have changed, until the registry goes.
fn follow(
    mut scanner: Scanner,
    messages: &Receiver<Message>,
    mut watches: Watches,
    sender: &watch::Sender<Arc<Discovery>>,
) {
    let look = |scanner: &mut Scanner| {
        if scanner.look(Instant::now()) {
            sender.send_replace(scanner.discovery.clone());
        }
    };
    loop {
        if watches.follow(&scanner.folders) {
            // What changed before a watch stood was not told: look again.
            look(&mut scanner);
        }
        let wait = if scanner.is_settling() { SETTLE } else { POLL };
        let mut answer = None;
        match messages.recv_timeout(wait) {
            Ok(Message::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Message::Declare(declaration, done)) => {
                scanner.declared = declaration;
                answer = Some(done);
            }
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        }
        look(&mut scanner);
        if let Some(done) = answer {
            let _ = done.send(());
        }
        thread::sleep(PAUSE);
    }
}
