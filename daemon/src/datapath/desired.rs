//! What the maps shall hold, by key, and what of it they have room for.
//!
//! A refusal that finds no room would leave a wider allowance alone. So what fits is decided before
//! anything is written: a workload whose verdicts have no room is refused everything in that
//! direction, and whatever could be an address or a port without room is refused too. Both have
//! [`reeve_common::Reason::MapFailure`] for their reason.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet},
};

use reeve_common::{
    Action, Address, Direction, DryRun, NO_WORKLOAD, NamespaceEntry, PEER_NO_ROOM, PeerEntry,
    PeerKey, PeerPortKey, VERDICT_PREFIX_ANY_PROTOCOL, VERDICT_PREFIX_FULL, VerdictEntry,
    VerdictKey, WorkloadEntry, WorkloadId, protocol,
};

use super::{KernelState, transition::Peers};

/// Bits of an address.
const ADDRESS_BITS: u32 = 128;

/// Entries of a trie that are left free: older kernels want room even to change an entry.
const SPARE: usize = 1;

/// What is said of a workload and direction without room.
pub(super) const NO_ROOM: VerdictEntry = VerdictEntry {
    action: Action::NoRoom as u32,
    rule: 0,
    dry_run: DryRun::Same as u32,
    dry_run_rule: 0,
};

/// A workload and a [`reeve_common::Direction`] as a number.
pub(super) type Side = (WorkloadId, u8);

/// Capacities of the maps that workloads, policies and peers fill.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) workloads: u32,
    pub(super) namespaces: u32,
    pub(super) local_addresses: u32,
    pub(super) peers: u32,
    pub(super) peer_ports: u32,
    pub(super) verdicts: u32,
}

/// Entries that have no room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Shortage {
    pub(super) workloads: usize,
    pub(super) namespaces: usize,
    pub(super) local_addresses: usize,
    pub(super) peers: usize,
    pub(super) peer_ports: usize,
    pub(super) verdicts: usize,
    /// Whose verdicts they are.
    pub(super) closed: BTreeSet<Side>,
}

// === impl Shortage ===

impl Shortage {
    /// Entries of all maps.
    pub(super) fn total(&self) -> usize {
        self.workloads
            + self.namespaces
            + self.local_addresses
            + self.peers
            + self.peer_ports
            + self.verdicts
    }
}

/// What the maps hold already, and keep where there is room for it.
pub(super) struct Kept<'a> {
    pub(super) cgroups: &'a HashMap<u64, WorkloadEntry>,
    pub(super) peers: &'a Peers,
    /// Workloads and directions with verdicts.
    pub(super) sides: HashSet<Side>,
}

/// A desired state.
pub(super) struct Desired {
    pub(super) depths: u32,
    pub(super) workloads: HashMap<u64, WorkloadEntry>,
    pub(super) namespaces: HashMap<u64, NamespaceEntry>,
    pub(super) local_addresses: HashMap<Address, WorkloadId>,
    pub(super) peers: HashMap<(u32, PeerKey), PeerEntry>,
    pub(super) peer_ports: HashMap<PeerPortKey, PeerEntry>,
    pub(super) verdicts: HashMap<(u32, VerdictKey), VerdictEntry>,
}

// === impl Desired ===

impl Desired {
    pub(super) fn new(state: &KernelState) -> Self {
        Self {
            depths: {
                let there = state.workloads.iter().map(|(_, depth, _)| *depth);
                let to_come = state.expected.iter().map(|(_, depth, _)| *depth);
                let depths = there.chain(to_come);
                depths.fold(0, |depths, depth| depths | 1_u32.wrapping_shl(depth))
            },
            workloads: state
                .workloads
                .iter()
                .map(|(id, _, entry)| (*id, *entry))
                .collect(),
            namespaces: state.namespaces.iter().copied().collect(),
            local_addresses: state.local_addresses.iter().copied().collect(),
            peers: state
                .tables
                .peers
                .iter()
                .map(|(bits, address, entry)| ((*bits, masked(*address, *bits)), *entry))
                .collect(),
            peer_ports: state.tables.peer_ports.iter().copied().collect(),
            verdicts: state
                .tables
                .verdicts
                .iter()
                .map(|(bits, key, entry)| ((*bits, masked_verdict(*key, *bits)), *entry))
                .collect(),
        }
    }

    /// Drops entries that do not fit, newcomers first, and refuses every connection that such an entry
    /// could have matched.
    pub(super) fn fit(&mut self, room: Room, kept: &Kept<'_>) -> Shortage {
        let workloads = self.fit_workloads(room.workloads as usize, kept.cgroups);
        let mut closed = BTreeSet::new();
        let namespaces = self.fit_namespaces(room.namespaces as usize, &mut closed);
        let local_addresses = self.fit_local_addresses(room.local_addresses as usize, &mut closed);
        let peer_ports = self.fit_peer_ports(room.peer_ports as usize);
        let peers = self.fit_peers((room.peers as usize).saturating_sub(SPARE), kept.peers);
        let room = (room.verdicts as usize).saturating_sub(SPARE);
        let verdicts = self.fit_verdicts(room, &mut closed, &kept.sides);
        Shortage {
            workloads,
            namespaces,
            local_addresses,
            peers,
            peer_ports,
            verdicts,
            closed,
        }
    }

    /// Enforced parents stay, which refuse what is left out below them, and who is enrolled already.
    fn fit_workloads(&mut self, room: usize, enrolled: &HashMap<u64, WorkloadEntry>) -> usize {
        let missing = self.workloads.len().saturating_sub(room);
        if missing == 0 {
            return 0;
        }
        let mut cgroups: Vec<_> = self
            .workloads
            .iter()
            .map(|(id, entry)| (entry.flags == 0, !enrolled.contains_key(id), *id))
            .collect();
        cgroups.sort_unstable();
        for (_, _, id) in cgroups.into_iter().skip(room) {
            self.workloads.remove(&id);
        }
        missing
    }

    /// A namespace without room has no tunnels. One that a workload owns is also where sockets of
    /// others are the workload's: whose does not fit, is refused everything.
    fn fit_namespaces(&mut self, room: usize, closed: &mut BTreeSet<Side>) -> usize {
        let missing = self.namespaces.len().saturating_sub(room);
        let mut namespaces: Vec<_> = self.namespaces.iter().collect();
        namespaces
            .sort_unstable_by_key(|(cookie, entry)| (entry.workload != NO_WORKLOAD, **cookie));
        let left_out: Vec<(u64, WorkloadId)> = namespaces
            .into_iter()
            .take(missing)
            .map(|(cookie, entry)| (*cookie, entry.workload))
            .collect();
        for (cookie, workload) in left_out {
            self.namespaces.remove(&cookie);
            if workload != NO_WORKLOAD {
                closed.extend(both_sides(workload));
            }
        }
        missing
    }

    /// Where an address is missing, it is not known whose it is. The workloads with the most addresses
    /// go first, with all of them, and are refused everything.
    fn fit_local_addresses(&mut self, room: usize, closed: &mut BTreeSet<Side>) -> usize {
        let number = self.local_addresses.len();
        if number <= room {
            return 0;
        }
        let mut counts: HashMap<WorkloadId, usize> = HashMap::new();
        for workload in self.local_addresses.values() {
            *counts.entry(*workload).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_unstable_by_key(|(workload, count)| (Reverse(*count), *workload));
        let mut missing = 0;
        let mut left_out = HashSet::new();
        for (workload, count) in counts {
            if number - missing <= room {
                break;
            }
            missing += count;
            left_out.insert(workload);
            closed.extend(both_sides(workload));
        }
        self.local_addresses
            .retain(|_, workload| !left_out.contains(workload));
        missing
    }

    /// Newcomers go first, then the workloads with the most verdicts, so that few do; those in `closed` go
    /// in any case.
    fn fit_verdicts(
        &mut self,
        room: usize,
        closed: &mut BTreeSet<Side>,
        open: &HashSet<Side>,
    ) -> usize {
        let mut number = self.verdicts.len();
        if number <= room && closed.is_empty() {
            return 0;
        }
        let mut sides: HashMap<Side, usize> = HashMap::new();
        for (_, key) in self.verdicts.keys() {
            *sides.entry(side(key)).or_default() += 1;
        }
        for side in closed.iter() {
            // One entry says that there is no room.
            number = number + 1 - sides.remove(side).unwrap_or_default();
        }
        let forced = closed.clone();
        let mut sides: Vec<_> = sides.into_iter().collect();
        sides.sort_unstable_by_key(|(side, count)| (open.contains(side), Reverse(*count), *side));
        for (side, count) in sides {
            if number <= room {
                break;
            }
            number = number + 1 - count;
            closed.insert(side);
        }
        let mut missing = 0;
        self.verdicts.retain(|(_, key), _| {
            let is_kept = !closed.contains(&side(key));
            missing += usize::from(!is_kept && !forced.contains(&side(key)));
            is_kept
        });
        let left = room.saturating_sub(self.verdicts.len());
        let said = closed
            .iter()
            .take(left)
            .map(|side| (every_connection(*side), NO_ROOM));
        self.verdicts.extend(said);
        missing
    }

    /// Drops newcomers, and then the narrowest prefixes; what is around them is refused.
    fn fit_peers(&mut self, room: usize, held: &Peers) -> usize {
        if self.peers.len() <= room {
            return 0;
        }
        let mut keys: Vec<_> = self.peers.keys().copied().collect();
        keys.sort_unstable_by_key(|key| (held.contains_key(key), Reverse(key.0), key.1));
        // One entry, around everything, says that there is no room.
        keys.truncate(keys.len() + 1 - room);
        for key in &keys {
            self.peers.remove(key);
        }
        let lengths: BTreeSet<u32> = self.peers.keys().map(|(bits, _)| *bits).collect();
        for (bits, address) in &keys {
            let wider = lengths.range(..bits).rev();
            let mut wider = wider.map(|bits| (*bits, masked(*address, *bits)));
            let around = wider.find(|key| self.peers.contains_key(key));
            self.mark(around.unwrap_or_default());
        }
        keys.len()
    }

    /// Leaves out all ports of some addresses; those addresses are refused.
    fn fit_peer_ports(&mut self, room: usize) -> usize {
        let number = self.peer_ports.len();
        if number <= room {
            return 0;
        }
        let mut ports: HashMap<Address, usize> = HashMap::new();
        for key in self.peer_ports.keys() {
            *ports.entry(key.address).or_default() += 1;
        }
        let mut ports: Vec<_> = ports.into_iter().collect();
        ports.sort_unstable_by_key(|(address, count)| (Reverse(*count), *address));
        let mut missing = 0;
        let mut refused = HashSet::new();
        for (address, count) in ports {
            if number - missing <= room {
                break;
            }
            missing += count;
            refused.insert(address);
        }
        self.peer_ports
            .retain(|key, _| !refused.contains(&key.address));
        for address in refused {
            self.mark((ADDRESS_BITS, address));
        }
        missing
    }

    fn mark(&mut self, key: (u32, PeerKey)) {
        self.peers.entry(key).or_default().flags |= PEER_NO_ROOM;
    }
}

/// The entry for everybody and everything of a workload and direction.
pub(super) fn every_connection((workload, direction): Side) -> (u32, VerdictKey) {
    let key = VerdictKey {
        workload,
        class: 0,
        direction,
        protocol: protocol::ANY,
        port: [0; 2],
    };
    (VERDICT_PREFIX_ANY_PROTOCOL, key)
}

/// Both directions of a workload.
fn both_sides(workload: WorkloadId) -> [Side; 2] {
    [Direction::Egress, Direction::Ingress].map(|direction| (workload, direction as u8))
}

/// Whose verdict it is.
pub(super) fn side(key: &VerdictKey) -> Side {
    (key.workload, key.direction)
}

/// Clears what lies behind a prefix: the kernel takes such keys for the same, and so must we.
pub(super) fn masked(mut address: Address, bits: u32) -> Address {
    for (byte, first) in address.iter_mut().zip((0_u32..).step_by(8)) {
        let kept = bits.saturating_sub(first).min(8);
        *byte &= !(0xff_u8.checked_shr(kept).unwrap_or(0));
    }
    address
}

/// The same for a verdict's key. Only what stands behind the class is ever left out.
fn masked_verdict(mut key: VerdictKey, bits: u32) -> VerdictKey {
    let [high, low] = key.port;
    let tail = u32::from_be_bytes([key.direction, key.protocol, high, low]);
    let left_out = VERDICT_PREFIX_FULL.saturating_sub(bits);
    let kept = u32::MAX.checked_shl(left_out).unwrap_or(0);
    let [direction, protocol, high, low] = (tail & kept).to_be_bytes();
    key.direction = direction;
    key.protocol = protocol;
    key.port = [high, low];
    key
}

#[cfg(test)]
mod tests {
    use reeve_common::ipv4_mapped;

    use super::*;
    use crate::policy::KernelTables;

    const PLENTY: Room = Room {
        workloads: 100,
        namespaces: 100,
        local_addresses: 100,
        peers: 100,
        peer_ports: 100,
        verdicts: 100,
    };

    /// What is left out, where nobody is enrolled yet.
    fn fit(desired: &mut Desired, room: Room) -> Shortage {
        let kept = Kept {
            cgroups: &HashMap::new(),
            peers: &Peers::new(),
            sides: HashSet::new(),
        };
        desired.fit(room, &kept)
    }

    #[test]
    fn who_is_enrolled_already_and_who_refuses_others_stay() {
        let entry = |workload, flags| WorkloadEntry { workload, flags };
        let mut fits = Desired::new(&KernelState {
            workloads: vec![
                (1, 2, entry(1, 0)),
                (2, 2, entry(2, 0)),
                (3, 2, entry(3, 0)),
                (4, 1, entry(0, reeve_common::WORKLOAD_UNKNOWN)),
                (5, 1, entry(0, reeve_common::WORKLOAD_IS_REEVE)),
            ],
            ..KernelState::default()
        });
        let room = Room {
            workloads: 3,
            ..PLENTY
        };
        let cgroups = HashMap::from([(3, entry(3, 0))]);
        let kept = Kept {
            cgroups: &cgroups,
            peers: &Peers::new(),
            sides: HashSet::new(),
        };
        assert_eq!(fits.fit(room, &kept).workloads, 2);
        let left: BTreeSet<u64> = fits.workloads.keys().copied().collect();
        assert_eq!(left, BTreeSet::from([3, 4, 5]));
    }

    fn desired(tables: KernelTables) -> Desired {
        Desired::new(&KernelState {
            tables,
            ..KernelState::default()
        })
    }

    fn verdict(workload: WorkloadId, port: u8) -> (u32, VerdictKey, VerdictEntry) {
        let key = VerdictKey {
            workload,
            protocol: protocol::TCP,
            port: [0, port],
            ..VerdictKey::default()
        };
        (VERDICT_PREFIX_FULL, key, VerdictEntry::default())
    }

    fn block(bits: u32, address: [u8; 4]) -> (u32, Address, PeerEntry) {
        (96 + bits, ipv4_mapped(address), PeerEntry::default())
    }

    #[test]
    fn the_workload_with_the_most_verdicts_is_closed_as_a_whole() {
        let verdicts = [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)];
        let tables = KernelTables {
            verdicts: verdicts.map(|(one, port)| verdict(one, port)).into(),
            ..KernelTables::default()
        };
        let mut fits = desired(tables.clone());
        assert_eq!(fit(&mut fits, PLENTY), Shortage::default());
        assert_eq!(fits.verdicts.len(), 5);

        let mut fits = desired(tables);
        // One of five is left free.
        let shortage = fit(
            &mut fits,
            Room {
                verdicts: 5,
                ..PLENTY
            },
        );
        assert_eq!(shortage.closed, BTreeSet::from([(2, 0)]));
        assert_eq!(shortage.verdicts, 3);
        assert_eq!(fits.verdicts.len(), 3);
        assert_eq!(fits.verdicts[&every_connection((2, 0))], NO_ROOM);
    }

    #[test]
    fn a_workload_whose_addresses_have_no_room_is_refused_everything() {
        let address = |last| ipv4_mapped([10, 0, 0, last]);
        let mut fits = Desired::new(&KernelState {
            local_addresses: vec![
                (address(1), 1),
                (address(2), 2),
                (address(3), 2),
                (address(4), 3),
            ],
            tables: KernelTables {
                verdicts: [(1, 1), (2, 1), (2, 2)]
                    .map(|(one, port)| verdict(one, port))
                    .into(),
                ..KernelTables::default()
            },
            ..KernelState::default()
        });
        let room = Room {
            local_addresses: 3,
            ..PLENTY
        };
        let shortage = fit(&mut fits, room);
        assert_eq!((shortage.local_addresses, shortage.verdicts), (2, 0));
        assert_eq!(shortage.closed, BTreeSet::from([(2, 0), (2, 1)]));
        let left: BTreeSet<_> = fits.local_addresses.values().copied().collect();
        assert_eq!(left, BTreeSet::from([1, 3]));
        assert_eq!(fits.verdicts[&every_connection((2, 0))], NO_ROOM);
        assert_eq!(fits.verdicts[&every_connection((2, 1))], NO_ROOM);
        assert_eq!(fits.verdicts.len(), 3);
    }

    #[test]
    fn of_namespaces_those_that_are_shared_go_first_and_the_owner_of_another_is_refused_everything()
    {
        let entry = |workload| NamespaceEntry { workload, flags: 0 };
        let state = KernelState {
            namespaces: vec![(10, entry(1)), (11, entry(NO_WORKLOAD)), (12, entry(2))],
            ..KernelState::default()
        };
        let fitted = |namespaces| {
            let mut fits = Desired::new(&state);
            let shortage = fit(
                &mut fits,
                Room {
                    namespaces,
                    ..PLENTY
                },
            );
            (shortage.namespaces, shortage.closed)
        };
        assert_eq!(fitted(3), (0, BTreeSet::new()));
        assert_eq!(fitted(2), (1, BTreeSet::new()));
        assert_eq!(fitted(1), (2, BTreeSet::from([(1, 0), (1, 1)])));
    }

    #[test]
    fn what_is_around_an_address_without_room_is_refused() {
        let mut fits = desired(KernelTables {
            peers: vec![
                block(8, [10, 0, 0, 0]),
                block(16, [10, 1, 0, 0]),
                block(32, [10, 1, 0, 1]),
                block(32, [10, 1, 0, 2]),
                block(32, [192, 0, 2, 1]),
            ],
            ..KernelTables::default()
        });
        let shortage = fit(&mut fits, Room { peers: 5, ..PLENTY });
        assert_eq!(shortage.peers, 2);
        let flags = |bits: u32, address| fits.peers.get(&(96 + bits, ipv4_mapped(address)));
        let marked = |bits, address| flags(bits, address).map(|entry| entry.flags);
        assert_eq!(marked(16, [10, 1, 0, 0]), Some(PEER_NO_ROOM));
        assert_eq!(marked(8, [10, 0, 0, 0]), Some(0));
        assert_eq!(marked(32, [192, 0, 2, 1]), Some(0));
        assert_eq!(marked(32, [10, 1, 0, 2]), None);
        assert!(fits.peers.len() < 5);
    }

    #[test]
    fn an_address_in_no_block_has_everything_unknown_refused() {
        let mut fits = desired(KernelTables {
            peers: vec![block(32, [10, 1, 0, 1]), block(32, [10, 1, 0, 2])],
            ..KernelTables::default()
        });
        fit(&mut fits, Room { peers: 2, ..PLENTY });
        assert_eq!(fits.peers.len(), 1);
        assert_eq!(fits.peers[&(0, [0; 16])].flags, PEER_NO_ROOM);
    }

    #[test]
    fn an_address_whose_ports_have_no_room_is_refused() {
        let port = |last, port| {
            let key = PeerPortKey {
                address: ipv4_mapped([10, 0, 0, last]),
                port,
                ..PeerPortKey::default()
            };
            (key, PeerEntry::default())
        };
        let mut fits = desired(KernelTables {
            peers: vec![block(32, [10, 0, 0, 1]), block(32, [10, 0, 0, 2])],
            peer_ports: vec![port(1, 80), port(2, 80), port(2, 81)],
            ..KernelTables::default()
        });
        let shortage = fit(
            &mut fits,
            Room {
                peer_ports: 2,
                ..PLENTY
            },
        );
        assert_eq!((shortage.peer_ports, fits.peer_ports.len()), (2, 1));
        let flags = |last| fits.peers[&(128, ipv4_mapped([10, 0, 0, last]))].flags;
        assert_eq!((flags(1), flags(2)), (0, PEER_NO_ROOM));
    }

    #[test]
    fn newcomers_are_refused_before_those_that_were_there() {
        let verdicts = [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)];
        let mut fits = desired(KernelTables {
            verdicts: verdicts.map(|(one, port)| verdict(one, port)).into(),
            peers: vec![block(8, [10, 0, 0, 0]), block(32, [10, 0, 0, 1])],
            ..KernelTables::default()
        });
        let old = block(32, [10, 0, 0, 1]);
        let kept = Kept {
            cgroups: &HashMap::new(),
            peers: &Peers::from([((old.0, old.1), old.2)]),
            sides: HashSet::from([(1, 0), (2, 0)]),
        };
        let room = Room {
            verdicts: 6,
            peers: 2,
            ..PLENTY
        };
        let shortage = fits.fit(room, &kept);
        assert_eq!(shortage.closed, BTreeSet::from([(3, 0)]));
    }

    #[test]
    fn what_lies_behind_a_prefix_is_cleared() {
        let ones = [0xff; 16];
        assert_eq!(masked(ones, 128), ones);
        assert_eq!(masked(ones, 0), [0; 16]);
        let mut expected = [0; 16];
        expected[0] = 0xff;
        expected[1] = 0b1110_0000;
        assert_eq!(masked(ones, 11), expected);
    }

    #[test]
    fn a_port_range_is_the_beginning_of_a_verdicts_key() {
        let key = VerdictKey {
            workload: 7,
            class: 9,
            direction: 1,
            protocol: 6,
            port: [0x1f, 0x91],
        };
        assert_eq!(masked_verdict(key, VERDICT_PREFIX_FULL), key);
        let range = masked_verdict(key, VERDICT_PREFIX_FULL - 4);
        assert_eq!(range.port, [0x1f, 0x90]);
        let any_port = masked_verdict(key, reeve_common::VERDICT_PREFIX_ANY_PORT);
        assert_eq!((any_port.protocol, any_port.port), (6, [0, 0]));
        let any = masked_verdict(key, VERDICT_PREFIX_ANY_PROTOCOL);
        assert_eq!((any.direction, any.protocol, any.port), (1, 0, [0, 0]));
    }
}
