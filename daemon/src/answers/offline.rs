//! A snapshot from files alone, without anything running.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use crate::{
    config::{Config, ConfigErrors},
    policy::{Inputs, Known, PolicySet, Snapshot},
    workload::{CgroupSelector, RunningWorkload, Workload},
    yaml::Document,
};

/// Stand in for the addresses that a workload will have when it runs: 0.0.0.0/8, in which no host has an
/// address, so that only the widest blocks of policies hold them. They are never shown.
const STAND_INS: u32 = 0x00ff_fffe;

/// A configuration and its policies, compiled as if all workloads ran.
#[derive(Debug)]
pub struct Offline {
    /// The configuration.
    pub config: Config,
    /// The policies.
    pub policies: PolicySet,
    /// What they come to.
    pub snapshot: Snapshot,
}

// === impl Offline ===

impl Offline {
    /// Reads a configuration and the policies that it names.
    ///
    /// # Errors
    /// Every mistake in any of the files.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        let config = Config::load(file)?;
        let known = Known {
            workloads: &config.workloads,
            peers: &config.peers,
            namespaces: &config.namespaces,
        };
        let policies = PolicySet::load(&config.policies, &known)?;
        Ok(Self::new(config, policies))
    }

    /// A configuration that was read elsewhere, with policies that were, and those that it names.
    pub(super) fn beside(config: Config, policies: &[&Document]) -> Result<Self, ConfigErrors> {
        let known = Known {
            workloads: &config.workloads,
            peers: &config.peers,
            namespaces: &config.namespaces,
        };
        let policies = PolicySet::load_beside(&config.policies, policies, &known)?;
        Ok(Self::new(config, policies))
    }

    /// Compiles. A workload whose addresses are not declared gets one that nobody uses.
    #[must_use]
    pub fn new(config: Config, policies: PolicySet) -> Self {
        let workloads = running(&config.workloads);
        let snapshot = Snapshot::compile(&Inputs {
            workloads: &workloads,
            peers: &config.peers,
            namespaces: &config.namespaces,
            policies: &policies,
            unselected: config.unselected,
            node_addresses: &config.node.addresses,
            tunnel_port: config.ports.tunnel,
        });
        Self {
            config,
            policies,
            snapshot,
        }
    }
}

/// Whether an address is only a stand-in.
pub(super) fn is_stand_in(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.to_bits() >> 24 == 0)
}

/// An address for somebody of whom none is known.
pub(super) fn stand_in(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(number % STAND_INS + 1).into()
}

/// The workloads as they will run: alone in their namespaces, but for units, which share the
/// host's.
fn running(workloads: &[Arc<Workload>]) -> Vec<Arc<RunningWorkload>> {
    let run = |(workload, number): (&Arc<Workload>, u32)| {
        let mut addresses = workload.addresses.clone();
        if addresses.is_empty() {
            addresses.push(stand_in(number));
        }
        Arc::new(RunningWorkload {
            link_local: Vec::new(),
            workload: Arc::clone(workload),
            cgroups: Vec::new(),
            netns: None,
            owns_netns: matches!(workload.selector, CgroupSelector::Cgroup(_)),
            addresses,
        })
    };
    workloads.iter().zip(1..).map(run).collect()
}
