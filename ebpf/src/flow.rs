//! Connections without a handshake: UDP, ICMP, SCTP and whatever else. The direction that was
//! allowed is remembered, so that replies pass and packets are not judged one by one.

use core::hint::black_box;

use aya_ebpf::helpers::bpf_ktime_get_ns;
use reeve_common::{
    Direction, FLOW_IDLE_NANOSECONDS, FLOW_WAYS, Flow, FlowSlot, Reason, WorkloadId, protocol,
};

use crate::{
    address::to_words,
    event::{Connection, Outcome, report},
    judge::judge,
    maps::{FLOW_SETS, FLOWS, Settings},
};

/// How old `last_seen` may be before it is written again: a busy flow's entry then stays in every
/// processor's cache.
const REFRESH_NANOSECONDS: u64 = 1_000_000_000;

/// Odd, and without a pattern in its bits.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A vacant slot is taken before one of a flow that is in use, and after one of an idle flow: so a
/// workload takes up no more slots than it needs.
const VACANT: u64 = 1;

/// What a set holds of a flow.
struct Found {
    /// The flow, if it is there.
    flow: Option<&'static Flow>,
    /// Where it is, or is to be kept.
    slot: u32,
}

/// The number by which a connection's protocol is remembered.
#[inline(always)]
fn number(protocol: u8) -> u32 {
    match protocol {
        protocol::ICMPV6 => protocol::ICMP.into(),
        other => other.into(),
    }
}

/// The ports and the protocol in one word, to be compared at once.
#[inline(always)]
fn word(local_port: u16, remote_port: u16, number: u32) -> u64 {
    u64::from(local_port) << 48 | u64::from(remote_port) << 32 | u64::from(number)
}

/// The set of a connection's flow.
#[inline(never)]
fn set(connection: &Connection, seed: u32, sets: u32) -> u32 {
    let remote = to_words(&connection.remote);
    let word = word(
        connection.local_port,
        connection.remote_port,
        number(connection.protocol),
    );
    let mut hash = u64::from(seed);
    for part in [
        u64::from(remote[0]) << 32 | u64::from(remote[1]),
        u64::from(remote[2]) << 32 | u64::from(remote[3]),
        word,
    ] {
        hash = (hash ^ part).wrapping_mul(MULTIPLIER);
        hash ^= hash >> 32;
    }
    // Once more: the local port stands in the highest bits, which reach only higher ones by one
    // multiplication. The upper bits are the ones to which every bit has come.
    (hash.wrapping_mul(MULTIPLIER) >> 40) as u32 & (sets - 1)
}

/// Looks for a connection's flow, in whichever direction it was opened. Gives with it where one of the
/// direction that is asked for is to be kept.
#[inline(always)]
fn look_up(connection: &Connection, seed: u32, now: u64) -> (Found, u32) {
    let direction = connection.direction;
    let sets = FLOW_SETS.load();
    let set = set(connection, seed, sets);
    let mut found = Found {
        flow: None,
        slot: 0,
    };
    find(
        connection,
        FlowSlot::first(direction, set, sets),
        now,
        &mut found,
    );
    let own = found.slot;
    if found.flow.is_none() {
        // What was opened in the other direction is answered in this one.
        let first = FlowSlot::first(opposite(direction), set, sets);
        find(connection, first, now, &mut found);
    }
    (found, own)
}

/// Looks for a connection's flow in the set that begins at `first`.
///
/// A function of its own, for its keys not to lie on the stack while the connection is judged.
#[inline(never)]
fn find(connection: &Connection, first: u32, now: u64, found: &mut Found) {
    let wanted = word(
        connection.local_port,
        connection.remote_port,
        number(connection.protocol),
    );
    found.flow = None;
    let mut oldest = u64::MAX;
    let mut way = 0;
    while way < FLOW_WAYS {
        let key = FlowSlot {
            workload: connection.workload,
            slot: first + way,
        };
        // SAFETY: what is replaced or removed meanwhile stays readable until the program ends.
        let age = match unsafe { FLOWS.get(&key) } {
            Some(flow) => {
                if word(flow.local_port, flow.remote_port, flow.protocol) == wanted
                    && flow.remote == connection.remote
                {
                    found.flow = Some(flow);
                    found.slot = key.slot;
                    return;
                }
                if now.saturating_sub(flow.last_seen) < FLOW_IDLE_NANOSECONDS {
                    flow.last_seen
                } else {
                    0
                }
            }
            None => VACANT,
        };
        if age < oldest {
            (oldest, found.slot) = (age, key.slot);
        }
        way += 1;
    }
}

/// Remembers a connection's flow, of the connection's direction, in place of whatever is in the slot.
/// False where the kernel has no room.
///
/// A function of its own, as above.
#[inline(never)]
fn keep(connection: &Connection, slot: u32, last_seen: u64, generation: u32, socket: u64) -> bool {
    let key = FlowSlot {
        workload: connection.workload,
        slot,
    };
    let flow = Flow {
        remote: connection.remote,
        last_seen,
        socket,
        generation,
        local_port: connection.local_port,
        remote_port: connection.remote_port,
        protocol: number(connection.protocol),
        direction: connection.direction.into(),
    };
    FLOWS.insert(&key, &flow, 0).is_ok()
}

/// Takes a flow away. False where another program, or the daemon, has.
#[inline(never)]
fn remove(workload: WorkloadId, slot: u32) -> bool {
    FLOWS.remove(&FlowSlot { workload, slot }).is_ok()
}

/// Whether a packet or message may pass, given the direction in which its connection would have
/// been opened. `told` says that a verdict of this generation was reported already, and `socket` is the
/// cookie of the workload's socket.
#[inline(always)]
pub fn pass(connection: &mut Connection, settings: &Settings, told: bool, socket: u64) -> bool {
    // SAFETY: a reference is never null.
    let passes = unsafe {
        reeve_pass(
            connection,
            settings.generation,
            settings.flow_seed,
            told.into(),
            socket,
        )
    };
    // The compiler knows that it is 0 or 1, and would return it from a hook as it is; the verifier,
    // which looks at the function by itself, does not.
    black_box(passes) != 0
}

/// Verified by itself, like [`crate::judge::judge`].
///
/// # Safety
///
/// `connection` is null or may be written.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_pass(
    connection: *mut Connection,
    generation: u32,
    seed: u32,
    told: u32,
    socket: u64,
) -> u32 {
    // SAFETY: as the caller promises.
    match unsafe { connection.as_mut() } {
        Some(connection) => passes(connection, generation, seed, told != 0, socket).into(),
        None => 0,
    }
}

#[inline(always)]
fn passes(
    connection: &mut Connection,
    generation: u32,
    seed: u32,
    told: bool,
    socket: u64,
) -> bool {
    let direction = connection.direction;
    // SAFETY: asking for the time has no condition.
    let now = unsafe { bpf_ktime_get_ns() };
    let (found, own) = look_up(connection, seed, now);
    let slot = found.slot;
    let mut revoked = false;
    if let Some(flow) = found.flow {
        let opened = flow.direction as u8;
        let last_seen = flow.last_seen;
        // Another processor's clock may be a moment ahead: no time has passed.
        let idle = now.saturating_sub(last_seen);
        if idle < FLOW_IDLE_NANOSECONDS {
            let asker = flow.socket;
            let mut live = flow.generation == generation;
            // An answer keeps it alive only for the socket that asked: once that is closed, the far end
            // cannot keep its port open.
            let asks = opened == direction;
            let keeps_alive = asks || (socket == asker && socket != 0);
            let mut refresh = keeps_alive && idle > REFRESH_NANOSECONDS;
            // One that asks from the port of one before it is the asker at once. Of ICMP each processor
            // has a socket of its own.
            refresh |= asks && socket != asker && connection.protocol == protocol::UDP;
            let last_seen = if refresh { now } else { last_seen };
            let asker = if asks { socket } else { asker };
            connection.direction = opened;
            if !live {
                live = judge(connection).allowed();
                refresh = true;
            }
            if live {
                if refresh {
                    // Where it cannot be written, the old entry stays and is judged again.
                    let _ = keep(connection, slot, last_seen, generation, asker);
                }
                connection.direction = direction;
                return true;
            }
            connection.direction = direction;
            // Whoever takes the entry away tells that it was revoked: so it is told once.
            revoked = remove(connection.workload, slot);
        }
    }
    let outcome = judge(connection);
    if !outcome.allowed() {
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
    if !keep(connection, own, now, generation, socket) {
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
pub fn is_live(connection: &mut Connection, settings: &Settings) -> bool {
    // SAFETY: a reference is never null.
    unsafe { reeve_is_live(connection, settings.generation, settings.flow_seed) != 0 }
}

/// Verified by itself, like [`crate::judge::judge`].
///
/// # Safety
///
/// `connection` is null or may be written.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_is_live(connection: *mut Connection, generation: u32, seed: u32) -> u32 {
    // SAFETY: as the caller promises.
    match unsafe { connection.as_mut() } {
        Some(connection) => lives(connection, generation, seed).into(),
        None => 0,
    }
}

#[inline(always)]
fn lives(connection: &mut Connection, generation: u32, seed: u32) -> bool {
    let observed = connection.direction;
    // SAFETY: asking for the time has no condition.
    let now = unsafe { bpf_ktime_get_ns() };
    let (found, _) = look_up(connection, seed, now);
    let Some(flow) = found.flow else {
        return false;
    };
    if now.saturating_sub(flow.last_seen) >= FLOW_IDLE_NANOSECONDS {
        return false;
    }
    connection.direction = flow.direction as u8;
    let live = flow.generation == generation || judge(connection).allowed();
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
