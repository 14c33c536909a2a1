//! What the kernel's maps shall hold, besides the policy's tables.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use reeve_common::{
    Address, ExpectedCgroup, NAMESPACE_LISTENING, NO_WORKLOAD, NamespaceEntry, ShownAddresses,
    WORKLOAD_IS_REEVE, WORKLOAD_UNKNOWN, WorkloadEntry, WorkloadId, link_local_key,
};

use crate::{
    datapath::{KernelState, netns::Netns},
    policy::KernelTables,
    workload::{Discovery, cgroup::CgroupTree},
};

/// The maps' contents for what runs here now.
///
/// `own` are the daemon's own cgroups, `listening` the cookies of the namespaces in which the
/// tunnel's listeners stand, and `without` has flags for those out of which a family does not lead.
pub(super) fn kernel_state(
    own: &[(u64, u32)],
    discovery: &Discovery,
    listening: &HashSet<u64>,
    without: &HashMap<u64, u32>,
    tables: KernelTables,
) -> KernelState {
    KernelState {
        workloads: workloads(own, discovery),
        expected: expected(discovery),
        namespaces: namespaces(discovery, listening, without),
        local_addresses: local_addresses(discovery),
        shown_addresses: shown_addresses(discovery),
        tables,
    }
}

/// Whose each cgroup is where the kernel enforces `state`. Reads the tree.
pub(super) fn owners(cgroups: &CgroupTree, state: &KernelState) -> HashMap<u64, WorkloadEntry> {
    let known = state.workloads.iter();
    cgroups.nearest(&known.map(|(cgroup, _, entry)| (*cgroup, *entry)).collect())
}

/// The network namespaces in which workloads run, each once.
pub(super) fn running_namespaces(discovery: &Discovery) -> Vec<Arc<Netns>> {
    let by_cookie: BTreeMap<u64, &Arc<Netns>> = discovery
        .workloads
        .iter()
        .filter_map(|running| running.netns.as_ref())
        .map(|netns| (netns.cookie, netns))
        .collect();
    by_cookie.into_values().cloned().collect()
}

/// A cgroup that is several things at once is the first of these: reeve's own, the workload that
/// is declared first, an enforced parent.
fn workloads(own: &[(u64, u32)], discovery: &Discovery) -> Vec<(u64, u32, WorkloadEntry)> {
    let entry = |workload, flags| WorkloadEntry { workload, flags };
    let own = own
        .iter()
        .map(|cgroup| (*cgroup, entry(NO_WORKLOAD, WORKLOAD_IS_REEVE)));
    let declared = discovery.workloads.iter().flat_map(|running| {
        let entry = entry(running.workload.id, 0);
        running.cgroups.iter().map(move |cgroup| (*cgroup, entry))
    });
    let parents = discovery
        .enforced_parents
        .iter()
        .map(|cgroup| (*cgroup, entry(NO_WORKLOAD, WORKLOAD_UNKNOWN)));

    let mut seen = HashSet::new();
    own.chain(declared)
        .chain(parents)
        .filter(|(cgroup, _)| seen.insert(*cgroup))
        .map(|((id, depth), entry)| (id, depth, entry))
        .collect()
}

/// What is too long for the map is found when it is there.
fn expected(discovery: &Discovery) -> Vec<(ExpectedCgroup, u32, WorkloadId)> {
    let expected = discovery.expected.iter();
    let keyed = expected.filter_map(|expected| {
        let key = ExpectedCgroup::new(expected.parent, expected.name.as_bytes())?;
        Some((key, expected.depth, expected.workload))
    });
    keyed.collect()
}

fn namespaces(
    discovery: &Discovery,
    listening: &HashSet<u64>,
    without: &HashMap<u64, u32>,
) -> Vec<(u64, NamespaceEntry)> {
    running_namespaces(discovery)
        .into_iter()
        .map(|netns| {
            let owner = discovery.workloads.iter().find(|running| {
                running.owns_netns
                    && running
                        .netns
                        .as_ref()
                        .is_some_and(|own| own.cookie == netns.cookie)
            });
            let entry = NamespaceEntry {
                workload: owner.map_or(NO_WORKLOAD, |running| running.workload.id),
                flags: without.get(&netns.cookie).copied().unwrap_or_default()
                    | if listening.contains(&netns.cookie) {
                        NAMESPACE_LISTENING
                    } else {
                        0
                    },
            };
            (netns.cookie, entry)
        })
        .collect()
}

fn local_addresses(discovery: &Discovery) -> Vec<(Address, WorkloadId)> {
    let mut seen = HashSet::new();
    discovery
        .workloads
        .iter()
        .filter(|running| running.owns_netns)
        .flat_map(|running| {
            let workload = running.workload.id;
            let everywhere = running.addresses.iter().map(|ip| map_address(*ip));
            let on_links = running.link_local.iter();
            let on_links =
                on_links.filter_map(move |ip| link_local_key(&map_address(*ip), workload));
            everywhere
                .chain(on_links)
                .map(move |address| (address, workload))
        })
        .filter(|(address, _)| seen.insert(*address))
        .collect()
}

/// The first address of each family: the daemon does not know where a connection would leave.
fn shown_addresses(discovery: &Discovery) -> Vec<(WorkloadId, ShownAddresses)> {
    let workloads = discovery.workloads.iter().map(|running| {
        let first = |is_v4| {
            let mut addresses = running.addresses.iter();
            let first = addresses.find(|ip| ip.is_ipv4() == is_v4);
            first.map_or([0; 16], |ip| map_address(*ip))
        };
        let shown = ShownAddresses {
            v4: first(true),
            v6: first(false),
        };
        (running.workload.id, shown)
    });
    workloads.collect()
}

fn map_address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => Ipv6Addr::octets(&ip),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use reeve_common::NAMESPACE_WITHOUT_V6;

    use super::*;
    use crate::{
        identity::SpiffeId,
        workload::{Attributes, CgroupSelector, RunningWorkload, Workload},
    };

    fn running(id: WorkloadId, cgroup: u64, netns: Option<Arc<Netns>>) -> Arc<RunningWorkload> {
        Arc::new(RunningWorkload {
            link_local: vec!["fe80::1".parse().unwrap()],
            workload: Arc::new(Workload {
                id,
                name: format!("w{id}"),
                attributes: Attributes {
                    namespace: "default".into(),
                    service_account: "sa".into(),
                    labels: BTreeMap::new(),
                    spiffe_id: SpiffeId::parse("spiffe://example.org/a").unwrap(),
                },
                selector: CgroupSelector::Cgroup(format!("/w{id}")),
                ports: Vec::new(),
                addresses: Vec::new(),
                certificates: None,
                named_ports: BTreeMap::new(),
                permissive: false,
            }),
            cgroups: vec![(cgroup, 1)],
            owns_netns: netns.is_some(),
            netns,
            addresses: vec!["192.0.2.1".parse().unwrap()],
        })
    }

    #[test]
    fn a_cgroup_has_one_meaning() {
        let discovery = Discovery {
            workloads: vec![running(1, 10, None), running(2, 10, None)],
            enforced_parents: vec![(10, 1), (11, 1)],
            ..Discovery::default()
        };
        let found = workloads(&[(12, 2)], &discovery);
        let meanings: Vec<_> = found
            .iter()
            .map(|(id, _, entry)| (*id, entry.workload, entry.flags))
            .collect();
        assert_eq!(
            meanings,
            [
                (12, NO_WORKLOAD, WORKLOAD_IS_REEVE),
                (10, 1, 0),
                (11, NO_WORKLOAD, WORKLOAD_UNKNOWN)
            ]
        );
    }

    #[test]
    fn a_namespace_listens_once_it_is_said_to() {
        let netns = Arc::new(Netns::of_pid(std::process::id()).unwrap());
        let discovery = Discovery {
            workloads: vec![running(7, 10, Some(netns.clone()))],
            ..Discovery::default()
        };
        let state = |listening: &HashSet<u64>, without: &HashMap<u64, u32>| {
            kernel_state(&[], &discovery, listening, without, KernelTables::default())
        };
        let before = state(&HashSet::new(), &HashMap::new());
        assert_eq!(before.namespaces[0].1.flags, 0);
        assert_eq!(before.namespaces[0].1.workload, 7);
        // On its links it is found by the workload as well: others may have the same address there.
        let on_links = Ipv6Addr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1]).octets();
        let on_links = link_local_key(&on_links, 7).unwrap();
        assert_eq!(
            before.local_addresses,
            [
                (reeve_common::ipv4_mapped([192, 0, 2, 1]), 7),
                (on_links, 7)
            ]
        );
        let listening = HashSet::from([netns.cookie]);
        let after = state(&listening, &HashMap::new());
        assert_eq!(after.namespaces[0].1.flags, NAMESPACE_LISTENING);
        let without = HashMap::from([(netns.cookie, NAMESPACE_WITHOUT_V6)]);
        let after = state(&listening, &without);
        let both = NAMESPACE_LISTENING | NAMESPACE_WITHOUT_V6;
        assert_eq!(after.namespaces[0].1.flags, both);
    }
}
