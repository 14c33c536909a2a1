//! What the kernel programs do with the tables, in user space.

use std::{collections::HashSet, net::IpAddr};

use reeve_common::{
    Action, Address, Direction, PEER_BY_PORT, PeerEntry, PeerPortKey, VERDICT_PREFIX_ANY_PORT,
    VERDICT_PREFIX_ANY_PROTOCOL, VerdictEntry, VerdictKey, WorkloadId, ipv4_mapped,
};

use crate::policy::{Decision, KernelTables, rule::judged_protocol};

/// An address as the programs see it.
pub(super) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => ipv4_mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// One question to the kernel: the far end's address, and the port at the destination.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) workload: WorkloadId,
    pub(super) direction: Direction,
    pub(super) remote: IpAddr,
    pub(super) protocol: u8,
    pub(super) port: u16,
}

/// The verdict.
pub(super) fn judge(tables: &KernelTables, question: Question) -> VerdictEntry {
    let class = peer(tables, question).class;
    verdict(tables, question, class)
        .or_else(|| verdict(tables, question, 0).filter(|_| class != 0))
        .unwrap_or_default()
}

/// What the tables have to say where a snapshot decides so.
pub(super) fn entry(decision: Decision) -> VerdictEntry {
    VerdictEntry {
        action: decision.action as u32,
        rule: decision.rule,
        dry_run: decision.dry_run as u32,
        dry_run_rule: decision.dry_run_rule,
    }
}

/// What `PEERS` and `PEER_PORTS` say of the far end.
pub(super) fn peer(tables: &KernelTables, question: Question) -> PeerEntry {
    let remote = address(question.remote);
    let number = u128::from_be_bytes(remote);
    let entry = tables
        .peers
        .iter()
        .filter(|(length, prefix, _)| {
            let different = number ^ u128::from_be_bytes(*prefix);
            different.leading_zeros() >= *length
        })
        .max_by_key(|(length, ..)| *length)
        .map_or(PeerEntry::default(), |(_, _, entry)| *entry);
    if entry.flags & PEER_BY_PORT == 0 || question.direction == Direction::Ingress {
        return entry;
    }
    let key = PeerPortKey {
        address: remote,
        port: question.port,
        protocol: question.protocol,
        reserved: 0,
    };
    let by_port = tables.peer_ports.iter().find(|(other, _)| *other == key);
    by_port.map_or(entry, |(_, entry)| *entry)
}

fn verdict(tables: &KernelTables, question: Question, class: u32) -> Option<VerdictEntry> {
    let protocol = judged_protocol(question.protocol);
    let port = if protocol == reeve_common::protocol::ICMP {
        0
    } else {
        question.port
    };
    let matches = |length: u32, key: &VerdictKey| {
        assert!(length >= VERDICT_PREFIX_ANY_PROTOCOL);
        let port_bits = length.saturating_sub(VERDICT_PREFIX_ANY_PORT);
        let different = port ^ u16::from_be_bytes(key.port);
        key.workload == question.workload
            && key.class == class
            && key.direction == question.direction as u8
            && (length < VERDICT_PREFIX_ANY_PORT || key.protocol == protocol)
            && different.leading_zeros() >= port_bits
    };
    let found = tables.verdicts.iter();
    let found = found.filter(|(length, key, _)| matches(*length, key));
    found
        .max_by_key(|(length, ..)| *length)
        .map(|(_, _, entry)| *entry)
}

/// Checks that the tables can be written to the maps as they are.
pub(super) fn check(tables: &KernelTables) {
    let peers: HashSet<_> = tables.peers.iter().map(|(l, a, _)| (l, a)).collect();
    assert_eq!(peers.len(), tables.peers.len(), "{:?}", tables.peers);
    let ports: HashSet<_> = tables.peer_ports.iter().map(|(key, _)| key).collect();
    assert_eq!(ports.len(), tables.peer_ports.len());
    let verdicts: HashSet<_> = tables.verdicts.iter().map(|(l, k, _)| (l, k)).collect();
    assert_eq!(
        verdicts.len(),
        tables.verdicts.len(),
        "{:?}",
        tables.verdicts
    );
    for (length, prefix, _) in &tables.peers {
        let number = u128::from_be_bytes(*prefix);
        assert!(
            number.trailing_zeros() >= 128 - length,
            "{length} {prefix:?}"
        );
    }
    for (length, key, entry) in &tables.verdicts {
        let port = u16::from_be_bytes(key.port);
        let port_bits = length.saturating_sub(VERDICT_PREFIX_ANY_PORT);
        assert!(port.trailing_zeros() >= 16 - port_bits, "{length} {key:?}");
        assert!(*length >= VERDICT_PREFIX_ANY_PORT || key.protocol == 0);
        // Only the default deny is nobody's rule; it has entries among what dry runs would change.
        assert!(
            entry.rule != 0 || entry.action == Action::Deny as u32,
            "{key:?}"
        );
    }
}
