//! A workload's network namespace and its addresses, found through its processes.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::{Arc, Weak},
};

use reeve_common::{NO_WORKLOAD, link_local_key};

use crate::datapath::{
    InterfaceAddress, address,
    netns::{Netns, UserNamespace},
};

/// Processes of one workload that are looked at to tell whether all are where the workload is.
const MAX_PROCESSES: usize = 256;
/// Network namespaces of one workload's processes of which it is asked who owns them.
const MAX_NAMESPACES: usize = 64;
/// Addresses of each family that are read of a namespace. Few of them are believed.
const MAX_READ: usize = 1024;
/// User namespaces inside each other, which the kernel allows 32 of.
const MAX_USER_NAMESPACES: usize = 32;

/// Namespaces that are open, each only for as long as somebody else holds it.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    open: HashMap<u64, Weak<Netns>>,
}

// === impl Namespaces ===

impl Namespaces {
    /// The namespace with this inode, opened through `pid` unless it is open already. None when
    /// the process has gone or moved meanwhile.
    pub(super) fn get(&mut self, inode: u64, pid: u32) -> Option<Arc<Netns>> {
        if let Some(netns) = self.open.get(&inode).and_then(Weak::upgrade) {
            return Some(netns);
        }
        let netns = Netns::of_pid(pid).ok()?;
        if netns.inode != inode {
            return None;
        }
        let netns = Arc::new(netns);
        self.open.insert(inode, Arc::downgrade(&netns));
        Some(netns)
    }

    /// Keeps a namespace that was opened elsewhere.
    pub(super) fn insert(&mut self, netns: &Arc<Netns>) {
        self.open.insert(netns.inode, Arc::downgrade(netns));
    }

    /// Forgets the namespaces that nobody holds.
    pub(super) fn tidy(&mut self) {
        self.open.retain(|_, netns| netns.strong_count() > 0);
    }
}

/// Whose network namespaces are believed to be a workload's: those that are owned by the first user
/// namespace, or by that of the workload's first process, or one around it, where the host's root made
/// it for somebody else, as container runtimes do. In any other the workload made the namespace itself,
/// and with it whatever addresses it likes.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// From the first process's outwards, without the first of all.
    owners: Vec<UserNamespace>,
}

// === impl Trust ===

impl Trust {
    /// By the first of these processes, which is the oldest.
    pub(super) fn of_oldest(pids: &[u32]) -> Self {
        let mut owners = Vec::new();
        let first = oldest_first(pids)
            .first()
            .copied()
            .filter(|pid| has_users_of_others(*pid));
        let mut next = first.and_then(|pid| UserNamespace::of_pid(pid).ok());
        while let Some(namespace) = next
            && namespace.inode != UserNamespace::INITIAL
            && owners.len() < MAX_USER_NAMESPACES
        {
            next = namespace.parent().ok();
            // Whoever is inside may have made it, and those in it.
            if namespace.maker().is_ok_and(|user| user == 0) {
                owners.push(namespace);
            } else {
                owners.clear();
            }
        }
        Self { owners }
    }

    /// Whether the network namespace that a process is in is believed.
    fn believes(&self, pid: u32) -> bool {
        let file = File::open(format!("/proc/{pid}/ns/net"));
        let owner = file.and_then(|file| UserNamespace::owning(&file));
        owner.is_ok_and(|owner| {
            owner.inode == UserNamespace::INITIAL
                || self.owners.iter().any(|known| known.inode == owner.inode)
        })
    }

    /// The namespace that the workload of these processes is in: the one that it has been in, as long
    /// as any of its processes is; else that of the oldest process whose namespace is believed. Gives
    /// its inode and a process in it.
    pub(super) fn namespace(&self, pids: &[u32], before: Option<u64>) -> Option<(u64, u32)> {
        let in_same = |pid: &&u32| before.is_some() && inode(**pid) == before;
        if let (Some(before), Some(pid)) = (before, pids.iter().find(in_same)) {
            return Some((before, *pid));
        }
        let mut seen = HashSet::new();
        oldest_first(pids)
            .into_iter()
            .filter_map(|pid| Some((inode(pid)?, pid)))
            .filter(|(inode, _)| seen.insert(*inode))
            .take(MAX_NAMESPACES)
            .find(|(_, pid)| self.believes(*pid))
    }

    /// Whether any of these processes is in a network namespace that is not believed.
    pub(super) fn has_doubts(&self, pids: &[u32], own: Option<u64>) -> bool {
        let mut seen: HashSet<u64> = own.into_iter().collect();
        pids.iter()
            .take(MAX_PROCESSES)
            .filter_map(|pid| Some((inode(*pid)?, *pid)))
            .filter(|(inode, _)| seen.insert(*inode))
            .take(MAX_NAMESPACES)
            .any(|(_, pid)| !self.believes(pid))
    }
}

/// Addresses of a namespace that others may reach, by an [`is_link_local`] one on its links only: of the
/// first [`MAX_READ`] of each family those that are not reserved for other things, by device.
pub(super) fn addresses(netns: &Netns) -> io::Result<Vec<InterfaceAddress>> {
    let mut addresses = netns.addresses(MAX_READ)?;
    let mut seen = HashSet::new();
    addresses.sort_by_key(|address| address.device);
    addresses.retain(|address| {
        let counts = is_reachable(&address.ip) || is_link_local(&address.ip);
        counts && seen.insert(address.ip)
    });
    Ok(addresses)
}

/// Whether more users than one have a number in a process's user namespace. Who may not become another
/// user gives it his own alone (`user_namespaces(7)`), even where he is root without a capability.
fn has_users_of_others(pid: u32) -> bool {
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap_or_default();
    let numbers = map.lines().map(|line| {
        let count = line.split_ascii_whitespace().nth(2);
        count.and_then(|count| count.parse().ok()).unwrap_or(0_u64)
    });
    numbers.sum::<u64>() > 1
}

/// These processes, the oldest first.
fn oldest_first(pids: &[u32]) -> Vec<u32> {
    let mut pids: Vec<(u64, u32)> = pids
        .iter()
        .filter_map(|pid| Some((started(*pid)?, *pid)))
        .collect();
    pids.sort_unstable();
    pids.into_iter().map(|(_, pid)| pid).collect()
}

/// When a process was started, in ticks of the clock since boot.
fn started(pid: u32) -> Option<u64> {
    /// Fields between the name, which may hold anything, and this one.
    const FIELDS: usize = 19;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(FIELDS)?.parse().ok()
}

/// A zombie has no namespace any more.
pub(super) fn inode(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net"))
        .ok()
        .map(|metadata| metadata.ino())
}

/// Whether others can reach an address by an address of this kind. One of IPv4 in IPv6's form would be
/// taken for that of IPv4, which it is not.
fn is_reachable(ip: &IpAddr) -> bool {
    let everybodys = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast();
    !everybodys
        && match ip {
            IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_broadcast(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local() && ip.to_ipv4_mapped().is_none(),
        }
}

/// Whether an address means something on its link only, where the programs look for it.
pub(super) fn is_link_local(ip: &IpAddr) -> bool {
    link_local_key(&address(*ip), NO_WORKLOAD).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_nobody_elsewhere_reaches_are_not_believed() {
        for ip in ["192.0.2.1", "100.64.0.1", "2001:db8::1", "fd00::1"] {
            assert!(is_reachable(&ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.2",
            "0.0.0.0",
            "169.254.1.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:192.0.2.1",
        ] {
            assert!(!is_reachable(&ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn a_process_is_as_old_as_the_kernel_says_whatever_its_name() {
        let own = started(std::process::id()).unwrap();
        assert!(started(1).unwrap() <= own);
        assert_eq!(oldest_first(&[std::process::id(), 1])[0], 1);
    }
}
