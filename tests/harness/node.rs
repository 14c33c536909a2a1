//! A node: what one daemon is responsible for.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{Addresses, Cgroup, Netns, Network, Place, Reeve, Workload, network::Joined, run::Run};

/// A node: a network namespace for the host's own processes, a cgroup under which all of its
/// processes are, and folders. Dropping it ends everything on it, and what its daemon pinned.
#[derive(Debug)]
pub struct Node {
    name: String,
    network: Network,
    host: Place,
    joined: Joined,
    cgroup: Arc<Cgroup>,
    folder: PathBuf,
    pins: PathBuf,
}

impl Node {
    /// A node on a network.
    #[must_use]
    pub fn new(network: &Network, name: &str) -> Self {
        let run = Run::this();
        let cgroup = Arc::new(run.cgroup(name));
        let host = Place::new(Some(Arc::new(Netns::new())), Arc::new(cgroup.child("host")));
        let joined = network.join(&host);
        Self {
            name: name.to_owned(),
            network: network.clone(),
            host,
            joined,
            cgroup,
            folder: run.folder(name),
            pins: run.pins(name),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own addresses.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.joined.addresses
    }

    /// Where the host's own processes run: like a kubelet, enrolled nowhere.
    #[must_use]
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// The cgroup that holds everything of this node.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The network that it is on.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Where its daemon keeps its files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its daemon pins, in bpffs.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Where its daemons pin now: the one that serves, and those of other layouts before and after it.
    #[must_use]
    pub fn all_pins(&self) -> Vec<PathBuf> {
        let parent = self.pins.parent().expect("it is a folder's");
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let name = self.pins.file_name().expect("it has a name");
        let is_own = |path: &PathBuf| {
            let found = path.file_name().map(|found| found.as_encoded_bytes());
            let rest = found.and_then(|found| found.strip_prefix(name.as_encoded_bytes()));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"-"))
        };
        let mut pins: Vec<_> = entries.map(|entry| entry.path()).filter(is_own).collect();
        pins.sort();
        pins
    }

    /// A place for a workload with a network namespace of its own, like a pod's.
    #[must_use]
    pub fn pod(&self, name: &str) -> Workload {
        self.pod_with(name, None)
    }

    /// A pod with addresses that another one had before.
    #[must_use]
    pub fn pod_at(&self, name: &str, addresses: Addresses) -> Workload {
        self.pod_with(name, Some(addresses))
    }

    fn pod_with(&self, name: &str, addresses: Option<Addresses>) -> Workload {
        let place = Place::new(
            Some(Arc::new(Netns::new())),
            Arc::new(self.cgroup.child(name)),
        );
        let joined = match addresses {
            Some(addresses) => self.network.join_at(&place, addresses),
            None => self.network.join(&place),
        };
        Workload::new(name, place, joined)
    }

    /// A place for a workload that shares the host's network namespace, like a systemd service's.
    #[must_use]
    pub fn service(&self, name: &str) -> Workload {
        let place = self.host.with_cgroup(Arc::new(self.cgroup.child(name)));
        Workload::new(name, place, self.joined.clone())
    }

    /// The settings of a daemon for this node.
    #[must_use]
    pub fn reeve(&self) -> Reeve<'_> {
        Reeve::new(self)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Programs and maps would stay in memory until the test process ends.
        for pins in self.all_pins() {
            if let Err(error) = fs::remove_dir_all(&pins) {
                eprintln!("removing {}: {error}", pins.display());
            }
        }
    }
}
