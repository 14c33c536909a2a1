//! The configuration file: YAML, checked as a whole, every mistake reported with its place.
//!
//! In: files. Out: an immutable [`Config`]. Reading is pure: nothing is opened but the file, and
//! what was in force before stays so until the caller replaces it.
//!
//! Every field is described in `docs/configuration.md`; a test compares the two.

mod check;
mod declared;
mod file;
mod restart;
mod settings;
mod settle;
mod tunnel;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use check::{Summary, check};
pub use declared::Declared;
pub use restart::RestartNeeded;
pub use settings::{
    Admin, Broker, Certificates, DelegatedIdentity, EbpfLog, EmbeddedCa, Log, LogFormat, LogLevel,
    Maps, Metrics, Node, Source, WorkloadApi,
};
pub use tunnel::{CongestionControl, Limits, Ports, Timeouts};

pub use crate::yaml::{Mistake, Mistakes as ConfigErrors};
use crate::{
    identity::{CryptoRules, TrustDomain},
    policy::{PolicySources, Unselected},
    privileges::Confinement,
    workload::{Namespaces, Peer, Roster, Workload},
    yaml,
};

/// Id of the first peer in a configuration by itself; ids below are those of local workloads, which are
/// peers of each other. A daemon gives both the ids that the kernel's maps have for them.
pub const FIRST_PEER_ID: u32 = 0x1_0000;

/// The configuration, whole and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file that it was read from.
    pub file: PathBuf,
    /// Trust domain of the workloads here.
    pub trust_domain: TrustDomain,
    /// This node.
    pub node: Node,
    /// Where reeve keeps what must outlive it. Default `/var/lib/reeve`.
    pub state_dir: PathBuf,
    /// The workloads of this node, in the order of their declaration.
    pub workloads: Vec<Arc<Workload>>,
    /// Cgroups, as paths from the cgroup2 mount with a leading slash, below which everything that
    /// is not enrolled is denied.
    pub enforced_parents: Vec<String>,
    /// The peers, in the order of their declaration.
    pub peers: Vec<Arc<Peer>>,
    /// Labels of the namespaces.
    pub namespaces: Namespaces,
    /// Where the policies are.
    pub policies: PolicySources,
    /// What a workload may do in a direction that no policy is about. Default nothing.
    pub unselected: Unselected,
    /// Where certificates come from.
    pub certificates: Certificates,
    /// Which cryptography is accepted. Default: that of the default profile.
    pub tls: CryptoRules,
    /// Ports that reeve takes.
    pub ports: Ports,
    /// TCP's below tunnels.
    pub congestion_control: CongestionControl,
    /// Bounds of the tunnel.
    pub limits: Limits,
    /// Time-outs of the tunnel.
    pub timeouts: Timeouts,
    /// Capacities of the kernel's maps.
    pub maps: Maps,
    /// What of the daemon's confinement must be there.
    pub sandbox: Confinement,
    /// The metrics endpoint.
    pub metrics: Metrics,
    /// The admin socket.
    pub admin: Admin,
    /// What is logged.
    pub log: Log,
}

/// A configuration inside another document, of which only counts who is where and who may talk:
/// its workloads need not say where they run.
#[derive(Debug, serde::Deserialize)]
#[serde(transparent)]
pub(crate) struct Inline(file::RawConfig);

// === impl Inline ===

impl Inline {
    /// Checks it as a whole. What is returned beside mistakes is good for finding more of them
    /// only.
    pub(crate) fn settle(
        self,
        document: &yaml::Document,
        root: yaml::NodeId,
        mistakes: &mut ConfigErrors,
    ) -> Option<Config> {
        settle::settle(document, root, self.0, true, mistakes)
    }
}

// === impl Config ===

impl Config {
    /// Reads and checks a configuration file. Relative paths in it start at its own folder.
    ///
    /// # Errors
    /// Every mistake in the file.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(path, &yaml::read_file(path)?)
    }

    /// As [`Config::load`], for a text that was read from `path`.
    ///
    /// # Errors
    /// Every mistake in the text.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigErrors> {
        let (config, mistakes) = Self::read(path, text);
        mistakes.into_result()?;
        config.ok_or_else(|| {
            let mut mistakes = ConfigErrors::default();
            mistakes.file(path, "could not be read as a configuration");
            mistakes
        })
    }

    /// Whom it declares.
    #[must_use]
    pub fn roster(&self) -> Roster {
        Roster {
            workloads: self.workloads.clone(),
            peers: self.peers.clone(),
            namespaces: self.namespaces.clone(),
        }
    }

    /// What could be read, and the mistakes. Beside mistakes, the configuration is good for
    /// finding more of them only.
    fn read(path: &Path, text: &str) -> (Option<Self>, ConfigErrors) {
        let (documents, mut mistakes) = yaml::parse(path, text);
        let config = match &documents[..] {
            [document] => {
                let raw = yaml::read(document, &mut mistakes);
                let root = document.root();
                raw.and_then(|raw| settle::settle(document, root, raw, false, &mut mistakes))
            }
            [] => {
                if mistakes.is_empty() {
                    mistakes.file(path, "is empty; `trustDomain` at least is needed");
                }
                None
            }
            [_, second, ..] => {
                mistakes.push(second.mistake(
                    second.root(),
                    "is a second document; the configuration is one document, policies have \
                     files of their own (`policies.folder`)",
                ));
                None
            }
        };
        (config, mistakes)
    }

    /// The configuration with other ids: those of the workloads, and then those of the peers, each in
    /// the order of declaration.
    #[must_use]
    pub fn with_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        let mut ids = ids.into_iter();
        for (workload, id) in self.workloads.iter_mut().zip(&mut ids) {
            Arc::make_mut(workload).id = id;
        }
        for (peer, id) in self.peers.iter_mut().zip(ids) {
            Arc::make_mut(peer).id = id;
        }
        self
    }
}
