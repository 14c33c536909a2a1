//! From what the maps hold to what they shall hold, where nobody knows what stands behind the one:
//! after a start, and when peers or workloads change.
//!
//! A verdict is made of two look-ups, and the maps change entry by entry. A far end that comes into
//! another class must neither be judged by its old class's new verdicts nor by its new class's old
//! ones. So it goes by way of a stand-in, a class that nobody was in before and of which all that the
//! new class's verdicts say is said before anybody comes into it:
//!
//! 1. the verdicts of the stand-ins are added;
//! 2. each far end that changes gets its class's stand-in, from the old to the new in one write;
//! 3. all other verdicts are replaced, by which only those are judged who stay in their class;
//! 4. the classes take the place of their stand-ins, which say the same, and these go.
//!
//! [`super::state`] writes it so.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use reeve_common::{
    Action, Address, PeerEntry, PeerKey, PeerPortKey, VerdictEntry, VerdictKey, WorkloadId,
};

use super::desired::{Desired, Room, Side, every_connection, masked, side};

/// Bits of an address.
const ADDRESS_BITS: u32 = 128;

/// What nothing allows.
const REFUSED: VerdictEntry = VerdictEntry {
    action: Action::Deny as u32,
    rule: 0,
    dry_run: 0,
    dry_run_rule: 0,
};

pub(super) type Peers = HashMap<(u32, PeerKey), PeerEntry>;
pub(super) type PeerPorts = HashMap<PeerPortKey, PeerEntry>;
pub(super) type Verdicts = HashMap<(u32, VerdictKey), VerdictEntry>;

/// What the maps hold.
#[derive(Clone, Copy)]
pub(super) struct Held<'a> {
    pub(super) peers: &'a Peers,
    pub(super) peer_ports: &'a PeerPorts,
    pub(super) verdicts: &'a Verdicts,
}

/// What is added on the way, in the order in which it is written.
#[derive(Debug, Default)]
pub(super) struct Transition {
    /// What the stand-ins' verdicts are.
    pub(super) verdicts: Verdicts,
    /// Who gets a stand-in: by port first, since only then is a port asked for.
    pub(super) peer_ports: PeerPorts,
    pub(super) peers: Peers,
}

/// Verdicts of one class, by workload and direction.
type OfClass<'a> = HashMap<Side, Vec<(&'a (u32, VerdictKey), &'a VerdictEntry)>>;

// === impl Transition ===

impl Transition {
    /// None where every far end stays in its class, and where there is no room for the old and the
    /// new at once.
    pub(super) fn new(held: Held<'_>, desired: &Desired, room: Room) -> Option<Self> {
        let lengths = desired.peers.keys().map(|(bits, _)| *bits).collect();
        let mut transition = Self {
            verdicts: Verdicts::new(),
            peer_ports: changed(held.peer_ports, &desired.peer_ports, |key| {
                around(&desired.peers, &lengths, ADDRESS_BITS, key.address)
            }),
            peers: changed(held.peers, &desired.peers, |(bits, address)| {
                around(&desired.peers, &lengths, *bits, *address)
            }),
        };
        if transition.peers.is_empty() && transition.peer_ports.is_empty() {
            return None;
        }
        let room_for_verdicts = (room.verdicts as usize)
            .checked_sub(held.verdicts.len() + new_keys(held.verdicts, &desired.verdicts))?;
        let fits = held.peers.len() + new_keys(held.peers, &transition.peers) < room.peers as usize
            && held.peer_ports.len() + new_keys(held.peer_ports, &transition.peer_ports)
                < room.peer_ports as usize
            && transition.stand_in(held, desired, room_for_verdicts);
        fits.then_some(transition)
    }

    /// Gives each far end the stand-in of its class. False where that is more than there is room for.
    fn stand_in(&mut self, held: Held<'_>, desired: &Desired, room: usize) -> bool {
        let mut free = free_classes(held, desired);
        let mut stand_ins: BTreeMap<u32, u32> = BTreeMap::new();
        for entry in self.peers.values_mut().chain(self.peer_ports.values_mut()) {
            let Some(stand_in) = stand_ins.get(&entry.class).copied().or_else(|| free.next())
            else {
                return false;
            };
            stand_ins.insert(entry.class, stand_in);
            entry.class = stand_in;
        }
        let changing = changing_for_everybody(held.verdicts, &desired.verdicts);
        // At least that much is said.
        if changing.len() * stand_ins.len() >= room {
            return false;
        }
        let mut by_class: HashMap<u32, OfClass<'_>> = HashMap::new();
        let is_asked = |class: u32| class == 0 || stand_ins.contains_key(&class);
        let verdicts = desired.verdicts.iter();
        for (key, value) in verdicts.filter(|(key, _)| is_asked(key.1.class)) {
            let of_class = by_class.entry(key.1.class).or_default();
            of_class.entry(side(&key.1)).or_default().push((key, value));
        }
        let nothing = OfClass::new();
        let of = |class: u32| by_class.get(&class).unwrap_or(&nothing);
        for (class, stand_in) in stand_ins {
            let own = of(class);
            let stays = own.iter().filter(|(side, _)| !changing.contains(*side));
            for (key, value) in stays.flat_map(|(_, verdicts)| verdicts) {
                self.say(stand_in, **key, **value);
            }
            for side in &changing {
                // What is not found would be looked for among what holds for everybody.
                self.say(stand_in, every_connection(*side), REFUSED);
                let said = own.get(side).or_else(|| of(0).get(side));
                for (key, value) in said.into_iter().flatten() {
                    self.say(stand_in, **key, **value);
                }
                if self.verdicts.len() >= room {
                    return false;
                }
            }
        }
        self.verdicts.len() < room
    }

    fn say(&mut self, class: u32, (bits, key): (u32, VerdictKey), value: VerdictEntry) {
        self.verdicts
            .insert((bits, VerdictKey { class, ..key }), value);
    }
}

/// The entries that are new, different, or in the old map alone, with what the new one says of them.
fn changed<K: Copy + Eq + std::hash::Hash>(
    held: &HashMap<K, PeerEntry>,
    desired: &HashMap<K, PeerEntry>,
    otherwise: impl Fn(&K) -> PeerEntry,
) -> HashMap<K, PeerEntry> {
    let gone = held.keys().filter(|key| !desired.contains_key(key));
    desired
        .iter()
        .map(|(key, entry)| (*key, *entry))
        .chain(gone.map(|key| (*key, otherwise(key))))
        .filter(|(key, entry)| held.get(key) != Some(entry))
        .collect()
}

/// What is found for a prefix that is not in the map, whose prefixes have these lengths.
fn around(peers: &Peers, lengths: &BTreeSet<u32>, bits: u32, address: Address) -> PeerEntry {
    let mut wider = lengths.range(..=bits).rev();
    wider
        .find_map(|bits| peers.get(&(*bits, masked(address, *bits))))
        .copied()
        .unwrap_or_default()
}

fn new_keys<K: Eq + std::hash::Hash, V>(held: &HashMap<K, V>, more: &HashMap<K, V>) -> usize {
    more.keys().filter(|key| !held.contains_key(key)).count()
}

/// Numbers that no class has, before or after.
fn free_classes(held: Held<'_>, desired: &Desired) -> impl Iterator<Item = u32> {
    let of_peers = held.peers.values().chain(desired.peers.values());
    let of_ports = held.peer_ports.values().chain(desired.peer_ports.values());
    let of_verdicts = held.verdicts.keys().chain(desired.verdicts.keys());
    let taken: HashSet<u32> = of_peers
        .chain(of_ports)
        .map(|entry| entry.class)
        .chain(of_verdicts.map(|(_, key)| key.class))
        .collect();
    (1..=u32::MAX).filter(move |class| !taken.contains(class))
}

/// The workloads and directions in which what holds for everybody changes.
fn changing_for_everybody(held: &Verdicts, desired: &Verdicts) -> HashSet<Side> {
    let differ = |one: &Verdicts, other: &Verdicts| -> Vec<(WorkloadId, u8)> {
        let differ = one
            .iter()
            .filter(|(key, value)| key.1.class == 0 && other.get(key) != Some(value));
        differ.map(|(key, _)| side(&key.1)).collect()
    };
    let mut sides: HashSet<Side> = differ(held, desired).into_iter().collect();
    sides.extend(differ(desired, held));
    sides
}

#[cfg(test)]
mod tests {
    use proptest::{collection, prelude::*};
    use reeve_common::{
        PEER_BY_PORT, VERDICT_PREFIX_ANY_PORT, VERDICT_PREFIX_FULL, ipv4_mapped, protocol::UDP,
    };

    use super::*;
    use crate::{datapath::KernelState, policy::KernelTables};

    const PLENTY: Room = Room {
        workloads: 100,
        namespaces: 100,
        local_addresses: 100,
        peers: 1000,
        peer_ports: 1000,
        verdicts: 10_000,
    };
    /// Two workloads, one direction.
    const SIDES: [Side; 2] = [(1, 0), (2, 0)];
    const PORTS: [u8; 4] = [1, 2, 3, 8];

    /// The three maps.
    #[derive(Clone, Debug)]
    struct Maps {
        peers: Peers,
        peer_ports: PeerPorts,
        verdicts: Verdicts,
    }

    impl Maps {
        fn held(&self) -> Held<'_> {
            Held {
                peers: &self.peers,
                peer_ports: &self.peer_ports,
                verdicts: &self.verdicts,
            }
        }

        fn peer(&self, address: Address) -> PeerEntry {
            let lengths = self.peers.keys().map(|(bits, _)| *bits).collect();
            around(&self.peers, &lengths, ADDRESS_BITS, address)
        }

        /// As the programs ask: whether a connection of a workload to an address and port is allowed.
        fn allows(&self, workload: WorkloadId, address: Address, port: u8) -> bool {
            let mut peer = self.peer(address);
            if peer.flags & PEER_BY_PORT != 0 {
                let by_port = self.peer_ports.get(&port_key(address, port));
                peer = by_port.copied().unwrap_or(peer);
            }
            let verdict = |class| {
                let key = |bits: u32| {
                    let kept = 0xff_u8.checked_shl(96 - bits.min(96)).unwrap_or(0);
                    let whole = bits > VERDICT_PREFIX_ANY_PORT;
                    (
                        bits,
                        VerdictKey {
                            workload,
                            class,
                            direction: 0,
                            protocol: if bits > 72 { UDP } else { 0 },
                            port: [0, if whole { port & kept } else { 0 }],
                        },
                    )
                };
                (72..=VERDICT_PREFIX_FULL)
                    .rev()
                    .find_map(|bits| self.verdicts.get(&key(bits)))
            };
            verdict(peer.class)
                .or_else(|| verdict(0))
                .is_some_and(|verdict| verdict.action == Action::Allow as u32)
        }

        fn answers(&self) -> Vec<bool> {
            let asked = SIDES.iter().flat_map(|(workload, _)| {
                (0..4_u8).flat_map(move |last| PORTS.map(|port| (*workload, last, port)))
            });
            asked
                .map(|(workload, last, port)| self.allows(workload, ip(last), port))
                .collect()
        }
    }

    fn ip(last: u8) -> Address {
        ipv4_mapped([10, 0, 0, last])
    }

    fn port_key(address: Address, port: u8) -> PeerPortKey {
        PeerPortKey {
            address,
            port: u16::from(port),
            protocol: UDP,
            reserved: 0,
        }
    }

    /// What a side says of ports: of one, of those that begin alike, of all, of every protocol.
    fn prefix(
        (bits, port): (u32, u8),
        class: u32,
        (workload, direction): Side,
    ) -> (u32, VerdictKey) {
        let key = VerdictKey {
            workload,
            class,
            direction,
            protocol: if bits > 72 { UDP } else { 0 },
            port: [
                0,
                if bits > VERDICT_PREFIX_ANY_PORT {
                    port
                } else {
                    0
                },
            ],
        };
        (bits, key)
    }

    type Said = Vec<((u32, u8), bool)>;

    fn said() -> impl Strategy<Value = Said> + Clone {
        let prefix = prop_oneof![
            proptest::sample::select(&PORTS[..]).prop_map(|port| (96, port)),
            Just((95, 2)),
            Just((80, 0)),
            Just((72, 0)),
        ];
        collection::vec((prefix, any::<bool>()), 0..4)
    }

    /// Maps as the compiler makes them: a class has no verdicts of its own, or all of them.
    fn maps() -> impl Strategy<Value = Maps> {
        let peer = (0..4_u8, prop_oneof![Just(120_u32), Just(127), Just(128)]);
        let peers = collection::hash_map(peer, (0..4_u32, any::<bool>()), 0..5);
        let ports = collection::hash_map((0..4_u8, 0..4_usize), 0..4_u32, 0..4);
        let of_side = (said(), collection::vec(proptest::option::of(said()), 3));
        let verdicts = [of_side.clone(), of_side];
        (peers, ports, verdicts).prop_map(|(peers, ports, sides)| {
            let mut verdicts = Verdicts::new();
            for (side, (everybody, classes)) in SIDES.iter().zip(sides) {
                let mut say = |class: u32, said: &Said| {
                    for (at, allow) in said {
                        let action = if *allow { Action::Allow } else { Action::Deny };
                        let value = VerdictEntry {
                            action: action as u32,
                            ..REFUSED
                        };
                        verdicts.insert(prefix(*at, class, *side), value);
                    }
                };
                say(0, &everybody);
                for (class, own) in (1..).zip(classes) {
                    if let Some(own) = own {
                        say(class, &everybody);
                        say(class, &own);
                    }
                }
            }
            let entry = |class, by_port: bool| PeerEntry {
                class,
                peer: 0,
                flags: if by_port { PEER_BY_PORT } else { 0 },
            };
            let peers: Peers = peers
                .into_iter()
                .map(|((last, bits), (class, by_port))| {
                    let by_port = by_port && bits == ADDRESS_BITS;
                    ((bits, masked(ip(last), bits)), entry(class, by_port))
                })
                .collect();
            // Ports are of addresses that are said to have some.
            let has_ports = |key: &PeerPortKey| {
                let of = peers.get(&(ADDRESS_BITS, key.address));
                of.is_some_and(|of| of.flags & PEER_BY_PORT != 0)
            };
            let peer_ports = ports
                .into_iter()
                .map(|((last, port), class)| (port_key(ip(last), PORTS[port]), entry(class, false)))
                .filter(|(key, _)| has_ports(key))
                .collect();
            Maps {
                peers,
                peer_ports,
                verdicts,
            }
        })
    }

    fn desired(maps: &Maps) -> Desired {
        let peers = maps.peers.iter();
        let verdicts = maps.verdicts.iter();
        Desired::new(&KernelState {
            tables: KernelTables {
                peers: peers
                    .map(|((bits, key), value)| (*bits, *key, *value))
                    .collect(),
                peer_ports: maps.peer_ports.clone().into_iter().collect(),
                verdicts: verdicts
                    .map(|((bits, key), value)| (*bits, *key, *value))
                    .collect(),
            },
            ..KernelState::default()
        })
    }

    /// Writes entry by entry, the longest prefixes first, and asks after each.
    fn write_peers(maps: &mut Maps, peers: &Peers, mut ask: impl FnMut(&Maps)) {
        let mut peers: Vec<_> = peers.iter().collect();
        peers.sort_unstable_by_key(|((bits, _), _)| std::cmp::Reverse(*bits));
        for (key, value) in peers {
            maps.peers.insert(*key, *value);
            ask(maps);
        }
    }

    proptest! {
        #[test]
        fn nobody_is_judged_by_half_of_either(old in maps(), new in maps()) {
            let (before, after) = (old.answers(), new.answers());
            let ask = |maps: &Maps| {
                for ((now, before), after) in maps.answers().iter().zip(&before).zip(&after) {
                    assert!(now == before || now == after);
                }
            };
            let Some(way) = Transition::new(old.held(), &desired(&new), PLENTY) else {
                for last in 0..4 {
                    prop_assert_eq!(old.peer(ip(last)), new.peer(ip(last)));
                }
                return Ok(());
            };
            let mut maps = old.clone();
            for (key, value) in &way.verdicts {
                let before = maps.verdicts.insert(*key, *value);
                prop_assert_eq!(before, None);
                ask(&maps);
            }
            for (key, value) in &way.peer_ports {
                maps.peer_ports.insert(*key, *value);
                ask(&maps);
            }
            write_peers(&mut maps, &way.peers, ask);
            // Only verdicts change from here on, and whom they are about does not.
            maps.verdicts.clone_from(&new.verdicts);
            maps.verdicts.extend(&way.verdicts);
            prop_assert_eq!(&maps.answers(), &after);
            write_peers(&mut maps, &new.peers, |maps| assert_eq!(maps.answers(), after));
            for (key, value) in &new.peer_ports {
                maps.peer_ports.insert(*key, *value);
                prop_assert_eq!(&maps.answers(), &after);
            }
            let gone: Vec<_> = maps.peers.keys().copied().collect();
            for key in gone.iter().filter(|key| !new.peers.contains_key(key)) {
                maps.peers.remove(key);
                prop_assert_eq!(&maps.answers(), &after);
            }
        }
    }

    #[test]
    fn where_there_is_no_room_for_both_there_is_no_way() {
        let maps = |class| Maps {
            peers: [(
                (128, ip(1)),
                PeerEntry {
                    class,
                    ..PeerEntry::default()
                },
            )]
            .into(),
            peer_ports: PeerPorts::new(),
            verdicts: [(prefix((96, 1), class, SIDES[0]), REFUSED)].into(),
        };
        let (old, new) = (maps(1), desired(&maps(2)));
        let way = Transition::new(old.held(), &new, PLENTY).unwrap();
        assert_eq!((way.peers.len(), way.verdicts.len()), (1, 1));
        assert_eq!(way.verdicts.keys().next().unwrap().1.class, 3);
        for room in [
            Room {
                verdicts: 3,
                ..PLENTY
            },
            Room { peers: 1, ..PLENTY },
        ] {
            assert!(Transition::new(old.held(), &new, room).is_none());
        }
    }
}
