//! With real cgroups and namespaces, so as root.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    net::IpAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use super::{scan::LINGER, *};
use crate::{
    identity::SpiffeId,
    workload::{Attributes, CgroupSelector, cgroup},
};

/// A cgroup of its own for each test, gone with the value.
struct TestCgroup(PathBuf);

impl TestCgroup {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let tree = CgroupTree::open(None).unwrap();
        let name = format!(
            "reeve-unit-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let folder = tree.mount().join(name);
        fs::create_dir(&folder).expect("unit tests of the registry make cgroups: run them as root");
        Self(folder)
    }

    fn child(&self, name: &str) -> TestCgroup {
        let folder = self.0.join(name);
        fs::create_dir_all(&folder).unwrap();
        TestCgroup(folder)
    }

    fn tree(&self) -> CgroupTree {
        CgroupTree::open(Some(&self.0)).unwrap()
    }

    fn path(&self) -> String {
        self.tree().path(&self.0)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A process, gone with the value. `unshare` may give it a namespace of its own.
struct Process(Child);

impl Process {
    fn start(cgroup: &TestCgroup, script: &str) -> Self {
        let mut child = Command::new("sh")
            .args([
                "-c",
                &format!("echo $$ > {}/cgroup.procs; {script}", cgroup.0.display()),
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        child.stdout.take().unwrap().read_exact(&mut line).unwrap();
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const HERE: &str = "echo; exec sleep 100 >&-";
const ISOLATED: &str = "exec unshare -n sh -c 'ip addr add 192.0.2.7/32 dev lo; ip addr add 169.254.1.1/32 dev lo; echo; exec sleep 100 >&-'";

fn workload(name: &str, selector: CgroupSelector) -> Arc<Workload> {
    Arc::new(Workload {
        id: 1,
        name: name.into(),
        attributes: Attributes {
            namespace: "default".into(),
            service_account: name.into(),
            labels: BTreeMap::new(),
            spiffe_id: SpiffeId::parse("spiffe://example.org/ns/default/sa/web").unwrap(),
        },
        selector,
        ports: Vec::new(),
        addresses: Vec::new(),
        certificates: None,
        named_ports: BTreeMap::new(),
        permissive: false,
    })
}

fn declare<const N: usize>(workloads: [Arc<Workload>; N]) -> Declaration {
    Declaration {
        workloads: workloads.into(),
        enforced_parents: Vec::new(),
    }
}

fn at(cgroup: &TestCgroup) -> CgroupSelector {
    CgroupSelector::Cgroup(cgroup.path())
}

/// Waits until the first declared workload is as wanted.
fn eventually(registry: &Registry, wanted: impl Fn(&RunningWorkload) -> bool) -> RunningWorkload {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let discovery = registry.discovery().borrow().clone();
        let running = discovery.workloads.first().unwrap();
        if wanted(running) {
            return RunningWorkload::clone(running);
        }
        assert!(Instant::now() < deadline, "still {running:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_workload_is_found_with_its_namespace_and_addresses() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let _process = Process::start(&web, ISOLATED);
    let registry = Registry::start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let running = registry.discovery().borrow().workloads[0].clone();
    assert_eq!(running.cgroups, [(cgroup::id(&web.0).unwrap(), 2)]);
    assert!(running.owns_netns);
    assert_eq!(running.addresses, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
}

#[test]
fn a_process_in_a_child_cgroup_counts() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let child = web.child("inner");
    let _process = Process::start(&child, ISOLATED);
    let registry = Registry::start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    assert!(registry.discovery().borrow().workloads[0].netns.is_some());
}

#[test]
fn a_service_in_the_hosts_namespace_does_not_own_it() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let registry = Registry::start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let process = Process::start(&web, HERE);
    let running = eventually(&registry, |running| running.netns.is_some());
    assert!(!running.owns_netns);
    drop(process);
    thread::sleep(Duration::from_millis(200));
    eventually(&registry, |running| running.netns.is_some());
}

#[test]
fn a_shared_namespace_has_no_owner() {
    let root = TestCgroup::new();
    let (web, db) = (root.child("web"), root.child("db"));
    let process = Process::start(&web, ISOLATED);
    let registry = Registry::start(
        root.tree(),
        declare([workload("web", at(&web)), workload("db", at(&db))]),
    )
    .unwrap();
    eventually(&registry, |web| web.owns_netns);
    let joined = format!(
        "exec nsenter -t {} -n sh -c 'echo; exec sleep 100 >&-'",
        process.0.id()
    );
    let _other = Process::start(&db, &joined);
    eventually(&registry, |web| web.netns.is_some() && !web.owns_netns);
}

#[test]
fn a_workload_that_comes_goes_and_returns_is_followed() {
    let root = TestCgroup::new();
    let folder = root.0.join("web");
    let selector = CgroupSelector::Cgroup(format!("{}/web", root.path()));
    let registry = Registry::start(root.tree(), declare([workload("web", selector)])).unwrap();
    assert!(
        registry.discovery().borrow().workloads[0]
            .cgroups
            .is_empty()
    );

    fs::create_dir(&folder).unwrap();
    let first = eventually(&registry, |web| !web.cgroups.is_empty()).cgroups;
    let cgroup = TestCgroup(folder.clone());
    let process = Process::start(&cgroup, ISOLATED);
    eventually(&registry, |web| web.netns.is_some());

    drop(process);
    thread::sleep(Duration::from_millis(200));
    let empty = registry.discovery().borrow().workloads[0].clone();
    assert_eq!(empty.cgroups, first, "an empty cgroup stays enrolled");

    fs::remove_dir(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    eventually(&registry, |web| {
        !web.cgroups.is_empty() && web.cgroups != first
    });
    let _process = Process::start(&cgroup, ISOLATED);
    eventually(&registry, |web| web.netns.is_some());
}

#[test]
fn changes_are_seen_long_before_the_next_poll() {
    let root = TestCgroup::new();
    let selector = CgroupSelector::Cgroup(format!("{}/web", root.path()));
    let registry = Registry::start(root.tree(), declare([workload("web", selector)])).unwrap();
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(150));
        let start = Instant::now();
        let web = root.child("web");
        eventually(&registry, |web| !web.cgroups.is_empty());
        slowest = slowest.max(start.elapsed());
        drop(web);
        eventually(&registry, |web| web.cgroups.is_empty());
    }
    assert!(slowest < POLL / 2, "{slowest:?}");
}

#[test]
fn a_unit_is_found_in_slices_and_nowhere_else() {
    let root = TestCgroup::new();
    let slice = root.child("system.slice");
    let session = root.child("user.service");
    let _delegated = session.child("nginx.service");
    let selector = CgroupSelector::Unit("nginx.service".into());
    let registry = Registry::start(root.tree(), declare([workload("web", selector)])).unwrap();
    assert!(
        registry.discovery().borrow().workloads[0]
            .cgroups
            .is_empty()
    );
    let unit = slice.child("nginx.service");
    let running = eventually(&registry, |web| !web.cgroups.is_empty());
    assert_eq!(running.cgroups, [(cgroup::id(&unit.0).unwrap(), 3)]);
}

#[test]
fn instances_of_a_template_are_one_workload_and_are_followed() {
    let root = TestCgroup::new();
    let system = root.child("system.slice");
    let selector = CgroupSelector::Unit("web@.service".into());
    let registry = Registry::start(root.tree(), declare([workload("web", selector)])).unwrap();
    // systemd gives the instances of a template a slice of their own, made with the first.
    let slice = system.child("system-web.slice");
    let first = slice.child("web@1.service");
    let one = eventually(&registry, |web| web.cgroups.len() == 1).cgroups;
    assert_eq!(one, [(cgroup::id(&first.0).unwrap(), 4)]);
    let _other = slice.child("other@1.service");
    let _second = slice.child("web@2.service");
    eventually(&registry, |web| web.cgroups.len() == 2);

    drop(first);
    let _restarted = slice.child("web@1.service");
    eventually(&registry, |web| {
        web.cgroups.len() == 2 && !web.cgroups.contains(&one[0])
    });
}

#[test]
fn a_slice_is_one_workload_with_all_that_is_in_it() {
    let root = TestCgroup::new();
    let selector = CgroupSelector::Unit("jobs.slice".into());
    let registry = Registry::start(root.tree(), declare([workload("jobs", selector)])).unwrap();
    let slice = root.child("jobs.slice");
    let unit = slice.child("backup.service");
    let _process = Process::start(&unit, ISOLATED);
    let running = eventually(&registry, |jobs| jobs.netns.is_some());
    assert_eq!(running.cgroups, [(cgroup::id(&slice.0).unwrap(), 2)]);
}

#[test]
fn a_namespace_is_let_go_with_its_last_process() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let process = Process::start(&web, ISOLATED);
    let registry = Registry::start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let netns = Arc::downgrade(
        &eventually(&registry, |web| web.netns.is_some())
            .netns
            .unwrap(),
    );
    drop(process);
    let ended = Instant::now();
    eventually(&registry, |web| web.netns.is_none());
    assert!(
        ended.elapsed() > LINGER / 2,
        "a new process finds its listeners"
    );
    assert_eq!(netns.strong_count(), 0);
}

#[test]
fn a_namespace_is_let_go_at_once_with_the_cgroup() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let process = Process::start(&web, ISOLATED);
    let registry = Registry::start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    eventually(&registry, |web| web.netns.is_some());
    let ended = Instant::now();
    drop((process, web));
    eventually(&registry, |web| web.netns.is_none());
    assert!(ended.elapsed() < LINGER / 2);
}

#[test]
fn other_declarations_are_followed_at_once() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let registry = Registry::start(root.tree(), declare([])).unwrap();
    registry.declare(declare([workload("web", at(&web))]));
    assert_eq!(registry.discovery().borrow().workloads.len(), 1);
}

#[test]
fn an_enforced_parent_is_found_when_it_comes() {
    let root = TestCgroup::new();
    let declaration = Declaration {
        workloads: Vec::new(),
        enforced_parents: vec![format!("{}/pods", root.path())],
    };
    let registry = Registry::start(root.tree(), declaration).unwrap();
    assert!(registry.discovery().borrow().enforced_parents.is_empty());
    let pods = root.child("pods");
    let id = cgroup::id(&pods.0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while registry.discovery().borrow().enforced_parents != [(id, 2)] {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}
