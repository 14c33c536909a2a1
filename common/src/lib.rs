//! What reeve's kernel programs and its daemon share: the keys and values of every map, the
//! events of the ring buffer, and the closed set of reasons.
//!
//! In: nothing. Out: plain `repr(C)` types without padding, the same bytes on both sides.
//! Who writes and who reads a map is said at its key.
//!
//! Any change to the layout of a type here raises [`LAYOUT_VERSION`].
#![no_std]

mod event;
mod maps;
mod reason;

pub use event::*;
pub use maps::*;
pub use reason::*;

/// Version of everything in this crate. Pinned maps of another version are never adopted.
pub const LAYOUT_VERSION: u32 = if cfg!(feature = "other-layout") {
    u32::MAX
} else {
    5
};

/// Firewall mark of the daemon's connections to local applications. The namespace routes marked
/// packets to the loopback device, so that replies to the client's address come back to reeve.
pub const ONWARD_MARK: u32 = 0x539;

/// Routing table that sends every address to the loopback device, for [`ONWARD_MARK`].
pub const ONWARD_ROUTE_TABLE: u32 = 15008;

/// Congestion control of the connections between reeve and the applications on its node, whatever
/// the host's own is: nothing congests there, and pacing (BBR) only costs throughput.
/// Every kernel has this one built in.
pub const LOCAL_CONGESTION_CONTROL: [u8; 4] = *b"reno";

/// TCP port of the outbound listener inside a workload's network namespace, by default.
pub const DEFAULT_OUTBOUND_PORT: u16 = 15001;

/// TCP port on which tunnels are accepted (HBONE), by default.
pub const DEFAULT_TUNNEL_PORT: u16 = 15008;

/// IP protocol numbers (IANA) with a meaning of their own in a verdict.
pub mod protocol {
    /// Any protocol: only in a [`crate::VerdictKey`] whose prefix ends before the protocol.
    pub const ANY: u8 = 0;
    /// ICMP for IPv4. Verdicts are asked with this number for ICMPv6 too.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPsec's encrypted packets.
    pub const ESP: u8 = 50;
    /// IPsec's authenticated packets.
    pub const AH: u8 = 51;
    /// ICMP for IPv6; judged as [`ICMP`].
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Lets the daemon copy the types into and out of maps.
#[cfg(feature = "user")]
mod user {
    use crate::{
        Arriving, Event, ExpectedCgroup, ExpectedEntry, FailingEntry, FailingKey, Flow, FlowEntry,
        FlowKey, FlowSlot, NamespaceEntry, Origin, PeerEntry, PeerPortKey, Settings,
        ShownAddresses, SocketTag, ToldKey, VerdictEntry, VerdictKey, WorkloadEntry,
    };

    macro_rules! pod {
        ($($name:ident),+ $(,)?) => {
            $(
                // SAFETY: `repr(C)`, made of integers alone, without padding (the sizes are
                // asserted), so that any bytes are a value.
                unsafe impl aya::Pod for $name {}
            )+
        };
    }

    pod!(
        Arriving,
        Event,
        ExpectedCgroup,
        ExpectedEntry,
        FailingEntry,
        FailingKey,
        Flow,
        FlowEntry,
        FlowKey,
        FlowSlot,
        NamespaceEntry,
        Origin,
        PeerEntry,
        PeerPortKey,
        Settings,
        ShownAddresses,
        SocketTag,
        ToldKey,
        VerdictEntry,
        VerdictKey,
        WorkloadEntry,
    );
}
