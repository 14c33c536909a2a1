//! The parts of the configuration that are settings of one module each.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use serde::Deserialize;

use crate::{
    identity::{BrokerPeers, BundleEndpoint, FilesLayout, Selector, TrustDomain},
    workload::Workload,
    yaml::values::{number, size},
};

/// This node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name in logs and metrics. Default: the host's name.
    pub name: String,
    /// Its addresses: plaintext from these is let in to every workload, as the probes of the
    /// node's own agent need. Default none.
    pub addresses: Vec<IpAddr>,
    /// Whether all addresses of the daemon's own network are the node's too, as they come and go.
    /// Default false.
    pub host_addresses: bool,
    /// Cgroup at which the programs are attached. None, the default: the mount point of the
    /// cgroup2 hierarchy.
    pub cgroup_root: Option<PathBuf>,
    /// Folder in a bpf file system in which programs and maps are pinned. Default
    /// `/sys/fs/bpf/reeve`.
    pub bpffs: PathBuf,
    /// Where proc is mounted so that the settings of workloads' network namespaces can be written.
    /// Default `/proc`.
    pub proc: PathBuf,
}

/// Where certificates come from, and whose signature counts besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// The sources by name, in the order of their declaration. The first gives the certificates of
    /// every workload that names none. Never empty; default the embedded authority.
    pub sources: Vec<(String, Source)>,
    /// PEM files with the certificates of trust domains' authorities. They count instead of what a
    /// source brings for the same trust domain. Default none.
    pub trust_bundles: BTreeMap<TrustDomain, PathBuf>,
    /// Files with revocation lists of trust domains' authorities, in addition to those that a source
    /// brings. Default none.
    pub revocation_lists: BTreeMap<TrustDomain, Vec<PathBuf>>,
    /// Where other trust domains publish their bundles, by trust domain. Default none.
    pub bundle_endpoints: Vec<BundleEndpoint>,
}

/// One source of certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// reeve's own certificate authority.
    Embedded(EmbeddedCa),
    /// Files that somebody else writes.
    Files(FilesLayout),
    /// What a SPIFFE agent gives to reeve itself.
    WorkloadApi(WorkloadApi),
    /// What a SPIRE agent gives to reeve for the workloads.
    DelegatedIdentity(DelegatedIdentity),
    /// What a SPIFFE agent gives to reeve for the workloads, by the Broker API.
    Broker(Broker),
}

/// The SPIFFE Workload API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadApi {
    /// Unix socket of the agent.
    pub socket: PathBuf,
}

/// SPIRE's Delegated Identity API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DelegatedIdentity {
    /// Admin socket of the agent.
    pub socket: PathBuf,
    /// By workload's name: what the agent is to know it by, instead of by a process. Default none.
    pub selectors: BTreeMap<String, Vec<Selector>>,
}

/// The SPIFFE Broker API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    /// Unix socket of the agent.
    pub socket: PathBuf,
    /// Who is at its ends.
    pub peers: BrokerPeers,
}

/// reeve's own certificate authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedCa {
    /// Folder of the authority's key and certificate. Default `ca` in the state folder.
    pub ca_dir: PathBuf,
    /// Lifetime of a leaf; it is renewed at half of that. Default 1 h.
    pub leaf_lifetime: Duration,
}

/// Capacities of the kernel's maps, in entries. A change takes effect when reeve starts anew
/// without pinned maps. A full map is a deny, a metric and a daemon that is not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Maps {
    /// Cgroups of workloads. Default 4096.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub workloads: u32,
    /// Network namespaces of workloads. Default 4096.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub namespaces: u32,
    /// Addresses of workloads. Default 16384.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub local_addresses: u32,
    /// Addresses and networks of peers and policies. Default 131072.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub peers: u32,
    /// Ports of peers that share an address. Default 65536.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub peer_ports: u32,
    /// Verdicts. Default 524288.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub verdicts: u32,
    /// Flows of protocols without connections; a workload has at most 1/32 of them. Default 524288.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub flows: u32,
    /// The daemon's connections to local applications that are being opened. Default 65536.
    #[serde(deserialize_with = "number::<_, _, 1, 16_777_216>")]
    pub onward: u32,
    /// Ring buffer of events in bytes, rounded up to a power of two. Default 1 MiB.
    #[serde(deserialize_with = "size::<_, _, 4096, 268_435_456>")]
    pub events: u32,
}

/// The metrics endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Where it listens; none where it is off. Default `127.0.0.1:15020`.
    pub address: Option<SocketAddr>,
    /// Rules of policies with series of their own; those beyond share one. Default 1000.
    pub rules: u32,
}

/// The admin socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Path of the socket. Default `/run/reeve/admin.sock`.
    pub socket: PathBuf,
    /// Events of connections that are kept for `reeve observe`, some 600 bytes each. Default 4096.
    pub recent_events: u32,
}

/// What is logged, on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Log {
    /// Form of a line. Default text.
    pub format: LogFormat,
    /// Least severity. Default info.
    pub level: LogLevel,
    /// What the kernel programs log of themselves. Default off.
    pub ebpf: EbpfLog,
    /// Lines about connections that one workload may make in a second, of each kind, and ten times as
    /// many at once; 0 is no bound. Default 10.
    #[serde(deserialize_with = "number::<_, _, 0, 1_000_000>")]
    pub connections_per_second: u32,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            format: LogFormat::default(),
            level: LogLevel::default(),
            ebpf: EbpfLog::default(),
            connections_per_second: 10,
        }
    }
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object on each line.
    Json,
}

/// Least severity of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What needs somebody.
    Error,
    /// What may need somebody.
    Warn,
    /// What happens.
    #[default]
    Info,
    /// What a developer of reeve asks for.
    Debug,
    /// Everything.
    Trace,
}

/// What the kernel programs log of themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EbpfLog {
    /// Nothing; the programs hold no code for it.
    #[default]
    Off,
    /// Every verdict: only for finding a fault, it is slow.
    Debug,
}

// === impl Certificates ===

impl Certificates {
    /// The source that a workload gets its certificate from.
    #[must_use]
    pub fn source_of<'a>(&'a self, workload: &'a Workload) -> &'a str {
        let first = || self.sources.first().map_or("", |(name, _)| name);
        workload.certificates.as_deref().unwrap_or_else(first)
    }

    /// The source itself; none where a workload names one that there is none of.
    #[must_use]
    pub fn source(&self, workload: &Workload) -> Option<&Source> {
        let wanted = self.source_of(workload);
        let found = self.sources.iter().find(|(name, _)| name == wanted);
        found.map(|(_, source)| source)
    }
}

// === impl LogLevel ===

impl LogLevel {
    /// The name, which is also a directive of `tracing_subscriber`'s filter.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

// === impl Default ===

impl Default for Maps {
    fn default() -> Self {
        Self {
            workloads: 4096,
            namespaces: 4096,
            local_addresses: 16_384,
            peers: 131_072,
            peer_ports: 65_536,
            verdicts: 524_288,
            flows: 524_288,
            onward: 65_536,
            events: 1 << 20,
        }
    }
}
