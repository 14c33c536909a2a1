//! Who runs here: workloads, found by cgroup, with their network namespace and addresses; and
//! peers, who run elsewhere.
//!
//! In: a [`RosterSource`], which says whom there is, and the node's cgroup tree. Out: [`Registry`]'s
//! snapshots.

pub mod cgroup;
mod namespace;
mod registry;
mod roster;

pub use registry::{
    Declaration, Discovery, Expected, Registry, RegistryError, Remark, Remarks, Reserved,
};
pub use roster::{Roster, RosterSource};

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use reeve_common::WorkloadId;

use crate::{datapath::netns::Netns, identity::SpiffeId};

/// What policies select by: the same for a workload here and for a peer elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Attributes {
    /// Namespace (Kubernetes' meaning of the word).
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// SPIFFE ID.
    pub spiffe_id: SpiffeId,
}

/// Ports with a name, as the containers of a pod have them.
pub type NamedPorts = BTreeMap<String, NamedPort>;

/// What the name of a port stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// IP protocol number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// Labels of namespaces. Every namespace has the label [`Namespaces::NAME_LABEL`], declared or
/// not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(pub BTreeMap<String, BTreeMap<String, String>>);

/// How a workload's cgroup is found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CgroupSelector {
    /// Path below the cgroup2 mount, with a leading slash.
    Cgroup(String),
    /// Name of a systemd unit, as in `nginx.service`: the cgroup of that name; or of a template, as
    /// in `web@.service`: those of all its instances.
    Unit(String),
}

/// A workload as it is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Number in maps and events; stable while the name is declared.
    pub id: WorkloadId,
    /// Name in logs and metrics, unique on the node.
    pub name: String,
    /// Who it is.
    pub attributes: Attributes,
    /// Where it runs.
    pub selector: CgroupSelector,
    /// Ports that it owns where several workloads share a namespace's addresses.
    pub ports: Vec<u16>,
    /// Addresses, where they are not to be discovered from the namespace.
    pub addresses: Vec<IpAddr>,
    /// Name of the source of its certificate; none for the first that is configured.
    pub certificates: Option<String>,
    /// Names of its ports, for policies that name ports.
    pub named_ports: NamedPorts,
    /// Whether plaintext that no policy allows is let in, for the time of a roll-out.
    pub permissive: bool,
}

/// A workload as it runs now.
#[derive(Clone, Debug)]
pub struct RunningWorkload {
    /// The declaration.
    pub workload: Arc<Workload>,
    /// Ids and depths of its cgroups (root is 0); empty when it does not run. One id stands here
    /// with several depths where the daemon cannot see how deep it lies.
    pub cgroups: Vec<(u64, u32)>,
    /// Its network namespace, found from its processes; none until the first process runs.
    pub netns: Option<Arc<Netns>>,
    /// Whether it is the only workload of that namespace, and the namespace is not the daemon's.
    pub owns_netns: bool,
    /// Its addresses: those that are declared, or those of that namespace that are believed.
    pub addresses: Vec<IpAddr>,
    /// Those of that namespace that mean something on a link only, where it owns the namespace.
    pub link_local: Vec<IpAddr>,
}

/// A far end that reeve knows: a workload on another node, or something without identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Number in maps and events; not 0.
    pub id: u32,
    /// Name in logs and metrics.
    pub name: String,
    /// Addresses and networks.
    pub addresses: Vec<IpNet>,
    /// Ports that it owns, where several peers share an address.
    pub ports: Vec<u16>,
    /// Who it is; none for something without identity.
    pub attributes: Option<Attributes>,
    /// Port on which its tunnel listens; none where no tunnel reaches it.
    pub tunnel_port: Option<u16>,
    /// Names of its ports, for policies that name ports.
    pub named_ports: NamedPorts,
}

// === impl Namespaces ===

impl Namespaces {
    /// The label that Kubernetes gives to every namespace: its name.
    pub const NAME_LABEL: &'static str = "kubernetes.io/metadata.name";

    /// The value of a namespace's label.
    #[must_use]
    pub fn label<'a>(&'a self, namespace: &'a str, key: &str) -> Option<&'a str> {
        if key == Self::NAME_LABEL {
            return Some(namespace);
        }
        self.0.get(namespace)?.get(key).map(String::as_str)
    }
}
