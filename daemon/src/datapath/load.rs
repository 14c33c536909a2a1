//! From the embedded object to programs in force: maps are adopted or made, programs verified,
//! links replaced or made.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapInfo, MapType},
    programs::{Program, ProgramError},
};
use reeve_common::{
    Address, Arriving, ExpectedCgroup, ExpectedEntry, Flow, FlowEntry, FlowKey, FlowSlot,
    NameDigest, NamespaceEntry, Origin, PeerEntry, PeerPortKey, Settings as KernelSettings,
    SocketTag, VerdictEntry, VerdictKey, WorkloadEntry, WorkloadId, flow_sets,
};

use super::{
    Error, Settings, bpffs,
    kernel_cgroups::{self, CgroupFields},
    kernel_sockets::{KernelSocketBit, knows_multipath},
    kernel_types::KernelTypes,
    links::{self, Target},
    namespace_source::PacketNamespaces,
    pins::SETTINGS,
    refusal::Refusal,
    sys::{self, AttachType},
};
use crate::config::{EbpfLog, Maps};

/// The object that `build.rs` made of `ebpf/`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/reeve-ebpf"));

/// The programs that are attached to the cgroup, and where.
///
/// The order is that of their use in a connection's life; the sockets' hooks come before the
/// packets', which is what a connection that is opened meanwhile needs.
const CGROUP_PROGRAMS: [(&str, AttachType); 16] = [
    ("reeve_sock_ops", AttachType::CgroupSockOps),
    ("reeve_peername4", AttachType::CgroupGetpeername4),
    ("reeve_peername6", AttachType::CgroupGetpeername6),
    ("reeve_sockname4", AttachType::CgroupGetsockname4),
    ("reeve_sockname6", AttachType::CgroupGetsockname6),
    ("reeve_connect4", AttachType::CgroupConnect4),
    ("reeve_connect6", AttachType::CgroupConnect6),
    ("reeve_sendmsg4", AttachType::CgroupSendmsg4),
    ("reeve_sendmsg6", AttachType::CgroupSendmsg6),
    ("reeve_recvmsg4", AttachType::CgroupRecvmsg4),
    ("reeve_recvmsg6", AttachType::CgroupRecvmsg6),
    ("reeve_bind4", AttachType::CgroupBind4),
    ("reeve_bind6", AttachType::CgroupBind6),
    ("reeve_setsockopt", AttachType::CgroupSetsockopt),
    ("reeve_egress", AttachType::CgroupEgress),
    ("reeve_ingress", AttachType::CgroupIngress),
];

/// The program that is attached to network namespaces.
pub(super) const LOOKUP_PROGRAM: &str = "reeve_lookup";

/// Bits that say how an LPM key is as long as it is, in front of each.
const PREFIX: usize = size_of::<u32>();

/// Links that are in force. Held, so that they stay where somebody unmounts what they are pinned
/// in.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// Of the cgroup.
    pub(super) cgroup: Vec<OwnedFd>,
    /// Of network namespaces, by inode.
    pub(super) namespaces: HashMap<u64, OwnedFd>,
}

/// A pinned map: its name and type, and the sizes of a key and a value.
type Shape = (&'static str, MapType, usize, usize);

/// The pinned maps. The others belong to one load: constants, the log, and what may be forgotten.
const PINNED_MAPS: [Shape; 16] = [
    shape::<u32, KernelSettings>(SETTINGS, MapType::Array),
    shape::<NameDigest, u32>("IDS", MapType::Hash),
    shape::<u64, WorkloadEntry>("WORKLOADS", MapType::Hash),
    shape::<ExpectedCgroup, ExpectedEntry>("EXPECTED", MapType::Hash),
    shape::<u64, NamespaceEntry>("NAMESPACES", MapType::Hash),
    shape::<Address, WorkloadId>("LOCAL_ADDRESSES", MapType::Hash),
    trie::<Address, PeerEntry>("PEERS"),
    shape::<PeerPortKey, PeerEntry>("PEER_PORTS", MapType::Hash),
    trie::<VerdictKey, VerdictEntry>("VERDICTS"),
    shape::<u32, Origin>("ORIGINAL_DESTINATIONS", MapType::SkStorage),
    shape::<FlowSlot, Flow>("FLOWS", MapType::Hash),
    shape::<FlowKey, FlowEntry>("ONWARD", MapType::LruHash),
    shape::<u32, SocketTag>("SOCKETS", MapType::SkStorage),
    shape::<u32, Arriving>("ARRIVING", MapType::PerCpuArray),
    shape::<u32, u64>("COUNTERS", MapType::PerCpuArray),
    // It has neither keys nor values.
    ("EVENTS", MapType::RingBuf, 0, 0),
];

const fn shape<K, V>(name: &'static str, kind: MapType) -> Shape {
    (name, kind, size_of::<K>(), size_of::<V>())
}

const fn trie<K, V>(name: &'static str) -> Shape {
    (
        name,
        MapType::LpmTrie,
        PREFIX + size_of::<K>(),
        size_of::<V>(),
    )
}

/// Capacity of a map in the configuration; none where it has one of its own.
fn capacity(maps: &Maps, name: &str) -> Option<u32> {
    match name {
        // Whoever is in either of these has a name.
        "IDS" => Some(maps.workloads.saturating_add(maps.peers)),
        "WORKLOADS" => Some(maps.workloads),
        // A unit is expected in each slice.
        "EXPECTED" => Some(maps.workloads.saturating_mul(4)),
        "NAMESPACES" => Some(maps.namespaces),
        "LOCAL_ADDRESSES" => Some(maps.local_addresses),
        "PEERS" => Some(maps.peers),
        "PEER_PORTS" => Some(maps.peer_ports),
        "VERDICTS" => Some(maps.verdicts),
        "FLOWS" => Some(maps.flows),
        "ONWARD" => Some(maps.onward),
        "EVENTS" => Some(maps.events),
        _ => None,
    }
}

/// Makes or adopts the maps, and has the kernel verify the programs.
pub(super) fn load(
    settings: &Settings,
    pins: &Path,
    namespaces: &PacketNamespaces,
) -> Result<Ebpf, Error> {
    let mut sets = 1;
    let mut loader = EbpfLoader::new();
    for shape in PINNED_MAPS {
        let (name, ..) = shape;
        let path = pins.join(name);
        let adopted = adoptable(&path, shape)?;
        let wanted = capacity(&settings.maps, name);
        if let (Some(adopted), Some(wanted)) = (adopted, wanted)
            && name != "EVENTS"
            && adopted != wanted
        {
            tracing::warn!(
                map = name,
                capacity = adopted,
                configured = wanted,
                "a pinned map keeps its capacity until what is pinned is removed"
            );
        }
        if let Some(capacity) = adopted.or(wanted) {
            loader.map_max_entries(name, capacity);
            if name == "FLOWS" {
                sets = flow_sets(capacity);
            }
        }
        loader.map_pin_path(name, path);
    }
    // It decides nothing, so each daemon fills one of its own.
    loader.map_max_entries("SHOWN_ADDRESSES", settings.maps.workloads);
    let log_level: u8 = match settings.log {
        EbpfLog::Off => 0,
        EbpfLog::Debug => aya_log::Level::Debug as u8,
    };
    loader.override_global(aya_log::LEVEL, &log_level, true);
    loader.override_global("FLOW_SETS", &sets, true);
    let source = namespaces.source() as u8;
    let offsets = namespaces.offsets();
    loader.override_global("NAMESPACE_SOURCE", &source, true);
    let types = KernelTypes::of_running_kernel().ok();
    let kernels = KernelSocketBit::find(types.as_ref());
    // The same place, whichever found it.
    let socket = offsets.socket.max(kernels.socket);
    loader.override_global("SOCKET_OFFSET", &socket, true);
    loader.override_global("KERNEL_SOCKET_OFFSET", &kernels.offset, true);
    loader.override_global("KERNEL_SOCKET_MASK", &kernels.mask, true);
    let fields = types.as_ref().and_then(CgroupFields::find);
    if let Some(fields) = &fields {
        fields.set(&mut loader);
    }
    let multipath = u8::from(knows_multipath(types.as_ref()));
    loader.override_global("KNOWS_MULTIPATH", &multipath, true);
    drop(types);
    loader.override_global("NETWORK_OFFSET", &offsets.network, true);
    loader.override_global("COOKIE_OFFSET", &offsets.cookie, true);
    let mut ebpf = loader.load(OBJECT)?;

    for (name, _) in CGROUP_PROGRAMS {
        verify(&mut ebpf, name)?;
    }
    verify(&mut ebpf, LOOKUP_PROGRAM)?;
    drop(loader);
    if fields.is_none() || kernel_cgroups::attach(&mut ebpf).is_err() {
        tracing::warn!(
            "the kernel does not tell the programs of new cgroups: a workload's is enforced some \
             milliseconds after it is made"
        );
    }
    give_back_memory();
    Ok(ebpf)
}

/// Reading the kernel's type information takes megabytes for a moment, in small pieces that the
/// allocator would keep for good.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches only what is not in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Capacity of the map pinned at `path`, if there is one, it is root's, and it has this shape.
fn adoptable(path: &Path, (_, kind, key, value): Shape) -> Result<Option<u32>, Error> {
    if fs::symlink_metadata(path).is_err() {
        return Ok(None);
    }
    bpffs::verify_pin(path)?;
    let info = MapData::from_pin(path)
        .and_then(|data| data.info())
        .map_err(|error| Error::Pin {
            doing: "open the map",
            path: path.to_owned(),
            source: io::Error::other(error),
        })?;
    let is_kind = info.map_type().is_ok_and(|found| found == kind);
    if is_kind && (info.key_size() as usize, info.value_size() as usize) == (key, value) {
        return Ok(Some(info.max_entries()));
    }
    Err(Error::Shape {
        path: path.to_owned(),
        found: type_name(&info),
        expected: format!("{kind:?}"),
        found_key: info.key_size(),
        found_value: info.value_size(),
        key: key as u32,
        value: value as u32,
    })
}

/// The type of a map, for messages.
pub(super) fn type_name(info: &MapInfo) -> String {
    info.map_type()
        .map_or_else(|_| "an unknown type".to_owned(), |kind| format!("{kind:?}"))
}

/// How often a program is loaded before it counts as refused: the verifier gives up with `EAGAIN`
/// where a signal waits for the thread.
const ATTEMPTS: usize = 5;

fn verify(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    let program = ebpf.program_mut(name).ok_or(Error::Missing(name))?;
    let mut attempt = 1;
    loop {
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSkb(program) => program.load(),
            Program::CgroupSockopt(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            _ => return Err(Error::Missing(name)),
        };
        match loaded {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock && attempt < ATTEMPTS =>
            {
                attempt += 1;
            }
            loaded => return loaded.map_err(|error| refused(name, &error)),
        }
    }
}

/// The pinned maps, held so that they can be pinned again.
pub(super) fn pinned_maps(pins: &Path) -> Result<Vec<(&'static str, OwnedFd)>, Error> {
    let open = |(name, ..): &Shape| {
        let path = pins.join(name);
        let map = sys::get_pinned(&path).map_err(|source| Error::Pin {
            doing: "open the map",
            path,
            source,
        })?;
        Ok((*name, map))
    };
    PINNED_MAPS.iter().map(open).collect()
}

/// Pins maps and links again whose pins are gone, or are of something else. Gives those pins.
pub(super) fn pin_again(
    pins: &Path,
    maps: &[(&'static str, OwnedFd)],
    attached: &Links,
) -> Result<Vec<PathBuf>, Error> {
    let maps = maps.iter().map(|(name, map)| (pins.join(name), map));
    let cgroup = CGROUP_PROGRAMS.iter().zip(&attached.cgroup);
    let cgroup = cgroup.map(|((name, _), link)| (links::of_program(pins, name), link));
    let namespaces = attached.namespaces.iter();
    let namespaces = namespaces.map(|(inode, link)| (links::of_namespace(pins, *inode), link));
    let mut again = Vec::new();
    for (path, object) in maps.chain(cgroup).chain(namespaces) {
        let failed = |source| Error::Pin {
            doing: "pin again",
            path: path.clone(),
            source,
        };
        let object = object.as_fd();
        if is_pinned(&path, object).map_err(failed)? {
            continue;
        }
        links::remove(&path)?;
        sys::pin(object, &path).map_err(failed)?;
        again.push(path);
    }
    Ok(again)
}

/// Whether the pin is there, root's, and of this object. What cannot be opened is of another.
fn is_pinned(path: &Path, object: BorrowedFd<'_>) -> io::Result<bool> {
    if bpffs::verify_pin(path).is_err() {
        return Ok(false);
    }
    let Ok(pinned) = sys::get_pinned(path) else {
        return Ok(false);
    };
    Ok(sys::kind_and_id(pinned.as_fd())? == sys::kind_and_id(object)?)
}

/// Puts the programs in force: at the cgroup, and in the namespaces of an earlier daemon. Gives
/// the links.
pub(super) fn attach(ebpf: &Ebpf, cgroup_root: &Path, pins: &Path) -> Result<Links, Error> {
    let failed = |source| Error::Cgroup {
        path: cgroup_root.to_owned(),
        source,
    };
    let cgroup = File::open(cgroup_root).map_err(failed)?;
    let number = cgroup.metadata().map_err(failed)?.ino();
    let target = Target {
        fd: cgroup.as_fd(),
        number,
        name: format!("the cgroup {}", cgroup_root.display()),
    };
    let mut attached = Links::default();
    for (name, attach_type) in CGROUP_PROGRAMS {
        let path = links::of_program(pins, name);
        let program = program(ebpf, name)?;
        let link = links::attach(&path, name, program.as_fd(), &target, attach_type)?;
        attached.cgroup.push(link);
    }
    let lookup = program(ebpf, LOOKUP_PROGRAM)?;
    attached.namespaces = links::adopt_namespaces(pins, LOOKUP_PROGRAM, lookup.as_fd())?
        .into_iter()
        .collect();
    Ok(attached)
}

/// Whether the cgroup's programs are still attached.
pub(super) fn check(links: &Links) -> Result<(), Error> {
    for ((name, _), link) in CGROUP_PROGRAMS.iter().zip(&links.cgroup) {
        if !links::is_attached(link.as_fd()) {
            return Err(Error::Detached { name });
        }
    }
    Ok(())
}

/// The file descriptor of a verified program.
pub(super) fn program<'a>(
    ebpf: &'a Ebpf,
    name: &'static str,
) -> Result<&'a aya::programs::ProgramFd, Error> {
    ebpf.program(name)
        .ok_or(Error::Missing(name))?
        .fd()
        .map_err(|error| refused(name, &error))
}

fn refused(name: &str, error: &ProgramError) -> Error {
    Error::Refused(Box::new(Refusal::of_program(name, error)))
}

/// An error of a map.
pub(super) fn map_error(
    map: &'static str,
    doing: &'static str,
    source: aya::maps::MapError,
) -> Error {
    Error::Map {
        map,
        doing,
        source: Box::new(source),
    }
}
