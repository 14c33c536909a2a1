//! Which of the addresses that workloads have in their namespaces are believed.
//!
//! Whoever rules a namespace gives it whatever addresses it likes, and an address stands for its
//! workload in policies. So an address that is known to be somebody's stays so: the node's own, one
//! that is declared, one that another workload had first.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use reeve_common::WorkloadId;

use super::{Remark, Reserved};
use crate::{datapath::InterfaceAddress, workload::RunningWorkload};

/// Addresses of one workload that are believed. Those that are declared are not counted.
pub(super) const MAX_ADDRESSES: usize = 128;

/// The loopback device's index, in every namespace.
const LOOPBACK_DEVICE: u32 = 1;

/// What a workload's namespace has.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) addresses: Vec<InterfaceAddress>,
    /// Whether the namespace is the daemon's own, in which nobody but the node's owner chooses.
    pub(super) in_own: bool,
}

/// Who has which address.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Who had an address at the last look.
    held: HashMap<IpAddr, WorkloadId>,
}

impl Claims {
    /// With what an earlier daemon has left.
    pub(super) fn new(held: HashMap<IpAddr, WorkloadId>) -> Self {
        Self { held }
    }

    /// Gives workloads those of the addresses that were found for them which are believed, and what
    /// there is to say of the others. `node` are addresses of the daemon's own namespace.
    pub(super) fn settle(
        &mut self,
        workloads: &mut [RunningWorkload],
        found: &[Found],
        node: &HashSet<IpAddr>,
        reserved: &Reserved,
        mut remark: impl FnMut(&RunningWorkload, Remark),
    ) {
        let mut taken: HashMap<IpAddr, usize> = HashMap::new();
        for (place, running) in workloads.iter().enumerate() {
            for ip in &running.workload.addresses {
                taken.entry(ip.to_canonical()).or_insert(place);
            }
        }
        let believed = |found: &Found, ip: IpAddr| {
            found.in_own || !(node.contains(&ip) || reserved.addresses.contains_key(&ip))
        };
        let all = |place: usize| found.get(place).into_iter().flat_map(|one| &one.addresses);
        // Who had an address keeps it; then in the order of declaration.
        for (place, (running, one)) in workloads.iter().zip(found).enumerate() {
            for ip in all(place).map(|address| address.ip) {
                if self.held.get(&ip) == Some(&running.workload.id) && believed(one, ip) {
                    taken.entry(ip).or_insert(place);
                }
            }
        }
        let mut given: Vec<Vec<IpAddr>> = Vec::with_capacity(workloads.len());
        for (place, (running, one)) in workloads.iter().zip(found).enumerate() {
            let mut of_loopback = Refused::default();
            let mut of_others = Refused::default();
            let mut left_out = 0;
            let mut own = Vec::new();
            let mut addresses: Vec<&InterfaceAddress> = all(place).collect();
            let is_new = |ip: &IpAddr| self.held.get(ip) != Some(&running.workload.id);
            addresses.sort_by_key(|address| is_new(&address.ip));
            for InterfaceAddress { ip, device } in addresses {
                if *device == LOOPBACK_DEVICE && !one.in_own {
                    of_loopback.add(*ip, String::new());
                    continue;
                }
                if !believed(one, *ip) {
                    let owner = reserved.addresses.get(ip);
                    let owner = owner.map_or_else(|| "the node".to_owned(), Clone::clone);
                    of_others.add(*ip, owner);
                    continue;
                }
                let holder = taken.get(ip).and_then(|holder| workloads.get(*holder));
                if let Some(holder) = holder
                    && holder.workload.id != running.workload.id
                    && !share(holder, running)
                    && !one.in_own
                {
                    of_others.add(*ip, format!("the workload {}", holder.workload.name));
                    continue;
                }
                if own.len() >= MAX_ADDRESSES {
                    left_out += 1;
                    continue;
                }
                taken.entry(*ip).or_insert(place);
                own.push(*ip);
            }
            own.sort_unstable();
            given.push(own);
            if let Some((ip, owner)) = of_others.first {
                let more = of_others.more;
                remark(running, Remark::AddressTaken { ip, owner, more });
            }
            if let Some((ip, _)) = of_loopback.first {
                let more = of_loopback.more;
                remark(running, Remark::LoopbackAddress { ip, more });
            }
            if left_out > 0 {
                remark(running, Remark::TooManyAddresses { left_out });
            }
        }
        self.held = taken
            .into_iter()
            .filter_map(|(ip, place)| Some((ip, workloads.get(place)?.workload.id)))
            .collect();
        for (running, own) in workloads.iter_mut().zip(given) {
            if running.workload.addresses.is_empty() {
                running.addresses = own;
            }
        }
    }
}

/// Addresses that are not believed, for the same reason.
#[derive(Default)]
struct Refused {
    first: Option<(IpAddr, String)>,
    more: usize,
}

impl Refused {
    fn add(&mut self, ip: IpAddr, owner: String) {
        match self.first {
            None => self.first = Some((ip, owner)),
            Some(_) => self.more += 1,
        }
    }
}

/// Whether both are in one namespace, whose addresses are both's.
fn share(one: &RunningWorkload, other: &RunningWorkload) -> bool {
    let inode = |running: &RunningWorkload| running.netns.as_ref().map(|netns| netns.inode);
    inode(one).is_some() && inode(one) == inode(other)
}
