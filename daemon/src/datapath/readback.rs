//! What the kernel's maps really hold, asked as the programs ask: see `ebpf/src/judge.rs`.

use std::net::IpAddr;

use aya::{
    Pod,
    maps::{self, MapData, MapError, lpm_trie},
};
use reeve_common::{
    Direction, PEER_BY_PORT, PEER_NO_ROOM, PeerEntry, PeerPortKey, VERDICT_PREFIX_FULL,
    VerdictEntry, VerdictKey, WorkloadId, protocol,
};

use super::{Error, address, desired::NO_ROOM, load::map_error, state::State};

/// Bits of an address.
const ADDRESS_BITS: u32 = 128;

impl State {
    /// What the programs would find for a connection: nothing is a deny.
    pub(super) fn verdict(
        &self,
        workload: WorkloadId,
        direction: Direction,
        remote: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<VerdictEntry, Error> {
        let peer = self.peer(direction, remote, protocol, port)?;
        if peer.flags & PEER_NO_ROOM != 0 {
            return Ok(NO_ROOM);
        }
        let class = peer.class;
        let (protocol, port) = match protocol {
            protocol::ICMP | protocol::ICMPV6 => (protocol::ICMP, 0),
            other => (other, port),
        };
        let key = |class| VerdictKey {
            workload,
            class,
            direction: direction as u8,
            protocol,
            port: port.to_be_bytes(),
        };
        let verdicts = self.verdicts.table();
        let mut found = longest("VERDICTS", verdicts, VERDICT_PREFIX_FULL, key(class))?;
        if found.is_none() && class != 0 {
            found = longest("VERDICTS", verdicts, VERDICT_PREFIX_FULL, key(0))?;
        }
        Ok(found.unwrap_or_default())
    }

    fn peer(
        &self,
        direction: Direction,
        remote: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<PeerEntry, Error> {
        let remote = address(remote);
        let entry = longest("PEERS", self.peers.table(), ADDRESS_BITS, remote)?;
        let entry = entry.unwrap_or_default();
        if entry.flags & PEER_BY_PORT == 0 || direction == Direction::Ingress {
            return Ok(entry);
        }
        let key = PeerPortKey {
            address: remote,
            port,
            protocol,
            reserved: 0,
        };
        let by_port = found("PEER_PORTS", self.peer_ports.table().get(&key, 0))?;
        Ok(by_port.unwrap_or(entry))
    }

    /// The workload that a cgroup is enrolled as.
    pub(super) fn enrolled(&self, cgroup: u64) -> Result<Option<WorkloadId>, Error> {
        let entry = found("WORKLOADS", self.workloads.table().get(&cgroup, 0))?;
        Ok(entry.map(|entry| entry.workload))
    }
}

fn longest<K: Pod, V: Pod>(
    name: &'static str,
    trie: &maps::LpmTrie<MapData, K, V>,
    bits: u32,
    key: K,
) -> Result<Option<V>, Error> {
    found(name, trie.get(&lpm_trie::Key::new(bits, key), 0))
}

fn found<V>(name: &'static str, result: Result<V, MapError>) -> Result<Option<V>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(map_error(name, "read", source)),
    }
}
