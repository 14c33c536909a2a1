//! A workload's network namespace and its addresses, found through its processes.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::{Arc, Weak},
};

use nix::ifaddrs::getifaddrs;

use crate::datapath::netns::Netns;

/// Processes of one workload that are asked for their namespace.
const MAX_PROCESSES: usize = 256;

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

/// The namespace that most of the processes are in, and one of these processes. Of equals the
/// one that it was before wins, since a helper that enters a namespace for a moment is no move.
pub(super) fn of_processes(pids: &[u32], before: Option<u64>) -> Option<(u64, u32)> {
    let mut found: BTreeMap<u64, (usize, u32)> = BTreeMap::new();
    pids.iter()
        .filter_map(|pid| Some((inode(*pid)?, *pid)))
        .take(MAX_PROCESSES)
        .for_each(|(inode, pid)| found.entry(inode).or_insert((0, pid)).0 += 1);
    found
        .into_iter()
        .max_by_key(|(inode, (count, _))| (*count, Some(*inode) == before))
        .map(|(inode, (_, pid))| (inode, pid))
}

/// Addresses of a namespace that others may reach, in a stable order.
pub(super) fn addresses(netns: &Netns) -> io::Result<Vec<IpAddr>> {
    let mut addresses: Vec<IpAddr> = netns
        .run(|| Ok(getifaddrs()?))?
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
            v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
        })
        .filter(|ip| !is_local(ip))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// A zombie has no namespace any more.
fn inode(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net"))
        .ok()
        .map(|metadata| metadata.ino())
}

fn is_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}
