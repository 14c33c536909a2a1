//! The daemon as others see it: what `reeve status`, `/readyz` and the metrics are told.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::{Instant, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{mpsc, oneshot};

use super::drain::Drain;
use crate::{
    admin::{self, Answer, ReloadReport, Responder, Status, WorkloadState, WorkloadStatus},
    answers,
    config::{Config, RestartNeeded},
    datapath::Datapath,
    handover::Draining,
    identity::{Federation, IdentityStore},
    policy::Snapshot,
    telemetry::{Metrics, Observation, ObserveRequest, Observers, Readiness, Readings},
    tunnel::Tunnels,
    workload::{Discovery, Remark, Remarks, RunningWorkload},
};

/// `reeve reload` at the same time; more wait.
const RELOADS_QUEUED: usize = 1;

/// Those who ask for everything to be read again.
pub(super) type Reloads = mpsc::Receiver<oneshot::Sender<ReloadReport>>;

/// The parts that are told, and the newest view of what control did with them.
#[derive(Debug)]
pub struct Daemon {
    /// The configuration in force.
    pub(super) config: ArcSwap<Config>,
    pub(super) datapath: Arc<Datapath>,
    pub(super) identities: Arc<IdentityStore>,
    pub(super) federation: Federation,
    pub(super) tunnels: Tunnels,
    pub(super) metrics: Metrics,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) observers: Observers,
    remarks: Remarks,
    ask_for_reload: mpsc::Sender<oneshot::Sender<ReloadReport>>,
    /// For control to take.
    reloads: Mutex<Option<Reloads>>,
    pub(super) view: ArcSwap<View>,
    /// Why what is enforced would not outlive the daemon.
    pub(super) not_pinned: ArcSwapOption<String>,
    /// Why the metrics endpoint does not answer.
    pub(super) no_metrics: ArcSwapOption<String>,
    /// Settings of the file that this daemon was not started with.
    pub(super) restart_needed: ArcSwap<RestartNeeded>,
    /// Another daemon takes over, and writes the kernel's maps.
    pub(super) kernel_is_anothers: AtomicBool,
    /// This daemon is the one that the service manager hears.
    pub(super) is_service: AtomicBool,
    /// Daemons before that still drain, the last one first.
    pub(super) predecessors: ArcSwap<Vec<Draining>>,
    started: Instant,
    /// The same by the wall clock, in seconds since 1970.
    pub(super) started_at: u64,
}

/// What control last brought about.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) discovery: Arc<Discovery>,
    /// Cookies of the namespaces in which listeners stand.
    pub(super) listening: HashSet<u64>,
    /// What could not be done, one sentence each.
    pub(super) problems: Vec<String>,
    pub(super) policies: admin::PolicyStatus,
    /// The newest policies have no room in the kernel's maps; how many workloads and directions are
    /// refused everything for it.
    pub(super) no_room: Option<usize>,
    /// Connections end by themselves.
    pub(super) draining: Option<Drain>,
}

// === impl Daemon ===

impl Daemon {
    /// Puts the parts together; nothing has been brought about yet.
    #[must_use]
    #[expect(
        clippy::too_many_arguments,
        reason = "each of them is a part, used once"
    )]
    pub fn new(
        config: Arc<Config>,
        datapath: Arc<Datapath>,
        identities: Arc<IdentityStore>,
        federation: Federation,
        tunnels: Tunnels,
        metrics: Metrics,
        snapshot: Arc<ArcSwap<Snapshot>>,
        observers: Observers,
        remarks: Remarks,
    ) -> Self {
        let (ask_for_reload, reloads) = mpsc::channel(RELOADS_QUEUED);
        let starting = View {
            problems: Readiness::starting().missing,
            ..View::default()
        };
        Self {
            config: ArcSwap::new(config),
            datapath,
            identities,
            federation,
            tunnels,
            metrics,
            snapshot,
            observers,
            remarks,
            ask_for_reload,
            reloads: Mutex::new(Some(reloads)),
            view: ArcSwap::from_pointee(starting),
            not_pinned: ArcSwapOption::empty(),
            no_metrics: ArcSwapOption::empty(),
            restart_needed: ArcSwap::default(),
            kernel_is_anothers: AtomicBool::new(false),
            is_service: AtomicBool::new(true),
            predecessors: ArcSwap::default(),
            started: Instant::now(),
            started_at: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        }
    }

    /// What is missing now.
    pub(super) fn readiness(&self) -> Readiness {
        let view = self.view.load();
        let mut missing = view.problems.clone();
        missing.extend(self.not_pinned.load().as_deref().cloned());
        missing.extend(self.no_metrics.load().as_deref().cloned());
        if view.draining.is_some() {
            missing.push("the daemon is shutting down".to_owned());
        }
        for running in &view.discovery.workloads {
            let name = &running.workload.name;
            if running.netns.is_some() && !view.is_listening(running) {
                missing.push(format!(
                    "workload {name}: no listener stands in its network namespace"
                ));
            }
            if running.netns.is_some() && !self.has_certificate(running) {
                missing.push(format!(
                    "workload {name}: no valid certificate for {}; `reeve status` says why",
                    running.workload.attributes.spiffe_id
                ));
            }
        }
        Readiness { missing }
    }

    /// What the metrics read at each scrape.
    #[must_use]
    pub fn readings(&self) -> Readings {
        let view = self.view.load();
        let counters = self.datapath.counters().inspect_err(|error| {
            tracing::warn!(%error, "the kernel's counters are missing from the metrics");
        });
        let mut workloads: BTreeMap<&'static str, u64> =
            BTreeMap::from([("running", 0), ("empty", 0), ("absent", 0)]);
        for running in &view.discovery.workloads {
            *workloads.entry(state(running).as_str()).or_default() += 1;
        }
        let mut remarks: BTreeMap<&'static str, u64> =
            Remark::NAMES.iter().map(|name| (*name, 0)).collect();
        for remark in self.remarks.load().values().flatten() {
            *remarks.entry(remark.name()).or_default() += 1;
        }
        Readings {
            remarks,
            counters: counters.ok(),
            maps: self.datapath.map_usage(),
            namespace_source: Some(self.datapath.packet_namespaces().name()),
            identities: self.identities.status(),
            bundles: self.identities.bundles(),
            reloads: self.identities.reload_counts(),
            bundle_endpoints: self.federation.status(),
            workloads,
            policies_without_room: view.no_room.is_some(),
            closed: (self.datapath.closed().len() + view.no_room.unwrap_or_default()) as u64,
            ready: self.readiness().is_ready(),
            draining: self.draining().is_some(),
            predecessors: self.predecessors.load_full(),
        }
    }

    /// The answer to `reeve status`.
    pub async fn status(&self) -> Status {
        let config = self.config.load_full();
        let view = self.view.load_full();
        let readiness = self.readiness();
        let workloads = view.discovery.workloads.iter();
        let counters = self.datapath.counters();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.node.name.clone(),
            trust_domain: config.trust_domain.to_string(),
            process: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: readiness.is_ready(),
            not_ready: readiness.missing,
            draining: self.draining().and_then(|draining| draining.left),
            predecessors: Vec::clone(&self.predecessors.load()),
            restart_needed: {
                let needed = self.restart_needed.load();
                needed.left.iter().map(|name| (*name).to_owned()).collect()
            },
            settings: config.fingerprints(),
            generation: self.datapath.generation(),
            workloads: workloads
                .map(|running| self.workload(&view, running))
                .collect(),
            certificates: self.certificates(),
            bundles: self.bundles(),
            bundle_endpoints: self.bundle_endpoints(),
            tunnels: self.tunnels_status().await,
            policies: view.policies.clone(),
            maps: self
                .datapath
                .map_usage()
                .into_iter()
                .map(Into::into)
                .collect(),
            lost_events: counters.map_or(0, |counters| counters.lost_events()),
        }
    }

    /// Those who ask for everything to be read again: taken once.
    pub(super) fn reloads(&self) -> Option<Reloads> {
        let mut reloads = self.reloads.lock().unwrap_or_else(PoisonError::into_inner);
        reloads.take()
    }

    /// Has control read everything again.
    async fn reload(&self) -> Answer {
        let (answer, report) = oneshot::channel();
        // Either fails only when the daemon is ending.
        if self.ask_for_reload.send(answer).await.is_ok()
            && let Ok(report) = report.await
        {
            return Answer::Reloaded(report);
        }
        Answer::Error("it is shutting down".to_owned())
    }

    fn workload(&self, view: &View, running: &RunningWorkload) -> WorkloadStatus {
        let mut cgroups: Vec<u64> = running.cgroups.iter().map(|(id, _)| *id).collect();
        cgroups.dedup();
        WorkloadStatus {
            name: running.workload.name.clone(),
            id: running.workload.id,
            spiffe_id: running.workload.attributes.spiffe_id.to_string(),
            selector: running.workload.selector.clone(),
            state: state(running),
            cgroups,
            netns: running.netns.as_ref().map(|netns| netns.inode),
            owns_netns: running.owns_netns,
            addresses: running.addresses.clone(),
            listening: view.is_listening(running),
            remarks: self
                .remarks
                .load()
                .get(&running.workload.name)
                .map(|remarks| remarks.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            certificate: self.has_certificate(running),
        }
    }

    fn certificates(&self) -> Vec<admin::CertificateStatus> {
        let identities = self.identities.status().into_iter();
        let entry = |identity: crate::identity::IdentityStatus| {
            let certificate = identity.certificate;
            admin::CertificateStatus {
                spiffe_id: identity.spiffe_id.to_string(),
                source: identity.source,
                serial: certificate.as_ref().map(|found| found.serial.clone()),
                issuer: certificate.as_ref().map(|found| found.issuer.clone()),
                generation: certificate.as_ref().map(|found| found.generation),
                not_before: certificate.as_ref().map(|found| rfc3339(found.not_before)),
                not_after: certificate.as_ref().map(|found| rfc3339(found.not_after)),
                seconds_left: certificate.as_ref().and_then(|found| {
                    let left = found.not_after.duration_since(SystemTime::now());
                    left.ok().map(|left| left.as_secs())
                }),
                signer_not_after: certificate
                    .as_ref()
                    .map(|found| rfc3339(found.signer.not_after)),
                next_attempt: identity.next_attempt.map(rfc3339),
                last_attempt: identity.last_attempt.map(rfc3339),
                last_success: identity.last_success.map(rfc3339),
                last_result: identity
                    .last_result
                    .map(|result| result.as_str().to_owned()),
                remarks: identity
                    .remarks
                    .iter()
                    .map(|remark| remark.as_str().to_owned())
                    .collect(),
                last_error: identity.last_error.map(|error| error.to_string()),
                refused_bundles: identity
                    .refused_bundles
                    .into_iter()
                    .map(|refused| admin::RefusedBundle {
                        trust_domain: refused.trust_domain,
                        reason: refused.reason,
                    })
                    .collect(),
            }
        };
        identities.map(entry).collect()
    }

    fn bundles(&self) -> Vec<admin::BundleStatus> {
        let bundles = self.identities.bundles().into_iter();
        let entry = |bundle: crate::identity::BundleStatus| admin::BundleStatus {
            trust_domain: bundle.trust_domain.to_string(),
            certificates: bundle.certificates,
            earliest_not_after: bundle.earliest_not_after.map(rfc3339),
            revocation_checked: bundle.revocation_checked,
            next_update: bundle.next_update.map(rfc3339),
        };
        bundles.map(entry).collect()
    }

    fn bundle_endpoints(&self) -> Vec<admin::BundleEndpointStatus> {
        let endpoints = self.federation.status().into_iter();
        let entry = |endpoint: crate::identity::EndpointStatus| admin::BundleEndpointStatus {
            trust_domain: endpoint.trust_domain.to_string(),
            url: endpoint.url,
            profile: endpoint.profile.to_owned(),
            origin: endpoint.origin.map(|origin| origin.as_str().to_owned()),
            sequence: endpoint.sequence,
            next_attempt: endpoint.next_attempt.map(rfc3339),
            last_attempt: endpoint.last_attempt.map(rfc3339),
            last_success: endpoint.last_success.map(rfc3339),
            last_result: endpoint.last_result.map(|it| it.as_str().to_owned()),
            reason: endpoint
                .last_error
                .as_ref()
                .map(|it| it.as_str().to_owned()),
            last_error: endpoint.last_error.map(|error| error.to_string()),
        };
        endpoints.map(entry).collect()
    }

    async fn tunnels_status(&self) -> admin::TunnelsStatus {
        let status = self.tunnels.status().await;
        let entry = |tunnel: crate::tunnel::TunnelStatus| admin::TunnelStatus {
            role: tunnel.role.to_owned(),
            local: tunnel.local.to_string(),
            peer: tunnel.peer.to_string(),
            address: tunnel.address.to_string(),
            streams: tunnel.streams,
            age_seconds: tunnel.age.as_secs(),
            proof: if tunnel.provable { "bound" } else { "none" }.to_owned(),
            proofs: tunnel.proofs,
            proven_seconds: tunnel.proven.as_secs(),
            proofs_failed: tunnel.proofs_failed,
            proof_error: tunnel.proof_error,
            silent: tunnel.silent,
            retired: tunnel.retired,
        };
        admin::TunnelsStatus {
            connections: status.connections,
            open: status.tunnels_open,
            tunnels: status.tunnels.into_iter().map(entry).collect(),
        }
    }

    fn has_certificate(&self, running: &RunningWorkload) -> bool {
        let id = &running.workload.attributes.spiffe_id;
        self.identities.current(id).is_some()
    }
}

impl Responder for Daemon {
    async fn respond(&self, command: admin::Command) -> Answer {
        match command {
            admin::Command::Status => Answer::Status(Box::new(self.status().await)),
            admin::Command::Policies => Answer::Policies(answers::list(&self.snapshot.load())),
            admin::Command::Explain(enquiry) => match self.explain(&enquiry).await {
                Ok(explanation) => Answer::Explanation(Box::new(explanation)),
                Err(error) => Answer::Error(error),
            },
            admin::Command::Reload => self.reload().await,
            admin::Command::Observe(_) => {
                Answer::Error("this is answered by `observe`, event by event".to_owned())
            }
        }
    }

    fn observe(&self, request: ObserveRequest) -> Result<Observation, String> {
        self.observers.observe(request)
    }
}

// === impl View ===

impl View {
    fn is_listening(&self, running: &RunningWorkload) -> bool {
        let netns = running.netns.as_ref();
        netns.is_some_and(|netns| self.listening.contains(&netns.cookie))
    }
}

fn state(running: &RunningWorkload) -> WorkloadState {
    if running.cgroups.is_empty() {
        WorkloadState::Absent
    } else if running.netns.is_none() {
        WorkloadState::Empty
    } else {
        WorkloadState::Running
    }
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
