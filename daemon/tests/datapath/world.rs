//! What every test here stands in: two network namespaces joined by a wire, cgroups, and a
//! datapath attached to them. Nothing is shared between tests, and nothing stays behind.
//!
//! Threads do what processes do elsewhere: the cgroups are threaded ones, so a test puts a thread
//! into a cgroup and a namespace, makes a socket there, and has it as a value.

use std::{
    fmt::Debug,
    fs,
    io::ErrorKind,
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use reeve::{
    config::{EbpfLog, Maps, Ports},
    datapath::{Datapath, Error, Events, KernelState, Settings, address, netns::Netns},
};
use reeve_common::{
    Action, Direction, Event, Hook, NAMESPACE_LISTENING, NamespaceEntry, NamespaceSource,
    PeerEntry, Reason, ShownAddresses, VERDICT_PREFIX_ANY_PORT, VERDICT_PREFIX_ANY_PROTOCOL,
    VERDICT_PREFIX_FULL, VerdictEntry, VerdictKey, WORKLOAD_IS_REEVE, WorkloadEntry, WorkloadId,
    protocol,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{runtime::Runtime, time::timeout};

use crate::place::{Cgroup, Place, mount, wire};

/// For something that happens to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// For something that must not happen.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);

/// Start of every name, so that what is ours can be told from all else.
const PREFIX: &str = "reeve-datapath-";
const BPFFS: &str = "/sys/fs/bpf";

/// Class of the far end of the wire, where a test says nothing else.
pub(crate) const CLASS: u32 = 7;
/// Number of the peer at the far end.
pub(crate) const PEER: u32 = 0x1_0007;
/// The rule of every verdict that a test writes.
pub(crate) const RULE: u32 = 41;
/// The workload that most tests judge.
pub(crate) const WORKLOAD: WorkloadId = 1;

/// Which ports of which protocol a verdict is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scope {
    /// One port.
    Port(u8, u16),
    /// Ports that have this many bits in common with this one.
    Ports(u8, u16, u32),
    /// Any port of a protocol.
    Protocol(u8),
    /// Anything.
    Anything,
}

/// A test's surroundings.
pub(crate) struct World {
    /// Everything that the maps shall hold; [`World::apply`] makes it so.
    pub(crate) state: KernelState,
    /// Where the judged workload runs.
    pub(crate) here: Place,
    /// Where its far ends are.
    pub(crate) there: Place,
    /// A cgroup that tests enrol as [`WORKLOAD`].
    pub(crate) workload: Cgroup,
    /// A cgroup that is not enrolled.
    pub(crate) stranger: Cgroup,
    /// The cgroup of reeve itself.
    pub(crate) reeve: Cgroup,
    /// None while "the daemon" is down.
    pub(crate) datapath: Option<Arc<Datapath>>,
    /// What it was loaded with.
    pub(crate) settings: Settings,
    events: Option<Events>,
    seen: Vec<Event>,
    runtime: Runtime,
    // Last, so that it is removed last.
    _root: Cgroup,
}

impl World {
    /// Two namespaces and a datapath that knows of nothing.
    pub(crate) fn new() -> Self {
        Self::attached(false, None)
    }

    /// The same with programs for the whole machine, the kernel's own sockets included.
    pub(crate) fn of_machine() -> Self {
        Self::attached(true, None)
    }

    /// The same with programs that find a packet's namespace in this way.
    pub(crate) fn of_machine_by(source: NamespaceSource) -> Self {
        Self::attached(true, Some(source))
    }

    fn attached(everywhere: bool, source: Option<NamespaceSource>) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let root = Cgroup::root(&name);
        // Programs for the whole machine that go by addresses must not find those of other tests.
        let first = source.map_or(1, |_| 3 + (number % 120) as u8 * 2);
        let (here, there) = (Place::new(first), Place::new(first + 1));
        wire(&here, &there);
        let settings = Settings {
            cgroup_root: if everywhere {
                mount()
            } else {
                root.path().to_owned()
            },
            pins: Path::new(BPFFS).join(&name),
            proc: "/proc".into(),
            ports: Ports::default(),
            maps: Maps::default(),
            log: EbpfLog::Off,
            namespace_source: source.or_else(wanted_source),
            beside: false,
        };
        let mut world = Self {
            state: KernelState::default(),
            here,
            there,
            workload: root.child("workload"),
            stranger: root.child("stranger"),
            reeve: root.child("reeve"),
            datapath: None,
            settings,
            events: None,
            seen: Vec::new(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            _root: root,
        };
        world.start().unwrap();
        let reeve = (world.reeve.id(), world.reeve.depth());
        world.state.workloads.push((
            reeve.0,
            reeve.1,
            WorkloadEntry {
                workload: 0,
                flags: WORKLOAD_IS_REEVE,
            },
        ));
        world
    }

    /// Two namespaces, and a workload in one of them that may do nothing.
    pub(crate) fn enrolled() -> Self {
        let mut world = Self::new();
        world.enrol();
        world.apply();
        world
    }

    /// Enrols the workload, which owns its namespace.
    pub(crate) fn enrol(&mut self) {
        let (id, depth) = (self.workload.id(), self.workload.depth());
        self.add_workload(id, depth, WORKLOAD);
        self.state.namespaces.push((
            self.here.netns.cookie,
            NamespaceEntry {
                workload: WORKLOAD,
                flags: 0,
            },
        ));
        for ip in [self.here.v4, self.here.v6] {
            self.state.local_addresses.push((address(ip), WORKLOAD));
        }
        let shown = ShownAddresses {
            v4: address(self.here.v4),
            v6: address(self.here.v6),
        };
        self.state.shown_addresses.push((WORKLOAD, shown));
    }

    /// Enrols another cgroup.
    pub(crate) fn add_workload(&mut self, cgroup: u64, depth: u32, workload: WorkloadId) {
        let entry = WorkloadEntry { workload, flags: 0 };
        self.state.workloads.push((cgroup, depth, entry));
    }

    /// Says that the daemon's listeners stand in the workload's namespace.
    pub(crate) fn listening(&mut self) {
        for (_, entry) in &mut self.state.namespaces {
            entry.flags |= NAMESPACE_LISTENING;
        }
    }

    /// Makes the far end of the wire a peer.
    pub(crate) fn peer(&mut self, flags: u32) {
        for ip in [self.there.v4, self.there.v6] {
            let entry = PeerEntry {
                class: CLASS,
                peer: PEER,
                flags,
            };
            self.state.tables.peers.push((128, address(ip), entry));
        }
    }

    /// Writes a verdict about [`WORKLOAD`].
    pub(crate) fn verdict(
        &mut self,
        direction: Direction,
        class: u32,
        scope: Scope,
        action: Action,
    ) {
        let (bits, protocol, port) = match scope {
            Scope::Port(protocol, port) => (VERDICT_PREFIX_FULL, protocol, port),
            Scope::Ports(protocol, port, bits) => (VERDICT_PREFIX_ANY_PORT + bits, protocol, port),
            Scope::Protocol(protocol) => (VERDICT_PREFIX_ANY_PORT, protocol, 0),
            Scope::Anything => (VERDICT_PREFIX_ANY_PROTOCOL, protocol::ANY, 0),
        };
        let key = VerdictKey {
            workload: WORKLOAD,
            class,
            direction: direction as u8,
            protocol,
            port: port.to_be_bytes(),
        };
        let entry = VerdictEntry {
            action: action as u32,
            rule: RULE,
            dry_run: 0,
            dry_run_rule: 0,
        };
        self.state.tables.verdicts.push((bits, key, entry));
    }

    /// Has everything allowed in one direction, to and from the far end of the wire.
    pub(crate) fn allow(&mut self, direction: Direction, scope: Scope) {
        self.verdict(direction, CLASS, scope, Action::Allow);
    }

    /// Loads the datapath.
    pub(crate) fn start(&mut self) -> Result<(), Error> {
        let datapath = Datapath::load(self.settings.clone())?;
        let _runtime = self.runtime.enter();
        self.events = Some(datapath.events()?);
        self.datapath = Some(Arc::new(datapath));
        Ok(())
    }

    /// Ends "the daemon", and leaves what it pinned.
    pub(crate) fn stop(&mut self) {
        self.events = None;
        self.datapath = None;
    }

    /// The datapath.
    pub(crate) fn datapath(&self) -> &Arc<Datapath> {
        self.datapath.as_ref().expect("the datapath is loaded")
    }

    /// Makes the maps hold what this says.
    pub(crate) fn apply(&self) {
        self.datapath().apply(&self.state).unwrap();
    }

    /// Does something as the workload.
    pub(crate) fn as_workload<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.here.run(&self.workload, work)
    }

    /// Does something as somebody who is not enrolled, at the far end of the wire.
    pub(crate) fn as_far_end<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.there.run(&self.stranger, work)
    }

    /// Does something as the daemon, in the workload's namespace.
    pub(crate) fn as_reeve<T: Send>(&self, work: impl FnOnce(&Netns) -> T + Send) -> T {
        self.here.run(&self.reeve, || work(&self.here.netns))
    }

    /// Waits for an event.
    pub(crate) fn event(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.seen.iter().position(&wanted) {
                return self.seen.remove(found);
            }
            assert!(
                self.read_events(deadline.saturating_duration_since(Instant::now())),
                "no event says that {what}: {:#?}",
                self.seen
            );
        }
    }

    /// Waits for the event of a verdict.
    pub(crate) fn verdict_event(&mut self, hook: Hook, allowed: bool, reason: Reason) -> Event {
        self.event(&format!("{hook:?} {allowed} {reason:?}"), |event| {
            event.kind == 0
                && event.hook == hook as u8
                && event.allowed == u8::from(allowed)
                && event.reason == reason as u8
        })
    }

    /// Everything that was told and not asked for yet.
    pub(crate) fn other_events(&mut self) -> &[Event] {
        while self.read_events(MOMENT) {}
        &self.seen
    }

    fn read_events(&mut self, patience: Duration) -> bool {
        let events = self.events.as_mut().expect("the datapath is loaded");
        let mut batch = Vec::new();
        let read = self
            .runtime
            .block_on(async { timeout(patience, events.next(&mut batch)).await });
        self.seen.append(&mut batch);
        read.is_ok()
    }

    /// How often a verdict was given.
    pub(crate) fn count(&self, direction: Direction, allowed: bool, reason: Reason) -> u64 {
        let counters = self.datapath().counters().unwrap();
        counters.verdicts(direction, allowed, reason)
    }

    /// Runs a future of the datapath.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop();
        let removed = fs::remove_dir_all(&self.settings.pins);
        if !thread::panicking() {
            removed.unwrap();
        }
    }
}

/// `REEVE_NAMESPACE_SOURCE` has all tests find packets' namespaces as another kernel would.
fn wanted_source() -> Option<NamespaceSource> {
    let wanted = std::env::var("REEVE_NAMESPACE_SOURCE").ok()?;
    Some(match wanted.as_str() {
        "helper" => NamespaceSource::Helper,
        "kernel_memory" => NamespaceSource::KernelMemory,
        "address" => NamespaceSource::Address,
        other => panic!("REEVE_NAMESPACE_SOURCE is {other}"),
    })
}

/// Removes what tests left that were killed.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (folder, is_cgroup) in [(mount(), true), (PathBuf::from(BPFFS), false)] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let dead = name
                    .strip_prefix(PREFIX)
                    .and_then(|rest| rest.split('-').next())
                    .is_some_and(|process| !Path::new("/proc").join(process).exists());
                if dead && is_cgroup {
                    for child in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                        let _ = fs::remove_dir(child.path());
                    }
                    let _ = fs::remove_dir(entry.path());
                } else if dead {
                    let _ = fs::remove_dir_all(entry.path());
                }
            }
        }
    });
}

/// What the kernel tells of a TCP socket (`struct tcp_info`), as far as every supported kernel tells it.
pub(crate) fn tcp_info(socket: &impl AsRawFd) -> [u8; 104] {
    let mut info = [0_u8; 104];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: `info` is as long as is said.
    let asked = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
    info
}

/// Asserts that a connection is refused at its first SYN. By the clock alone a busy machine could not be told from a
/// client that had to ask again.
pub(crate) fn reset_at_once(to: SocketAddr) {
    /// Where `struct tcp_info` has `tcpi_total_retrans`.
    const SENT_AGAIN: usize = 100;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    let refused = socket.connect_timeout(&to.into(), PATIENCE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to}");
    let info = tcp_info(&socket);
    assert_eq!(info[SENT_AGAIN..], [0; 4], "{to}: the SYN was sent again");
}

/// A socket of UDP-Lite; none where the kernel has no such protocol, as those after Linux 7.0.
pub(crate) fn udp_lite(domain: Domain) -> Option<Socket> {
    match Socket::new(domain, Type::DGRAM, Some(Protocol::UDPLITE)) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
        made => Some(made.unwrap()),
    }
}

/// Asserts that a call was refused by a program.
pub(crate) fn assert_refused<T: Debug>(result: std::io::Result<T>) {
    let error = result.expect_err("the call is refused");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
}
