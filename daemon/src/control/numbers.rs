//! The numbers by which the kernel's maps know workloads and peers outlive the daemon, and so does
//! what they mean: an entry that is pinned, or a connection that waits to be accepted, must not
//! come to be another's.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use crate::{
    config::Config,
    datapath::{self, Datapath},
    workload::{
        CgroupSelector,
        cgroup::{CgroupTree, id},
    },
};

/// Bits of an IPv4 address in the maps' form that say that it is one.
const MAPPED_BITS: u32 = 96;

/// The configuration with the numbers that the maps have for the same workloads, found by their
/// cgroups, and for the same peers, found by their addresses.
#[must_use]
pub fn keep_numbers(config: &Config, tree: &CgroupTree, datapath: &Datapath) -> Config {
    let numbers = datapath.numbers();
    let workloads = config.workloads.iter().filter_map(|workload| {
        let folders = match &workload.selector {
            CgroupSelector::Cgroup(path) => vec![tree.folder(path)],
            CgroupSelector::Unit(name) => tree.units(name).0,
        };
        let mut known = folders
            .iter()
            .filter_map(|folder| numbers.workloads.get(&id(folder).ok()?));
        known.next().map(|number| (&workload.name, *number))
    });
    let peers = config.peers.iter().filter_map(|peer| {
        let mut known = peer
            .addresses
            .iter()
            .filter_map(|net| numbers.peers.get(&prefix(*net)));
        known.next().map(|number| (&peer.name, *number))
    });
    let (workloads, peers) = (each_once(workloads), each_once(peers));
    config.clone().with_numbers(&workloads, &peers)
}

/// Names with numbers, without the names whose number another has already.
fn each_once<'a>(names: impl Iterator<Item = (&'a String, u32)>) -> HashMap<String, u32> {
    let mut used = HashSet::new();
    names
        .filter(|(_, number)| used.insert(*number))
        .map(|(name, number)| (name.clone(), number))
        .collect()
}

/// A network as the maps have it.
fn prefix(net: IpNet) -> (u32, reeve_common::Address) {
    let bits = u32::from(net.prefix_len());
    let mapped = if net.addr().is_ipv4() { MAPPED_BITS } else { 0 };
    (bits + mapped, datapath::address(net.network()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_one_names_only() {
        let names = ["a", "b", "c"].map(str::to_owned);
        let found = each_once(names.iter().zip([7, 7, 8]));
        assert_eq!(found, [("a".to_owned(), 7), ("c".to_owned(), 8)].into());
    }

    #[test]
    fn a_network_is_found_as_it_is_written() {
        let (bits, address) = prefix("10.1.2.3/8".parse().unwrap());
        assert_eq!(
            (bits, address),
            (104, reeve_common::ipv4_mapped([10, 0, 0, 0]))
        );
        assert_eq!(prefix("fd00::1/128".parse().unwrap()).0, 128);
    }
}
