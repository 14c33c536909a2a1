//! Bringing the maps to a desired state while the programs read them.
//!
//! What is new or different is written first, what is surplus removed last, so that every
//! verdict in between is one that the old or the new state gives. Verdicts come before the peers
//! that point to them, and both before the workloads that they are about: a workload that is
//! enrolled finds its policy there. A workload that gets another number is refused everything
//! until all of that is done, since its old number may be another's new one.
//!
//! What has no room is known before ([`Desired::fit`]), and refused. Where the kernel takes less than
//! that, or has no room for the old and the new at once, the rest is applied all the same, since a
//! workload must be enrolled even when its policy does not fit; a workload of which a refusal is missing
//! then loses all its allowances.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
};

use aya::{
    Ebpf,
    maps::{self, MapData},
};
use reeve_common::{
    Action, Address, ExpectedCgroup, ExpectedEntry, LAYOUT_VERSION, NO_WORKLOAD, NameDigest,
    NamespaceEntry, PeerEntry, PeerKey, PeerPortKey, Settings as KernelSettings, ShownAddresses,
    VerdictEntry, VerdictKey, WORKLOAD_UNKNOWN, WorkloadEntry, WorkloadId,
};

use super::{
    Error, KernelState, MapUsage,
    desired::{Desired, Kept, NO_ROOM, Room, Shortage, Side, every_connection, side},
    load::map_error,
    sys,
    table::{Table, Tracked},
    transition::{Held, Peers, Transition, Verdicts},
};
use crate::config::Ports;

type Hash<K, V> = maps::HashMap<MapData, K, V>;
type Trie<K, V> = maps::LpmTrie<MapData, K, V>;

/// What changes between a desired state and the one before, where both the rules and whom they
/// tell apart do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// More far ends are told apart: they are before the rules that there were already change.
    Grows,
    /// Fewer are: they are not told apart once the rules have changed.
    Shrinks,
    /// Nobody knows, or the far ends themselves are others: whoever changes goes by way of a
    /// stand-in, where there is room for the old and the new at once.
    Replaces,
}

/// The maps that the daemon writes.
pub(super) struct State {
    settings: maps::Array<MapData, KernelSettings>,
    /// What is in `settings`.
    pub(super) current: KernelSettings,
    /// Who has which id.
    pub(super) ids: Tracked<Hash<NameDigest, u32>>,
    pub(super) workloads: Tracked<Hash<u64, WorkloadEntry>>,
    expected: Tracked<Hash<ExpectedCgroup, ExpectedEntry>>,
    namespaces: Tracked<Hash<u64, NamespaceEntry>>,
    pub(super) local_addresses: Tracked<Hash<Address, WorkloadId>>,
    shown_addresses: Tracked<Hash<WorkloadId, ShownAddresses>>,
    pub(super) peers: Tracked<Trie<PeerKey, PeerEntry>>,
    pub(super) peer_ports: Tracked<Hash<PeerPortKey, PeerEntry>>,
    pub(super) verdicts: Tracked<Trie<VerdictKey, VerdictEntry>>,
    /// What of the newest desired state has no room.
    shortage: Shortage,
}

// === impl State ===

impl State {
    /// Takes the maps out of the loaded object and reads what an earlier daemon left in them.
    pub(super) fn adopt(ebpf: &mut Ebpf, ports: Ports, flags: u32) -> Result<Self, Error> {
        let settings = "SETTINGS";
        let mut map: maps::Array<MapData, KernelSettings> =
            take(ebpf, settings, |map| map.try_into())?.0;
        let mut current = map
            .get(&0, 0)
            .map_err(|source| map_error(settings, "read", source))?;
        current.layout_version = LAYOUT_VERSION;
        current.generation = current.generation.max(1);
        // 0 is nobody's.
        current.next_id = current.next_id.max(1);
        if current.flow_seed == 0 {
            current.flow_seed = RandomState::new().hash_one(()) as u32;
        }
        current.outbound_port = ports.outbound;
        current.tunnel_port = ports.tunnel;
        current.flags = flags;
        map.set(0, current, 0)
            .map_err(|source| map_error(settings, "write", source))?;
        Ok(Self {
            settings: map,
            current,
            ids: tracked(ebpf, "IDS", Hash::try_from)?,
            workloads: tracked(ebpf, "WORKLOADS", Hash::try_from)?,
            expected: tracked(ebpf, "EXPECTED", Hash::try_from)?,
            namespaces: tracked(ebpf, "NAMESPACES", Hash::try_from)?,
            local_addresses: tracked(ebpf, "LOCAL_ADDRESSES", Hash::try_from)?,
            shown_addresses: tracked(ebpf, "SHOWN_ADDRESSES", Hash::try_from)?,
            peers: tracked(ebpf, "PEERS", Trie::try_from)?,
            peer_ports: tracked(ebpf, "PEER_PORTS", Hash::try_from)?,
            verdicts: tracked(ebpf, "VERDICTS", Trie::try_from)?,
            shortage: Shortage::default(),
        })
    }

    /// Reads the maps again, where another daemon has written to them.
    pub(super) fn reread(&mut self) -> Result<(), Error> {
        self.current = self
            .settings
            .get(&0, 0)
            .map_err(|source| map_error("SETTINGS", "read", source))?;
        self.ids.reread()?;
        self.workloads.reread()?;
        self.expected.reread()?;
        self.namespaces.reread()?;
        self.local_addresses.reread()?;
        self.peers.reread()?;
        self.peer_ports.reread()?;
        self.verdicts.reread()
    }

    /// Has everything refused to these cgroups (id and depth), except those of which the maps say
    /// something already. Takes nothing back.
    pub(super) fn guard(&mut self, cgroups: &[(u64, u32)]) -> Result<(), Error> {
        let unknown = WorkloadEntry {
            workload: NO_WORKLOAD,
            flags: WORKLOAD_UNKNOWN,
        };
        let new: Vec<u64> = cgroups
            .iter()
            .map(|(cgroup, _)| *cgroup)
            .filter(|cgroup| !self.workloads.content().contains_key(cgroup))
            .collect();
        let changed = self
            .workloads
            .put(new.iter().map(|cgroup| (cgroup, &unknown)))?;
        let depths = cgroups.iter().fold(self.current.cgroup_depths, |all, at| {
            all | 1_u32.wrapping_shl(at.1)
        });
        if changed || depths != self.current.cgroup_depths {
            self.write(KernelSettings {
                cgroup_depths: depths,
                generation: self.current.generation.checked_add(1).unwrap_or(1),
                ..self.current
            })?;
        }
        Ok(())
    }

    /// Makes the maps hold `desired`. The first thing that did not fit is the error; everything
    /// else is in force.
    pub(super) fn apply(&mut self, desired: &KernelState, order: Order) -> Result<(), Error> {
        if let Err(error) = self.show_addresses(&desired.shown_addresses) {
            tracing::warn!(%error, "applications may see a loopback address as their own");
        }
        let expected = self.expect_no_others(&desired.expected)?;
        let mut desired = Desired::new(desired);
        let room = self.room();
        self.shortage = desired.fit(room, &self.kept());
        let mut changed = false;
        self.suspend(&desired)?;
        let workloads = self.workloads.content().values();
        let is_anybody_judged = workloads
            .map(|entry| entry.workload)
            .any(|id| id != NO_WORKLOAD);
        if order == Order::Replaces
            && is_anybody_judged
            && let Some(way) = Transition::new(self.held(), &desired, room)
        {
            changed = true;
            // What of it was not written is written below.
            if let Err(error) = self.go(&way, &desired) {
                tracing::warn!(%error, "the kernel's maps are changed in one step");
            }
        }
        let fits = self.put(&desired, order, &mut changed);
        if fits.is_err() {
            // What is surplus holds back what is not there yet.
            self.close(&desired, true)?;
        }

        // From here on the new workloads are enforced.
        let depths = self.current.cgroup_depths | desired.depths;
        if depths != self.current.cgroup_depths {
            self.write(KernelSettings {
                cgroup_depths: depths,
                ..self.current
            })?;
        }
        if let Err(error) = self.expected.put(&expected) {
            tracing::debug!(%error, "a workload's cgroup is enforced once the daemon has seen it");
        }

        changed |= self.prune(&desired)?;
        // What was removed may have made room.
        let fits = fits.or_else(|_| self.put(&desired, order, &mut changed));
        if fits.is_err() {
            let all_known =
                self.peers.holds(&desired.peers) && self.peer_ports.holds(&desired.peer_ports);
            let closed = self.close(&desired, all_known)?;
            // Without room for it they are refused all the same, as what no policy allows.
            let said: Vec<_> = closed.iter().map(|side| every_connection(*side)).collect();
            let _ = self.verdicts.put(said.iter().map(|key| (key, &NO_ROOM)));
            self.shortage.closed.extend(closed);
        }
        if changed || desired.depths != self.current.cgroup_depths {
            self.write(KernelSettings {
                cgroup_depths: desired.depths,
                // 0 is "never" to a socket that remembers.
                generation: self.current.generation.checked_add(1).unwrap_or(1),
                ..self.current
            })?;
        }
        fits.and_then(|()| self.roomy())
    }

    /// Enrols no new cgroup but as is `expected`, which is written when the rest is: what is expected to
    /// be a workload finds its policy there.
    fn expect_no_others(
        &mut self,
        expected: &[(ExpectedCgroup, u32, WorkloadId)],
    ) -> Result<HashMap<ExpectedCgroup, ExpectedEntry>, Error> {
        let content = self.expected.content();
        let entry = |(key, _, workload): &(ExpectedCgroup, u32, WorkloadId)| {
            let known = content.get(key).filter(|entry| entry.workload == *workload);
            let new = ExpectedEntry {
                workload: *workload,
                ..ExpectedEntry::default()
            };
            (*key, known.copied().unwrap_or(new))
        };
        // Of several that name the same one, the first has it.
        let expected: HashMap<_, _> = expected.iter().rev().map(entry).collect();
        let others = content.iter().filter(|(key, entry)| {
            let wanted = expected.get(*key);
            wanted.is_none_or(|wanted| wanted.workload != entry.workload)
        });
        let others: Vec<_> = others.map(|(key, _)| *key).collect();
        settled(self.expected.remove(&others))?;
        Ok(expected)
    }

    /// No verdict depends on them, so that they have no part in the generation.
    fn show_addresses(&mut self, shown: &[(WorkloadId, ShownAddresses)]) -> Result<(), Error> {
        let shown = shown.iter().copied().collect();
        self.shown_addresses.prune(&shown)?;
        self.shown_addresses.put(&shown).map(drop)
    }

    /// How many entries of a state have no room. Changes nothing.
    pub(super) fn missing(&self, desired: &KernelState) -> usize {
        let mut desired = Desired::new(desired);
        desired.fit(self.room(), &self.kept()).total()
    }

    fn room(&self) -> Room {
        Room {
            workloads: self.workloads.capacity(),
            namespaces: self.namespaces.capacity(),
            local_addresses: self.local_addresses.capacity(),
            peers: self.peers.capacity(),
            peer_ports: self.peer_ports.capacity(),
            verdicts: self.verdicts.capacity(),
        }
    }

    fn kept(&self) -> Kept<'_> {
        let verdicts = self.verdicts.content().iter();
        let open = verdicts.filter(|(_, entry)| entry.action != Action::NoRoom as u32);
        Kept {
            cgroups: self.workloads.content(),
            peers: self.peers.content(),
            sides: open.map(|((_, key), _)| side(key)).collect(),
        }
    }

    /// The first map that has no room for what is desired.
    fn roomy(&self) -> Result<(), Error> {
        let full = |missing: usize, map, capacity| match missing {
            0 => Ok(()),
            _ => Err(Error::Full { map, capacity }),
        };
        let missing = &self.shortage;
        if missing.workloads > 0 {
            return Err(Error::NotEnrolled {
                missing: missing.workloads,
                capacity: self.workloads.capacity(),
            });
        }
        let (name, capacity) = (self.namespaces.name(), self.namespaces.capacity());
        full(missing.namespaces, name, capacity)?;
        let (name, capacity) = (self.local_addresses.name(), self.local_addresses.capacity());
        full(missing.local_addresses, name, capacity)?;
        full(missing.peers, self.peers.name(), self.peers.capacity())?;
        let (name, capacity) = (self.peer_ports.name(), self.peer_ports.capacity());
        full(missing.peer_ports, name, capacity)?;
        let (name, capacity) = (self.verdicts.name(), self.verdicts.capacity());
        full(missing.verdicts, name, capacity)
    }

    /// Takes all allowances from workloads of which a refusal is not in the map, and, where not
    /// all far ends are known, from those that tell any apart. Gives those workloads.
    fn close(&mut self, desired: &Desired, all_known: bool) -> Result<BTreeSet<Side>, Error> {
        let content = self.verdicts.content();
        let missing = desired.verdicts.iter().filter(|(key, value)| {
            refuses(value) && content.get(key) != Some(value) || !all_known && key.1.class != 0
        });
        let closed: BTreeSet<Side> = missing.map(|((_, key), _)| side(key)).collect();
        let mut keys: Vec<_> = content.keys().copied().collect();
        keys.retain(|(_, key)| closed.contains(&side(key)));
        keys.sort_unstable_by_key(|key| std::cmp::Reverse(breadth(key)));
        settled(self.verdicts.remove(&keys))?;
        Ok(closed)
    }

    /// The workloads and directions that are refused everything, since there is no room for what
    /// the policy says of them.
    pub(super) fn closed(&self) -> &BTreeSet<Side> {
        &self.shortage.closed
    }

    /// Entries and capacity of each map.
    pub(super) fn usage(&self) -> Vec<MapUsage> {
        let missing = &self.shortage;
        vec![
            usage(&self.ids, 0),
            usage(&self.workloads, missing.workloads),
            usage(&self.namespaces, missing.namespaces),
            usage(&self.local_addresses, missing.local_addresses),
            usage(&self.peers, missing.peers),
            usage(&self.peer_ports, missing.peer_ports),
            usage(&self.verdicts, missing.verdicts),
        ]
    }

    /// The generation in force.
    pub(super) fn generation(&self) -> u32 {
        self.current.generation
    }

    /// Whether the kernel has the generation that was written last.
    pub(super) fn check(&self) -> Result<(), Error> {
        let found = self
            .settings
            .get(&0, 0)
            .map_err(|source| map_error("SETTINGS", "read", source))?;
        if found.generation == self.current.generation {
            return Ok(());
        }
        Err(Error::Overwritten {
            found: found.generation,
            written: self.current.generation,
        })
    }

    /// Refuses everything to workloads whose numbers change hands.
    fn suspend(&mut self, desired: &Desired) -> Result<(), Error> {
        let unknown = WorkloadEntry {
            workload: NO_WORKLOAD,
            flags: WORKLOAD_UNKNOWN,
        };
        let suspended: Vec<_> = renumbered(self.workloads.content(), &desired.workloads)
            .into_iter()
            .map(|cgroup| (cgroup, unknown))
            .collect();
        self.workloads
            .put(suspended.iter().map(|(cgroup, entry)| (cgroup, entry)))
            .map(drop)
    }

    fn held(&self) -> Held<'_> {
        Held {
            peers: self.peers.content(),
            peer_ports: self.peer_ports.content(),
            verdicts: self.verdicts.content(),
        }
    }

    /// All but the last step of a transition.
    fn go(&mut self, way: &Transition, desired: &Desired) -> Result<(), Error> {
        settled(self.verdicts.put(&way.verdicts))?;
        settled(self.peer_ports.put(&way.peer_ports))?;
        settled(self.put_peers(&way.peers))?;
        self.put_verdicts(&desired.verdicts)?;
        let mut verdicts = desired.verdicts.clone();
        verdicts.extend(&way.verdicts);
        self.prune_verdicts(&verdicts).map(drop)
    }

    /// Writes everything that is new or different, whatever does not fit.
    fn put(&mut self, desired: &Desired, order: Order, changed: &mut bool) -> Result<(), Error> {
        let first = match order {
            Order::Grows => self.put_new_classes(desired),
            Order::Shrinks | Order::Replaces => self.put_verdicts(&desired.verdicts),
        };
        let steps = [
            first,
            settled(self.put_peers(&desired.peers)),
            settled(self.peer_ports.put(&desired.peer_ports)),
            match order {
                Order::Grows => self.put_verdicts(&desired.verdicts),
                Order::Shrinks | Order::Replaces => Ok(false),
            },
            self.local_addresses.put(&desired.local_addresses),
            self.namespaces.put(&desired.namespaces),
            self.workloads.put(&desired.workloads),
        ];
        let mut result = Ok(());
        for step in steps {
            match step {
                Ok(different) => *changed |= different,
                Err(error) => {
                    // A part of it may have been written.
                    *changed = true;
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    /// The narrowest first: a connection then goes from what the old entries say of it to what the
    /// new ones say, with nothing in between; those for everybody come once no program is left that
    /// has asked for those of a class before. Where there is no room, what refuses gets what
    /// there is: a refusal without room must not leave the wider allowance alone.
    fn put_verdicts(&mut self, desired: &Verdicts) -> Result<bool, Error> {
        let mut different: Vec<_> = self.verdicts.different(desired).collect();
        different.sort_unstable_by_key(|(key, _)| breadth(key));
        let (of_all, of_classes): (Vec<_>, Vec<_>) = different
            .into_iter()
            .partition(|((_, key), _)| key.class == 0);
        let first = settled(self.verdicts.put(of_classes));
        let both = first.and_then(|first| Ok(first | settled(self.verdicts.put(of_all))?));
        both.or_else(|error| {
            let refusing = desired.iter().filter(|(_, value)| refuses(value));
            self.verdicts.put(refusing)?;
            Err(error)
        })
    }

    /// The verdicts of classes that nobody has yet.
    fn put_new_classes(&mut self, desired: &Desired) -> Result<bool, Error> {
        let peers = self.peers.content().values();
        let by_port = self.peer_ports.content().values();
        let known: HashSet<u32> = peers.chain(by_port).map(|entry| entry.class).collect();
        let is_new = |class| class != 0 && !known.contains(&class);
        let new = self.verdicts.different(&desired.verdicts);
        let new: Vec<_> = new.filter(|((_, key), _)| is_new(key.class)).collect();
        settled(self.verdicts.put(new))
    }

    /// The widest first, for the same reason. A program that has come past a wide entry on its way
    /// through the map must still find the narrow one that says otherwise.
    fn prune_verdicts(&mut self, desired: &Verdicts) -> Result<bool, Error> {
        let mut surplus = self.verdicts.surplus(desired);
        let content = self.verdicts.content();
        let action = |key: &(u32, VerdictKey)| content.get(key).map(|entry| entry.action);
        surplus.sort_unstable_by_key(|key| (std::cmp::Reverse(breadth(key)), action(key)));
        let alike = surplus.chunk_by(|one, next| action(one) == action(next));
        let runs: Vec<Vec<_>> = alike.map(<[_]>::to_vec).collect();
        let mut removed = false;
        for run in runs {
            removed |= settled(self.verdicts.remove(&run))?;
        }
        Ok(removed)
    }

    /// The shortest prefix first, for the same reason.
    fn prune_peers(&mut self, desired: &Desired) -> Result<bool, Error> {
        let mut surplus = self.peers.surplus(&desired.peers);
        surplus.sort_unstable_by_key(|(bits, _)| *bits);
        let mut removed = false;
        for run in surplus.chunk_by(|(one, _), (next, _)| one == next) {
            removed |= settled(self.peers.remove(run))?;
        }
        Ok(removed)
    }

    /// The longest prefix first: an address without room must not count as its neighbours.
    fn put_peers(&mut self, desired: &Peers) -> Result<bool, Error> {
        let mut peers: Vec<_> = desired.iter().collect();
        peers.sort_unstable_by_key(|((bits, _), _)| std::cmp::Reverse(*bits));
        self.peers.put(peers)
    }

    fn prune(&mut self, desired: &Desired) -> Result<bool, Error> {
        Ok(self.workloads.prune(&desired.workloads)?
            | self.namespaces.prune(&desired.namespaces)?
            | self.local_addresses.prune(&desired.local_addresses)?
            | settled(self.peer_ports.prune(&desired.peer_ports))?
            | self.prune_peers(desired)?
            | self.prune_verdicts(&desired.verdicts)?)
    }

    pub(super) fn has_flags(&self, flags: u32) -> bool {
        self.current.flags & flags == flags
    }

    /// Sets the `SETTINGS_*` bits, and waits until no program goes by what they were.
    pub(super) fn set_flags(&mut self, flags: u32) -> Result<(), Error> {
        self.write(KernelSettings {
            flags,
            ..self.current
        })?;
        sys::wait_for_programs();
        Ok(())
    }

    pub(super) fn write(&mut self, settings: KernelSettings) -> Result<(), Error> {
        self.settings
            .set(0, settings, 0)
            .map_err(|source| map_error("SETTINGS", "write", source))?;
        self.current = settings;
        Ok(())
    }
}

/// After a change of a map: has every program that may have seen it otherwise come to its end. A
/// program looks into several maps one after the other, and must not see the first as it was and
/// the last as it is two changes later.
fn settled(changed: Result<bool, Error>) -> Result<bool, Error> {
    if !matches!(changed, Ok(false)) {
        sys::wait_for_programs();
    }
    changed
}

/// Whether a verdict refuses a connection that a wider one may allow.
fn refuses(value: &VerdictEntry) -> bool {
    ![Action::Allow as u32, Action::Permissive as u32].contains(&value.action)
}

/// How wide a verdict is: those for everybody after those of a class, which are asked first, and
/// short prefixes after long ones.
fn breadth((bits, key): &(u32, VerdictKey)) -> (bool, std::cmp::Reverse<u32>) {
    (key.class == 0, std::cmp::Reverse(*bits))
}

/// The cgroups whose workload has a number that means another workload before or after.
fn renumbered(
    current: &HashMap<u64, WorkloadEntry>,
    desired: &HashMap<u64, WorkloadEntry>,
) -> Vec<u64> {
    let moved: HashSet<WorkloadId> = current
        .iter()
        .filter_map(|(cgroup, before)| Some((before.workload, desired.get(cgroup)?.workload)))
        .filter(|(before, after)| before != after)
        .flat_map(|(before, after)| [before, after])
        .filter(|workload| *workload != NO_WORKLOAD)
        .collect();
    current
        .iter()
        .filter(|(_, entry)| moved.contains(&entry.workload))
        .map(|(cgroup, _)| *cgroup)
        .collect()
}

fn usage<T: Table>(tracked: &Tracked<T>, missing: usize) -> MapUsage {
    MapUsage {
        name: tracked.name(),
        entries: tracked.content().len() as u64,
        capacity: u64::from(tracked.capacity()),
        missing: missing as u64,
    }
}

fn tracked<T: Table>(
    ebpf: &mut Ebpf,
    name: &'static str,
    typed: impl FnOnce(maps::Map) -> Result<T, maps::MapError>,
) -> Result<Tracked<T>, Error> {
    let (table, capacity) = take(ebpf, name, typed)?;
    Tracked::adopt(name, capacity, table)
}

/// Takes a map out of the object, with its capacity.
pub(super) fn take<T>(
    ebpf: &mut Ebpf,
    name: &'static str,
    typed: impl FnOnce(maps::Map) -> Result<T, maps::MapError>,
) -> Result<(T, u32), Error> {
    let map = ebpf.take_map(name).ok_or(Error::Missing(name))?;
    let capacity =
        super::usage::capacity(&map).map_err(|source| map_error(name, "read", source))?;
    let map = typed(map).map_err(|source| map_error(name, "read", source))?;
    Ok((map, capacity))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workloads(entries: &[(u64, WorkloadId)]) -> HashMap<u64, WorkloadEntry> {
        let entry = |workload| WorkloadEntry { workload, flags: 0 };
        entries
            .iter()
            .map(|(cgroup, workload)| (*cgroup, entry(*workload)))
            .collect()
    }

    #[test]
    fn workloads_are_suspended_when_their_numbers_change_hands() {
        let suspended = |before: &[_], after: &[_]| {
            let mut cgroups = renumbered(&workloads(before), &workloads(after));
            cgroups.sort_unstable();
            cgroups
        };
        let before = [(10, 1), (20, 2), (30, 3)];
        assert!(suspended(&before, &before).is_empty());
        // The second goes, and the third gets its number.
        assert_eq!(suspended(&before, &[(10, 1), (30, 2)]), [20, 30]);
        // A new first one.
        let after = [(5, 1), (10, 2), (20, 3), (30, 4)];
        assert_eq!(suspended(&before, &after), [10, 20, 30]);
        // A restart is no change of numbers.
        assert!(suspended(&before, &[(11, 1), (20, 2), (30, 3)]).is_empty());
    }
}
