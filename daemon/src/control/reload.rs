//! Reading configuration and policies again: all of it, or nothing.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use ipnet::IpNet;
use tokio::{
    task::block_in_place,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Control, RunError, certificates,
    ids::{give_ids, ids_of_others},
    own_cgroup::settle_in,
    process,
    reconcile::describe,
};
use crate::{
    admin::{PolicyStatus, ReloadPart, ReloadReport},
    config::{Config, ConfigErrors},
    handover::Word,
    policy::{Known, PolicySet, PolicySources},
    watch::Look,
    workload::{Declaration, Reserved, Roster},
};

/// How long the sources of certificates may take to answer when everything is read again: whoever
/// asked waits.
const SOURCES_PATIENCE: Duration = Duration::from_secs(5);

/// How long a file of policies that holds nothing any more is taken to be under way: whoever
/// writes files in place empties them first.
const EMPTY_PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at it, where somebody waits for an answer.
const EMPTY_LOOK: Duration = Duration::from_millis(100);

/// Since when policies are not taken because the file of some of them is empty.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    since: Option<Instant>,
}

/// The files that a configuration names, as they were before they were read.
#[derive(Debug)]
pub struct Looks {
    /// Of policies.
    pub(super) policies: Look,
    /// Trust bundles and revocation lists.
    pub(super) bundles: Look,
}

/// Whom the registry shall look for.
#[must_use]
pub fn declaration(config: &Config, roster: &Roster) -> Declaration {
    Declaration {
        workloads: roster.workloads.clone(),
        enforced_parents: config.enforced_parents.clone(),
        reserved: Arc::new(reserved(config, roster)),
    }
}

/// The node's addresses, and those of peers. A network of a peer's is around others, and no claim to
/// each of its addresses.
fn reserved(config: &Config, roster: &Roster) -> Reserved {
    let nodes = config.node.addresses.iter();
    let nodes = nodes.map(|ip| (ip.to_canonical(), "the node".to_owned()));
    let peers = roster.peers.iter().flat_map(|peer| {
        let single = |net: &&IpNet| net.prefix_len() == net.max_prefix_len();
        let addresses = peer.addresses.iter().filter(single);
        addresses.map(|net| (net.addr().to_canonical(), format!("the peer {}", peer.name)))
    });
    Reserved {
        addresses: peers.chain(nodes).collect(),
    }
}

/// Reads the policies that the configuration names, about those on the roster.
///
/// # Errors
/// Every mistake in any of them.
pub fn policies(config: &Config, roster: &Roster) -> Result<PolicySet, ConfigErrors> {
    let policies = PolicySet::load(&config.policies, &Known::from(roster))?;
    for warning in policies.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(policies)
}

pub(super) fn policy_status(config: &Config, policies: &PolicySet) -> PolicyStatus {
    let sources = config.policies.folder.iter().chain(&config.policies.files);
    PolicyStatus {
        sources: sources.map(|path| path.display().to_string()).collect(),
        policies: policies.len(),
        refused: None,
    }
}

// === impl Looks ===

impl Looks {
    /// Before anything else than the configuration is read.
    #[must_use]
    pub fn at(config: &Config) -> Self {
        let PolicySources { folder, files } = &config.policies;
        let folder = folder.clone().into_iter().collect();
        Self {
            policies: Look::at(folder, files.clone()),
            bundles: Look::at(Vec::new(), certificates::trust_files(config)),
        }
    }
}

// === impl Control ===

impl Control {
    /// Reads everything again that is read from files or asked of others. What is refused leaves
    /// what was there before in force, and does not keep the rest from being read.
    pub(super) async fn reload_everything(&mut self) -> ReloadReport {
        let is_service = self.daemon.is_service.load(Ordering::Relaxed);
        if is_service {
            process::notify_reloading();
        }
        let mut report = ReloadReport::default();
        let file = self.daemon.config.load().file.clone();
        let config = self.reload_config(&file).await;
        report.push("configuration and policies", config);
        let trust = self.reload_trust();
        report.push("trust bundles and revocation lists", trust);
        self.reconcile().await;
        report.parts.extend(self.refresh_bundles().await);
        let refused = self.daemon.identities.reload(SOURCES_PATIENCE).await;
        let identities = self.daemon.identities.status().len();
        report.parts.push(ReloadPart {
            what: "certificates".to_owned(),
            detail: format!(
                "{} of {identities}",
                identities.saturating_sub(refused.len())
            ),
            refused: refused
                .into_iter()
                .map(|(id, why)| format!("{id}: {why}"))
                .collect(),
        });
        if is_service {
            process::notify_ready();
        }
        report
    }

    /// Asks the bundle endpoints now; nothing where there is none.
    async fn refresh_bundles(&self) -> Option<ReloadPart> {
        let federation = &self.daemon.federation;
        let all = federation.status().len();
        if all == 0 {
            return None;
        }
        let refused = federation.refresh(SOURCES_PATIENCE).await;
        Some(ReloadPart {
            what: "bundle endpoints".to_owned(),
            detail: format!("{} of {all}", all.saturating_sub(refused.len())),
            refused: refused
                .into_iter()
                .map(|(domain, why)| format!("{domain}: {why}"))
                .collect(),
        })
    }

    /// Reads the policies again. Mistakes leave the old ones in force.
    pub(super) fn reload_policies(&mut self) -> Result<String, Vec<String>> {
        let config = self.daemon.config.load_full();
        let roster = self.rosters.borrow().clone();
        match block_in_place(|| policies(&config, &roster)) {
            // Looked at again when the time is over, or the file has changed.
            Ok(policies) if self.doubt.is_about(&policies, &self.policies) => {
                Ok(self.numbers(&config))
            }
            Ok(policies) => {
                self.take_policies(&config, policies);
                Ok(self.numbers(&config))
            }
            Err(mistakes) => {
                self.doubt.since = None;
                Err(self.refuse("policy", &mistakes))
            }
        }
    }

    /// Reads the configuration and the policies again. Mistakes in any leave all as it was.
    pub(super) async fn reload_config(&mut self, file: &Path) -> Result<String, Vec<String>> {
        if self.succession.frozen && !self.succession.has_handed_over {
            // Whoever is new needs an id, and these are the other daemon's to give.
            self.daemon.metrics.reload("config", false);
            let why = "another daemon is about to take over: reload again when it has";
            tracing::error!("the configuration is not read again: {why}");
            return Err(vec![why.to_owned()]);
        }
        let before = self.daemon.config.load_full();
        let read = || {
            let config = Config::load(file)?;
            let looks = Looks::at(&config);
            let policies = policies(&config, &config.roster())?;
            Ok::<_, ConfigErrors>((config, looks, policies))
        };
        let mut both = block_in_place(read);
        while let Ok((_, _, policies)) = &both
            && self.doubt.is_about(policies, &self.policies)
        {
            sleep(EMPTY_LOOK).await;
            both = block_in_place(read);
        }
        self.doubt.since = None;
        match both {
            Ok((new, looks, policies)) => self.take_config(&before, new, looks, policies),
            Err(mistakes) => Err(self.refuse("config", &mistakes)),
        }
    }

    /// Reads the configured trust bundles and revocation lists again.
    pub(super) fn reload_trust(&mut self) -> Result<String, Vec<String>> {
        let config = self.daemon.config.load_full();
        let read = block_in_place(|| {
            let trust = certificates::trust(&config)?;
            certificates::follow(&self.daemon.federation, &config)?;
            Ok::<_, certificates::CertificatesError>(trust)
        });
        match read {
            Ok((bundles, lists)) => {
                let number: usize = lists.values().map(Vec::len).sum();
                let numbers = format!("{} bundles, {number} lists", bundles.len());
                self.daemon.identities.configure_trust(&bundles, lists);
                self.daemon.metrics.reload("trust_bundle", true);
                tracing::info!(
                    bundles = bundles.len(),
                    revocation_lists = number,
                    "trust bundles and revocation lists were read again"
                );
                Ok(numbers)
            }
            Err(error) => {
                self.daemon.metrics.reload("trust_bundle", false);
                let error = describe(&error);
                tracing::error!(
                    "trust bundles and revocation lists were refused, the ones before stay in \
                     force: {error}"
                );
                Err(vec![error])
            }
        }
    }

    fn take_config(
        &mut self,
        before: &Arc<Config>,
        new: Config,
        looks: Looks,
        policies: PolicySet,
    ) -> Result<String, Vec<String>> {
        let (config, needed) = before.reloaded(new);
        if let Some(why) = needed.refusal() {
            self.daemon.metrics.reload("config", false);
            tracing::error!("the new configuration was refused: {why}");
            return Err(vec![why]);
        }
        if !needed.left.is_empty() {
            tracing::warn!(
                settings = needed.left.join(", "),
                "these settings have changed and need a restart; the old ones stay in force"
            );
        }
        let numbered = block_in_place(|| {
            if self.succession.has_handed_over && self.succession.beside {
                // Cgroups are the other daemon's to make.
                let config = give_ids(config, &self.daemon.datapath)?;
                return Ok((self.own_cgroups.clone(), config));
            }
            if self.succession.has_handed_over {
                // Cgroups and ids are the other daemon's to make and to give.
                let config = ids_of_others(config, &self.daemon.datapath)?;
                return Ok((self.own_cgroups.clone(), config));
            }
            let own = settle_in(&self.cgroups, &config)?;
            // Last, since whoever is not declared any more loses its id.
            let config = give_ids(config, &self.daemon.datapath)?;
            Ok::<_, RunError>((own, config))
        });
        let config = match numbered {
            Ok((own, config)) => {
                self.own_cgroups = own;
                Arc::new(config)
            }
            Err(error) => {
                self.daemon.metrics.reload("config", false);
                let error = describe(&error);
                tracing::error!(
                    "the new configuration was refused, the one before stays in force: {error}"
                );
                return Err(vec![error]);
            }
        };
        self.host_addresses.follow(config.node.host_addresses);
        self.declared.replace(&config);
        self.follow_roster(&config);
        self.policy_files = looks.policies.watch();
        self.bundle_files = looks.bundles.watch();
        self.daemon.config.store(config.clone());
        self.daemon.metrics.reload("config", true);
        tracing::info!(
            workloads = config.workloads.len(),
            peers = config.peers.len(),
            "the configuration was read again"
        );
        self.take_policies(&config, policies);
        self.succession.predecessors.tell_of(&self.own_cgroups);
        self.succession.predecessors.tell(Word::Reload);
        let mut numbers = self.numbers(&config);
        if !needed.left.is_empty() {
            numbers.push_str("; a restart is needed for ");
            numbers.push_str(&needed.left.join(", "));
        }
        self.daemon.restart_needed.store(Arc::new(needed));
        Ok(numbers)
    }

    /// Looks for the workloads of the newest roster from now on.
    pub(super) fn follow_roster(&mut self, config: &Config) {
        let roster = self.rosters.borrow_and_update().clone();
        block_in_place(|| self.registry.declare(declaration(config, &roster)));
    }

    fn numbers(&self, config: &Config) -> String {
        format!(
            "{} workloads, {} peers, {} policies",
            config.workloads.len(),
            config.peers.len(),
            self.policies.len()
        )
    }

    fn take_policies(&mut self, config: &Config, policies: PolicySet) {
        self.policy_status = policy_status(config, &policies);
        self.policies = Arc::new(policies);
        self.daemon.metrics.reload("policy", true);
        tracing::info!(
            policies = self.policies.len(),
            rules = self.policies.rules(),
            "policies in force"
        );
    }

    fn refuse(&mut self, what: &'static str, mistakes: &ConfigErrors) -> Vec<String> {
        self.daemon.metrics.reload(what, false);
        for mistake in mistakes.iter() {
            tracing::error!("{mistake}");
        }
        tracing::error!(
            what,
            mistakes = mistakes.len(),
            "what was read was refused, what was before stays in force"
        );
        self.policy_status.refused = Some(mistakes.to_string());
        mistakes.iter().map(ToString::to_string).collect()
    }
}

// === impl Doubt ===

impl Doubt {
    /// Whether new policies are not to be taken yet: some of those before would go because their
    /// file is empty, and the time to write it is not over.
    fn is_about(&mut self, new: &PolicySet, before: &PolicySet) -> bool {
        let emptied: Vec<&Path> = new.emptied(before).collect();
        if emptied.is_empty() {
            self.since = None;
            return false;
        }
        let Some(since) = self.since else {
            self.since = Some(Instant::now());
            tracing::warn!(
                files = ?emptied,
                patience = %humantime::format_duration(EMPTY_PATIENCE),
                "a file of policies holds nothing any more; what it held stays in force for a \
                 moment, since it may be being written"
            );
            return true;
        };
        if since.elapsed() < EMPTY_PATIENCE {
            return true;
        }
        tracing::warn!(files = ?emptied, "still nothing: the policies that were there are gone");
        self.since = None;
        false
    }

    /// Ready when the time to write a file is over; never without doubt.
    pub(super) async fn is_over(&self) {
        match self.since {
            Some(since) => sleep_until(since + EMPTY_PATIENCE).await,
            None => std::future::pending().await,
        }
    }
}
