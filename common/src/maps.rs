//! Keys and values of the maps. Map names are the names of their statics in `ebpf`.

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`, in network byte order.
pub type Address = [u8; 16];

/// The first 12 bytes of every IPv4-mapped address.
pub const IPV4_MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// Turns an IPv4 address, in network byte order, into its mapped form.
#[inline(always)]
#[must_use]
pub const fn ipv4_mapped(ip: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3],
    ]
}

/// The key in `LOCAL_ADDRESSES` of an address that means something on its link only (`fe80::/64`,
/// `169.254.0.0/16`): with the workload in bytes that are always zero, since several workloads may have
/// the same one. None for any other address.
#[inline(always)]
#[must_use]
pub const fn link_local_key(address: &Address, workload: WorkloadId) -> Option<Address> {
    let &[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    let v6 = matches!([a, b, c, d, e, f, g, h], [0xfe, 0x80, 0, 0, 0, 0, 0, 0]);
    let v4 = matches!(
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 169, 254]
    );
    if !v6 && !v4 {
        return None;
    }
    let [w, x, y, z] = workload.to_ne_bytes();
    Some([a, b, c, d, w, x, y, z, i, j, k, l, m, n, o, p])
}

/// Where a connection to an IPv4 destination is redirected to: an address in `127.128.0.0/10` that is
/// always the same for the destination and, but for one pair in four millions, no other's. The kernel
/// tells connections apart by both ends, so that a workload has every local port for each destination.
#[inline(always)]
#[must_use]
pub const fn redirect_address(destination: &Address, port: u16) -> [u8; 4] {
    /// Odd, and without a pattern in its bits.
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    const NETWORK: u32 = 0x7f80_0000;
    const HOST_BITS: u32 = 22;
    let &[.., a, b, c, d] = destination;
    let word = (u32::from_be_bytes([a, b, c, d]) as u64) << 16 | port as u64;
    // The upper bits are the ones to which every bit has come.
    let hash = word.wrapping_mul(MULTIPLIER) >> (u64::BITS - HOST_BITS);
    (NETWORK | hash as u32).to_be_bytes()
}

/// Which end of a connection the judged workload is.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The workload opened the connection.
    Egress = 0,
    /// The workload was connected to.
    Ingress = 1,
}

/// `SETTINGS`: array of one. Written by the daemon, read by every program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`crate::LAYOUT_VERSION`] of the writer.
    pub layout_version: u32,
    /// Raised at each change of policy, peers or workloads: what a socket remembers of its
    /// verdict counts only while the generation is the same.
    pub generation: u32,
    /// Bit `n` is set when some key of `WORKLOADS` lies at depth `n` of the cgroup tree (the
    /// root is depth 0). Only these ancestors are looked up, so a process that is not enrolled
    /// pays for the depths in use and not for its own depth. Zero: nothing is enrolled.
    pub cgroup_depths: u32,
    /// Outbound listener's port, host byte order.
    pub outbound_port: u16,
    /// Tunnel port, host byte order.
    pub tunnel_port: u16,
    /// The next id that a workload or a peer gets. Only ever raised, so that no id means another
    /// later while anything that these maps know bears it. No program reads it.
    pub next_id: u32,
    /// Random, for as long as the maps live: no peer can tell which flows share a set of `FLOWS`.
    pub flow_seed: u32,
    /// `SETTINGS_*` bits, while programs of another layout judge as well.
    pub flags: u32,
}

/// Programs of another layout judge as well, and each daemon's sockets are unknown to the other's maps: a
/// socket that bears [`crate::ONWARD_MARK`] and was made in a cgroup of reeve's is one of the other daemon's
/// to an application, for whatever workload. The other programs ask whose listener it meets.
pub const SETTINGS_BESIDE: u32 = 1 << 0;
/// The other programs were there before, and still send connections to the outbound listener. They come
/// first, so that these see such a connection as one to the listener: the others say what it was meant for.
pub const SETTINGS_JOINING: u32 = 1 << 1;
/// The other programs send connections to the outbound listener; these judge and remember as ever, and
/// leave that to them.
pub const SETTINGS_ASIDE: u32 = 1 << 2;

/// Deepest cgroup that may be enrolled (depth of the root is 0).
pub const MAX_CGROUP_DEPTH: u32 = 15;

/// Id of a workload, given once in the life of the pinned maps. 0 is no workload.
pub type WorkloadId = u32;

/// `IDS`: hash from this, the SHA-256 of what something is (a workload or a peer) and of its name, to
/// its id. Written and read by the daemon alone, so that the next one knows the ids by which sockets
/// and the other maps name things. A name that is declared no longer is not in it, and gets
/// another id when it returns.
pub type NameDigest = [u8; 32];

/// No workload.
pub const NO_WORKLOAD: WorkloadId = 0;

/// In a [`SocketTag`]: somebody below an enforced parent who is not enrolled, see [`WORKLOAD_UNKNOWN`].
pub const UNKNOWN_WORKLOAD: WorkloadId = WorkloadId::MAX;

/// `WORKLOADS`: hash from cgroup id (`u64`, inode number of the cgroup's folder) to this.
/// Written by the daemon at enrolment; read by every program for the caller's or the socket's
/// ancestors, deepest first, so that an inner entry wins over an outer one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// `WORKLOAD_*` bits.
    #[cfg(feature = "other-layout")]
    pub flags: u32,
    /// The workload, or [`NO_WORKLOAD`] where `flags` says what the cgroup is instead.
    pub workload: WorkloadId,
    /// `WORKLOAD_*` bits.
    #[cfg(not(feature = "other-layout"))]
    pub flags: u32,
}

/// The cgroup is reeve's own: its sockets are not judged and may use reeve's ports.
pub const WORKLOAD_IS_REEVE: u32 = 1 << 0;
/// An enforced parent: what is below and not enrolled by itself is denied everything but
/// loopback ([`crate::Reason::UnknownWorkload`]).
pub const WORKLOAD_UNKNOWN: u32 = 1 << 1;

/// Bytes of the name of an [`ExpectedCgroup`].
pub const EXPECTED_NAME: usize = 120;

/// `EXPECTED`: hash from this to [`ExpectedEntry`]. A cgroup that will be a workload's once it is made:
/// it is enrolled as soon as it is, by the program that the kernel tells of new cgroups, and is in
/// `WORKLOADS` before anything runs in it. Written by the daemon.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpectedCgroup {
    /// Id of the cgroup above it.
    pub parent: u64,
    /// Name of its folder, with zeroes behind it.
    pub name: [u8; EXPECTED_NAME],
}

impl ExpectedCgroup {
    /// The one of this name; none where the name is too long, or is none.
    #[must_use]
    pub fn new(parent: u64, name: &[u8]) -> Option<Self> {
        let mut key = Self {
            parent,
            name: [0; EXPECTED_NAME],
        };
        // With a zero behind it, and shorter than one that was cut.
        if name.is_empty() || name.len() + 1 >= EXPECTED_NAME {
            return None;
        }
        key.name.get_mut(..name.len())?.copy_from_slice(name);
        Some(key)
    }
}

/// Value of `EXPECTED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpectedEntry {
    /// The workload.
    pub workload: WorkloadId,
    /// Zero.
    pub reserved: u32,
    /// Id of the last cgroup that was made so, written by the program: there is no more than one at a
    /// time, so that its entry in `WORKLOADS` goes with the next one.
    pub last: u64,
}

/// `NAMESPACES`: hash from network namespace cookie (`u64`, `SO_NETNS_COOKIE`) to this. Written by
/// the daemon for each namespace in which an enrolled workload runs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceEntry {
    /// The one workload that owns the namespace, or [`NO_WORKLOAD`] when several share it or it
    /// is the host's.
    pub workload: WorkloadId,
    /// `NAMESPACE_*` bits.
    pub flags: u32,
}

/// The daemon's listeners stand in this namespace. Without it nothing is redirected and
/// tunnelled destinations are refused ([`crate::Reason::NoListener`]).
pub const NAMESPACE_LISTENING: u32 = 1 << 0;

/// No route leads out of this namespace in a family: nothing of it is redirected, so that the kernel
/// says to the application what it would say without reeve.
pub const NAMESPACE_WITHOUT_V4: u32 = 1 << 1;
/// The same for IPv6.
pub const NAMESPACE_WITHOUT_V6: u32 = 1 << 2;

/// How the packet programs find the network namespace of a packet's socket: the global
/// `NAMESPACE_SOURCE`, set at load. The later, the more exact.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamespaceSource {
    /// They do not. A packet that leaves from, or arrives at, an address of `LOCAL_ADDRESSES` is
    /// taken for one of that workload's namespace.
    Address = 0,
    /// From the kernel's own structures, which the programs read.
    KernelMemory = 1,
    /// From the kernel, by `bpf_get_netns_cookie` (Linux 6.16 and later).
    Helper = 2,
}

/// `LOCAL_ADDRESSES`: hash from [`Address`] to [`WorkloadId`], for addresses of namespaces that one
/// workload owns; link-local ones under their [`link_local_key`]. Written by the daemon; read by
/// `sk_lookup`, which sees no cgroup, and wherever it is asked what stays in a workload.
pub type LocalAddressEntry = WorkloadId;

/// `SHOWN_ADDRESSES`: hash from [`WorkloadId`] to this, what `getsockname()` shows of a redirected
/// socket in place of the loopback address that it has. Written by the daemon; decides nothing.
/// Zeroes where the workload has no address of the family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShownAddresses {
    /// The workload's first IPv4 address, mapped.
    pub v4: Address,
    /// Its first IPv6 address.
    pub v6: Address,
}

/// `PEERS`: longest prefix match from an address to what is known of the far end. aya's LPM key
/// carries the prefix length; this is its data. IPv4 prefixes are 96 bits longer than written.
pub type PeerKey = Address;

/// Value of `PEERS` and `PEER_PORTS`.
///
/// A *class* stands for all far ends that no policy tells apart: the set of selectors that match
/// them. The compiler numbers classes; class 0 is an address of which nothing is known.
///
/// A number is made from what the class stands for and never means anything else later: the maps
/// are brought from one policy to the next entry by entry, and what is answered meanwhile shall be
/// what one of the two policies says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerEntry {
    /// Class, the middle part of a [`VerdictKey`].
    pub class: u32,
    /// The peer's number for events, 0 where the entry is only a CIDR of some policy.
    pub peer: u32,
    /// `PEER_*` bits.
    pub flags: u32,
}

/// A tunnel reaches this peer: allowed TCP goes through it and never as plaintext.
pub const PEER_TUNNEL: u32 = 1 << 0;
/// Several peers share the address: `PEER_PORTS` is asked with the port first, and only a port
/// that it does not hold is judged by this entry.
pub const PEER_BY_PORT: u32 = 1 << 1;
/// Some of the addresses or ports below have no room in the map. Which ones is not known here, so
/// whatever this entry is found for is refused ([`crate::Reason::MapFailure`]).
pub const PEER_NO_ROOM: u32 = 1 << 2;
/// An address of the node, from which plaintext is let in: no workload sends under it from a namespace
/// of its own.
pub const PEER_NODE: u32 = 1 << 3;

/// `PEER_PORTS`: hash from this to [`PeerEntry`], for peers that share an address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerPortKey {
    /// The shared address.
    pub address: Address,
    /// Port of the far end, host byte order.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// `VERDICTS`: longest prefix match from this to [`VerdictEntry`]. Written by the daemon from the
/// compiled policy; read by every program.
///
/// The order of the fields is the order of the prefix. A program asks at most twice, whatever
/// the number of rules: first with the far end's class, then with class 0, and the first answer
/// is final. The compiler makes that right: wherever a class has an entry of its own, the entry
/// already holds what the rules for everybody say about the same ports. No answer is a deny.
///
/// The direction's far port is judged: for [`Direction::Egress`] the destination's, for
/// [`Direction::Ingress`] the workload's own. Protocols without ports have port 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VerdictKey {
    /// The judged workload.
    pub workload: WorkloadId,
    /// Class of the far end, see [`PeerEntry`].
    pub class: u32,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// IP protocol number; [`crate::protocol::ICMP`] for both ICMPs.
    pub protocol: u8,
    /// Port in network byte order, so that a port range is a handful of prefixes.
    pub port: [u8; 2],
}

/// Bits of a [`VerdictKey`] prefix that ends before the protocol: any protocol, any port.
pub const VERDICT_PREFIX_ANY_PROTOCOL: u32 = 72;
/// Bits of a [`VerdictKey`] prefix that ends before the port: any port of the protocol.
pub const VERDICT_PREFIX_ANY_PORT: u32 = 80;
/// Bits of a whole [`VerdictKey`].
pub const VERDICT_PREFIX_FULL: u32 = 96;

/// What the policy says of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerdictEntry {
    /// An [`Action`] as a number; any other number is a deny.
    pub action: u32,
    /// Number of the rule that said so, for events; 0 is the default deny.
    pub rule: u32,
    /// What the policies in dry run would change, a [`DryRun`] as a number.
    pub dry_run: u32,
    /// Number of the rule that would say so, where `dry_run` is not [`DryRun::Same`].
    pub dry_run_rule: u32,
}

/// What would become of a connection if the policies in dry run were enforced.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DryRun {
    /// The same.
    #[default]
    Same = 0,
    /// It would be refused, and is let pass.
    Deny = 1,
    /// It would be let pass, and is refused.
    Allow = 2,
}

impl DryRun {
    /// The one with this number; of any other number nothing is said.
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Deny,
            2 => Self::Allow,
            _ => Self::Same,
        }
    }
}

/// The actions of a [`VerdictEntry`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Refuse.
    Deny = 0,
    /// Let pass; through a tunnel where the far end has [`PEER_TUNNEL`].
    Allow = 1,
    /// Ingress TCP that is allowed to an authenticated identity: plaintext from the address is
    /// refused ([`crate::Reason::PlaintextRefused`]), the tunnel judges again.
    TunnelOnly = 2,
    /// Ingress to a permissive workload that nothing else allows without a tunnel: let in, with
    /// the reason [`crate::Reason::Permissive`].
    Permissive = 3,
    /// Refuse: what the policy says of this workload and direction has no room in the map
    /// ([`crate::Reason::MapFailure`]).
    NoRoom = 4,
}

/// `ORIGINAL_DESTINATIONS`: socket storage of connections that the outbound listener accepts. Written
/// by `sock_ops` before `accept()` returns the connection, read by the daemon through the
/// descriptor. An origin ends with its socket, so no other connection can inherit it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Address that the application asked for.
    pub address: Address,
    /// Port that the application asked for, host byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
    /// Workload that connected.
    pub workload: WorkloadId,
    /// Peer number of the destination.
    pub peer: u32,
    /// Rule that allowed it.
    pub rule: u32,
}

/// `FLOWS`: hash from this to [`Flow`]. Remembers the direction in which a connection without a
/// handshake (UDP, ICMP, SCTP) was allowed, so that its replies pass.
///
/// Each workload has slots of its own, half of them for flows that it opened and half for flows
/// that arrived, so that no flow takes the place of another workload's, and no client that of a
/// workload's own question. A flow may lie in any of the [`FLOW_WAYS`] slots of one set, which is
/// chosen by a hash of the flow; a new flow replaces an idle one of its set, or the one that has
/// been silent for the longest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowSlot {
    /// The workload.
    pub workload: WorkloadId,
    /// Number of the slot, see [`FlowSlot::first`].
    pub slot: u32,
}

impl FlowSlot {
    /// The first slot of a set; the others of the set follow.
    #[inline(always)]
    #[must_use]
    pub const fn first(direction: u8, set: u32, sets: u32) -> u32 {
        (direction as u32 * sets + set) * FLOW_WAYS
    }
}

/// Slots of a set.
pub const FLOW_WAYS: u32 = 4;

/// `FLOWS` has room for so many workloads that use all of their slots.
pub const FLOW_SHARES: u32 = 32;

/// Sets of a workload in each direction, a power of two, where `FLOWS` has this capacity.
#[must_use]
pub const fn flow_sets(capacity: u32) -> u32 {
    match (capacity / (FLOW_SHARES * 2 * FLOW_WAYS)).checked_ilog2() {
        Some(bits) => 1 << bits,
        None => 1,
    }
}

/// Value of `FLOWS`. Never changed in its place, only replaced as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Address of the far end.
    pub remote: Address,
    /// `CLOCK_MONOTONIC` nanoseconds of the last packet that kept it alive: one in the direction that
    /// was judged, or an answer of or to the same socket.
    pub last_seen: u64,
    /// Cookie of the workload's socket in the direction that was judged; 0 where there is none.
    pub socket: u64,
    /// [`Settings::generation`] of the verdict.
    pub generation: u32,
    /// Port of the workload, host byte order; the identifier of an ICMP echo.
    pub local_port: u16,
    /// Port of the far end, host byte order.
    pub remote_port: u16,
    /// IP protocol number, [`crate::protocol::ICMP`] for both ICMPs.
    pub protocol: u32,
    /// [`Direction`] in which it was allowed.
    pub direction: u32,
}

/// `ONWARD`: LRU hash keyed by a connection as its workload sees it.
///
/// `ONWARD` holds the daemon's own connections to local applications, so that the look-up of a
/// listener does not reset them: while one is opened, and in the moment in which its established
/// socket takes the place of its request, when a packet on another processor finds neither. Written
/// by `sock_ops` for sockets with [`TAG_ONWARD`], and removed when the daemon's end is closed. It
/// decides nothing: at the listener the packet is judged by the socket that sent it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Address of the workload.
    pub local: Address,
    /// Address of the far end.
    pub remote: Address,
    /// Port of the workload, host byte order.
    pub local_port: u16,
    /// Port of the far end, host byte order.
    pub remote_port: u16,
    /// Workload, or [`NO_WORKLOAD`] in `ONWARD`.
    pub workload: WorkloadId,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// Value of `ONWARD`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEntry {
    /// `CLOCK_MONOTONIC` nanoseconds at which it was written.
    pub last_seen: u64,
    /// [`Settings::generation`] at that time.
    pub generation: u32,
    /// [`Direction`] in which it was allowed.
    pub direction: u32,
}

/// `SOCKETS`: socket storage. What a socket remembers of its last verdict, so that a packet of an
/// established connection costs one look-up. Written by the programs; of its own sockets to local
/// applications the daemon writes the first, and reads what became of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketTag {
    /// `CLOCK_MONOTONIC` nanoseconds at which the connection was established.
    #[cfg(feature = "other-layout")]
    pub since: u64,
    /// The far end that the application asked for, or that was judged.
    pub remote: Address,
    /// `CLOCK_MONOTONIC` nanoseconds at which the connection was established.
    #[cfg(not(feature = "other-layout"))]
    pub since: u64,
    /// The judged workload, or [`UNKNOWN_WORKLOAD`].
    pub workload: WorkloadId,
    /// Number of the peer for events.
    pub peer: u32,
    /// Rule for events.
    pub rule: u32,
    /// [`Settings::generation`] of the verdict; 0 is no verdict, only a workload.
    pub generation: u32,
    /// Port of the far end, host byte order.
    pub remote_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`Direction`] of the verdict, where `flags` has [`TAG_DIRECTION`].
    pub direction: u8,
    /// `TAG_*` bits.
    pub flags: u32,
}

/// The verdict of this generation is allow; without it, deny.
pub const TAG_ALLOWED: u32 = 1 << 0;
/// The direction is known.
pub const TAG_DIRECTION: u32 = 1 << 1;
/// The socket was sent to the outbound listener instead of the far end that it asked for.
pub const TAG_REDIRECTED: u32 = 1 << 2;
/// The application's end of a connection that came through a tunnel: the tunnel judges it.
pub const TAG_TUNNELLED: u32 = 1 << 3;
/// One of reeve's own sockets to a local application, whose workload the tag names. The daemon
/// writes it through the descriptor when it makes the socket. Of another layout's daemon
/// ([`SETTINGS_BESIDE`]) the programs write it, with [`NO_WORKLOAD`].
pub const TAG_ONWARD: u32 = 1 << 4;
/// The connection stays in the workload: never in question, and not reported.
pub const TAG_LOCAL: u32 = 1 << 5;

/// One of reeve's own listeners, or what one has accepted, also when a later daemon, in another
/// cgroup, has inherited it.
pub const TAG_REEVE: u32 = 1 << 6;
/// With [`TAG_ONWARD`]: the listener at the application's port belongs to somebody other than the
/// workload ([`crate::Reason::WrongListener`]). The daemon, which gets no answer, looks here.
pub const TAG_WRONG_LISTENER: u32 = 1 << 7;

/// `TRANSLATED`: socket storage, of TCP sockets whose packets leave for another far end than their
/// socket has, or from another address: what is to be thought of that. Written and read by the
/// programs only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// The far end that the packets really leave for.
    pub remote: Address,
    /// [`Settings::generation`] of the verdict.
    pub generation: u32,
    /// Port of the far end, host byte order.
    pub remote_port: u16,
    /// [`Direction`] of the verdict.
    pub direction: u8,
    /// Whether it is allowed.
    pub allowed: u8,
}

/// `ARRIVING`: per-CPU array of one. A packet that was let in to a listening socket leaves its
/// connection here for `sock_ops`, which runs next on the same CPU where the packet completes
/// the handshake and cannot find out the workload by itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arriving {
    /// The connection. Its workload is the listener's, or [`NO_WORKLOAD`] where the listener is
    /// reeve's.
    pub key: FlowKey,
    /// For reeve's outbound listener: what the client asked for; without a workload there is none.
    pub origin: Origin,
    /// Number of the peer for events.
    pub peer: u32,
    /// Rule that allowed it.
    pub rule: u32,
    /// [`Settings::generation`] of the verdict; 0 where there is none.
    pub generation: u32,
    /// As in [`VerdictEntry`].
    pub dry_run_rule: u32,
    /// [`DryRun`] as a number.
    pub dry_run: u8,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
    /// 1 where reeve's own socket opens the connection, from a tunnel to the application.
    pub tunnelled: u8,
    /// Zero.
    pub reserved: u8,
}

/// `TOLD`: LRU hash. Whoever files a socket here first tells that its connection is refused: the
/// programs at a packet, or the daemon that looks through all sockets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ToldKey {
    /// Cookie of the socket.
    pub cookie: u64,
    /// [`Settings::generation`] of the refusal.
    pub generation: u32,
    /// Zero.
    pub reserved: u32,
}

/// `FAILING`: LRU hash. A destination to which a workload's connections through a tunnel have just failed.
/// Written by the daemon, read at `connect()`, which fails at once meanwhile. It decides nothing else: one
/// that is not there costs an application a connection that is reset.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FailingKey {
    /// Address of the far end.
    pub remote: Address,
    /// Whose connections: what one workload was refused is nothing to another.
    pub workload: WorkloadId,
    /// Port of the far end, host byte order.
    pub remote_port: u16,
    /// Zero.
    pub reserved: u16,
}

/// Value of `FAILING`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FailingEntry {
    /// `CLOCK_MONOTONIC` nanoseconds until which calls fail. The first one after it is let through to try,
    /// and others fail for [`FAILING_TRIAL_NANOSECONDS`] more; 0: the destination serves again.
    pub until: u64,
    /// The same while one tries. Written at `connect()`; it lengthens nothing beyond the time at which the
    /// daemon, too, forgets that the destination has failed.
    pub trial_until: u64,
    /// How: the number of an error of `connect()`, as of `ECONNREFUSED`.
    pub error: u32,
    /// Why: [`crate::Reason`] as a number.
    pub reason: u32,
}

/// How long one connection tries by itself whether a destination serves again.
pub const FAILING_TRIAL_NANOSECONDS: u64 = 1_000_000_000;
/// This long after [`FailingEntry::until`] a destination counts as one that has not failed.
pub const FAILING_FORGOTTEN_NANOSECONDS: u64 = 10 * 1_000_000_000;

/// A flow without packets for longer than this is forgotten: its next packet is judged anew.
pub const FLOW_IDLE_NANOSECONDS: u64 = 180 * 1_000_000_000;

/// The same bytes on both sides: no type may hold padding, and none is larger than it was.
const _: () = {
    assert!(size_of::<Settings>() == 28);
    assert!(size_of::<WorkloadEntry>() == 8);
    assert!(size_of::<ExpectedCgroup>() == 128);
    assert!(size_of::<ExpectedEntry>() == 16);
    assert!(size_of::<NamespaceEntry>() == 8);
    assert!(size_of::<ShownAddresses>() == 32);
    assert!(size_of::<PeerEntry>() == 12);
    assert!(size_of::<PeerPortKey>() == 20);
    assert!(size_of::<VerdictKey>() == 12);
    assert!(size_of::<VerdictEntry>() == 16);
    assert!(size_of::<Origin>() == 32);
    assert!(size_of::<FlowSlot>() == 8);
    assert!(size_of::<Flow>() == 48);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<FlowEntry>() == 16);
    assert!(size_of::<SocketTag>() == 48);
    assert!(size_of::<Translated>() == 24);
    assert!(size_of::<Arriving>() == 100);
    assert!(size_of::<ToldKey>() == 16);
    assert!(size_of::<FailingKey>() == 24);
    assert!(size_of::<FailingEntry>() == 24);
    assert!(size_of::<crate::Event>() == 96);
};
