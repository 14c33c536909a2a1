//! What holds the daemon together: turns changes of configuration, policies and workloads into
//! one snapshot after another, kernel first.
//!
//! In: the configuration, the policies' files, the registry of workloads, signals. Out: what the
//! kernel's maps hold, the snapshot that the tunnels judge by, listeners, identities.
//!
//! [`Control::run`] waits for changes; `reconcile` is the step that each of them causes, and
//! `desired` what that step wants of the kernel. [`Daemon`] is what is told to others.

mod beside;
mod ca;
mod certificates;
mod daemon;
mod desired;
mod drain;
mod endpoints;
mod error;
mod explain;
mod guard;
mod health;
mod host_addresses;
mod housekeeping;
mod ids;
mod own_cgroup;
mod parents;
mod passing;
mod port_holder;
mod ports;
mod process;
mod reconcile;
mod reload;
mod revoke;
mod service;
mod signals;
mod succession;
mod systemd;

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwap;
use reeve_common::{Event, EventKind};
use tokio::{
    sync::{oneshot, watch},
    task::block_in_place,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    admin::{PolicyStatus, ReloadReport},
    config::{Config, Declared},
    datapath::{self, Datapath},
    handover::{Request, Takeover},
    policy::{PolicySet, Snapshot},
    telemetry::{Events, Health, Readiness},
    watch::Files,
    workload::{Discovery, Registry, Roster, cgroup::CgroupTree},
};

pub use certificates::{CertificatesError, federation, identity_store};
pub use daemon::Daemon;
pub use endpoints::Endpoints;
pub use error::RunError;
pub use guard::{Guarded, guard};
pub use ids::give_ids;
pub use own_cgroup::{open_cgroups, settle_in};
pub use parents::ParentError;
pub use process::{prepare as prepare_process, spawn_orphan};
pub use reconcile::{Compiled, steps};
pub use reload::{Looks, declaration, policies};
pub use service::{StandIn, unknown_units};

use daemon::{Reloads, View};
use drain::News;
use health::{Asked, HealthLook};
use host_addresses::HostAddresses;
use housekeeping::Housekeeping;
use reconcile::{Enforced, Namespaces};
use reload::Doubt;
use signals::{Signal, Signals};
use succession::{LEAVE, READY_LOOK, Reported, Succession, at, within};

/// For a process that was killed to be gone.
const DIE: Duration = Duration::from_secs(2);
/// First wait before what failed is tried again; doubled at each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest wait before what failed is tried again.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The one who decides what is in force.
pub struct Control {
    daemon: Arc<Daemon>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    cgroups: CgroupTree,
    own_cgroups: Vec<(u64, u32)>,
    /// Told when the configuration is read again.
    declared: Declared,
    /// Whom policies select.
    rosters: watch::Receiver<Arc<Roster>>,
    registry: Registry,
    discovery: watch::Receiver<Arc<Discovery>>,
    policies: Arc<PolicySet>,
    /// What the kernel was brought to last.
    enforced: Option<Enforced>,
    policy_status: PolicyStatus,
    policy_files: Files,
    /// Why policies that were read are not taken.
    doubt: Doubt,
    bundle_files: Files,
    /// Who asks for everything to be read again.
    reloads: Option<Reloads>,
    namespaces: Namespaces,
    /// The host's addresses, where they are the node's.
    host_addresses: HostAddresses,
    readiness: watch::Sender<Readiness>,
    health: watch::Sender<Health>,
    events: Option<datapath::Events>,
    /// Counts and logs what the kernel tells.
    kernel_events: Events,
    /// Generation by which live connections were last judged again.
    judged: Option<u32>,
    housekeeping: Housekeeping,
    /// By which it was last told what policies in dry run would change of them.
    told: Arc<Snapshot>,
    endpoints: Endpoints,
    succession: Succession,
    /// Takes this daemon's place in its unit when it leaves.
    stand_in: Option<StandIn>,
    /// Where to write that this daemon has taken over.
    report: Option<PathBuf>,
    /// The kernel has held all that is declared at least once.
    is_enforced: bool,
}

/// What control is made of, besides the [`Daemon`].
pub struct Parts {
    /// What the tunnels judge by.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The cgroup tree.
    pub cgroups: CgroupTree,
    /// The daemon's own cgroups, from [`settle_in`].
    pub own_cgroups: Vec<(u64, u32)>,
    /// Whom the configuration declares; told when it is read again.
    pub declared: Declared,
    /// Whom policies select, from wherever that is known.
    pub rosters: watch::Receiver<Arc<Roster>>,
    /// Who runs here.
    pub registry: Registry,
    /// The policies to begin with.
    pub policies: PolicySet,
    /// The files of these and of trust, from before they were read.
    pub looks: Looks,
    /// Where readiness is told.
    pub readiness: watch::Sender<Readiness>,
    /// Where health is told.
    pub health: watch::Sender<Health>,
    /// What the kernel tells, and who counts it.
    pub events: (datapath::Events, Events),
    /// Where others ask.
    pub endpoints: Endpoints,
    /// A hand-over to this daemon that has begun.
    pub takeover: Option<Takeover>,
    /// Takes this daemon's place in its unit when it leaves.
    pub stand_in: Option<StandIn>,
    /// Where to write that it is done.
    pub report: Option<PathBuf>,
    /// How long the daemons before may go on.
    pub end_old_after: Option<Duration>,
    /// Cookies of the namespaces whose listeners another process opened.
    pub inherited: HashSet<u64>,
}

/// What happened.
enum Change {
    Roster,
    Workloads,
    Policies,
    Bundles,
    Certificates,
    HostAddresses,
    /// The metrics endpoint's address may be free now.
    Endpoints,
    /// Something in a namespace of workloads.
    Namespaces,
    Retry,
    /// Readiness may have changed.
    Look,
    /// Whether the loop turns; every few seconds.
    Asked(oneshot::Sender<()>),
    Signal(Signal),
    /// `reeve reload`.
    Reload(oneshot::Sender<ReloadReport>),
    Request(Request),
    /// Of a daemon before.
    Predecessor(News),
    /// No other daemon hears what is left of this one.
    Unheard,
    /// No other daemon passes certificates.
    AskSources,
    RegistryEnded,
}

/// What the loop waits for besides what control owns, and when it tries again.
struct Waits {
    signals: Signals,
    certificates: watch::Receiver<u64>,
    asked: Asked,
    retry: Duration,
    retry_at: Option<Instant>,
}

/// What the datapath needs to know of the configuration, and of the daemon before.
#[must_use]
pub fn datapath_settings(
    config: &Config,
    cgroups: &CgroupTree,
    takeover: Option<&Takeover>,
) -> datapath::Settings {
    datapath::Settings {
        cgroup_root: cgroups.root().to_owned(),
        pins: config.node.bpffs.clone(),
        proc: config.node.proc.clone(),
        ports: config.ports,
        maps: config.maps,
        log: config.log.ebpf,
        namespace_source: None,
        beside: takeover.is_some_and(|takeover| takeover.offer.beside),
    }
}

// === impl Control ===

impl Control {
    /// Puts the parts together. Needs a tokio runtime.
    #[must_use]
    pub fn new(daemon: Arc<Daemon>, parts: Parts) -> Self {
        let config = daemon.config.load_full();
        // The kernel goes on sending connections to listeners that stand.
        let mut view = View::clone(&daemon.view.load());
        view.listening.clone_from(&parts.inherited);
        daemon.view.store(Arc::new(view));
        // Until this one has taken over, the service manager hears the other one.
        let is_service = parts.takeover.is_none();
        daemon.is_service.store(is_service, Ordering::Relaxed);
        daemon.no_metrics.store(parts.endpoints.missing());
        Self {
            endpoints: parts.endpoints,
            succession: Succession::new(parts.takeover, &parts.inherited, parts.end_old_after),
            snapshot: parts.snapshot,
            cgroups: parts.cgroups,
            own_cgroups: parts.own_cgroups,
            discovery: parts.registry.discovery(),
            registry: parts.registry,
            declared: parts.declared,
            rosters: parts.rosters,
            policy_status: reload::policy_status(&config, &parts.policies),
            policies: Arc::new(parts.policies),
            enforced: None,
            policy_files: parts.looks.policies.watch(),
            doubt: Doubt::default(),
            bundle_files: parts.looks.bundles.watch(),
            reloads: daemon.reloads(),
            namespaces: Namespaces::default(),
            host_addresses: HostAddresses::default(),
            readiness: parts.readiness,
            health: parts.health,
            events: Some(parts.events.0),
            kernel_events: parts.events.1,
            judged: None,
            housekeeping: Housekeeping::new(),
            told: Arc::default(),
            stand_in: parts.stand_in,
            report: parts.report,
            is_enforced: false,
            daemon,
        }
    }

    /// Keeps everything as it is declared, until a signal asks for the end. Then connections may
    /// end by themselves for a while; what is pinned in the kernel stays.
    ///
    /// # Errors
    /// When signals or the registry fail.
    pub async fn run(mut self) -> Result<(), RunError> {
        let signals = Signals::new().map_err(RunError::Signals)?;
        let certificates = self.daemon.identities.changes();
        let mut told = false;

        let wanted = self.daemon.config.load().node.host_addresses;
        self.host_addresses.follow(wanted);
        self.reconcile().await;
        // Only now do the numbers in events have names, those left from before included.
        if !self.succession.is_taking_over() {
            self.begin()?;
        }
        let (_look, asked) = HealthLook::start(self.daemon.clone(), self.health.clone());
        let mut waits = Waits {
            signals,
            certificates,
            asked,
            retry: FIRST_RETRY,
            retry_at: None,
        };
        loop {
            self.tell_readiness();
            self.take_over_when_ready()?;
            if self.is_enforced && !told && !self.succession.is_taking_over() {
                // What must start behind reeve may start. Whether all of it is served, `/readyz`
                // says: systemd would end a daemon that is not up in time.
                process::notify_ready();
                process::give_back_code();
                told = true;
            }
            match self.next_change(&mut waits).await {
                Change::Signal(Signal::Stop) => break,
                Change::Request(Request::Take {
                    process,
                    done,
                    rest,
                }) => {
                    self.hand_over(process, done, rest, &mut waits).await;
                    return Ok(());
                }
                Change::RegistryEnded => return Err(RunError::RegistryEnded),
                other => self.follow(other, &mut waits).await,
            }
        }
        self.stop(&mut waits).await;
        Ok(())
    }

    /// Waits for the next change, whoever serves: a daemon that has handed over follows all that it
    /// followed before. Dropped before its end, it has taken nothing.
    async fn next_change(&mut self, waits: &mut Waits) -> Change {
        // What another daemon is responsible for is not tried again.
        let failed = !self.succession.frozen && !self.daemon.view.load().problems.is_empty();
        if !failed {
            (waits.retry, waits.retry_at) = (FIRST_RETRY, None);
        }
        let again = *waits
            .retry_at
            .get_or_insert_with(|| Instant::now() + waits.retry);
        let looks_at = self.succession.looks_at();
        let asks_at = self.succession.asks_at;
        // What is handed over has been said already.
        let endpoints = self.endpoints.tries_at();
        let endpoints = endpoints.filter(|_| !self.succession.frozen);
        tokio::select! {
            Ok(()) = self.rosters.changed() => Change::Roster,
            changed = self.discovery.changed() => match changed {
                Ok(()) => Change::Workloads,
                Err(_) => Change::RegistryEnded,
            },
            () = self.policy_files.changed() => Change::Policies,
            () = self.doubt.is_over() => Change::Policies,
            () = self.bundle_files.changed() => Change::Bundles,
            Some(answer) = next_reload(&mut self.reloads) => Change::Reload(answer),
            Ok(()) = waits.certificates.changed() => Change::Certificates,
            () = self.host_addresses.changed() => Change::HostAddresses,
            () = self.namespaces.changed() => Change::Namespaces,
            signal = waits.signals.next() => Change::Signal(signal),
            Some(news) = self.succession.predecessors.news() => Change::Predecessor(news),
            Some(request) = self.succession.requests.recv() => Change::Request(request),
            () = at(looks_at) => Change::Unheard,
            () = at(asks_at) => Change::AskSources,
            () = at(endpoints) => Change::Endpoints,
            () = sleep(READY_LOOK), if self.succession.is_waiting() => Change::Look,
            () = sleep_until(again), if failed => Change::Retry,
            Some(answer) = waits.asked.recv() => Change::Asked(answer),
        }
    }

    /// Does what a change asks for, but for what ends the loop.
    async fn follow(&mut self, change: Change, waits: &mut Waits) {
        match change {
            Change::Roster => {
                let config = self.daemon.config.load_full();
                self.follow_roster(&config);
                // What policies say depends on whom they can select.
                let _ = self.reload_policies();
                self.reconcile().await;
            }
            Change::Workloads | Change::HostAddresses => self.reconcile().await,
            Change::Namespaces => self.mend_namespaces(false).await,
            Change::Endpoints => self.open_endpoints(),
            Change::Policies => {
                let _ = self.reload_policies();
                self.reconcile().await;
            }
            Change::Bundles => {
                // Refusals are logged and counted.
                let _ = self.reload_trust();
            }
            Change::Certificates => self.daemon.tunnels.judge_again(),
            // Certificates expire without a change: readiness is told again at each of these.
            Change::Asked(answer) => {
                self.keep_pinned();
                self.keep_house();
                self.mend_namespaces(true).await;
                // Whoever asked may have given up.
                let _ = answer.send(());
            }
            Change::Retry => {
                (waits.retry, waits.retry_at) = ((waits.retry * 2).min(LONGEST_RETRY), None);
                self.reconcile().await;
            }
            Change::Signal(Signal::Reload) => {
                self.reload_everything().await;
            }
            Change::Request(Request::Told(word)) => self.obey(word).await,
            Change::Request(Request::Passed(id, passed)) => {
                self.daemon.identities.take_passed(&id, passed);
            }
            Change::Reload(answer) => {
                let report = self.reload_everything().await;
                // Whoever asked may have given up.
                let _ = answer.send(report);
            }
            Change::Request(Request::Freeze { asker, answer }) => self.freeze(asker, answer).await,
            Change::Request(Request::Serves(cgroups)) => self.know_next(&cgroups).await,
            Change::Request(Request::Resume) => self.resume().await,
            Change::Request(Request::Heard) => self.is_heard(true),
            Change::Request(Request::Unheard) => self.is_heard(false),
            Change::Request(Request::Came(comer)) => self.welcome(comer),
            Change::Unheard => block_in_place(|| self.look_for_successor()),
            Change::AskSources => self.ask_sources(),
            Change::Predecessor(news) => {
                if self.hear_of_predecessor(news) {
                    self.reconcile().await;
                }
            }
            Change::Look
            | Change::Signal(Signal::Stop)
            | Change::Request(Request::Take { .. })
            | Change::RegistryEnded => {}
        }
    }

    /// Tries again to listen where metrics are told.
    fn open_endpoints(&mut self) {
        let daemon = self.daemon.clone();
        let missing = match block_in_place(|| self.endpoints.try_again(&daemon)) {
            Ok(()) => self.endpoints.missing(),
            Err(error) => {
                let why = reconcile::describe(&error);
                tracing::error!("{why}");
                Some(Arc::new(why))
            }
        };
        daemon.no_metrics.store(missing);
    }

    async fn stop(&mut self, waits: &mut Waits) {
        let patience = self.daemon.config.load().timeouts.drain;
        let redirect = block_in_place(|| self.leave_listeners());
        if redirect
            && let Some(stand_in) = self.stand_in.take()
            && block_in_place(service::is_restarting)
        {
            self.make_way(stand_in, waits).await;
            tracing::info!("stopped, after the service was left to the next daemon");
            return;
        }
        tracing::info!(
            patience = %humantime::format_duration(patience),
            "shutting down: connections may end by themselves; what is enforced stays so"
        );
        process::notify_stopping();
        self.stop_serving(redirect);
        let until = std::time::Instant::now() + patience;
        self.daemon.drain_until(Some(until));
        self.tell_readiness();
        self.drain(until, waits).await;
        tracing::info!("stopped");
    }

    /// Waits until connections have ended, at most `until` then, and the daemons before with theirs.
    async fn drain(&mut self, until: std::time::Instant, waits: &mut Waits) {
        let left = || until.saturating_duration_since(std::time::Instant::now());
        self.succession.predecessors.tell(within(left()));
        let daemon = self.daemon.clone();
        let mut ended = std::pin::pin!(daemon.tunnels.drain(left()));
        let mut told = std::pin::pin!(drain::tell(&daemon, |_| {
            process::notify_status(&daemon.in_a_line());
        }));
        let mut last = until + LEAVE;
        let (mut drained, mut killed) = (false, false);
        while !drained || !self.succession.predecessors.are_gone() {
            tokio::select! {
                () = &mut ended, if !drained => drained = true,
                () = &mut told => {}
                () = health::answer(&mut waits.asked) => {}
                () = at(Some(last)), if !killed => {
                    self.succession.predecessors.kill();
                    // Their ends are waited for.
                    (killed, last) = (true, last + DIE);
                }
                () = at(Some(last)), if killed => return,
                () = sleep(READY_LOOK), if drained => {}
                Some(news) = self.succession.predecessors.news() => {
                    self.hear_of_predecessor(news);
                }
                // Nothing is handed over any more.
                Some(request) = self.succession.requests.recv() => {
                    if let Request::Came(comer) = request {
                        self.welcome(comer);
                        self.succession.predecessors.tell(within(left()));
                    }
                }
                () = waits.signals.stop() => {
                    tracing::warn!("asked again: connections are ended");
                    self.succession.predecessors.tell(within(Duration::ZERO));
                    last = last.min(std::time::Instant::now() + LEAVE);
                    drained = true;
                }
            }
        }
    }

    /// Looks after what is pinned, unless that is another daemon's. What cannot be pinned keeps the
    /// daemon from being ready.
    fn keep_pinned(&self) {
        if self.succession.frozen && !self.succession.beside {
            return;
        }
        self.sweep();
        let problem = match block_in_place(|| self.daemon.datapath.keep_pinned()) {
            Ok(again) => {
                if !again.is_empty() {
                    let pins: Vec<_> = again.iter().map(|pin| pin.display().to_string()).collect();
                    tracing::warn!(
                        pins = pins.join(", "),
                        "what was pinned had been removed, replaced or unmounted, and is pinned \
                         again; what is enforced stayed so"
                    );
                }
                None
            }
            Err(error) => Some(format!(
                "what was pinned is gone, or not root's alone: it would end with this daemon: {}",
                reconcile::describe(&error)
            )),
        };
        if let Some(problem) = &problem {
            tracing::error!("{problem}");
        }
        self.daemon.not_pinned.store(problem.map(Arc::new));
    }

    fn tell_readiness(&self) {
        let now = self.daemon.readiness();
        self.readiness.send_if_modified(|before| {
            let different = *before != now;
            if different {
                match (before.is_ready(), now.is_ready()) {
                    (false, true) => tracing::info!("ready"),
                    (true, false) => {
                        tracing::warn!(missing = now.missing.join("; "), "not ready any more");
                    }
                    _ => {}
                }
                *before = now;
                if self.daemon.is_service.load(Ordering::Relaxed) {
                    process::notify_status(&self.daemon.in_a_line());
                }
            }
            different
        });
    }
}

/// The next who asks for everything to be read again.
async fn next_reload(reloads: &mut Option<Reloads>) -> Option<oneshot::Sender<ReloadReport>> {
    reloads.as_mut()?.recv().await
}

/// Takes the kernel's events for as long as the future is polled, those that are `told`: there is one
/// reader at a time.
async fn follow_events(
    mut kernel: datapath::Events,
    events: Events,
    datapath: Arc<Datapath>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    mut told: watch::Receiver<Reported>,
) {
    let mut batch = Vec::new();
    // What was lost before nobody can be told.
    let mut lost = datapath.lost_events().ok();
    loop {
        let which = match told.wait_for(|told| *told != Reported::Nothing).await {
            Ok(which) => *which,
            Err(_) => return,
        };
        let read = tokio::select! {
            read = kernel.next(&mut batch) => read,
            _ = told.changed() => continue,
        };
        if let Err(error) = read {
            tracing::error!(%error, "the kernel's events are no longer read");
            return;
        }
        let snapshot = snapshot.load();
        let refusal = |event: &&Event| event.allowed == 0 && event.kind == EventKind::Verdict as u8;
        for event in batch
            .iter()
            .filter(|event| which == Reported::All || refusal(event))
        {
            events.record(event, &snapshot);
        }
        // An event is lost only where others wait to be read, so none is lost unnoticed.
        if let Ok(now) = datapath.lost_events() {
            let more = now.saturating_sub(lost.unwrap_or(now));
            lost = Some(now);
            if more > 0 {
                events.lost(more);
            }
        }
    }
}
