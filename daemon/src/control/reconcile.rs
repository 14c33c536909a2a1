//! One step: from what is declared and what runs to what is enforced.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use reeve_common::{NAMESPACE_WITHOUT_V4, NAMESPACE_WITHOUT_V6};
use tokio::{sync::Notify, task::block_in_place};

use super::{
    Control, certificates,
    daemon::View,
    desired::{kernel_state, running_namespaces},
};
use crate::{
    config::Config,
    datapath::{Datapath, Families, KernelState, NamespaceWatch, Order, netns::Netns},
    policy::{Inputs, PolicySet, Snapshot},
    telemetry::direction_name,
    workload::{Discovery, Roster},
};

/// Policies, and what they are compiled to.
pub type Compiled<'a> = (&'a PolicySet, &'a Snapshot);

/// What the kernel enforces on its way from the old policies to the new ones, which come last. Both
/// are compiled for the same workloads and peers.
///
/// The maps change entry by entry, and the kernel asks two of them: with one step for all, a
/// connection could be judged by half of either. In each of these steps only one of the things
/// changes that a verdict is made of: whom the rules tell apart, then what holds for everybody, and
/// at last again whom they tell apart. Where both tell apart the same, nothing comes between: then
/// verdicts are all that changes.
#[must_use]
pub fn steps(old: Compiled<'_>, new: Compiled<'_>) -> Vec<(PolicySet, Order)> {
    if old.1.kernel_tables().tells_apart_as(new.1.kernel_tables()) {
        return Vec::new();
    }
    vec![
        (PolicySet::between(old.0, new.0), Order::Grows),
        (PolicySet::between(new.0, old.0), Order::Shrinks),
    ]
}

/// What was brought into force last: compiled once, for the kernel, the tunnels and all who ask.
#[derive(Debug)]
pub(super) struct Enforced {
    /// The newest that were asked for.
    wanted: Arc<PolicySet>,
    /// The newest that were taken whole.
    taken: Arc<PolicySet>,
    /// What is in force: these, unless those that are wanted have no room.
    policies: Arc<PolicySet>,
    around: Around,
    snapshot: Arc<Snapshot>,
    /// Why others are in force than are wanted.
    refused: Option<NoRoom>,
}

/// Policies that the kernel's maps have no room for.
#[derive(Clone, Debug)]
struct NoRoom {
    /// What is said of it.
    why: String,
    /// Workloads and directions that are refused everything, since the old policies allow more.
    closed: usize,
}

/// What policies are compiled for.
#[derive(Clone, Debug)]
struct Around {
    discovery: Arc<Discovery>,
    config: Arc<Config>,
    roster: Arc<Roster>,
    /// Of the host, where they are the node's.
    host_addresses: Arc<[IpAddr]>,
}

/// What was done to a namespace, by its cookie.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    known: BTreeMap<u64, Known>,
    /// Something has changed in one of them.
    word: Arc<Notify>,
}

#[derive(Debug)]
struct Known {
    inode: u64,
    /// Tells of changes, from before it was prepared.
    watch: Option<NamespaceWatch>,
    /// Families in which a route leads out.
    families: Families,
    /// Replies of local applications are routed back to the daemon.
    prepared: bool,
    /// Arriving connections are judged before a listener is looked up.
    attached: bool,
}

impl Control {
    /// Brings kernel and tunnels to what is declared and what runs now. What cannot be done is
    /// left for the next call, logged, and keeps the daemon from being ready.
    ///
    /// The kernel comes first: from then on it refuses what the new snapshot does not allow. The
    /// tunnels get the snapshot even where the kernel did not take all of it, since a connection
    /// needs both: an allowance that only one of them has is none.
    pub(super) async fn reconcile(&mut self) {
        let discovery = self.discovery.borrow_and_update().clone();
        let config = self.daemon.config.load_full();
        let roster = self.rosters.borrow().clone();
        let mut problems = discovery.problems.clone();

        let around = Around {
            discovery: discovery.clone(),
            config: config.clone(),
            roster,
            host_addresses: self.host_addresses.current(),
        };
        // Until this is over, or while another daemon writes, nobody knows what the kernel holds.
        let old = self.enforced.take();
        let wanted = self.policies.clone();
        let settled = old.as_ref().filter(|old| old.is(&wanted, &around));
        let snapshot = match settled {
            Some(old) => old.snapshot.clone(),
            None => Arc::new(around.compile(&wanted)),
        };
        let settled = settled.map(|old| (old.policies.clone(), old.refused.clone()));
        let namespaces = running_namespaces(&discovery);
        if self.succession.frozen {
            if self.succession.beside {
                // Both judge, so that what is allowed now is to be allowed by both.
                let listening = self.daemon.view.load().listening.clone();
                let order = Order::Replaces;
                problems.clear();
                self.apply(&discovery, &listening, &snapshot, order, &mut problems);
                for problem in &problems {
                    tracing::error!("{problem}");
                }
            }
            // The rest is another daemon's; what this one carries is judged all the same.
            self.snapshot.store(snapshot);
            self.daemon.tunnels.judge_again();
            self.daemon.tunnels.leave_all_but(&namespaces);
            return;
        }
        let datapath = self.daemon.datapath.clone();
        let ready = self
            .namespaces
            .prepare(&datapath, &discovery, &namespaces, &mut problems)
            .await;

        let before = self.daemon.view.load_full();
        let mut listening = before.listening.clone();
        listening.retain(|cookie| ready.iter().any(|netns| netns.cookie == *cookie));
        let (policies, snapshot, refused) = match (settled, &old) {
            (Some((policies, refused)), _) => (policies, snapshot, refused),
            (None, Some(old)) => {
                let state = |snapshot: &Snapshot| self.state(&discovery, &listening, snapshot);
                admit(&datapath, old, &around, (&wanted, snapshot), state)
            }
            // After a start: what has no room is refused.
            (None, None) => (wanted.clone(), snapshot, None),
        };
        problems.extend(refused.as_ref().map(|refused| refused.why.clone()));
        let taken = match (&refused, &old) {
            (Some(_), Some(old)) => old.taken.clone(),
            _ => wanted.clone(),
        };
        let old = old.filter(|old| old.policies != policies);
        let order = match &old {
            Some(_) => Order::Shrinks,
            // After a start, or where others run or are peers.
            None => Order::Replaces,
        };
        if let Some(old) = old {
            let mut former = old.snapshot;
            if !old.around.is(&around) {
                former = Arc::new(around.compile(&old.policies));
                let order = Order::Replaces;
                self.apply(&discovery, &listening, &former, order, &mut problems);
            }
            for (between, order) in steps((&old.policies, &former), (&policies, &snapshot)) {
                let step = around.compile(&between);
                self.apply(&discovery, &listening, &step, order, &mut problems);
            }
        }
        let state = self.apply(&discovery, &listening, &snapshot, order, &mut problems);
        let mut policy_status = self.policy_status.clone();
        if let Some(refused) = &refused {
            policy_status.policies = taken.len();
            policy_status.refused = Some(refused.why.clone());
        }
        let no_room = refused.as_ref().map(|refused| refused.closed);
        self.enforced = Some(Enforced {
            wanted,
            taken,
            policies,
            around,
            snapshot: snapshot.clone(),
            refused,
        });

        self.snapshot.store(snapshot.clone());
        self.daemon.tunnels.judge_again();
        // Whoever is no longer declared has left connections behind, maybe where nobody else is.
        let mut judged = namespaces.clone();
        judged.extend(
            running_namespaces(&before.discovery)
                .into_iter()
                .filter(|old| namespaces.iter().all(|new| new.cookie != old.cookie)),
        );
        self.revoke(&snapshot, &judged, &state);
        let holders = certificates::holders(&config, &self.cgroups, &discovery);
        self.daemon.identities.holders().replace(holders);
        let identities = discovery.workloads.iter().map(|running| {
            let source = config.certificates.source_of(&running.workload);
            let id = running.workload.attributes.spiffe_id.clone();
            (id, source.to_owned())
        });
        let identities = identities.collect();
        self.daemon.identities.ensure(&identities);

        let new = ready
            .iter()
            .filter(|netns| !listening.contains(&netns.cookie));
        self.clear_ports(new, &state);
        let flagged = listening;
        self.daemon.tunnels.leave_all_but(&namespaces);
        let results = block_in_place(|| self.daemon.tunnels.serve(&ready));
        let mut listening = HashSet::new();
        for (cookie, result) in results {
            match result {
                Ok(()) => {
                    listening.insert(cookie);
                }
                Err(error) => problems.push(describe(&error)),
            }
        }
        if listening != flagged {
            let order = Order::Shrinks;
            self.apply(&discovery, &listening, &snapshot, order, &mut problems);
        }
        self.namespaces.forget(&datapath, &namespaces);

        for problem in problems
            .iter()
            .filter(|problem| !before.problems.contains(problem))
        {
            tracing::error!("{problem}");
        }
        self.daemon.view.store(Arc::new(View {
            discovery,
            listening,
            problems,
            policies: policy_status,
            no_room,
            draining: before.draining,
        }));
    }

    /// Puts back what others have changed in the workloads' namespaces: in those of which there is word,
    /// and the settings in all where `settings` says so, of which there is none. What cannot be put back
    /// keeps the daemon from being ready.
    pub(super) async fn mend_namespaces(&mut self, settings: bool) {
        if self.succession.frozen {
            return;
        }
        let view = self.daemon.view.load_full();
        let datapath = self.daemon.datapath.clone();
        let mut different = false;
        for netns in running_namespaces(&view.discovery) {
            different |= self.namespaces.mend(&datapath, &netns, settings).await;
        }
        if different {
            self.reconcile().await;
        }
    }

    /// Tells the kernel that nobody listens any more: what needs a tunnel is refused at once. Where
    /// `redirect` is set, connections go on to the listeners, which the next daemon gets.
    pub(super) fn stop_serving(&mut self, redirect: bool) {
        let view = self.daemon.view.load_full();
        let snapshot = self.snapshot.load_full();
        let mut problems = Vec::new();
        if !redirect {
            let nowhere = HashSet::new();
            let order = Order::Shrinks;
            self.apply(&view.discovery, &nowhere, &snapshot, order, &mut problems);
        }
        for problem in &problems {
            tracing::error!("{problem}");
        }
    }

    fn apply(
        &mut self,
        discovery: &Discovery,
        listening: &HashSet<u64>,
        snapshot: &Snapshot,
        order: Order,
        problems: &mut Vec<String>,
    ) -> KernelState {
        let state = self.state(discovery, listening, snapshot);
        match block_in_place(|| self.daemon.datapath.apply_in(&state, order)) {
            Ok(()) => self.is_enforced = true,
            Err(error) => {
                problems.push(describe(&error));
                problems.extend(self.closed(snapshot));
            }
        }
        state
    }

    /// What the kernel is to hold.
    fn state(
        &self,
        discovery: &Discovery,
        listening: &HashSet<u64>,
        snapshot: &Snapshot,
    ) -> KernelState {
        let tables = snapshot.kernel_tables().clone();
        let mut own = self.own_cgroups.clone();
        own.extend(&self.succession.old_cgroups);
        own.extend(&self.succession.next_cgroups);
        let without = self.namespaces.without();
        kernel_state(&own, discovery, listening, &without, tables)
    }

    /// Whom the kernel refuses everything, since it has no room for their policy.
    fn closed(&self, snapshot: &Snapshot) -> impl Iterator<Item = String> {
        let closed = self.daemon.datapath.closed().into_iter();
        closed.filter_map(|(id, direction)| {
            let name = &snapshot.workload(id)?.workload.name;
            let direction = direction_name(direction);
            Some(format!(
                "workload {name}: {direction} is refused everything (map_failure), since the kernel's maps \
                 have no room for its policy, its addresses or its network namespace"
            ))
        })
    }
}

// === impl Enforced ===

impl Enforced {
    /// Whether it was made of the same.
    fn is(&self, wanted: &Arc<PolicySet>, around: &Around) -> bool {
        self.around.is(around) && self.wanted == *wanted
    }
}

/// What comes into force where policies change: those that are wanted, if the maps have room for them.
/// If not, those that were taken last stay, as a whole; a workload of which they could allow something
/// that the wanted ones do not is refused everything in that direction. Workloads and peers that are new
/// cannot be refused: the datapath denies what of them has no room.
fn admit(
    datapath: &Datapath,
    old: &Enforced,
    around: &Around,
    (wanted, snapshot): (&Arc<PolicySet>, Arc<Snapshot>),
    state: impl Fn(&Snapshot) -> KernelState,
) -> (Arc<PolicySet>, Arc<Snapshot>, Option<NoRoom>) {
    if old.taken == *wanted {
        return (wanted.clone(), snapshot, None);
    }
    let missing = datapath.missing(&state(&snapshot));
    if missing == 0 {
        return (wanted.clone(), snapshot, None);
    }
    let taken = Arc::new(around.compile(&old.taken));
    // What takes less room than what there is now helps, if not enough.
    if missing < datapath.missing(&state(&taken)) {
        return (wanted.clone(), snapshot, None);
    }
    let narrowed = taken.narrowed_by(&snapshot);
    let named: Vec<_> = narrowed
        .iter()
        .filter_map(|(id, direction)| {
            Some((taken.workload(*id)?.workload.name.as_str(), *direction))
        })
        .collect();
    let mut why = format!(
        "the changed policies are refused as a whole, and those before stay in force: the kernel's maps have \
         no room for {missing} of their entries (see `maps` in the configuration)"
    );
    if !named.is_empty() {
        why.push_str(
            "; since the change takes something away from them, these are refused everything: ",
        );
        let sides = named
            .iter()
            .map(|(name, direction)| format!("{} of {name}", direction_name(*direction)));
        why.push_str(&sides.collect::<Vec<_>>().join(", "));
    }
    let refused = Some(NoRoom {
        why,
        closed: named.len(),
    });
    if named.is_empty() {
        return (old.taken.clone(), taken, refused);
    }
    let closing = Arc::new(old.taken.closing(named));
    let snapshot = Arc::new(around.compile(&closing));
    (closing, snapshot, refused)
}

// === impl Around ===

impl Around {
    /// Whether both are the same values; others may say the same.
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.discovery, &other.discovery)
            && Arc::ptr_eq(&self.config, &other.config)
            && Arc::ptr_eq(&self.roster, &other.roster)
            && self.host_addresses == other.host_addresses
    }

    fn compile(&self, policies: &PolicySet) -> Snapshot {
        let config = &self.config;
        let mut node_addresses = config.node.addresses.clone();
        node_addresses.extend(self.host_addresses.iter());
        node_addresses.sort_unstable();
        node_addresses.dedup();
        let inputs = Inputs {
            workloads: &self.discovery.workloads,
            peers: &self.roster.peers,
            namespaces: &self.roster.namespaces,
            policies,
            unselected: config.unselected,
            node_addresses: &node_addresses,
            tunnel_port: config.ports.tunnel,
        };
        block_in_place(|| Snapshot::compile(&inputs))
    }
}

// === impl Namespaces ===

impl Namespaces {
    /// Makes namespaces ready for listeners, and gives those that are.
    async fn prepare(
        &mut self,
        datapath: &Datapath,
        discovery: &Discovery,
        namespaces: &[Arc<Netns>],
        problems: &mut Vec<String>,
    ) -> Vec<Arc<Netns>> {
        let mut ready = Vec::new();
        for netns in namespaces {
            let owned = discovery.workloads.iter().any(|running| {
                let here = running.netns.as_ref();
                running.owns_netns && here.is_some_and(|here| here.cookie == netns.cookie)
            });
            let known = self.known.entry(netns.cookie).or_insert(Known {
                inode: netns.inode,
                watch: None,
                families: Families { v4: true, v6: true },
                prepared: false,
                attached: false,
            });
            match known.prepare(datapath, netns, owned, &self.word).await {
                Ok(()) => ready.push(netns.clone()),
                Err(error) => problems.push(describe(&error)),
            }
        }
        ready
    }

    /// Ready when something may have changed in one of them.
    pub(super) async fn changed(&self) {
        self.word.notified().await;
    }

    /// By cookie, the flags of the families in which no route leads out.
    fn without(&self) -> HashMap<u64, u32> {
        let flags = |known: &Known| {
            let v4 = if known.families.v4 {
                0
            } else {
                NAMESPACE_WITHOUT_V4
            };
            let v6 = if known.families.v6 {
                0
            } else {
                NAMESPACE_WITHOUT_V6
            };
            v4 | v6
        };
        let known = self.known.iter();
        known
            .map(|(cookie, known)| (*cookie, flags(known)))
            .collect()
    }

    /// Looks again at one that was prepared. True where that has changed more than what it puts back.
    async fn mend(&mut self, datapath: &Datapath, netns: &Netns, settings: bool) -> bool {
        let Some(known) = self.known.get_mut(&netns.cookie) else {
            return false;
        };
        let changed = known
            .watch
            .as_ref()
            .is_some_and(NamespaceWatch::take_change);
        let unset = || settings && !block_in_place(|| datapath.is_namespace_set(netns));
        if !known.prepared || !(changed || unset()) {
            return false;
        }
        let before = known.families;
        match known.look(datapath, netns).await {
            Ok(mended) => {
                if !mended.is_empty() {
                    tracing::warn!(
                        namespace = netns.inode,
                        what = mended.join(", "),
                        "another program has removed or changed what connections to workloads need in \
                         their network namespace; it is put back"
                    );
                }
                known.families != before
            }
            // The next attempt says what is wrong.
            Err(_) => {
                known.prepared = false;
                true
            }
        }
    }

    /// Lets go of the namespaces that are not among `namespaces`.
    fn forget(&mut self, datapath: &Datapath, namespaces: &[Arc<Netns>]) {
        self.known.retain(|cookie, known| {
            if namespaces.iter().any(|netns| netns.cookie == *cookie) {
                return true;
            }
            // The inode may have been given to a newer namespace, whose link has that name now.
            let reused = namespaces.iter().any(|netns| netns.inode == known.inode);
            if known.attached
                && !reused
                && let Err(error) = datapath.detach_namespace(known.inode)
            {
                tracing::warn!(
                    error = describe(&error),
                    "a link to a namespace that is gone stays"
                );
            }
            false
        });
    }
}

impl Known {
    async fn prepare(
        &mut self,
        datapath: &Datapath,
        netns: &Netns,
        owned: bool,
        word: &Arc<Notify>,
    ) -> Result<(), crate::datapath::Error> {
        if self.watch.is_none() {
            self.watch = Some(datapath.watch_namespace(netns, word.clone())?);
        }
        if !self.prepared {
            self.look(datapath, netns).await?;
            self.prepared = true;
        }
        if owned && !self.attached {
            datapath.attach_namespace(netns)?;
            self.attached = true;
        } else if !owned && self.attached {
            datapath.detach_namespace(netns.inode)?;
            self.attached = false;
        }
        Ok(())
    }
}

impl Known {
    /// Makes it as it has to be, and gives what was not.
    async fn look(
        &mut self,
        datapath: &Datapath,
        netns: &Netns,
    ) -> Result<Vec<String>, crate::datapath::Error> {
        let mended = datapath.prepare_namespace(netns).await?;
        self.families = block_in_place(|| datapath.families(netns))?;
        Ok(mended)
    }
}

/// An error with what caused it, in one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
