//! Telling the daemon: counters for every verdict, and a record for each new one.

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE},
    helpers::{bpf_ktime_get_ns, generated::bpf_ringbuf_query},
};
use aya_log_ebpf::debug;
use reeve_common::{
    Address, COUNTER_LOST_EVENTS, DryRun, Event, EventKind, Hook, Reason, SocketTag, WorkloadId,
    counter_slot, dry_run_slot,
};

use crate::maps::{COUNTERS, EVENTS, LAST_TOLD};

/// One connection as its workload sees it: the question that `judge` answers, and what an event
/// says of it.
///
/// Passed to functions that are verified by themselves (see [`crate::judge::judge`]), so it has no
/// padding, which would be memory that nothing has written.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Connection {
    /// The workload's address, zero where not known.
    pub local: Address,
    /// The far end's.
    pub remote: Address,
    /// The judged workload.
    pub workload: WorkloadId,
    /// The workload's port, host byte order.
    pub local_port: u16,
    /// The far end's.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// `Direction` that is asked about.
    pub direction: u8,
    /// `Hook` that asks.
    pub hook: u8,
    /// Answer: `DryRun`.
    pub dry_run: u8,
    /// Answer: number of the peer.
    pub peer: u32,
    /// Answer: rule.
    pub rule: u32,
    /// Answer: rule in dry run.
    pub dry_run_rule: u32,
}

const _: () = assert!(size_of::<Connection>() == 56, "padding");

impl Connection {
    /// A question about nothing yet.
    #[inline(always)]
    pub fn new(hook: Hook) -> Self {
        Self {
            local: [0; 16],
            remote: [0; 16],
            workload: 0,
            local_port: 0,
            remote_port: 0,
            protocol: 0,
            direction: 0,
            hook: hook as u8,
            dry_run: DryRun::Same as u8,
            peer: 0,
            rule: 0,
            dry_run_rule: 0,
        }
    }

    /// What policies in dry run would change of an outcome; nothing where another reason than
    /// the policy's stands against it.
    #[inline(always)]
    fn dry_run(&self, outcome: Outcome) -> DryRun {
        let by_policy = outcome.is(Reason::NoPolicy)
            || outcome.is(Reason::PolicyDeny)
            || outcome.is(Reason::PlaintextRefused);
        if outcome.allowed() && self.dry_run == DryRun::Deny as u8 {
            DryRun::Deny
        } else if !outcome.allowed() && by_policy && self.dry_run == DryRun::Allow as u8 {
            DryRun::Allow
        } else {
            DryRun::Same
        }
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Outcome(u32);

const ALLOWED: u32 = 1 << 8;
const THROUGH_TUNNEL: u32 = 1 << 9;

impl Outcome {
    /// It may go on.
    #[inline(always)]
    pub const fn allow(reason: Reason) -> Self {
        Self(reason as u32 | ALLOWED)
    }

    /// It may go on through a tunnel, and only so.
    #[inline(always)]
    pub const fn tunnel() -> Self {
        Self(Reason::Policy as u32 | ALLOWED | THROUGH_TUNNEL)
    }

    /// It may not.
    #[inline(always)]
    pub const fn deny(reason: Reason) -> Self {
        Self(reason as u32)
    }

    /// Whether it may go on.
    #[inline(always)]
    pub const fn allowed(self) -> bool {
        self.0 & ALLOWED != 0
    }

    /// Whether it may go on through a tunnel only.
    #[inline(always)]
    pub const fn through_tunnel(self) -> bool {
        self.0 & THROUGH_TUNNEL != 0
    }

    /// All of it, for another function of this object.
    #[inline(always)]
    pub const fn to_number(self) -> u32 {
        self.0
    }

    /// What [`Self::to_number`] gave.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// Why, as a number.
    #[inline(always)]
    pub const fn reason(self) -> u8 {
        self.0 as u8
    }

    /// Whether the reason is this one.
    #[inline(always)]
    pub const fn is(self, reason: Reason) -> bool {
        self.0 as u8 == reason as u8
    }
}

/// Adds one to a counter of this processor.
#[inline(always)]
fn count(slot: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: the value is this processor's, and no other program runs on it meanwhile; one
        // that interrupts it loses a count at worst.
        unsafe { *counter += 1 }
    }
}

/// Counts a verdict without a record of it.
#[inline(always)]
pub fn count_verdict(direction: u8, outcome: Outcome) {
    let of_reason = counter_slot(direction, outcome.allowed(), Reason::Policy);
    count(of_reason + u32::from(outcome.reason() & 63));
}

/// The verdict as a line of the daemon's log, where it asks for them.
///
/// A function of its own, for its buffers not to lie on the stack below the event's.
#[inline(never)]
fn log(connection: &Connection, outcome: Outcome) {
    debug!(
        (),
        "hook {} workload {} port {} remote {:i} port {} protocol {} allowed {} reason {} rule {}",
        connection.hook,
        connection.workload,
        connection.local_port,
        connection.remote,
        connection.remote_port,
        connection.protocol,
        u8::from(outcome.allowed()),
        outcome.reason(),
        connection.rule
    );
}

/// Between two events of one workload where the ring buffer is more than half full.
const PAUSE_NANOSECONDS: u64 = 1_000_000;

/// Whether an event of a workload may be told. The second half of the ring buffer is for workloads
/// with few events: one that has many leaves room for the others.
#[inline(never)]
fn has_room(workload: WorkloadId) -> bool {
    // SAFETY: `EVENTS` is a ring buffer.
    let ask = |what: u32| unsafe {
        bpf_ringbuf_query(core::ptr::from_ref(&EVENTS).cast_mut().cast(), what.into())
    };
    if ask(BPF_RB_AVAIL_DATA) * 2 < ask(BPF_RB_RING_SIZE) {
        return true;
    }
    // SAFETY: asking for the time has no condition.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(told) = LAST_TOLD.get_ptr_mut(&workload) else {
        // Without an entry it may tell the next one as well.
        let _ = LAST_TOLD.insert(&workload, &now, 0);
        return true;
    };
    // SAFETY: the entry stays readable until the program ends. Two processors that write to it at
    // once tell one event more.
    unsafe {
        if now.saturating_sub(*told) < PAUSE_NANOSECONDS {
            return false;
        }
        *told = now;
    }
    true
}

/// Counts a verdict and tells the daemon of it.
#[inline(always)]
pub fn report(connection: &Connection, outcome: Outcome) {
    // SAFETY: a reference is never null.
    unsafe { reeve_report(connection, outcome.to_number()) };
}

/// Verified by itself, like [`crate::judge::judge`].
///
/// # Safety
///
/// `connection` is null or may be read.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn reeve_report(connection: *const Connection, outcome: u32) -> u32 {
    // SAFETY: as the caller promises.
    if let Some(connection) = unsafe { connection.as_ref() } {
        tell(connection, Outcome::from_number(outcome));
    }
    0
}

#[inline(always)]
fn tell(connection: &Connection, outcome: Outcome) {
    count_verdict(connection.direction, outcome);
    let dry_run = connection.dry_run(outcome);
    if dry_run != DryRun::Same {
        count(dry_run_slot(connection.direction, dry_run == DryRun::Allow));
    }
    log(connection, outcome);
    if !has_room(connection.workload) {
        count(COUNTER_LOST_EVENTS);
        return;
    }
    let Some(mut record) = EVENTS.reserve(0) else {
        count(COUNTER_LOST_EVENTS);
        return;
    };
    // SAFETY: asking for the time has no condition.
    let timestamp = unsafe { bpf_ktime_get_ns() };
    let event = record.as_mut_ptr();
    // Field by field: the event does not lie on the stack first.
    // SAFETY: the record has room for an event, and every field of it is written.
    unsafe {
        (*event).timestamp = timestamp;
        (*event).bytes_sent = 0;
        (*event).bytes_received = 0;
        (*event).duration = 0;
        (*event).local = connection.local;
        (*event).remote = connection.remote;
        (*event).workload = connection.workload;
        (*event).peer = connection.peer;
        (*event).rule = connection.rule;
        (*event).dry_run_rule = connection.dry_run_rule;
        (*event).local_port = connection.local_port;
        (*event).remote_port = connection.remote_port;
        (*event).protocol = connection.protocol;
        (*event).direction = connection.direction;
        (*event).kind = EventKind::Verdict as u8;
        (*event).hook = connection.hook;
        (*event).allowed = u8::from(outcome.allowed());
        (*event).reason = outcome.reason();
        (*event).dry_run = dry_run as u8;
        (*event).reserved = [0; 5];
    }
    record.submit(0);
}

/// Tells the daemon that a plaintext connection was closed.
#[inline(always)]
pub fn report_closed(
    tag: &SocketTag,
    reason: Reason,
    local: Address,
    local_port: u16,
    bytes_sent: u64,
    bytes_received: u64,
) {
    let Some(mut record) = EVENTS.reserve(0) else {
        count(COUNTER_LOST_EVENTS);
        return;
    };
    // SAFETY: asking for the time has no condition.
    let timestamp = unsafe { bpf_ktime_get_ns() };
    record.write(Event {
        timestamp,
        bytes_sent,
        bytes_received,
        duration: timestamp - tag.since,
        local,
        remote: tag.remote,
        workload: tag.workload,
        peer: tag.peer,
        rule: tag.rule,
        dry_run_rule: 0,
        local_port,
        remote_port: tag.remote_port,
        protocol: tag.protocol,
        direction: tag.direction,
        kind: EventKind::Closed as u8,
        hook: Hook::SocketState as u8,
        allowed: 1,
        reason: reason as u8,
        dry_run: DryRun::Same as u8,
        reserved: [0; 5],
    });
    record.submit(0);
}
