//! What the programs tell the daemon: records of the ring buffer `EVENTS`, and the counters.

use crate::{Address, Reason, WorkloadId};

/// What happened to a connection.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A verdict was given: see [`Event::allowed`] and [`Event::reason`].
    Verdict = 0,
    /// A plaintext TCP connection of a workload was closed; `bytes_*` are filled.
    Closed = 1,
}

/// Where a verdict was given.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// `connect()`.
    Connect = 0,
    /// `sendmsg()` of an unconnected socket.
    Sendmsg = 1,
    /// `bind()`.
    Bind = 2,
    /// A packet that leaves.
    PacketEgress = 3,
    /// A packet that arrives.
    PacketIngress = 4,
    /// The look-up of a socket for an arriving connection or datagram.
    SocketLookup = 5,
    /// A change of a socket's state.
    SocketState = 6,
    /// `setsockopt()`.
    SocketOption = 7,
}

/// One record of `EVENTS`. Written by every program, read by the daemon; a record that finds no
/// room is counted in [`COUNTER_LOST_EVENTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`), nanoseconds.
    pub timestamp: u64,
    /// Application bytes that the workload sent, for [`EventKind::Closed`].
    pub bytes_sent: u64,
    /// Application bytes that the workload received, for [`EventKind::Closed`].
    pub bytes_received: u64,
    /// Lifetime of the connection in nanoseconds, for [`EventKind::Closed`].
    pub duration: u64,
    /// The workload's address, all zero where not known yet.
    pub local: Address,
    /// The far end's address.
    pub remote: Address,
    /// The judged workload.
    pub workload: WorkloadId,
    /// Number of the peer, 0 where the address is not a peer's.
    pub peer: u32,
    /// Rule that gave the verdict, 0 for none.
    pub rule: u32,
    /// Rule that would give another one, where `dry_run` says that there is one.
    pub dry_run_rule: u32,
    /// The workload's port, host byte order, 0 where not known yet.
    pub local_port: u16,
    /// The far end's port, host byte order.
    pub remote_port: u16,
    /// IP protocol number as in the packet.
    pub protocol: u8,
    /// [`crate::Direction`] as a number.
    pub direction: u8,
    /// [`EventKind`] as a number.
    pub kind: u8,
    /// [`Hook`] as a number.
    pub hook: u8,
    /// 1 where the connection may go on.
    pub allowed: u8,
    /// [`Reason`] as a number.
    pub reason: u8,
    /// [`crate::DryRun`] as a number.
    pub dry_run: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

/// Slots for each direction in `COUNTERS`: one per reason for refused, one for allowed.
pub const COUNTER_REASONS: u32 = 64;

/// Slot in `COUNTERS` of events that found the ring buffer full.
pub const COUNTER_LOST_EVENTS: u32 = 4 * COUNTER_REASONS;

/// First of the slots in `COUNTERS` for verdicts that policies in dry run would change.
const COUNTER_DRY_RUN: u32 = COUNTER_LOST_EVENTS + 1;

/// Number of slots in `COUNTERS`, a per-CPU array of `u64`. Written by the programs, summed by
/// the daemon.
pub const COUNTER_SLOTS: u32 = COUNTER_DRY_RUN + 4;

/// Slot in `COUNTERS` for verdicts with this outcome.
#[inline(always)]
#[must_use]
pub const fn counter_slot(direction: u8, allowed: bool, reason: Reason) -> u32 {
    (((direction & 1) as u32) * 2 + allowed as u32) * COUNTER_REASONS + reason as u32
}

/// Slot in `COUNTERS` for verdicts that policies in dry run would change: to allow, or to deny.
#[inline(always)]
#[must_use]
pub const fn dry_run_slot(direction: u8, would_allow: bool) -> u32 {
    COUNTER_DRY_RUN + ((direction & 1) as u32) * 2 + would_allow as u32
}
