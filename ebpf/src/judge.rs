//! Who is asking, who is at the far end, and what the policy says: shared by every hook.
//!
//! A verdict costs one look-up for the far end and at most two for the policy, whatever the
//! number of rules. Nothing found is a deny.

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id},
};
use reeve_common::{
    Action, Address, Direction, DryRun, MAX_CGROUP_DEPTH, NO_WORKLOAD, PEER_BY_PORT, PEER_NO_ROOM,
    PEER_TUNNEL, PeerEntry, PeerPortKey, Reason, VERDICT_PREFIX_FULL, VerdictEntry, VerdictKey,
    WORKLOAD_IS_REEVE, WORKLOAD_UNKNOWN, WorkloadEntry, WorkloadId, link_local_key, protocol,
};

use crate::{
    address::{is_loopback, is_unspecified, to_words},
    event::{Connection, Outcome},
    maps::{LOCAL_ADDRESSES, PEER_PORTS, PEERS, VERDICTS, WORKLOADS},
};

/// Bits of an address.
const ADDRESS_BITS: u32 = 128;

/// Whether an entry is reeve itself.
#[inline(always)]
pub fn is_reeve(entry: &WorkloadEntry) -> bool {
    entry.flags & WORKLOAD_IS_REEVE != 0
}

/// Whether an entry is an enforced parent of which no enrolled child matched.
#[inline(always)]
pub fn is_unknown(entry: &WorkloadEntry) -> bool {
    entry.flags & WORKLOAD_UNKNOWN != 0
}

/// The entry of the deepest enrolled cgroup among the calling task's own and its ancestors.
#[inline(always)]
pub fn caller(depths: u32) -> Option<WorkloadEntry> {
    // SAFETY: a depth that the task's cgroup does not reach gives 0.
    deepest(depths, |depth| unsafe {
        bpf_get_current_ancestor_cgroup_id(depth)
    })
}

/// The same for the cgroup in which a packet's socket was made.
#[inline(always)]
pub fn owner(depths: u32, skb: *mut __sk_buff) -> Option<WorkloadEntry> {
    // SAFETY: `skb` is the program's context.
    deepest(depths, |depth| unsafe {
        bpf_skb_ancestor_cgroup_id(skb, depth)
    })
}

#[inline(always)]
fn deepest(depths: u32, ancestor: impl Fn(i32) -> u64) -> Option<WorkloadEntry> {
    let mut depth = MAX_CGROUP_DEPTH as i32;
    while depth >= 0 {
        if depths & (1 << depth) != 0 {
            let id = ancestor(depth);
            if id != 0 {
                // SAFETY: the entry is copied at once; what is freed meanwhile stays readable
                // until the program ends.
                if let Some(entry) = unsafe { WORKLOADS.get(id) } {
                    return Some(*entry);
                }
            }
        }
        depth -= 1;
    }
    None
}

/// The workload that alone has this address on the node.
#[inline(always)]
pub fn workload_at(address: &Address) -> Option<WorkloadId> {
    match owner_of(address, NO_WORKLOAD) {
        NO_WORKLOAD => None,
        owner => Some(owner),
    }
}

/// The same, or none of them. Of an address that means something on its link only: `workload`, if it has
/// one like it.
///
/// The work is in a function that the verifier looks at once, see [`judge`]: a packet is asked this
/// several times.
#[inline(always)]
fn owner_of(address: &Address, workload: WorkloadId) -> WorkloadId {
    // SAFETY: a reference is never null.
    unsafe { reeve_owner_of(address, workload) }
}

/// # Safety
///
/// `address` is null or may be read.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_owner_of(address: *const Address, workload: WorkloadId) -> WorkloadId {
    // SAFETY: as the caller promises.
    let Some(address) = (unsafe { address.as_ref() }) else {
        return NO_WORKLOAD;
    };
    let key = match link_local_key(address, workload) {
        Some(key) => key,
        None if is_like_a_key(address) => return NO_WORKLOAD,
        None => *address,
    };
    // SAFETY: as in `deepest`.
    unsafe { LOCAL_ADDRESSES.get(&key) }
        .copied()
        .unwrap_or(NO_WORKLOAD)
}

/// Whether an address looks like the key of a link-local one, which has a workload's number where such
/// an address has zeroes.
#[inline(always)]
fn is_like_a_key(address: &Address) -> bool {
    let words = to_words(address).map(u32::from_be);
    let of_v6 = words[0] == 0xfe80_0000;
    let of_v4 = words[0] == 0 && words[2] == 0xffff && words[3] >> 16 == 0xa9fe;
    words[1] != 0 && (of_v6 || of_v4)
}

/// Whether an address is the workload's: one of its own, or loopback's.
#[inline(never)]
pub fn is_own(address: &Address, workload: WorkloadId) -> bool {
    is_loopback(address) || (workload != NO_WORKLOAD && owner_of(address, workload) == workload)
}

/// Whether a source address may lead back to the workload alone: it is one of its own, or the
/// namespace is shared, whose addresses the daemon does not know. `namespace_owner` is asked only where it
/// matters.
#[inline(always)]
pub fn is_from_here(
    source: &Address,
    workload: WorkloadId,
    namespace_owner: impl FnOnce() -> WorkloadId,
) -> bool {
    is_own(source, workload) || namespace_owner() != workload
}

/// Whether an address under which a workload sends is not its own: another workload's, or, in a
/// namespace that is the workload's alone, any but its own. Whoever the far end then answers has not
/// asked. `namespace_owner` says whose the namespace is, and is asked only where it matters.
#[inline(always)]
pub fn is_forged(
    source: &Address,
    workload: WorkloadId,
    namespace_owner: impl FnOnce() -> WorkloadId,
) -> bool {
    match owner_of(source, workload) {
        // Without an address, as who asks for one by DHCP has none, nobody can be answered.
        NO_WORKLOAD => !is_unspecified(source) && namespace_owner() == workload,
        owner => owner != workload,
    }
}

/// What is known of the far end. An address of which nothing is known is of class 0.
#[inline(always)]
fn peer(connection: &Connection) -> PeerEntry {
    let key = Key::new(ADDRESS_BITS, connection.remote);
    let Some(entry) = PEERS.get(&key).copied() else {
        return PeerEntry {
            class: 0,
            peer: 0,
            flags: 0,
        };
    };
    // A client's port says nothing of who it is: anybody can choose it.
    if entry.flags & PEER_BY_PORT != 0 && connection.direction == Direction::Egress as u8 {
        let key = PeerPortKey {
            address: connection.remote,
            port: connection.remote_port,
            protocol: connection.protocol,
            reserved: 0,
        };
        // SAFETY: as in `deepest`.
        if let Some(entry) = unsafe { PEER_PORTS.get(&key) } {
            return *entry;
        }
    }
    entry
}

/// What the policy says, by the far end's class and then by class 0.
#[inline(always)]
fn verdict(connection: &Connection, class: u32) -> VerdictEntry {
    let port = if connection.direction == Direction::Egress as u8 {
        connection.remote_port
    } else {
        connection.local_port
    };
    let (protocol, port) = match connection.protocol {
        protocol::ICMP | protocol::ICMPV6 => (protocol::ICMP, 0),
        other => (other, port),
    };
    let mut key = Key::new(
        VERDICT_PREFIX_FULL,
        VerdictKey {
            workload: connection.workload,
            class,
            direction: connection.direction,
            protocol,
            port: port.to_be_bytes(),
        },
    );
    let mut found = VERDICTS.get(&key);
    if found.is_none() && class != 0 {
        key.data.class = 0;
        found = VERDICTS.get(&key);
    }
    found.copied().unwrap_or(VerdictEntry {
        action: Action::Deny as u32,
        rule: 0,
        dry_run: DryRun::Same as u32,
        dry_run_rule: 0,
    })
}

/// Judges a connection and fills in the answer's peer and rules.
///
/// The work is in a function with a symbol of its own, which the verifier looks at once, whatever
/// it is called with; without one it is followed again at each call, with all that is known there.
#[inline(always)]
pub fn judge(connection: &mut Connection) -> Outcome {
    // SAFETY: a reference is never null.
    Outcome::from_number(unsafe { reeve_judge(connection) })
}

/// See [`judge`]. The verifier wants a pointer that may be null.
///
/// # Safety
///
/// `connection` is null or may be written.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_judge(connection: *mut Connection) -> u32 {
    // SAFETY: as the caller promises.
    let outcome = match unsafe { connection.as_mut() } {
        Some(connection) => judged(connection),
        None => Outcome::deny(Reason::MapFailure),
    };
    outcome.to_number()
}

#[inline(always)]
fn judged(connection: &mut Connection) -> Outcome {
    let peer = peer(connection);
    let verdict = verdict(connection, peer.class);
    connection.peer = peer.peer;
    connection.rule = verdict.rule;
    connection.dry_run = verdict.dry_run as u8;
    connection.dry_run_rule = verdict.dry_run_rule;
    if verdict.action == Action::NoRoom as u32 || peer.flags & PEER_NO_ROOM != 0 {
        return Outcome::deny(Reason::MapFailure);
    }
    let egress = connection.direction == Direction::Egress as u8;
    let tcp = connection.protocol == protocol::TCP;
    if verdict.action == Action::Allow as u32 {
        return match (tcp, egress && peer.flags & PEER_TUNNEL != 0) {
            (true, true) => Outcome::tunnel(),
            (true, false) => Outcome::allow(Reason::NoTunnel),
            (false, _) => Outcome::allow(Reason::NotTunnelled),
        };
    }
    if verdict.action == Action::Permissive as u32 && !egress {
        return Outcome::allow(Reason::Permissive);
    }
    if verdict.action == Action::TunnelOnly as u32 && !egress {
        return Outcome::deny(Reason::PlaintextRefused);
    }
    Outcome::deny(if verdict.rule == 0 {
        Reason::NoPolicy
    } else {
        Reason::PolicyDeny
    })
}
