//! One look at everything that is declared.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use reeve_common::WorkloadId;

use super::{
    Declaration, Discovery, Expected, Remark, Remarks, Reserved,
    claims::{Claims, Found},
    remark::Told,
};
use crate::{
    datapath::{InterfaceAddress, netns::Netns},
    workload::{
        CgroupSelector, RunningWorkload, Workload,
        cgroup::{self, CgroupTree, Members, Processes},
        namespace::{self, Namespaces, Trust},
    },
};

/// For how long a new workload must be seen in the daemon's own namespace before it counts as
/// being there: a container's first process is in the host's for a moment.
pub(super) const SETTLE: Duration = Duration::from_millis(100);
/// For how long a workload's namespace is kept after its last process, while its cgroup is there:
/// a workload whose process is replaced finds its listeners standing.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// For how long a workload has no cgroup before that is said: units restart, and daemons start before
/// them.
pub(super) const ABSENT_FOR: Duration = Duration::from_secs(5);
/// For how long a workload's first process may still come to be in the user namespace that is the
/// workload's: a container runtime makes it from inside.
const TRUST_SETTLES: Duration = Duration::from_secs(2);

/// Addresses of one workload that mean something on a link only. More than a namespace has links.
const MAX_LINK_LOCAL: usize = 64;

/// Looks, and remembers what it saw.
pub(super) struct Scanner {
    tree: CgroupTree,
    own: Arc<Netns>,
    namespaces: Namespaces,
    pub(super) declared: Declaration,
    pub(super) discovery: Arc<Discovery>,
    /// Folders to watch, filled by the last look.
    pub(super) folders: HashSet<PathBuf>,
    /// What is known of the processes of each workload, by name.
    alive: HashMap<String, Alive>,
    claims: Claims,
    /// What is known of the processes in each cgroup of a workload, by its id.
    members: HashMap<u64, Members>,
    /// Addresses of the namespaces that workloads were found in, the last that could be read.
    read: HashMap<u64, Vec<InterfaceAddress>>,
    pub(super) remarks: Remarks,
    told: Told,
    /// Workloads, by name, that have no cgroup, and since when.
    absent: HashMap<String, Instant>,
    /// Workloads, by name, that were seen in the daemon's own namespace a moment ago, and since when.
    settling: HashMap<String, Instant>,
    first: bool,
}

/// A workload that has processes, or had some a moment ago.
#[derive(Debug)]
struct Alive {
    /// Ids of its cgroups.
    cgroups: Vec<u64>,
    since: Instant,
    last: Instant,
    trust: Trust,
}

/// What a look comes across besides workloads.
#[derive(Default)]
struct Notes {
    folders: HashSet<PathBuf>,
    problems: Vec<String>,
    settling: HashMap<String, Instant>,
    members: HashMap<u64, Members>,
    remarks: BTreeMap<String, Vec<Remark>>,
    expected: Vec<Expected>,
    /// Ids of folders, as far as they were asked for.
    ids: HashMap<PathBuf, Option<u64>>,
}

/// A cgroup that was found.
struct Cgroup {
    folder: PathBuf,
    /// Its id with its depth, or with all possible ones.
    ids: Vec<(u64, u32)>,
}

// === impl Scanner ===

impl Scanner {
    pub(super) fn new(
        tree: CgroupTree,
        own: Netns,
        declared: Declaration,
        held: HashMap<IpAddr, WorkloadId>,
    ) -> Self {
        let own = Arc::new(own);
        let mut namespaces = Namespaces::default();
        namespaces.insert(&own);
        Self {
            tree,
            own,
            namespaces,
            declared,
            discovery: Arc::default(),
            folders: HashSet::new(),
            alive: HashMap::new(),
            claims: Claims::new(held),
            members: HashMap::new(),
            read: HashMap::new(),
            remarks: Remarks::default(),
            told: Told::default(),
            absent: HashMap::new(),
            settling: HashMap::new(),
            first: true,
        }
    }

    /// Whether the next look should come soon.
    pub(super) fn is_settling(&self) -> bool {
        !self.settling.is_empty()
    }

    /// Looks at everything. Whether something is different from the last time.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        let mut notes = Notes::default();
        let declared = self.declared.clone();
        let enforced_parents: Vec<(u64, u32)> = declared
            .enforced_parents
            .into_iter()
            .flat_map(|path| {
                let selector = CgroupSelector::Cgroup(path);
                self.find("an enforced parent", &selector, &mut notes).0
            })
            .flat_map(|cgroup| cgroup.ids)
            .collect();
        let last = self.discovery.clone();
        let last: HashMap<&str, &RunningWorkload> = last
            .workloads
            .iter()
            .map(|running| (running.workload.name.as_str(), &**running))
            .collect();
        let mut workloads: Vec<RunningWorkload> = declared
            .workloads
            .into_iter()
            .map(|workload| {
                let before = last.get(workload.name.as_str()).copied();
                self.look_at(workload, before, now, &mut notes)
            })
            .collect();
        mark_owners(&mut workloads, self.own.inode);
        self.settle_addresses(&mut workloads, &declared.reserved, &mut notes);
        self.told.tell(&notes.remarks, now);
        if **self.remarks.load() != notes.remarks {
            self.remarks.store(Arc::new(notes.remarks));
        }
        self.settling = notes.settling;
        self.members = notes.members;
        self.folders = notes.folders;
        self.first = false;
        let is_declared = |name: &str| workloads.iter().any(|found| found.workload.name == name);
        self.alive.retain(|name, _| is_declared(name));
        self.absent.retain(|name, _| is_declared(name));
        self.namespaces.tidy();

        let different = workloads.len() != self.discovery.workloads.len()
            || notes.problems != self.discovery.problems
            || notes.expected != self.discovery.expected
            || enforced_parents != self.discovery.enforced_parents
            || !workloads
                .iter()
                .zip(&self.discovery.workloads)
                .all(|(new, old)| same(new, old));
        if different {
            self.discovery = Arc::new(Discovery {
                workloads: workloads.into_iter().map(Arc::new).collect(),
                expected: notes.expected,
                enforced_parents,
                problems: notes.problems,
            });
        }
        different
    }

    fn look_at(
        &mut self,
        workload: Arc<Workload>,
        before: Option<&RunningWorkload>,
        now: Instant,
        notes: &mut Notes,
    ) -> RunningWorkload {
        let whose = format!("workload {}", workload.name);
        let (found, to_come) = self.find(&whose, &workload.selector, notes);
        self.expect(workload.id, &to_come, notes);
        let last = before.and_then(|running| running.netns.clone());
        let processes = self.processes(&found, last.as_deref(), now, notes);
        // Its cgroup is enforced all the same, but nothing that a namespace is needed for.
        let is_hidden = |found: &Processes| found.numbers.is_empty() && found.hidden;
        if processes.as_ref().is_some_and(is_hidden) {
            notes.problems.push(format!(
                "{whose}: its processes have no numbers here, as in a container with process numbers \
                 of its own; start reeve with the host's (`hostPID: true`, `--pid=host`)"
            ));
        }
        let cgroups: Vec<(u64, u32)> = found.into_iter().flat_map(|cgroup| cgroup.ids).collect();
        let is_there = !cgroups.is_empty();
        self.note_absence(&workload, is_there, now, notes);

        let netns = match processes {
            Some(Processes { numbers, .. }) => {
                match self.namespace(&workload, &cgroups, &numbers, last.as_ref(), now, notes) {
                    Some(netns) => self.settled(&workload, netns, last.as_ref(), now, notes),
                    None => self.without_process(&workload, last, is_there, now),
                }
            }
            None => {
                self.keep(&workload, notes);
                last
            }
        };
        RunningWorkload {
            addresses: workload.addresses.clone(),
            workload,
            cgroups,
            netns,
            owns_netns: false,
            link_local: Vec::new(),
        }
    }

    /// The processes of a workload's cgroups. None where it has some, and they do not say that it is
    /// still where it was: those that would are looked for soon.
    fn processes(
        &mut self,
        cgroups: &[Cgroup],
        last: Option<&Netns>,
        now: Instant,
        notes: &mut Notes,
    ) -> Option<Processes> {
        let mut all = Processes {
            all: true,
            ..Processes::default()
        };
        let mut unknown = false;
        for cgroup in cgroups {
            let id = cgroup.ids.first().map_or(0, |(id, _)| *id);
            // Workloads may name the same cgroup.
            let known = notes.members.remove(&id);
            let known = known.or_else(|| self.members.remove(&id));
            let mut members = known.unwrap_or_default();
            match members.look(&cgroup.folder, now) {
                Some(found) => {
                    all.numbers.extend(found.numbers);
                    all.hidden |= found.hidden;
                    all.all &= found.all;
                }
                None => unknown = true,
            }
            notes.members.insert(id, members);
        }
        all.all &= !unknown;
        let is_confirmed = || {
            let mut inodes = all.numbers.iter().map(|pid| namespace::inode(*pid));
            last.is_some_and(|last| inodes.any(|inode| inode == Some(last.inode)))
        };
        let says_enough = all.all || is_confirmed();
        says_enough.then_some(all)
    }

    /// Keeps what was noted of a workload that is as it was.
    fn keep(&self, workload: &Workload, notes: &mut Notes) {
        let name = &workload.name;
        if let Some(since) = self.settling.get(name) {
            notes.settling.insert(name.clone(), *since);
        }
        let before = self.remarks.load();
        if before
            .get(name)
            .is_some_and(|before| before.contains(&Remark::OwnNamespace))
        {
            let remarks = notes.remarks.entry(name.clone()).or_default();
            remarks.push(Remark::OwnNamespace);
        }
    }

    fn note_absence(
        &mut self,
        workload: &Workload,
        is_there: bool,
        now: Instant,
        notes: &mut Notes,
    ) {
        if is_there {
            self.absent.remove(&workload.name);
            return;
        }
        let since = *self.absent.entry(workload.name.clone()).or_insert(now);
        if now.saturating_duration_since(since) >= ABSENT_FOR {
            let remarks = notes.remarks.entry(workload.name.clone()).or_default();
            remarks.push(Remark::Absent(workload.selector.clone()));
        }
    }

    /// Gives workloads the addresses of their namespaces that are believed.
    fn settle_addresses(
        &mut self,
        workloads: &mut [RunningWorkload],
        reserved: &Reserved,
        notes: &mut Notes,
    ) {
        let own = self.own.clone();
        let mut read = HashMap::new();
        let mut addresses_in = |netns: &Netns, whose: &str, problems: &mut Vec<String>| {
            let found = read.entry(netns.inode).or_insert_with(|| {
                namespace::addresses(netns).unwrap_or_else(|error| {
                    problems.push(format!(
                        "{whose}: the addresses of its network namespace cannot be read: {error}"
                    ));
                    self.read.get(&netns.inode).cloned().unwrap_or_default()
                })
            });
            found.clone()
        };
        let found: Vec<Found> = workloads
            .iter()
            .map(|running| {
                let netns = running.netns.as_ref();
                let netns = netns.filter(|_| running.workload.addresses.is_empty());
                netns.map_or_else(Found::default, |netns| {
                    let whose = format!("workload {}", running.workload.name);
                    let mut addresses = addresses_in(netns, &whose, &mut notes.problems);
                    addresses.retain(|address| !namespace::is_link_local(&address.ip));
                    Found {
                        addresses,
                        in_own: netns.inode == own.inode,
                    }
                })
            })
            .collect();
        for running in workloads.iter_mut().filter(|running| running.owns_netns) {
            let Some(netns) = &running.netns else {
                continue;
            };
            let whose = format!("workload {}", running.workload.name);
            running.link_local = addresses_in(netns, &whose, &mut notes.problems)
                .iter()
                .map(|address| address.ip)
                .filter(namespace::is_link_local)
                .take(MAX_LINK_LOCAL)
                .collect();
            running.link_local.sort_unstable();
        }
        let is_elsewhere = found
            .iter()
            .any(|one| !one.in_own && !one.addresses.is_empty());
        let node: HashSet<IpAddr> = match is_elsewhere {
            true => addresses_in(&own, "the node", &mut notes.problems)
                .iter()
                .map(|address| address.ip)
                .collect(),
            false => HashSet::new(),
        };
        let remarks = &mut notes.remarks;
        let remark = |running: &RunningWorkload, remark| {
            let name = running.workload.name.clone();
            remarks.entry(name).or_default().push(remark);
        };
        self.claims
            .settle(workloads, &found, &node, reserved, remark);
        self.read = read;
    }

    /// The namespace of a workload with processes, once it is sure.
    fn settled(
        &self,
        workload: &Workload,
        netns: Arc<Netns>,
        last: Option<&Arc<Netns>>,
        now: Instant,
        notes: &mut Notes,
    ) -> Option<Arc<Netns>> {
        let is_own = |netns: &Arc<Netns>| netns.inode == self.own.inode;
        if !is_own(&netns) || last.is_some_and(is_own) || self.first {
            return Some(netns);
        }
        let since = self.settling.get(&workload.name).copied().unwrap_or(now);
        if now.saturating_duration_since(since) >= SETTLE {
            return Some(netns);
        }
        notes.settling.insert(workload.name.clone(), since);
        None
    }

    /// The namespace of a workload without processes: where the next one is expected.
    fn without_process(
        &self,
        workload: &Workload,
        last: Option<Arc<Netns>>,
        is_there: bool,
        now: Instant,
    ) -> Option<Arc<Netns>> {
        let recent = self
            .alive
            .get(&workload.name)
            .is_some_and(|alive| now.saturating_duration_since(alive.last) < LINGER);
        match (last, &workload.selector) {
            (Some(last), _) if is_there && recent => Some(last),
            // The daemon's own namespace goes on whoever is in it, and it is where systemd starts
            // its units: they find the listeners standing.
            (_, CgroupSelector::Unit(_)) => Some(self.own.clone()),
            (Some(last), _) if is_there && last.inode == self.own.inode => Some(last),
            _ => None,
        }
    }

    /// The namespace that a workload's processes say it is in, where they are believed.
    fn namespace(
        &mut self,
        workload: &Workload,
        cgroups: &[(u64, u32)],
        pids: &[u32],
        last: Option<&Arc<Netns>>,
        now: Instant,
        notes: &mut Notes,
    ) -> Option<Arc<Netns>> {
        if pids.is_empty() {
            // Whoever comes next is the first again.
            if let Some(alive) = self.alive.get_mut(&workload.name) {
                alive.cgroups.clear();
            }
            return None;
        }
        let is_same = |alive: &Alive| {
            let mut ids = cgroups.iter();
            ids.any(|(id, _)| alive.cgroups.contains(id))
        };
        let since = match self.alive.get(&workload.name) {
            Some(alive) if is_same(alive) => alive.since,
            _ => now,
        };
        let goes_on = self.alive.get(&workload.name).is_some_and(is_same);
        let is_settled = now.saturating_duration_since(since) >= TRUST_SETTLES;
        let mut alive = match self.alive.remove(&workload.name) {
            Some(alive) if is_settled => alive,
            before => Alive {
                cgroups: Vec::new(),
                since,
                last: before.map_or(now, |before| before.last),
                trust: Trust::of_oldest(pids),
            },
        };
        alive.cgroups = cgroups.iter().map(|(id, _)| *id).collect();
        let found = alive.trust.namespace(pids, last.map(|netns| netns.inode));
        if alive.trust.has_doubts(pids, found.map(|(inode, _)| inode)) {
            let remarks = notes.remarks.entry(workload.name.clone()).or_default();
            remarks.push(Remark::OwnNamespace);
        }
        let netns = match found {
            Some((inode, pid)) => self.namespaces.get(inode, pid),
            // All have gone to where nobody believes them, and may have left sockets where they were.
            None => last.filter(|_| goes_on).cloned(),
        };
        if netns.is_some() {
            alive.last = now;
        }
        self.alive.insert(workload.name.clone(), alive);
        netns
    }

    /// Notes the folders at which cgroups of a workload are made.
    fn expect(&self, workload: WorkloadId, folders: &[PathBuf], notes: &mut Notes) {
        for folder in folders {
            let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
                continue;
            };
            let id = || cgroup::id(parent).ok();
            let parent = *notes.ids.entry(parent.to_owned()).or_insert_with(id);
            let (Some(parent), Some(name)) = (parent, name.to_str()) else {
                continue;
            };
            let expected = self.tree.depths(folder).into_iter().map(|depth| Expected {
                parent,
                name: name.to_owned(),
                depth,
                workload,
            });
            notes.expected.extend(expected);
        }
    }

    /// The cgroups that are meant and can be enrolled, and the folders at which others may be made. They,
    /// and what must be watched to see them come, are noted.
    fn find(
        &self,
        whose: &str,
        selector: &CgroupSelector,
        notes: &mut Notes,
    ) -> (Vec<Cgroup>, Vec<PathBuf>) {
        let mut cgroups = Vec::new();
        let (found, to_come) = self.folders_of(whose, selector, notes);
        for folder in found {
            let Ok(id) = cgroup::id(&folder) else {
                continue;
            };
            let depths = self.tree.depths(&folder);
            if depths.is_empty() {
                notes.problems.push(format!(
                    "{whose}: the cgroup {} lies deeper than {} levels and cannot be enforced",
                    self.tree.path(&folder),
                    reeve_common::MAX_CGROUP_DEPTH
                ));
                continue;
            }
            notes.folders.extend(folder.parent().map(PathBuf::from));
            notes.folders.insert(folder.clone());
            let ids = depths.into_iter().map(|depth| (id, depth)).collect();
            cgroups.push(Cgroup { folder, ids });
        }
        (cgroups, to_come)
    }

    fn folders_of(
        &self,
        whose: &str,
        selector: &CgroupSelector,
        notes: &mut Notes,
    ) -> (Vec<PathBuf>, Vec<PathBuf>) {
        match selector {
            CgroupSelector::Cgroup(path) => {
                let folder = self.tree.folder(path);
                if folder.is_dir() {
                    return (vec![folder.clone()], vec![folder]);
                }
                let nearest = folder.ancestors().find(|folder| folder.is_dir());
                notes.folders.extend(nearest.map(PathBuf::from));
                (Vec::new(), vec![folder])
            }
            CgroupSelector::Unit(name) => {
                let (found, slices) = self.tree.units(name);
                // Which instances a template has is known once they are there.
                let to_come = match name.contains("@.") {
                    true => found.clone(),
                    false => slices.iter().map(|slice| slice.join(name)).collect(),
                };
                notes.folders.extend(slices);
                if found.is_empty()
                    && let Some(elsewhere) = self.tree.unit_outside(name)
                {
                    notes.problems.push(format!(
                        "{whose}: it runs in {elsewhere}, which is not below `node.cgroupRoot`: \
                         nothing is enforced there"
                    ));
                }
                (found, to_come)
            }
        }
    }
}

/// A workload owns its namespace when no other runs there and it is not the daemon's.
fn mark_owners(workloads: &mut [RunningWorkload], own: u64) {
    let mut residents: HashMap<u64, usize> = HashMap::new();
    for netns in workloads.iter().filter_map(|found| found.netns.as_ref()) {
        *residents.entry(netns.inode).or_default() += 1;
    }
    for running in workloads {
        running.owns_netns = running
            .netns
            .as_ref()
            .is_some_and(|netns| netns.inode != own && residents.get(&netns.inode) == Some(&1));
    }
}

fn same(a: &RunningWorkload, b: &RunningWorkload) -> bool {
    let inode = |running: &RunningWorkload| running.netns.as_ref().map(|netns| netns.inode);
    a.workload == b.workload
        && a.cgroups == b.cgroups
        && inode(a) == inode(b)
        && a.owns_netns == b.owns_netns
        && a.addresses == b.addresses
        && a.link_local == b.link_local
}
