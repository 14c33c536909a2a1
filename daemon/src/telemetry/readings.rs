//! Metrics of state that is kept elsewhere: read when somebody asks, so never stale.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit};
use prometheus::{
    GaugeVec, IntCounterVec, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use reeve_common::{COUNTER_SLOTS, Direction, DryRun, Reason, counter_slot, dry_run_slot};

use super::{certificates::CertificateFamilies, labels::direction_name};
use crate::{
    datapath::{Counters, MapUsage},
    handover::Draining,
    identity::{BundleStatus, EndpointStatus, IdentityStatus, ReloadCounts},
};

/// For how long a difference of clocks is told after it was last seen.
const SKEW_COUNTS: Duration = Duration::from_secs(15 * 60);

/// What the rest of the daemon knows at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// What the kernel programs counted; none where that cannot be read.
    pub counters: Option<Counters>,
    /// The kernel's maps.
    pub maps: Vec<MapUsage>,
    /// How the kernel programs find a packet's network namespace.
    pub namespace_source: Option<&'static str>,
    /// Every identity and its certificate.
    pub identities: Vec<IdentityStatus>,
    /// The trust bundles; a trust domain may have several, for different identities.
    pub bundles: Vec<BundleStatus>,
    /// How the attempts at each source of certificates have ended.
    pub reloads: BTreeMap<String, ReloadCounts>,
    /// The bundle endpoints that are followed.
    pub bundle_endpoints: Vec<EndpointStatus>,
    /// Number of declared workloads in each state.
    pub workloads: BTreeMap<&'static str, u64>,
    /// Number of workloads of which something is not believed, by what it is.
    pub remarks: BTreeMap<&'static str, u64>,
    /// Whether the newest policies have no room in the kernel's maps, and those before are in force.
    pub policies_without_room: bool,
    /// Workloads and directions that are refused everything, for want of room in the kernel's maps.
    pub closed: u64,
    /// Whether nothing is missing, see [`super::Readiness`].
    pub ready: bool,
    /// Whether this daemon lets its connections end.
    pub draining: bool,
    /// Daemons before that do.
    pub predecessors: Arc<Vec<Draining>>,
}

type Source = Box<dyn Fn() -> Readings + Send + Sync>;

/// Collects [`Readings`] from whoever was given to [`ReadingsCollector::read_from`].
pub(super) struct ReadingsCollector {
    source: OnceLock<Source>,
    /// The tunnel's verdicts, in the slots of the kernel's counters.
    verdicts: Box<[AtomicU64]>,
    /// The largest that was seen lately, and when.
    skew: Mutex<Option<(Duration, Instant)>>,
    descriptions: Vec<Desc>,
}

/// The families of one scrape.
struct Families {
    verdicts: IntCounterVec,
    dry_runs: IntCounterVec,
    lost_events: IntCounterVec,
    map_entries: IntGaugeVec,
    map_capacity: IntGaugeVec,
    map_missing: IntGaugeVec,
    namespace_source: IntGaugeVec,
    certificates: CertificateFamilies,
    workloads: IntGaugeVec,
    remarks: IntGaugeVec,
    policies_without_room: IntGaugeVec,
    closed: IntGaugeVec,
    ready: IntGaugeVec,
    draining: IntGaugeVec,
    predecessors: IntGaugeVec,
    predecessor_connections: IntGaugeVec,
    clock_skew: GaugeVec,
    predecessor_age: IntGaugeVec,
    open_files: IntGaugeVec,
    most_files: IntGaugeVec,
    resident: IntGaugeVec,
}

// === impl ReadingsCollector ===

impl ReadingsCollector {
    pub(super) fn new() -> prometheus::Result<Arc<Self>> {
        let descriptions = Families::new()?
            .collectors()
            .into_iter()
            .flat_map(|family| family.desc().into_iter().cloned().collect::<Vec<_>>())
            .collect();
        Ok(Arc::new(Self {
            source: OnceLock::new(),
            verdicts: (0..COUNTER_SLOTS).map(|_| AtomicU64::new(0)).collect(),
            skew: Mutex::default(),
            descriptions,
        }))
    }

    /// The first source stays.
    pub(super) fn read_from(&self, source: impl Fn() -> Readings + Send + Sync + 'static) {
        if self.source.set(Box::new(source)).is_err() {
            tracing::warn!("metrics were given a second source of readings; it is not used");
        }
    }

    pub(super) fn clock_skew(&self, least: Duration, now: Instant) {
        let mut skew = self.skew.lock().unwrap_or_else(PoisonError::into_inner);
        if latest(*skew, now).is_none_or(|known| known <= least) {
            *skew = Some((least, now));
        }
    }

    pub(super) fn verdict(&self, direction: Direction, allowed: bool, reason: Reason) {
        let slot = counter_slot(direction as u8, allowed, reason) as usize;
        if let Some(counter) = self.verdicts.get(slot) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn dry_run(&self, direction: Direction, would: DryRun) {
        let slot = dry_run_slot(direction as u8, would == DryRun::Allow) as usize;
        if let Some(counter) = self.verdicts.get(slot).filter(|_| would != DryRun::Same) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The tunnel's verdicts of one kind.
    fn tunnel_verdicts(&self, direction: Direction, allowed: bool, reason: Reason) -> u64 {
        let slot = counter_slot(direction as u8, allowed, reason) as usize;
        let counter = self.verdicts.get(slot);
        counter.map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    fn families(&self) -> prometheus::Result<Vec<MetricFamily>> {
        let readings = self
            .source
            .get()
            .map_or_else(Readings::default, |read| read());
        let families = Families::new()?;

        for direction in [Direction::Egress, Direction::Ingress] {
            for allowed in [false, true] {
                for reason in Reason::ALL {
                    let kernel = readings
                        .counters
                        .as_ref()
                        .map_or(0, |counters| counters.verdicts(direction, allowed, *reason));
                    let count = kernel + self.tunnel_verdicts(direction, allowed, *reason);
                    // The two usual ones always have a series, so that the first is an increase.
                    let usual = matches!(
                        (allowed, reason),
                        (true, Reason::Policy) | (false, Reason::NoPolicy)
                    );
                    if count > 0 || usual {
                        let verdict = if allowed { "allow" } else { "deny" };
                        families
                            .verdicts
                            .with_label_values(&[
                                direction_name(direction),
                                verdict,
                                reason.as_str(),
                            ])
                            .inc_by(count);
                    }
                }
            }
        }
        for direction in [Direction::Egress, Direction::Ingress] {
            for (would_allow, verdict) in [(false, "deny"), (true, "allow")] {
                let kernel = readings.counters.as_ref();
                let kernel = kernel.map_or(0, |c| c.dry_runs(direction, would_allow));
                let slot = dry_run_slot(direction as u8, would_allow) as usize;
                let tunnel = self.verdicts.get(slot);
                let tunnel = tunnel.map_or(0, |counter| counter.load(Ordering::Relaxed));
                families
                    .dry_runs
                    .with_label_values(&[direction_name(direction), verdict])
                    .inc_by(kernel + tunnel);
            }
        }
        families
            .lost_events
            .with_label_values::<&str>(&[])
            .inc_by(readings.counters.as_ref().map_or(0, Counters::lost_events));
        for usage in &readings.maps {
            let map = [usage.name];
            families
                .map_entries
                .with_label_values(&map)
                .set(saturating(usage.entries));
            families
                .map_capacity
                .with_label_values(&map)
                .set(saturating(usage.capacity));
            families
                .map_missing
                .with_label_values(&map)
                .set(saturating(usage.missing));
        }
        if let Some(source) = readings.namespace_source {
            families
                .namespace_source
                .with_label_values(&[source])
                .set(1);
        }
        families.certificates.set(&readings);
        for (state, count) in &readings.workloads {
            families
                .workloads
                .with_label_values(&[state])
                .set(saturating(*count));
        }
        for (remark, count) in &readings.remarks {
            families
                .remarks
                .with_label_values(&[remark])
                .set(saturating(*count));
        }
        families
            .ready
            .with_label_values::<&str>(&[])
            .set(i64::from(readings.ready));
        let before = &readings.predecessors;
        let left = |daemon: &Draining| daemon.left.as_ref().map_or(0, |left| left.connections);
        for (family, value) in [
            (&families.draining, usize::from(readings.draining)),
            (
                &families.policies_without_room,
                usize::from(readings.policies_without_room),
            ),
            (&families.closed, readings.closed as usize),
            (&families.predecessors, before.len()),
            (
                &families.predecessor_connections,
                before.iter().map(left).sum(),
            ),
        ] {
            let value = saturating(value as u64);
            family.with_label_values::<&str>(&[]).set(value);
        }
        let skew = *self.skew.lock().unwrap_or_else(PoisonError::into_inner);
        let skew = latest(skew, Instant::now()).unwrap_or_default();
        families
            .clock_skew
            .with_label_values::<&str>(&[])
            .set(skew.as_secs_f64());
        for daemon in before.iter() {
            let age = families
                .predecessor_age
                .with_label_values(&[&daemon.version]);
            age.set(age.get().max(saturating(daemon.seconds)));
        }
        let process = process();
        for (family, value) in [
            (&families.open_files, process.open_files),
            (&families.most_files, process.most_files),
            (&families.resident, process.resident),
        ] {
            if let Some(value) = value {
                family.with_label_values::<&str>(&[]).set(saturating(value));
            }
        }
        Ok(families
            .collectors()
            .into_iter()
            .flat_map(Collector::collect)
            .collect())
    }
}

/// The registry wants to own its collectors, and [`super::Metrics`] needs this one too.
pub(super) struct Shared(pub(super) Arc<ReadingsCollector>);

impl Collector for Shared {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.families().unwrap_or_else(|error| {
            tracing::error!(%error, "metrics of the daemon's state could not be collected");
            Vec::new()
        })
    }
}

// === impl Families ===

impl Families {
    fn new() -> prometheus::Result<Self> {
        Ok(Self {
            verdicts: IntCounterVec::new(
                Opts::new(
                    "reeve_verdicts_total",
                    "Verdicts of the kernel programs and of the tunnel.",
                ),
                &["direction", "verdict", "reason"],
            )?,
            dry_runs: IntCounterVec::new(
                Opts::new(
                    "reeve_dry_run_verdicts_total",
                    "Verdicts that policies in dry run would change, by what they would be.",
                ),
                &["direction", "verdict"],
            )?,
            lost_events: IntCounterVec::new(
                Opts::new(
                    "reeve_events_lost_total",
                    "Kernel events that found the ring buffer full.",
                ),
                &[],
            )?,
            map_entries: IntGaugeVec::new(
                Opts::new("reeve_map_entries", "Entries in a kernel map."),
                &["map"],
            )?,
            map_capacity: IntGaugeVec::new(
                Opts::new("reeve_map_capacity", "Entries that fit into a kernel map."),
                &["map"],
            )?,
            map_missing: IntGaugeVec::new(
                Opts::new(
                    "reeve_map_missing_entries",
                    "Entries that a kernel map has no room for: what they could be about is refused.",
                ),
                &["map"],
            )?,
            namespace_source: IntGaugeVec::new(
                Opts::new(
                    "reeve_packet_namespace_source",
                    "1 for how the kernel programs find a packet's network namespace: helper, \
                     kernel_memory, or address, which leaves a gap.",
                ),
                &["source"],
            )?,
            certificates: CertificateFamilies::new()?,
            workloads: IntGaugeVec::new(
                Opts::new("reeve_workloads", "Declared workloads by state."),
                &["state"],
            )?,
            remarks: IntGaugeVec::new(
                Opts::new(
                    "reeve_workload_remarks",
                    "Workloads that claim a network namespace or addresses that are not believed, by what it is.",
                ),
                &["remark"],
            )?,
            policies_without_room: IntGaugeVec::new(
                Opts::new(
                    "reeve_policies_without_room",
                    "1 while the newest policies do not fit into the kernel's maps and the previous ones stay in force, else 0.",
                ),
                &[],
            )?,
            closed: IntGaugeVec::new(
                Opts::new(
                    "reeve_closed_directions",
                    "Directions of workloads that are refused everything, since the kernel's maps have no room for what policies say.",
                ),
                &[],
            )?,
            ready: IntGaugeVec::new(
                Opts::new("reeve_ready", "1 when /readyz answers 200, else 0."),
                &[],
            )?,
            draining: IntGaugeVec::new(
                Opts::new(
                    "reeve_draining",
                    "1 when the daemon was asked to stop and lets its connections end, else 0.",
                ),
                &[],
            )?,
            predecessors: IntGaugeVec::new(
                Opts::new(
                    "reeve_predecessors",
                    "Daemons from which others took over and whose connections have not all ended.",
                ),
                &[],
            )?,
            predecessor_connections: IntGaugeVec::new(
                Opts::new(
                    "reeve_predecessor_connections",
                    "Connections that such daemons still carry, where they say so.",
                ),
                &[],
            )?,
            clock_skew: GaugeVec::new(
                Opts::new(
                    "reeve_clock_skew_seconds",
                    "Least difference between this node's clock and a peer's or an issuer's, by the largest \
                     that certificates' dates have shown at failed handshakes of the last 15 minutes; else 0.",
                ),
                &[],
            )?,
            predecessor_age: IntGaugeVec::new(
                Opts::new(
                    "reeve_predecessor_age_seconds",
                    "Seconds since the oldest of such daemons, by version, was taken over from.",
                ),
                &["version"],
            )?,
            open_files: IntGaugeVec::new(
                Opts::new("process_open_fds", "File descriptors that are open."),
                &[],
            )?,
            most_files: IntGaugeVec::new(
                Opts::new("process_max_fds", "File descriptors that may be open."),
                &[],
            )?,
            resident: IntGaugeVec::new(
                Opts::new("process_resident_memory_bytes", "Resident memory."),
                &[],
            )?,
        })
    }

    fn collectors(&self) -> Vec<&dyn Collector> {
        let mut collectors: Vec<&dyn Collector> = vec![
            &self.verdicts,
            &self.dry_runs,
            &self.lost_events,
            &self.map_entries,
            &self.map_capacity,
            &self.map_missing,
            &self.namespace_source,
            &self.workloads,
            &self.remarks,
            &self.policies_without_room,
            &self.closed,
            &self.ready,
            &self.draining,
            &self.predecessors,
            &self.predecessor_connections,
            &self.clock_skew,
            &self.predecessor_age,
            &self.open_files,
            &self.most_files,
            &self.resident,
        ];
        collectors.extend(self.certificates.collectors());
        collectors
    }
}

/// What was seen within the time for which it counts.
fn latest(skew: Option<(Duration, Instant)>, now: Instant) -> Option<Duration> {
    let (least, seen) = skew?;
    (now.saturating_duration_since(seen) < SKEW_COUNTS).then_some(least)
}

/// What the process has of what may run out. What the system does not tell has no series.
#[derive(Default)]
struct Process {
    open_files: Option<u64>,
    most_files: Option<u64>,
    resident: Option<u64>,
}

fn process() -> Process {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kibibytes = status.lines().find_map(|line| {
        let size = line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?;
        size.trim().parse::<u64>().ok()
    });
    Process {
        open_files: fs::read_dir("/proc/self/fd")
            .ok()
            .map(|files| files.count() as u64),
        most_files: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(now, _)| now),
        resident: kibibytes.map(|kibibytes| kibibytes << 10),
    }
}

fn saturating(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
