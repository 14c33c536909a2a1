//! The kernel's side, seen from the daemon: loads and pins the eBPF programs, keeps their maps
//! equal to the desired state, and opens sockets inside network namespaces.
//!
//! In: [`KernelState`], whole. Out: verdict events, counters, original destinations.
//!
//! Programs, links and maps are pinned, so what is enforced stays enforced while no daemon runs.
//! The next one adopts it, see [`Datapath::load`].

mod beside;
mod bpffs;
mod desired;
mod diag;
mod ending;
mod error;
mod events;
mod families;
mod ids;
mod interfaces;
mod kernel_cgroups;
mod kernel_sockets;
mod kernel_types;
mod links;
mod load;
mod namespace_source;
mod namespace_watch;
mod nat;
mod netlink;
pub mod netns;
mod pins;
mod readback;
mod refusal;
mod route;
mod socket;
mod sockets;
mod state;
mod sys;
mod table;
mod transition;
mod usage;

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{self, MapData, PerCpuArray, RingBuf},
};
use reeve_common::{
    Address, Direction, ExpectedCgroup, FailingEntry, FailingKey, Flow, FlowEntry, FlowKey,
    FlowSlot, LAYOUT_VERSION, NameDigest, NamespaceEntry, NamespaceSource, Origin, SETTINGS_BESIDE,
    SETTINGS_JOINING, ShownAddresses, SocketTag, TAG_ONWARD, TAG_REEVE, TAG_WRONG_LISTENER,
    ToldKey, VerdictEntry, WorkloadEntry, WorkloadId, ipv4_mapped, protocol,
};
use tokio::sync::Notify;

pub use self::{
    diag::{Listener, LiveSocket, Remembered},
    error::Error,
    events::Events,
    families::Families,
    interfaces::InterfaceAddress,
    namespace_source::{PacketNamespaces, gap_of_running_kernel},
    namespace_watch::NamespaceWatch,
    refusal::{Refusal, untested_kernel},
    socket::{control_congestion, speak_as, speak_from},
    sockets::{SocketStorage, Sockets},
    state::Order,
    usage::{Counters, MapUsage},
};
use self::{
    links::Target,
    load::Links,
    netns::Netns,
    pins::Pins,
    state::{State, take},
    sys::AttachType,
};
use crate::{
    config::{EbpfLog, Maps, Ports},
    policy::KernelTables,
};

/// What the datapath needs to know before it loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Cgroup at which the programs are attached: what runs in it and below can be enrolled.
    pub cgroup_root: PathBuf,
    /// Folder in a bpf file system for programs and maps; made, and the file system mounted on
    /// its parent, where they are missing.
    pub pins: PathBuf,
    /// Where proc is mounted, for the settings of workloads' namespaces.
    pub proc: PathBuf,
    /// The daemon's ports in the workloads' namespaces.
    pub ports: Ports,
    /// Capacities of maps that are not pinned yet.
    pub maps: Maps,
    /// Whether the programs log every verdict.
    pub log: EbpfLog,
    /// How the programs find a packet's network namespace; none is the best that the kernel
    /// offers. For tests: older kernels offer less.
    pub namespace_source: Option<NamespaceSource>,
    /// Another daemon, with maps of another layout, serves until [`Datapath::take_place`], and judges
    /// its connections until it ends.
    pub beside: bool,
}

/// What the maps shall hold.
#[derive(Clone, Debug, Default)]
pub struct KernelState {
    /// `WORKLOADS`: cgroup id, its depth, value. The depth counts from the root of the whole
    /// hierarchy, also where the daemon sees a part of it only.
    pub workloads: Vec<(u64, u32, WorkloadEntry)>,
    /// `EXPECTED`: key, the depth of the cgroup that is to come, its workload.
    pub expected: Vec<(ExpectedCgroup, u32, WorkloadId)>,
    /// `NAMESPACES`: cookie, value.
    pub namespaces: Vec<(u64, NamespaceEntry)>,
    /// `LOCAL_ADDRESSES`.
    pub local_addresses: Vec<(Address, WorkloadId)>,
    /// `SHOWN_ADDRESSES`.
    pub shown_addresses: Vec<(WorkloadId, ShownAddresses)>,
    /// Policy.
    pub tables: KernelTables,
}

/// The loaded programs and their maps. Shared by reference; every call may come from any thread.
pub struct Datapath {
    settings: Settings,
    pins: Mutex<Pins>,
    links: Mutex<Links>,
    namespaces: PacketNamespaces,
    /// The pinned maps, by name.
    maps: Vec<(&'static str, OwnedFd)>,
    ebpf: Mutex<Ebpf>,
    state: Mutex<State>,
    events: Mutex<Option<RingBuf<MapData>>>,
    counters: PerCpuArray<MapData, u64>,
    /// `ORIGINAL_DESTINATIONS`, to be read socket by socket.
    origins: OwnedFd,
    /// `FLOWS`, to take entries out of.
    revoked: OwnedFd,
    /// `SOCKETS`, to be read socket by socket.
    tags: OwnedFd,
    /// `TOLD`.
    told: Mutex<maps::HashMap<MapData, ToldKey, u32>>,
    /// `FAILING`.
    failing: Mutex<maps::HashMap<MapData, FailingKey, FailingEntry>>,
    /// Maps that only the programs fill, and their capacities.
    flows: (maps::HashMap<MapData, FlowSlot, Flow>, u32),
    onward: (maps::HashMap<MapData, FlowKey, FlowEntry>, u32),
}

/// Removes everything that is pinned in `pins`: from then on nothing is enforced. Gives what was
/// removed. For when no daemon runs.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn detach(pins: &Path) -> Result<Vec<PathBuf>, Error> {
    pins::remove_all(pins)
}

/// Takes back what [`Datapath::prepare_namespace`] routed in a namespace. True where there was
/// anything.
///
/// # Errors
///
/// From the kernel.
pub async fn restore_namespace(netns: &Netns) -> Result<bool, Error> {
    route::take_back(netns).await
}

/// Makes sure that what is pinned in `pins`, if there is anything, is of this reeve's layout.
///
/// # Errors
///
/// [`Error::Layout`] where it is not.
pub fn require_layout(pins: &Path) -> Result<(), Error> {
    match pins::layout(pins)? {
        Some(found) if found != LAYOUT_VERSION => Err(Error::Layout {
            path: pins.to_owned(),
            found,
            expected: LAYOUT_VERSION,
        }),
        _ => Ok(()),
    }
}

// === impl Datapath ===

impl Datapath {
    /// Loads the programs and attaches them.
    ///
    /// Maps of this layout that are pinned already are adopted with what they hold, which stays
    /// in force until [`Datapath::apply`] is called; a newer program takes the place of an older
    /// one within its link. What is pinned with another layout goes on judging beside these
    /// programs until [`Datapath::apply`] has succeeded once, and is removed then; or until its daemon
    /// ends, where that one is there ([`Settings::beside`]). Programs of other owners are left alone.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or what is pinned is not reeve's. What was in force before then
    /// stays so.
    pub fn load(settings: Settings) -> Result<Self, Error> {
        let pins = Pins::find(&settings.pins, settings.beside)?;
        if let Some(untested) = untested_kernel() {
            tracing::warn!("{untested}");
        }
        let namespaces = PacketNamespaces::find(settings.namespace_source);
        match namespaces.gap() {
            Some(gap) => tracing::warn!("{gap}"),
            None => tracing::info!(
                source = namespaces.name(),
                "the programs know the network namespace of every packet"
            ),
        }
        let mut ebpf = load::load(&settings, pins.folder(), &namespaces)?;
        let flags = match settings.beside {
            true => SETTINGS_BESIDE | SETTINGS_JOINING,
            false if pins.has_olds()? => SETTINGS_BESIDE,
            false => 0,
        };
        let state = State::adopt(&mut ebpf, settings.ports, flags)?;
        let links = load::attach(&ebpf, &settings.cgroup_root, pins.folder())?;
        Ok(Self {
            state: Mutex::new(state),
            links: Mutex::new(links),
            namespaces,
            events: Mutex::new(Some(take(&mut ebpf, "EVENTS", |map| map.try_into())?.0)),
            counters: take(&mut ebpf, "COUNTERS", |map| map.try_into())?.0,
            flows: take(&mut ebpf, "FLOWS", |map| map.try_into())?,
            onward: take(&mut ebpf, "ONWARD", |map| map.try_into())?,
            maps: load::pinned_maps(pins.folder())?,
            origins: pinned_map(pins.folder(), "ORIGINAL_DESTINATIONS")?,
            revoked: pinned_map(pins.folder(), "FLOWS")?,
            tags: pinned_map(pins.folder(), "SOCKETS")?,
            told: Mutex::new(take(&mut ebpf, "TOLD", |map| map.try_into())?.0),
            failing: Mutex::new(take(&mut ebpf, "FAILING", |map| map.try_into())?.0),
            pins: Mutex::new(pins),
            ebpf: Mutex::new(ebpf),
            settings,
        })
    }

    /// How the programs find a packet's network namespace.
    #[must_use]
    pub const fn packet_namespaces(&self) -> &PacketNamespaces {
        &self.namespaces
    }

    /// Makes the maps hold `state`: adds and changes first, deletes last. Every connection is
    /// judged again afterwards if anything was different.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] names the first map that had no room; everything that fits is in force
    /// then, and whatever could be about what does not fit is refused, see [`Datapath::closed`].
    /// [`Error::Map`] is the kernel's.
    pub fn apply(&self, state: &KernelState) -> Result<(), Error> {
        self.apply_in(state, Order::Shrinks)
    }

    /// As [`Datapath::apply`], in an order.
    ///
    /// # Errors
    ///
    /// As [`Datapath::apply`].
    pub fn apply_in(&self, state: &KernelState, order: Order) -> Result<(), Error> {
        lock(&self.state).apply(state, order)?;
        if lock(&self.pins).settle()? {
            tracing::info!("what was pinned with another layout is removed");
        }
        Ok(())
    }

    /// Has everything but loopback refused to these cgroups (id and depth) and all below them.
    /// What the maps say of cgroups already stays as it is.
    ///
    /// # Errors
    ///
    /// As of [`Datapath::apply`].
    pub fn guard(&self, cgroups: &[(u64, u32)]) -> Result<(), Error> {
        lock(&self.state).guard(cgroups)
    }

    /// Looks at every pin, and pins again what is not there any more, or has been replaced: while this
    /// daemon holds the programs they go on, and after it they shall. Gives the pins that were so.
    ///
    /// # Errors
    ///
    /// From the kernel, or where the folder is no longer root's alone.
    pub fn keep_pinned(&self) -> Result<Vec<PathBuf>, Error> {
        let (mut pins, links) = (lock(&self.pins), lock(&self.links));
        pins.keep()?;
        load::pin_again(pins.folder(), &self.maps, &links)
    }

    /// Takes the kernel's side back from a daemon that began to take over and ended before it
    /// had: these programs run again, and the maps are read again. [`Datapath::apply`] follows.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn take_back(&self) -> Result<(), Error> {
        let pins = lock(&self.pins);
        let links = load::attach(&lock(&self.ebpf), &self.settings.cgroup_root, pins.folder())?;
        *lock(&self.links) = links;
        lock(&self.state).reread()
    }

    /// The next daemon has adopted what is pinned, and looks after it.
    pub fn let_go(&self) {
        lock(&self.pins).let_go();
    }

    /// Which workload has which address, as the maps have it.
    #[must_use]
    pub fn local_addresses(&self) -> HashMap<IpAddr, WorkloadId> {
        let state = lock(&self.state);
        let addresses = state.local_addresses.content().iter();
        addresses
            .map(|(address, workload)| {
                let ip = Ipv6Addr::from(*address).to_canonical();
                (ip, *workload)
            })
            .collect()
    }

    /// The ids of these names, in their order: those that they have, or new ones. A name that is not
    /// among these is retired: its id is never given again, and it gets another when it returns.
    ///
    /// # Errors
    ///
    /// [`Error::NoIds`] when every id has been given. Nothing is changed then.
    pub fn ids(&self, names: &[NameDigest]) -> Result<Vec<u32>, Error> {
        lock(&self.state).ids(names)
    }

    /// The ids that another daemon, to which the maps have been left, has given to these names.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn ids_of_others(&self, names: &[NameDigest]) -> Result<Vec<Option<u32>>, Error> {
        lock(&self.state).ids_of_others(names)
    }

    /// Whether the programs are still attached, and the maps still what this daemon writes: asked of
    /// the kernel, where others may have detached or written them.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn check(&self) -> Result<(), Error> {
        load::check(&lock(&self.links))?;
        lock(&self.state).check()
    }

    /// What a program of packets does with an Ethernet frame: whether it passes. The packet's
    /// socket is one of the caller's cgroup.
    #[cfg(test)]
    pub(crate) fn passes(&self, program: &str, frame: &[u8]) -> bool {
        use aya::{
            TestRun as _, TestRunOptions,
            programs::{CgroupSkb, Program},
        };
        let mut ebpf = lock(&self.ebpf);
        let program: &mut Program = ebpf.program_mut(program).unwrap();
        let program: &mut CgroupSkb = program.try_into().unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::default()
        };
        program.test_run(options).unwrap().return_value == 1
    }

    /// How often what is enforced has changed since the maps were made.
    #[must_use]
    pub fn generation(&self) -> u32 {
        lock(&self.state).generation()
    }

    /// What the maps hold for a connection of a workload, looked up as the programs do.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn verdict(
        &self,
        workload: WorkloadId,
        direction: Direction,
        remote: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<VerdictEntry, Error> {
        lock(&self.state).verdict(workload, direction, remote, protocol, port)
    }

    /// How many entries of a state the maps have no room for. Changes nothing.
    #[must_use]
    pub fn missing(&self, desired: &KernelState) -> usize {
        lock(&self.state).missing(desired)
    }

    /// The workloads and directions that are refused everything, since the maps have no room for
    /// what the policy says of them.
    #[must_use]
    pub fn closed(&self) -> Vec<(WorkloadId, Direction)> {
        let state = lock(&self.state);
        let direction = |number| match number {
            number if number == Direction::Egress as u8 => Direction::Egress,
            _ => Direction::Ingress,
        };
        let closed = state.closed().iter();
        closed
            .map(|(id, number)| (*id, direction(*number)))
            .collect()
    }

    /// The workload that the maps have a cgroup enrolled as.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn enrolled(&self, cgroup: u64) -> Result<Option<WorkloadId>, Error> {
        lock(&self.state).enrolled(cgroup)
    }

    /// What the programs have counted.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn counters(&self) -> Result<Counters, Error> {
        usage::counters(&self.counters)
    }

    /// Events that found the ring buffer full, since the maps were made.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn lost_events(&self) -> Result<u64, Error> {
        usage::lost_events(&self.counters)
    }

    /// Entries and capacity of every map. Walks the maps of connections: for metrics, not for
    /// every packet.
    #[must_use]
    pub fn map_usage(&self) -> Vec<MapUsage> {
        let mut usage = lock(&self.state).usage();
        let (flows, onward) = (&self.flows, &self.onward);
        usage.push(usage::count("FLOWS", flows.1, &flows.0));
        usage.push(usage::count("ONWARD", onward.1, &onward.0));
        usage
    }

    /// The reader of the programs' events, of which there is one. Called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] the second time.
    pub fn events(&self) -> Result<Events, Error> {
        let ring = lock(&self.events).take().ok_or(Error::Taken("events"))?;
        Events::new(ring)
    }

    /// Passes the programs' debug lines on to the daemon's log for as long as the future is
    /// polled. None where [`Settings::log`] is off. Called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`] the second time.
    pub fn debug_log(&self) -> Result<Option<impl Future<Output = ()> + Send + use<>>, Error> {
        if self.settings.log == EbpfLog::Off {
            return Ok(None);
        }
        events::forward_log(&mut lock(&self.ebpf)).map(Some)
    }

    /// Has arriving connections of a namespace judged before a listener is looked up, so that a
    /// refused client gets its answer at once. Does nothing the second time.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn attach_namespace(&self, netns: &Netns) -> Result<(), Error> {
        let (pins, ebpf) = (lock(&self.pins), lock(&self.ebpf));
        links::tidy_namespaces(pins.folder())?;
        let program = load::program(&ebpf, load::LOOKUP_PROGRAM)?;
        let target = Target {
            fd: netns.fd.as_fd(),
            number: netns.inode,
            name: format!("the network namespace {}", netns.inode),
        };
        let path = links::of_namespace(pins.folder(), netns.inode);
        let link = links::attach(
            &path,
            load::LOOKUP_PROGRAM,
            program.as_fd(),
            &target,
            AttachType::SkLookup,
        )?;
        lock(&self.links).namespaces.insert(netns.inode, link);
        Ok(())
    }

    /// Ends what [`Datapath::attach_namespace`] began, for a namespace without workloads.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn detach_namespace(&self, inode: u64) -> Result<(), Error> {
        lock(&self.links).namespaces.remove(&inode);
        links::remove_link(&links::of_namespace(lock(&self.pins).folder(), inode))
    }

    /// Has a namespace route the replies of local applications to [`Netns::onward_sockets`] back
    /// to the daemon: a firewall mark that replies inherit, a rule for the mark, and a table
    /// behind it that sends everything to the loopback device. What is there already stays; gives what
    /// was not.
    ///
    /// # Errors
    ///
    /// From the kernel. A namespace without IPv6 is none.
    pub async fn prepare_namespace(&self, netns: &Netns) -> Result<Vec<String>, Error> {
        route::prepare(netns, &self.settings.proc).await
    }

    /// Whether the settings of a namespace are as [`Datapath::prepare_namespace`] makes them. Unlike the
    /// rest, they change without word to a [`NamespaceWatch`].
    #[must_use]
    pub fn is_namespace_set(&self, netns: &Netns) -> bool {
        // What cannot be read is prepared again, which says what is wrong.
        route::is_set(netns, &self.settings.proc).unwrap_or(false)
    }

    /// Gives `word` whenever something has changed in a namespace that
    /// [`Datapath::prepare_namespace`] looks after, or that [`Netns::families`] depends on. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn watch_namespace(
        &self,
        netns: &Netns,
        word: Arc<Notify>,
    ) -> Result<NamespaceWatch, Error> {
        NamespaceWatch::start(netns, word)
            .map_err(Error::in_namespace(netns, "watch its routes and rules"))
    }

    /// See [`Netns::families`].
    ///
    /// # Errors
    ///
    /// From the kernel.
    pub fn families(&self, netns: &Netns) -> Result<Families, Error> {
        netns
            .families()
            .map_err(Error::in_namespace(netns, "read its routes"))
    }
}

impl SocketStorage for Datapath {
    fn origin(&self, accepted: BorrowedFd<'_>) -> Option<Origin> {
        sys::of_socket(self.origins.as_fd(), accepted).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot read the map ORIGINAL_DESTINATIONS");
            None
        })
    }

    fn deliver_to(&self, socket: BorrowedFd<'_>, workload: WorkloadId) -> io::Result<()> {
        let tag = SocketTag {
            workload,
            protocol: protocol::TCP,
            flags: TAG_ONWARD | TAG_REEVE,
            ..SocketTag::default()
        };
        sys::set_of_socket(self.tags.as_fd(), socket, &tag)
    }

    fn met_wrong_listener(&self, socket: BorrowedFd<'_>) -> bool {
        let tag = sys::of_socket::<SocketTag>(self.tags.as_fd(), socket);
        tag.is_ok_and(|tag| tag.is_some_and(|tag| tag.flags & TAG_WRONG_LISTENER != 0))
    }

    fn set_failing(&self, destination: FailingKey, how: FailingEntry) -> io::Result<()> {
        lock(&self.failing)
            .insert(destination, how, 0)
            .map_err(io::Error::other)
    }
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

fn pinned_map(pins: &Path, name: &str) -> Result<OwnedFd, Error> {
    let path = pins.join(name);
    sys::get_pinned(&path).map_err(|source| Error::Pin {
        doing: "open the map",
        path,
        source,
    })
}

/// An address as the maps have it.
#[must_use]
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ipv4_mapped(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The kernel's clock for events, flows and destinations that fail.
#[must_use]
pub fn monotonic_nanoseconds() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    // The clock is there on every Linux; without it, everything is new.
    now.map_or(0, |now| {
        let seconds = u64::try_from(now.tv_sec()).unwrap_or_default();
        let rest = u64::try_from(now.tv_nsec()).unwrap_or_default();
        seconds * 1_000_000_000 + rest
    })
}

/// What a panicking thread left behind is whole: every step of an update is recorded when done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
