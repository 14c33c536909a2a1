//! `reeve check`: everything that can be said of a configuration without running it.

use std::{fmt, path::Path, sync::Arc};

use serde::Serialize;

use super::{Config, ConfigErrors};
use crate::{
    policy::{Inputs, KernelTables, Known, PolicySet, Snapshot},
    workload::{Peer, RunningWorkload, Workload},
    yaml,
};

/// What a configuration without mistakes holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Workloads of this node.
    pub workloads: usize,
    /// Peers.
    pub peers: usize,
    /// Policies.
    pub policies: usize,
    /// Rules of the policies.
    pub rules: usize,
    /// What is not wrong, and probably not meant.
    pub warnings: Vec<String>,
    /// The configuration.
    #[serde(skip)]
    pub config: Option<Config>,
}

/// Reads the configuration and its policies, and checks them as `reeve run` would.
///
/// # Errors
/// Every mistake in any of the files.
pub fn check(path: &Path) -> Result<Summary, ConfigErrors> {
    let (config, mut mistakes) = Config::read(path, &yaml::read_file(path)?);
    let Some(config) = config else {
        mistakes.into_result()?;
        return Ok(Summary::default());
    };
    if !mistakes.is_empty() {
        mistakes.extend(PolicySet::mistakes(&config.policies));
        return mistakes.into_result().map(|()| Summary::default());
    }
    let known = Known {
        workloads: &config.workloads,
        peers: &config.peers,
        namespaces: &config.namespaces,
    };
    let policies = PolicySet::load(&config.policies, &known)?;
    let tables = compile(&config, &policies);
    for (map, entries, capacity) in [
        ("workloads", config.workloads.len(), config.maps.workloads),
        ("peers", tables.peers.len(), config.maps.peers),
        ("peerPorts", tables.peer_ports.len(), config.maps.peer_ports),
        ("verdicts", tables.verdicts.len(), config.maps.verdicts),
    ] {
        if entries > capacity as usize {
            mistakes.file(
                path,
                format!("needs {entries} entries, and `maps.{map}` has {capacity}; raise it"),
            );
        }
    }
    mistakes.into_result()?;
    let mut warnings = unknown_domains(&config);
    warnings.extend(policies.warnings().iter().map(ToString::to_string));
    Ok(Summary {
        workloads: config.workloads.len(),
        peers: config.peers.len(),
        policies: policies.len(),
        rules: policies.rules(),
        warnings,
        config: Some(config),
    })
}

/// Peers whose certificates nothing here can verify.
fn unknown_domains(config: &Config) -> Vec<String> {
    let endpoints = &config.certificates.bundle_endpoints;
    let warning = |peer: &Arc<Peer>| {
        let domain = peer.attributes.as_ref()?.spiffe_id.trust_domain();
        let known = *domain == config.trust_domain
            || config.certificates.trust_bundles.contains_key(domain)
            || endpoints.iter().any(|it| it.trust_domain == *domain);
        (peer.tunnel_port.is_some() && !known).then(|| {
            format!(
                "{}: the peer `{}` is of the trust domain `{domain}`, which \
                 neither `certificates.trustBundles` nor `certificates.bundleEndpoints` has: no \
                 tunnel to it will stand",
                config.file.display(),
                peer.name
            )
        })
    };
    config.peers.iter().filter_map(warning).collect()
}

/// The kernel's tables, as far as they are known before anything runs.
fn compile(config: &Config, policies: &PolicySet) -> KernelTables {
    let running = |workload: &Arc<Workload>| {
        Arc::new(RunningWorkload {
            link_local: Vec::new(),
            workload: Arc::clone(workload),
            cgroups: Vec::new(),
            netns: None,
            owns_netns: false,
            addresses: workload.addresses.clone(),
        })
    };
    let workloads: Vec<_> = config.workloads.iter().map(running).collect();
    let snapshot = Snapshot::compile(&Inputs {
        workloads: &workloads,
        peers: &config.peers,
        namespaces: &config.namespaces,
        policies,
        unselected: config.unselected,
        node_addresses: &config.node.addresses,
        tunnel_port: config.ports.tunnel,
    });
    snapshot.kernel_tables().clone()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} workloads, {} peers, {} policies with {} rules",
            self.workloads, self.peers, self.policies, self.rules
        )?;
        for warning in &self.warnings {
            write!(f, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}
