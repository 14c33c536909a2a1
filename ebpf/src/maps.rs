//! The maps. What each holds, who writes it and who reads it stands at its key in `reeve_common`.
//!
//! The daemon sets the capacities at load.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    helpers::generated::{bpf_sk_storage_get, bpf_skc_to_mptcp_sock},
    macros::btf_map,
};
use reeve_common::{
    Address, Arriving, COUNTER_SLOTS, Event, ExpectedCgroup, ExpectedEntry, FailingEntry,
    FailingKey, Flow, FlowEntry, FlowKey, FlowSlot, LocalAddressEntry, NameDigest, NamespaceEntry,
    Origin, PeerEntry, PeerKey, PeerPortKey, ShownAddresses, SocketTag, ToldKey, Translated,
    VerdictEntry, VerdictKey, WorkloadEntry, WorkloadId,
};

use crate::{address::field, parse::Packet};

/// A [`reeve_common::NamespaceSource`] as a number, set at load.
#[unsafe(no_mangle)]
pub static NAMESPACE_SOURCE: Global<u8> = Global::new(0);
/// Offsets of fields in the running kernel's structures, set at load for
/// [`reeve_common::NamespaceSource::KernelMemory`]: `sk` in `sk_buff`, the namespace in `sock`,
/// the cookie in `net`.
#[unsafe(no_mangle)]
pub static SOCKET_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static NETWORK_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static COOKIE_OFFSET: Global<u32> = Global::new(0);

/// Where a socket says whether it is the kernel's own, set at load: a byte in `sock`, and a bit in it.
/// No bit: it cannot be read.
#[unsafe(no_mangle)]
pub static KERNEL_SOCKET_OFFSET: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static KERNEL_SOCKET_MASK: Global<u8> = Global::new(0);

/// Offsets of fields in the running kernel's structures, set at load: `kn`, `root` and `self.parent` in
/// `cgroup`, `hierarchy_id` in `cgroup_root`, `id` and `name` in `kernfs_node`.
#[unsafe(no_mangle)]
pub static CGROUP_NODE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static CGROUP_ROOT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static CGROUP_PARENT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static HIERARCHY_ID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static NODE_ID: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static NODE_NAME: Global<u32> = Global::new(0);

/// 1 where the kernel tells the programs of which multipath connection a TCP socket is a part, set at load.
#[unsafe(no_mangle)]
pub static KNOWS_MULTIPATH: Global<u8> = Global::new(0);

/// Sets of a workload in `FLOWS`, in each direction. Set at load, by the map's capacity.
#[unsafe(no_mangle)]
pub static FLOW_SETS: Global<u32> = Global::new(1);

/// Stands for a capacity that the daemon sets.
const SET_AT_LOAD: usize = 1;
/// The same for the ring buffer, in bytes.
const PAGE: usize = 4096;

/// Hashes that only the daemon fills, or of which each workload has a share, are allocated as they
/// grow.
const GROWING: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static SETTINGS: Array<reeve_common::Settings, 1> = Array::new();

/// For the daemon alone.
#[btf_map]
pub static IDS: HashMap<NameDigest, u32, SET_AT_LOAD, GROWING> = HashMap::new();

#[btf_map]
pub static WORKLOADS: HashMap<u64, WorkloadEntry, SET_AT_LOAD, GROWING> = HashMap::new();

#[btf_map]
pub static EXPECTED: HashMap<ExpectedCgroup, ExpectedEntry, SET_AT_LOAD, GROWING> = HashMap::new();

/// The cgroup that is being made: it would take much of the stack.
#[btf_map]
pub static MADE: PerCpuArray<ExpectedCgroup, 1> = PerCpuArray::new();

#[btf_map]
pub static NAMESPACES: HashMap<u64, NamespaceEntry, SET_AT_LOAD, GROWING> = HashMap::new();

#[btf_map]
pub static LOCAL_ADDRESSES: HashMap<Address, LocalAddressEntry, SET_AT_LOAD, GROWING> =
    HashMap::new();

#[btf_map]
pub static SHOWN_ADDRESSES: HashMap<WorkloadId, ShownAddresses, SET_AT_LOAD, GROWING> =
    HashMap::new();

#[btf_map]
pub static PEERS: LpmTrie<PeerKey, PeerEntry, SET_AT_LOAD> = LpmTrie::new();

#[btf_map]
pub static PEER_PORTS: HashMap<PeerPortKey, PeerEntry, SET_AT_LOAD, GROWING> = HashMap::new();

#[btf_map]
pub static VERDICTS: LpmTrie<VerdictKey, VerdictEntry, SET_AT_LOAD> = LpmTrie::new();

#[btf_map]
pub static ORIGINAL_DESTINATIONS: SkStorage<Origin> = SkStorage::new();

#[btf_map]
pub static FLOWS: HashMap<FlowSlot, Flow, SET_AT_LOAD, GROWING> = HashMap::new();

#[btf_map]
pub static ONWARD: LruHashMap<FlowKey, FlowEntry, SET_AT_LOAD> = LruHashMap::new();

#[btf_map]
pub static SOCKETS: SkStorage<SocketTag> = SkStorage::new();

#[btf_map]
pub static TRANSLATED: SkStorage<Translated> = SkStorage::new();

#[btf_map]
pub static ARRIVING: PerCpuArray<Arriving, 1> = PerCpuArray::new();

/// A packet that arrives at a listener: it would take too much of the stack. Only the kernel's
/// softirqs use it, which do not interrupt each other.
#[btf_map]
pub static LISTENERS_PACKET: PerCpuArray<Packet, 1> = PerCpuArray::new();

/// More than are refused in the moment between a look at a socket and its end.
const TOLD_SOCKETS: usize = 1024;

#[btf_map]
pub static TOLD: LruHashMap<ToldKey, u32, TOLD_SOCKETS> = LruHashMap::new();

/// More destinations than fail for all workloads of a node at one moment; one that pushes out another
/// costs it a connection that is reset.
const FAILING_DESTINATIONS: usize = 4096;

#[btf_map]
pub static FAILING: LruHashMap<FailingKey, FailingEntry, FAILING_DESTINATIONS> = LruHashMap::new();

#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_SLOTS as usize }> = PerCpuArray::new();

#[btf_map]
pub static EVENTS: RingBuf<Event, PAGE> = RingBuf::new();

/// More workloads than report many verdicts at once.
const TELLING_WORKLOADS: usize = 4096;

/// When a workload last told of a verdict while `EVENTS` was more than half full.
#[btf_map]
pub static LAST_TOLD: LruHashMap<WorkloadId, u64, TELLING_WORKLOADS> = LruHashMap::new();

/// What the programs read of [`reeve_common::Settings`]; the rest would lie on their stacks.
pub struct Settings {
    pub generation: u32,
    pub cgroup_depths: u32,
    pub outbound_port: u16,
    pub tunnel_port: u16,
    pub flow_seed: u32,
}

/// The settings, as they are at this moment; there are always some, so none is a doubt.
///
/// A copy: a verdict is remembered with the generation that was in force before it was asked for,
/// so that one that is changed meanwhile is asked for again.
#[inline(always)]
pub fn settings() -> Option<Settings> {
    let settings = SETTINGS.get_ptr(0)?;
    // SAFETY: the kernel keeps the one entry of the array for as long as there are programs.
    unsafe {
        Some(Settings {
            generation: field(&raw const (*settings).generation),
            cgroup_depths: field(&raw const (*settings).cgroup_depths),
            outbound_port: field(&raw const (*settings).outbound_port),
            tunnel_port: field(&raw const (*settings).tunnel_port),
            flow_seed: field(&raw const (*settings).flow_seed),
        })
    }
}

/// Whether all of these `SETTINGS_*` bits are set.
#[inline(always)]
pub fn has_flags(flags: u32) -> bool {
    let Some(settings) = SETTINGS.get_ptr(0) else {
        return false;
    };
    // SAFETY: as above.
    field(unsafe { &raw const (*settings).flags }) & flags == flags
}

/// What a socket remembers, if it remembers anything. `socket` is never null.
#[inline(always)]
pub fn tag(socket: *mut bpf_sock) -> Option<&'static mut SocketTag> {
    // SAFETY: the kernel keeps a socket's storage for as long as the program runs.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&SOCKETS).cast_mut().cast(),
            socket.cast(),
            core::ptr::null_mut(),
            0,
        )
        .cast::<SocketTag>()
        .as_mut()
    }
}

/// The socket of the multipath connection (MPTCP) of which a TCP socket is a part: the one that the
/// application has. `socket` is never null; null where it is part of none.
///
/// The constant lets the verifier drop the call where the kernel lacks it.
#[inline(always)]
pub fn multipath(socket: *mut bpf_sock) -> *mut bpf_sock {
    if KNOWS_MULTIPATH.load() == 0 {
        return core::ptr::null_mut();
    }
    // SAFETY: asked of a socket, which is not null.
    unsafe { bpf_skc_to_mptcp_sock(socket.cast()).cast() }
}

/// Keeps the origin of an accepted connection with its socket. Without it the daemon refuses the
/// connection. `socket` is never null.
#[inline(always)]
pub fn set_origin(socket: *mut bpf_sock, origin: &mut Origin) {
    // SAFETY: as in `tag`; the storage is new, since the socket is.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&ORIGINAL_DESTINATIONS)
                .cast_mut()
                .cast(),
            socket.cast(),
            core::ptr::from_mut(origin).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        );
    }
}

/// Makes a socket remember `value` in place of what it remembered. False where the kernel has no
/// memory for it. `socket` is never null.
#[inline(always)]
#[must_use]
pub fn set_tag(socket: *mut bpf_sock, value: &mut SocketTag) -> bool {
    // SAFETY: as in `tag`; a new storage is filled from `value`, an old one is written over here.
    unsafe {
        let stored = bpf_sk_storage_get(
            core::ptr::from_ref(&SOCKETS).cast_mut().cast(),
            socket.cast(),
            core::ptr::from_mut(value).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
        .cast::<SocketTag>();
        match stored.as_mut() {
            Some(stored) => {
                *stored = *value;
                true
            }
            None => false,
        }
    }
}

/// What a socket remembers of its translation. `socket` is never null.
#[inline(always)]
pub fn translated(socket: *mut bpf_sock) -> Option<&'static mut Translated> {
    // SAFETY: as in `tag`.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(&TRANSLATED).cast_mut().cast(),
            socket.cast(),
            core::ptr::null_mut(),
            0,
        )
        .cast::<Translated>()
        .as_mut()
    }
}

/// Makes a socket remember `value` of its translation, if the kernel has the memory. `socket` is
/// never null.
#[inline(always)]
pub fn set_translated(socket: *mut bpf_sock, value: &mut Translated) {
    // SAFETY: as in `set_tag`.
    unsafe {
        let stored = bpf_sk_storage_get(
            core::ptr::from_ref(&TRANSLATED).cast_mut().cast(),
            socket.cast(),
            core::ptr::from_mut(value).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
        .cast::<Translated>();
        if let Some(stored) = stored.as_mut() {
            *stored = *value;
        }
    }
}
