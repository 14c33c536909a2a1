//! How the daemon is, as `reeve status --json` prints it.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    datapath,
    handover::{Draining, Left},
    workload::CgroupSelector,
};

/// The whole of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Trust domain of the workloads here.
    pub trust_domain: String,
    /// The daemon's process.
    pub process: u32,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
    /// Whether nothing is missing.
    pub ready: bool,
    /// What is missing, one sentence each.
    pub not_ready: Vec<String>,
    /// What is left of its connections, where it lets them end.
    #[serde(default)]
    pub draining: Option<Left>,
    /// Daemons before, from which others took over and whose connections have not all ended; the last
    /// one first.
    #[serde(default)]
    pub predecessors: Vec<Draining>,
    /// Settings that have changed in the file and need a restart.
    #[serde(default)]
    pub restart_needed: Vec<String>,
    /// Fingerprints of the settings that need a restart, by name: equal for equal values and versions.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Number of the state that the kernel holds; raised at each change.
    pub generation: u32,
    /// Workloads of this node, in the order of their declaration.
    pub workloads: Vec<WorkloadStatus>,
    /// Certificates, by SPIFFE ID.
    pub certificates: Vec<CertificateStatus>,
    /// Trust bundles, by trust domain.
    pub bundles: Vec<BundleStatus>,
    /// Bundle endpoints that are followed, by trust domain.
    pub bundle_endpoints: Vec<BundleEndpointStatus>,
    /// Tunnels.
    pub tunnels: TunnelsStatus,
    /// Policies.
    pub policies: PolicyStatus,
    /// The kernel's maps.
    pub maps: Vec<MapUsage>,
    /// Events that found the kernel's ring buffer full.
    pub lost_events: u64,
}

/// What a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WorkloadState {
    /// It has a process, and so a network namespace.
    Running,
    /// Its cgroup is there and empty: enforced, and nobody to enforce it on.
    Empty,
    /// It has no cgroup.
    Absent,
}

/// One workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadStatus {
    /// Its name.
    pub name: String,
    /// Its number in maps and events.
    pub id: u32,
    /// Its identity.
    pub spiffe_id: String,
    /// How it is found.
    pub selector: CgroupSelector,
    /// What it does.
    pub state: WorkloadState,
    /// Ids of its cgroups.
    pub cgroups: Vec<u64>,
    /// Inode of its network namespace.
    pub netns: Option<u64>,
    /// Whether it is alone in that namespace.
    pub owns_netns: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether the tunnel's listeners stand in its namespace.
    pub listening: bool,
    /// Whether it has a certificate that is valid now.
    pub certificate: bool,
    /// What it says of itself and is not believed, one sentence each.
    #[serde(default)]
    pub remarks: Vec<String>,
}

/// One identity and its certificate. Times are RFC 3339.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// Whose.
    pub spiffe_id: String,
    /// Where it comes from.
    pub source: String,
    /// Serial number, lower case hexadecimal; none without a valid certificate.
    pub serial: Option<String>,
    /// Distinguished name of its issuer.
    pub issuer: Option<String>,
    /// Counts the certificates of all identities since the daemon began.
    pub generation: Option<u64>,
    /// Start of validity.
    pub not_before: Option<String>,
    /// When the first certificate of its chain expires, the authority that vouches for it included:
    /// peers refuse it from then on.
    pub not_after: Option<String>,
    /// Seconds until then.
    pub seconds_left: Option<u64>,
    /// When the first CA of the chain expires, the authority included.
    pub signer_not_after: Option<String>,
    /// When the source is asked next; none of a source that tells by itself when there is something new.
    pub next_attempt: Option<String>,
    /// When the source was last asked.
    pub last_attempt: Option<String>,
    /// When that last gave a certificate that could be used.
    pub last_success: Option<String>,
    /// How the last attempt ended: `accepted`, `unchanged` or `rejected`.
    pub last_result: Option<String>,
    /// Why the last attempt failed; none where it did not.
    pub last_error: Option<String>,
    /// What an operator should know of the source though nothing fails: `polled` where files cannot
    /// be watched, `mounted_file` where one is mounted by itself and will never change,
    /// `systemd_credential` where one changes only when the unit is restarted, `signer_expires` where
    /// a CA of the chain has less than a tenth of its lifetime left.
    pub remarks: Vec<String>,
    /// Trust bundles that the source gave and that are not used: everybody of the trust domain is denied.
    #[serde(default)]
    pub refused_bundles: Vec<RefusedBundle>,
}

/// A trust bundle that is not used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedBundle {
    /// Whose.
    pub trust_domain: String,
    /// What is wrong with it.
    pub reason: String,
}

/// One trust domain's bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BundleStatus {
    /// Whose.
    pub trust_domain: String,
    /// Signing certificates in it.
    pub certificates: usize,
    /// When the first of them expires, RFC 3339.
    pub earliest_not_after: Option<String>,
    /// Whether revocation is checked: there is a revocation list.
    pub revocation_checked: bool,
    /// When the first revocation list expires, RFC 3339.
    pub next_update: Option<String>,
}

/// One bundle endpoint. Times are RFC 3339.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BundleEndpointStatus {
    /// Whose bundle it serves.
    pub trust_domain: String,
    /// Where it is.
    pub url: String,
    /// How its server is authenticated: `https_web` or `https_spiffe`.
    pub profile: String,
    /// Where the bundle in force is from: `fetched`, `kept` from before the daemon was started, or
    /// `bootstrap`; none where there is none, and everybody of the trust domain is refused.
    pub origin: Option<String>,
    /// Sequence number of the bundle in force.
    pub sequence: Option<u64>,
    /// When the endpoint is asked next.
    pub next_attempt: Option<String>,
    /// When it was last asked.
    pub last_attempt: Option<String>,
    /// When it last gave a bundle that could be used.
    pub last_success: Option<String>,
    /// How the last attempt ended: `accepted`, `unchanged` or `rejected`.
    pub last_result: Option<String>,
    /// Name of the reason why the last attempt failed; none where it did not.
    pub reason: Option<String>,
    /// The same in full.
    pub last_error: Option<String>,
}

/// The data path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelsStatus {
    /// Application connections open now.
    pub connections: usize,
    /// Tunnels open now.
    pub open: usize,
    /// The first of them: a bounded number.
    pub tunnels: Vec<TunnelStatus>,
}

/// One tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelStatus {
    /// `client` where this node opened it, `server` where the peer did.
    pub role: String,
    /// Own identity.
    pub local: String,
    /// The far end's authenticated identity.
    pub peer: String,
    /// The far end's address.
    pub address: String,
    /// Application connections in it now.
    pub streams: usize,
    /// Seconds since it was opened.
    pub age_seconds: u64,
    /// How its identities are proven again: `bound` by a handshake inside of it that is bound to it,
    /// `none` where the peer does not do so.
    pub proof: String,
    /// How often they were proven again.
    pub proofs: u64,
    /// Seconds since they were proven last, or it was opened.
    pub proven_seconds: u64,
    /// Proofs that have failed since the last one that has not.
    #[serde(default)]
    pub proofs_failed: u64,
    /// Why the last of them has failed.
    #[serde(default)]
    pub proof_error: Option<String>,
    /// The peer answers nothing at the moment: new streams go elsewhere.
    pub silent: bool,
    /// Takes no new streams.
    pub retired: bool,
}

/// The policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// Where they come from.
    pub sources: Vec<String>,
    /// Policies in force.
    pub policies: usize,
    /// Why the newest files were refused; the policies before them are in force.
    pub refused: Option<String>,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapUsage {
    /// Its name.
    pub map: String,
    /// Entries in it.
    pub entries: u64,
    /// Entries that fit.
    pub capacity: u64,
    /// Entries that have no room.
    #[serde(default)]
    pub missing: u64,
}

// === impl WorkloadState ===

impl WorkloadState {
    /// Name in metrics and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Empty => "empty",
            Self::Absent => "absent",
        }
    }
}

// === impl MapUsage ===

impl From<datapath::MapUsage> for MapUsage {
    fn from(usage: datapath::MapUsage) -> Self {
        Self {
            map: usage.name.to_owned(),
            entries: usage.entries,
            capacity: usage.capacity,
            missing: usage.missing,
        }
    }
}
