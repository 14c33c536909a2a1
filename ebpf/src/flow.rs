//! Connections without a handshake: UDP, ICMP, SCTP and whatever else. The direction that was
//! allowed is remembered, so that replies pass and packets are not judged one by one.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use reeve_common::{Direction, FLOW_IDLE_NANOSECONDS, FlowEntry, FlowKey, Reason, protocol};

use crate::{
    event::{Connection, Outcome, report},
    judge::judge,
    maps::FLOWS,
};

/// How old `last_seen` may be before it is written again: a busy flow's entry then stays in every
/// processor's cache.
const REFRESH_NANOSECONDS: u64 = 1_000_000_000;

/// The key of a connection in `FLOWS`.
#[inline(always)]
fn key(connection: &Connection) -> FlowKey {
    FlowKey {
        local: [0; 16],
        remote: connection.remote,
        local_port: connection.local_port,
        remote_port: connection.remote_port,
        workload: connection.workload,
        protocol: match connection.protocol {
            protocol::ICMPV6 => protocol::ICMP,
            other => other,
        },
        reserved: [0; 7],
    }
}

/// Whether a packet or message may pass, given the direction in which its connection would have
/// been opened. `told` says that a verdict of this generation was reported already.
#[inline(never)]
pub fn pass(connection: &mut Connection, generation: u32, told: bool) -> bool {
    let key = key(connection);
    let direction = connection.direction;
    // SAFETY: asking for the time has no condition.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut revoked = false;
    if let Some(entry) = FLOWS.get_ptr_mut(&key) {
        // SAFETY: an entry that is removed meanwhile stays readable until the program ends, and
        // what is written to it then is lost with it.
        let entry = unsafe { &mut *entry };
        // Another processor's clock may be a moment ahead: no time has passed.
        let idle = now.saturating_sub(entry.last_seen);
        if idle < FLOW_IDLE_NANOSECONDS {
            let mut live = entry.generation == generation;
            if !live {
                connection.direction = entry.direction as u8;
                live = judge(connection).allowed();
                connection.direction = direction;
                if live {
                    entry.generation = generation;
                }
            }
            revoked = !live;
            if live {
                if entry.direction == u32::from(direction) && idle > REFRESH_NANOSECONDS {
                    entry.last_seen = now;
                }
                return true;
            }
        }
    }
    let outcome = judge(connection);
    if !outcome.allowed() {
        // Whoever takes the entry away tells that it was revoked: so it is told once.
        let revoked = revoked && FLOWS.remove(&key).is_ok();
        report(
            connection,
            if revoked {
                Outcome::deny(Reason::Revoked)
            } else {
                outcome
            },
        );
        return false;
    }
    let entry = FlowEntry {
        last_seen: now,
        generation,
        direction: u32::from(direction),
    };
    if FLOWS.insert(&key, &entry, 0).is_err() {
        report(connection, Outcome::deny(Reason::MapFailure));
        return false;
    }
    if !told {
        report(connection, outcome);
    }
    true
}

/// Whether a connection's flow is remembered and still allowed. Nothing is remembered of the question.
#[inline(always)]
pub fn is_live(connection: &mut Connection, generation: u32) -> bool {
    let Some(entry) = FLOWS.get_ptr(&key(connection)) else {
        return false;
    };
    // SAFETY: as in `pass`; asking for the time has no condition.
    let (entry, now) = unsafe { (&*entry, bpf_ktime_get_ns()) };
    if now.saturating_sub(entry.last_seen) >= FLOW_IDLE_NANOSECONDS {
        return false;
    }
    let observed = connection.direction;
    connection.direction = entry.direction as u8;
    let live = entry.generation == generation || judge(connection).allowed();
    connection.direction = observed;
    live
}

/// The other direction.
#[inline(always)]
pub fn opposite(direction: u8) -> u8 {
    if direction == Direction::Egress as u8 {
        Direction::Ingress as u8
    } else {
        Direction::Egress as u8
    }
}
