//! From what is written to what is meant: defaults that depend on other fields, names that must be
//! unique, and fields that must fit each other.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Admin, Certificates, Config, FIRST_PEER_ID, Metrics, Node, Ports,
    file::{RawConfig, RawNamedPorts, RawNamespace, RawNode, RawPolicies, RawWorkload},
};
use crate::{
    identity::{SpiffeId, TrustDomain},
    policy::PolicySources,
    workload::{Attributes, CgroupSelector, NamedPorts, Namespaces, Workload},
    yaml::{
        Document, Located, Mistakes, NodeId,
        values::{Labels, Name},
    },
};

mod bundle_endpoints;
mod certificates;
mod peers;
mod tls;

const STATE_DIR: &str = "/var/lib/reeve";
const BPFFS: &str = "/sys/fs/bpf/reeve";
const PROC: &str = "/proc";
const ADMIN_SOCKET: &str = "/run/reeve/admin.sock";
const DEFAULT_NAMESPACE: &str = "default";
/// Cgroups of reeve itself that its map of cgroups has room for: a daemon's, and that of the one before
/// while they change over.
const OWN_CGROUPS: usize = 2;
/// Name of a node whose host has none.
const NAMELESS_NODE: &str = "localhost";

/// Where mistakes about one document go.
struct Report<'a> {
    document: &'a Document,
    mistakes: &'a mut Mistakes,
    /// Whether workloads need not say where they run.
    anywhere: bool,
    /// What each name was given to first: workloads and peers share them.
    names: HashMap<String, NodeId>,
}

/// The fields that make an identity, for workloads and peers alike.
struct Identity<'a> {
    name: &'a str,
    namespace: Option<&'a Name>,
    service_account: Option<&'a Name>,
    labels: Labels,
    spiffe_id: Option<&'a Located<SpiffeId>>,
}

/// Checks the document as a whole. What is returned beside mistakes is good for finding more of
/// them only.
///
/// The configuration is the mapping `root`; with `anywhere`, its workloads need not say where they
/// run.
pub(super) fn settle(
    document: &Document,
    root: NodeId,
    raw: RawConfig,
    anywhere: bool,
    mistakes: &mut Mistakes,
) -> Option<Config> {
    let mut report = Report {
        document,
        mistakes,
        anywhere,
        names: HashMap::new(),
    };
    let trust_domain = report.require(root, "trustDomain", raw.trust_domain);
    // Stands in for the one that is missing, so that the rest is checked all the same.
    let stand_in = TrustDomain::parse("missing").ok()?;
    let domain = trust_domain.unwrap_or(stand_in);
    let ports = report.ports(raw.ports);
    let tls = report.tls(raw.tls);
    let namespaces = report.namespaces(raw.namespaces);
    let file = document.file().to_path_buf();
    let folder = file.parent().unwrap_or(Path::new("")).to_owned();
    let state_dir = raw
        .state_dir
        .map_or_else(|| PathBuf::from(STATE_DIR), |path| folder.join(path.0));
    let names: Vec<&str> = raw
        .workloads
        .iter()
        .filter_map(|workload| workload.name.as_ref().map(|name| name.as_str()))
        .collect();
    report.selected_workloads(&raw.certificates, &names);
    let certificates = report.certificates(raw.certificates, &folder, &state_dir, &domain);
    let workloads = report.workloads(raw.workloads, &domain, &certificates);
    let peers = report.peers(raw.peers, &domain, ports.tunnel);
    let cgroups = workloads.len() + raw.enforced_parents.len();
    report.room_for_cgroups(root, cgroups, raw.maps.workloads);

    Some(Config {
        trust_domain: domain,
        node: node(raw.node, &folder),
        certificates,
        state_dir,
        workloads,
        enforced_parents: raw
            .enforced_parents
            .into_iter()
            .map(|path| path.value.0)
            .collect(),
        peers,
        namespaces,
        unselected: raw.policies.unselected,
        policies: policies(raw.policies, &folder),
        tls,
        ports,
        congestion_control: raw.tunnel.congestion_control,
        limits: raw.limits,
        timeouts: raw.timeouts,
        maps: raw.maps,
        sandbox: raw.sandbox,
        metrics: Metrics {
            address: raw.metrics.address.map(|address| address.0),
            rules: raw.metrics.rules,
        },
        admin: Admin {
            socket: raw
                .admin
                .socket
                .map_or_else(|| PathBuf::from(ADMIN_SOCKET), |path| folder.join(path.0)),
            recent_events: raw.admin.recent_events,
        },
        log: raw.log,
        file,
    })
}

fn node(raw: RawNode, folder: &Path) -> Node {
    Node {
        name: raw.name.map_or_else(host_name, String::from),
        addresses: raw.addresses.into_iter().map(|ip| ip.0).collect(),
        host_addresses: raw.host_addresses,
        cgroup_root: raw.cgroup_root.map(|path| folder.join(path.0)),
        bpffs: raw
            .bpffs
            .map_or_else(|| PathBuf::from(BPFFS), |path| folder.join(path.0)),
        proc: raw
            .proc
            .map_or_else(|| PathBuf::from(PROC), |path| folder.join(path.0)),
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .and_then(|name| Name::try_from(name.trim().to_owned()).ok())
        .map_or_else(|| NAMELESS_NODE.to_owned(), String::from)
}

fn policies(raw: RawPolicies, folder: &Path) -> PolicySources {
    PolicySources {
        folder: raw.folder.map(|path| folder.join(path.0)),
        files: raw
            .files
            .into_iter()
            .map(|path| folder.join(path.0))
            .collect(),
    }
}

fn named_ports(raw: &RawNamedPorts) -> NamedPorts {
    raw.iter()
        .map(|(name, port)| (name.0.clone(), port.0))
        .collect()
}

// === impl Report ===

impl Report<'_> {
    fn mistake(&mut self, node: NodeId, what: impl Into<String>) {
        self.mistakes.push(self.document.mistake(node, what));
    }

    /// Notes that a field is missing, unless it is there and was mistaken by itself.
    fn require<T>(&mut self, mapping: NodeId, field: &str, value: Option<T>) -> Option<T> {
        if value.is_none() && !self.has(mapping, field) {
            self.mistake(mapping, format!("`{field}` is missing; add it"));
        }
        value
    }

    /// Whether a field is written and not `null`, readable or not.
    fn has(&self, mapping: NodeId, field: &str) -> bool {
        self.document
            .child(mapping, field)
            .is_some_and(|value| !self.document.is_null(value))
    }

    /// Notes a name; each may be given once.
    fn unique_name(&mut self, name: &Located<Name>) {
        match self.names.get(name.as_str()) {
            None => {
                self.names.insert(name.as_str().to_owned(), name.node);
            }
            Some(first) => {
                let line = self.document.line(*first);
                self.mistake(
                    name.node,
                    format!(
                        "`{}` is given already on line {line}; workloads and peers need \
                         different names",
                        name.as_str()
                    ),
                );
            }
        }
    }

    /// A workload without room in the map of cgroups would not be enrolled.
    fn room_for_cgroups(&mut self, root: NodeId, declared: usize, capacity: u32) {
        let needed = declared + OWN_CGROUPS;
        if needed <= capacity as usize {
            return;
        }
        let maps = self.document.child(root, "maps");
        let field = maps.and_then(|maps| self.document.child(maps, "workloads"));
        self.mistake(
            field.or(maps).unwrap_or(root),
            format!(
                "`maps.workloads` is {capacity}; the workloads and enforced parents that are \
                 declared need room for {needed} cgroups, reeve's own among them; raise it"
            ),
        );
    }

    fn ports(&mut self, raw: Option<Located<Ports>>) -> Ports {
        let Some(ports) = raw else {
            return Ports::default();
        };
        if ports.outbound == ports.tunnel {
            self.mistake(
                ports.node,
                format!(
                    "both ports are {}; expected two different ones",
                    ports.tunnel
                ),
            );
        }
        ports.value
    }

    fn workloads(
        &mut self,
        raw: Vec<Located<RawWorkload>>,
        domain: &TrustDomain,
        certificates: &Certificates,
    ) -> Vec<Arc<Workload>> {
        let mut selectors: HashMap<String, NodeId> = HashMap::new();
        let mut sources = HashMap::new();
        let mut workloads = Vec::with_capacity(raw.len());
        for (workload, id) in raw.into_iter().zip(1..) {
            if id >= FIRST_PEER_ID {
                self.mistake(
                    workload.node,
                    format!("is workload {id}; at most {} fit", FIRST_PEER_ID - 1),
                );
                break;
            }
            self.chosen_source(&workload, certificates);
            let Some(settled) = self.workload(&workload, id, domain) else {
                continue;
            };
            self.one_source(&workload, &settled, certificates, &mut sources);
            let (CgroupSelector::Cgroup(place) | CgroupSelector::Unit(place)) = &settled.selector;
            if let Some(first) = selectors.get(place) {
                let line = self.document.line(*first);
                self.mistake(
                    workload.node,
                    format!(
                        "runs in `{place}`, as the workload on line {line} does; give each \
                         workload a cgroup of its own"
                    ),
                );
            } else {
                selectors.insert(place.clone(), workload.node);
            }
            workloads.push(Arc::new(settled));
        }
        workloads
    }

    fn workload(
        &mut self,
        raw: &Located<RawWorkload>,
        id: u32,
        domain: &TrustDomain,
    ) -> Option<Workload> {
        let name = self.require(raw.node, "name", raw.name.as_ref());
        if let Some(name) = name {
            self.unique_name(name);
        }
        match (self.has(raw.node, "cgroup"), self.has(raw.node, "unit")) {
            (true, true) => {
                self.mistake(raw.node, "has `cgroup` and `unit`; keep one of them");
            }
            (false, false) if !self.anywhere => {
                self.mistake(
                    raw.node,
                    "has neither `cgroup` nor `unit`; add the one that tells where it runs",
                );
            }
            _ => {}
        }
        let selector = match (&raw.cgroup, &raw.unit) {
            (Some(path), None) => Some(CgroupSelector::Cgroup(path.0.clone())),
            (None, Some(unit)) => Some(CgroupSelector::Unit(unit.0.clone())),
            (None, None) if self.anywhere => {
                name.map(|name| CgroupSelector::Cgroup(format!("/{}", name.as_str())))
            }
            _ => None,
        };
        if let Some(id) = &raw.spiffe_id
            && id.trust_domain() != domain
        {
            self.mistake(
                id.node,
                format!(
                    "`{}` is of another trust domain; workloads of this node are of `{domain}`",
                    id.value
                ),
            );
        }
        let name = name?.as_str();
        let attributes = self.attributes(
            &Identity {
                name,
                namespace: raw.namespace.as_ref(),
                service_account: raw.service_account.as_ref(),
                labels: raw.labels.clone(),
                spiffe_id: raw.spiffe_id.as_ref(),
            },
            domain,
            raw.node,
        );
        Some(Workload {
            id,
            name: name.to_owned(),
            attributes: attributes?,
            selector: selector?,
            ports: raw.ports.iter().map(|port| port.0).collect(),
            addresses: raw.addresses.iter().map(|ip| ip.0).collect(),
            certificates: raw
                .certificates
                .as_ref()
                .map(|name| name.as_str().to_owned()),
            named_ports: named_ports(&raw.named_ports),
            permissive: raw.permissive,
        })
    }

    fn namespaces(&mut self, raw: Vec<Located<RawNamespace>>) -> Namespaces {
        let mut namespaces = Namespaces::default();
        for namespace in raw {
            let Some(name) = self.require(namespace.node, "name", namespace.name.as_ref()) else {
                continue;
            };
            let labels = namespace.labels.0.clone();
            let own = labels.get(Namespaces::NAME_LABEL);
            if own.is_some_and(|own| own != name.as_str()) {
                self.mistake(
                    namespace.node,
                    format!(
                        "has another label `{}` than its name; remove it, every namespace has it",
                        Namespaces::NAME_LABEL
                    ),
                );
            }
            if namespaces
                .0
                .insert(name.as_str().to_owned(), labels)
                .is_some()
            {
                self.mistake(
                    name.node,
                    format!(
                        "the namespace `{}` is given already; keep one",
                        name.as_str()
                    ),
                );
            }
        }
        namespaces
    }

    /// Fills in what is not given. A SPIFFE ID of the usual form says the namespace and the
    /// service account; where they are written too, they must say the same.
    fn attributes(
        &mut self,
        identity: &Identity<'_>,
        domain: &TrustDomain,
        node: NodeId,
    ) -> Option<Attributes> {
        let from_id = identity.spiffe_id.and_then(|id| id.service_account());
        if let (Some((namespace, account)), Some(id)) = (from_id, identity.spiffe_id) {
            for (field, written, said) in [
                ("namespace", identity.namespace, namespace),
                ("serviceAccount", identity.service_account, account),
            ] {
                if let Some(written) = written.filter(|written| written.as_str() != said) {
                    self.mistake(
                        id.node,
                        format!(
                            "says `{said}` where `{field}` says `{}`; make them the same, or \
                             leave `{field}` out",
                            written.as_str()
                        ),
                    );
                }
            }
        }
        let namespace = identity
            .namespace
            .map(Name::as_str)
            .or(from_id.map(|(namespace, _)| namespace))
            .unwrap_or(DEFAULT_NAMESPACE);
        let service_account = identity
            .service_account
            .map(Name::as_str)
            .or(from_id.map(|(_, account)| account))
            .unwrap_or(identity.name);
        let spiffe_id = match identity.spiffe_id {
            Some(id) => id.value.clone(),
            None => match SpiffeId::for_service_account(domain, namespace, service_account) {
                Ok(id) => id,
                Err(error) => {
                    self.mistake(
                        node,
                        format!("no SPIFFE ID can be made of its names: {error}; give `spiffeId`"),
                    );
                    return None;
                }
            },
        };
        Some(Attributes {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            labels: identity.labels.0.clone(),
            spiffe_id,
        })
    }
}
