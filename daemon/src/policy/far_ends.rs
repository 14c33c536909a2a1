//! Who is at an address: by longest prefix, the selectors that match whoever is there.
//!
//! Blocks of policies add up: an address is in all the blocks that contain it. Peers do not: an
//! address belongs to the peer with the longest prefix. Each prefix that anybody names therefore
//! carries the blocks of all prefixes around it, and the nearest peers.
//!
//! Where several peers share an address, a destination port tells whom a connection is for. A
//! source's port tells nothing: what comes from there matches what allows only where that matches
//! all of them, and what denies as soon as that matches one.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use reeve_common::protocol;

use super::sets::{SelectorId, SetId, Sets};

/// Protocols whose far ends are told apart by port.
pub(super) const PORT_PROTOCOLS: [u8; 2] = [protocol::TCP, protocol::UDP];

/// A peer, as far as its addresses are concerned.
#[derive(Clone, Debug)]
pub(super) struct Resident {
    /// Number of the peer.
    pub(super) peer: u32,
    pub(super) addresses: Vec<IpNet>,
    pub(super) ports: Vec<u16>,
    /// The selectors that match who it is.
    pub(super) identity: SetId,
    /// Whether a tunnel reaches it.
    pub(super) tunnel: bool,
    /// Whether nobody unknown can use its addresses too.
    pub(super) exclusive: bool,
}

/// A block of a policy.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) selector: SelectorId,
    pub(super) block: IpNet,
    pub(super) except: Vec<IpNet>,
}

/// Who is at an address, or at one port of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Occupant {
    /// Number of the peer, 0 for none.
    pub(super) peer: u32,
    pub(super) tunnel: bool,
    /// What matches it as a destination.
    pub(super) egress: SetId,
    /// What matches it as a source.
    pub(super) ingress: SetId,
}

/// Who is at the addresses of a prefix.
#[derive(Clone, Debug, Default)]
pub(super) struct FarEnd {
    /// Who has the ports that nobody owns.
    pub(super) rest: Occupant,
    /// Who owns ports, where several share the address.
    pub(super) ports: BTreeMap<u16, Occupant>,
    /// Blocks only, whoever is there.
    pub(super) blocks: SetId,
    /// Every peer there.
    pub(super) residents: Vec<u32>,
}

/// The selectors that the rules of this node's workloads name, by direction. Others tell nobody
/// apart.
#[derive(Clone, Debug, Default)]
pub(super) struct InUse {
    pub(super) egress: Vec<bool>,
    pub(super) ingress: Vec<bool>,
    /// The selectors that match whoever they could match, since their rules deny.
    pub(super) possible: Vec<bool>,
    /// Selectors that match whom two others match: by the one of identity, the one of blocks and
    /// the selector itself.
    pub(super) both: HashMap<SelectorId, Vec<(SelectorId, SelectorId)>>,
}

/// All prefixes that anybody names.
#[derive(Clone, Debug, Default)]
pub(super) struct FarEnds {
    /// A prefix stands before those inside it.
    ordered: Vec<(IpNet, FarEnd)>,
    index: HashMap<IpNet, usize>,
    /// Prefix lengths in use, longest first.
    lengths_v4: Vec<u8>,
    lengths_v6: Vec<u8>,
}

/// What a prefix changes compared to the one around it.
#[derive(Clone, Debug, Default)]
struct Change {
    add: Vec<SelectorId>,
    remove: Vec<SelectorId>,
    residents: Vec<usize>,
}

/// A prefix around those that follow.
struct Around<'a> {
    prefix: IpNet,
    blocks: SetId,
    residents: Vec<&'a Resident>,
    /// Whether the residents are at a single address. The kernel looks ports up by address, so
    /// only there can they be told by port.
    single: bool,
}

struct Builder<'a> {
    residents: &'a [Resident],
    in_use: &'a InUse,
    sets: &'a mut Sets,
}

// === impl FarEnds ===

impl FarEnds {
    pub(super) fn new(
        residents: &[Resident],
        blocks: &[Block],
        in_use: &InUse,
        sets: &mut Sets,
    ) -> Self {
        let mut changes: BTreeMap<IpNet, Change> = BTreeMap::new();
        for (index, resident) in residents.iter().enumerate() {
            for prefix in &resident.addresses {
                let change = changes.entry(prefix.trunc()).or_default();
                if change.residents.last() != Some(&index) {
                    change.residents.push(index);
                }
            }
        }
        for block in blocks {
            let change = changes.entry(block.block).or_default();
            change.add.push(block.selector);
            for hole in &block.except {
                changes
                    .entry(*hole)
                    .or_default()
                    .remove
                    .push(block.selector);
            }
        }
        let mut builder = Builder {
            residents,
            in_use,
            sets,
        };
        builder.walk(changes)
    }

    /// Who is at an address; none where no prefix contains it.
    pub(super) fn at(&self, ip: IpAddr) -> Option<&FarEnd> {
        let ip = ip.to_canonical();
        let lengths = match ip {
            IpAddr::V4(_) => &self.lengths_v4,
            IpAddr::V6(_) => &self.lengths_v6,
        };
        lengths.iter().find_map(|length| {
            let prefix = IpNet::new(ip, *length).ok()?.trunc();
            let (_, far_end) = self.ordered.get(*self.index.get(&prefix)?)?;
            Some(far_end)
        })
    }

    /// Every prefix, each before those inside it; IPv4 before IPv6.
    pub(super) fn iter(&self) -> impl Iterator<Item = &(IpNet, FarEnd)> {
        self.ordered.iter()
    }

    fn insert(&mut self, prefix: IpNet, far_end: FarEnd) {
        let lengths = match prefix {
            IpNet::V4(_) => &mut self.lengths_v4,
            IpNet::V6(_) => &mut self.lengths_v6,
        };
        if let Err(place) = lengths.binary_search_by(|l| prefix.prefix_len().cmp(l)) {
            lengths.insert(place, prefix.prefix_len());
        }
        self.index.insert(prefix, self.ordered.len());
        self.ordered.push((prefix, far_end));
    }
}

// === impl FarEnd ===

impl FarEnd {
    /// Whom a connection to a port is for.
    pub(super) fn destination(&self, protocol: u8, port: u16) -> &Occupant {
        let owner = PORT_PROTOCOLS
            .contains(&protocol)
            .then(|| self.ports.get(&port));
        owner.flatten().unwrap_or(&self.rest)
    }

    /// Every occupant.
    pub(super) fn occupants(&self) -> impl Iterator<Item = &Occupant> {
        std::iter::once(&self.rest).chain(self.ports.values())
    }
}

// === impl Builder ===

impl<'a> Builder<'a> {
    fn walk(&mut self, changes: BTreeMap<IpNet, Change>) -> FarEnds {
        let mut far_ends = FarEnds::default();
        let mut around: Vec<Around<'a>> = Vec::new();
        for (prefix, change) in changes {
            while around
                .pop_if(|outer| !outer.prefix.contains(&prefix))
                .is_some()
            {}
            let outer = around.last();
            let mut blocks = outer.map_or(SetId::EMPTY, |outer| outer.blocks);
            if !change.add.is_empty() || !change.remove.is_empty() {
                let kept = self.sets.get(blocks).iter().copied();
                let kept = kept.filter(|selector| !change.remove.contains(selector));
                let selectors: Vec<_> = kept.chain(change.add).collect();
                blocks = self.sets.intern(selectors);
            }
            let (residents, single) = match outer {
                Some(outer) if change.residents.is_empty() => {
                    (outer.residents.clone(), outer.single)
                }
                _ => {
                    let all = self.residents;
                    let own = change.residents.iter();
                    (
                        own.filter_map(|index| all.get(*index)).collect(),
                        prefix.prefix_len() == prefix.max_prefix_len(),
                    )
                }
            };
            let here = Around {
                prefix,
                blocks,
                residents,
                single,
            };
            far_ends.insert(prefix, self.far_end(&here));
            around.push(here);
        }
        far_ends
    }

    fn far_end(&mut self, here: &Around<'a>) -> FarEnd {
        let (blocks, residents) = (here.blocks, &here.residents);
        let owns_ports_only = |resident: &Resident| {
            let told_apart = residents.len() > 1 || !resident.exclusive;
            here.single && told_apart && !resident.ports.is_empty()
        };
        let source = self.source(residents);
        let ingress = self.within(blocks, source, &self.in_use.ingress);
        let mut ports = BTreeMap::new();
        for resident in residents
            .iter()
            .filter(|resident| owns_ports_only(resident))
        {
            let egress = self.within(blocks, resident.identity, &self.in_use.egress);
            let occupant = Occupant {
                peer: resident.peer,
                tunnel: resident.tunnel,
                egress,
                ingress,
            };
            for port in &resident.ports {
                ports.entry(*port).or_insert(occupant);
            }
        }
        let others: Vec<_> = residents
            .iter()
            .copied()
            .filter(|resident| !owns_ports_only(resident))
            .collect();
        let rest = others.first();
        // Who is there may use a port that nobody owns.
        let possible = if others.is_empty() {
            residents
        } else {
            &others
        };
        let identity = self.rest(rest.map_or(SetId::EMPTY, |rest| rest.identity), possible);
        FarEnd {
            rest: Occupant {
                peer: rest.map_or(0, |rest| rest.peer),
                tunnel: rest.is_some_and(|rest| rest.tunnel),
                egress: self.within(blocks, identity, &self.in_use.egress),
                ingress,
            },
            ports,
            blocks,
            residents: residents.iter().map(|resident| resident.peer).collect(),
        }
    }

    /// What matches any of these as a source.
    fn source(&mut self, residents: &[&Resident]) -> SetId {
        let certain = residents.iter().all(|resident| resident.exclusive);
        match residents {
            [] => return SetId::EMPTY,
            [one] if certain => return one.identity,
            _ => {}
        }
        let sets: Vec<_> = residents.iter().map(|resident| resident.identity).collect();
        let common = common(self.sets, &sets, &self.in_use.possible);
        let possible = &self.in_use.possible;
        let kept = common
            .into_iter()
            .filter(|selector| certain || is(possible, *selector));
        self.sets.intern(kept)
    }

    /// What matches the one whom a connection is taken to be for, where it could be for others.
    fn rest(&mut self, identity: SetId, others: &[&Resident]) -> SetId {
        if let [one] = others
            && one.identity == identity
        {
            return identity;
        }
        let possible = &self.in_use.possible;
        let sets = others
            .iter()
            .flat_map(|other| self.sets.get(other.identity));
        let could_be = sets.copied().filter(|selector| is(possible, *selector));
        let all: Vec<_> = self
            .sets
            .get(identity)
            .iter()
            .copied()
            .chain(could_be)
            .collect();
        self.sets.intern(all)
    }

    /// The selectors of both sets that are in use.
    fn within(&mut self, blocks: SetId, identity: SetId, in_use: &[bool]) -> SetId {
        let (blocks, identity) = (self.sets.get(blocks), self.sets.get(identity));
        let of_both = identity.iter().filter_map(|one| self.in_use.both.get(one));
        let of_both = of_both
            .flatten()
            .filter(|(block, _)| blocks.binary_search(block).is_ok())
            .map(|(_, both)| *both);
        let all = blocks.iter().chain(identity).copied().chain(of_both);
        let used: Vec<_> = all.filter(|selector| is(in_use, *selector)).collect();
        self.sets.intern(used)
    }
}

/// What a far end matches that could be any of several, of whom these sets are: what denies if
/// any of them matches it, and all else if all of them do.
pub(super) fn common(sets: &Sets, several: &[SetId], possible: &[bool]) -> Vec<SelectorId> {
    let Some((first, others)) = several.split_first() else {
        return Vec::new();
    };
    let in_all = sets.get(*first).iter().copied().filter(|selector| {
        let in_set = |set: &SetId| sets.get(*set).binary_search(selector).is_ok();
        others.iter().all(in_set)
    });
    let in_any = several.iter().flat_map(|set| sets.get(*set)).copied();
    in_all
        .chain(in_any.filter(|selector| is(possible, *selector)))
        .collect()
}

fn is(flags: &[bool], selector: SelectorId) -> bool {
    let place = usize::try_from(selector).unwrap_or(usize::MAX);
    flags.get(place).copied().unwrap_or_default()
}
