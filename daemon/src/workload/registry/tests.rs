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

use super::{
    scan::{ABSENT_FOR, LINGER},
    *,
};
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

    /// Ends whatever runs in it.
    fn kill(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        while !cgroup::processes(&self.0).is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
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
const ISOLATED: &str = "exec unshare -n sh -c 'ip link add wire type bridge; ip addr add 198.51.100.7/32 dev wire; ip addr add 169.254.1.1/32 dev wire; echo; exec sleep 100 >&-'";

/// In a network namespace with these addresses on a bridge, made with these options of `unshare`, with
/// some more processes than any other.
fn nested(options: &str, addresses: &[&str]) -> String {
    let add: String = addresses
        .iter()
        .map(|address| format!("ip addr add {address} dev wire; "))
        .collect();
    format!(
        "exec unshare {options} sh -c 'ip link add wire type bridge; {add}\
         for i in 1 2 3 4 5; do sleep 100 >&- & done; echo; exec sleep 100 >&-'"
    )
}

/// What whoever is not root can do as well.
const OWN_USER: &str = "--user --map-root-user --net";

fn start(tree: CgroupTree, declared: Declaration) -> Result<Registry, RegistryError> {
    Registry::start(tree, declared, HashMap::new())
}

/// The names of what there is to say of a workload.
fn remarks(registry: &Registry, workload: &str) -> Vec<&'static str> {
    let remarks = registry.remarks().load_full();
    let of_workload = remarks.get(workload).into_iter().flatten();
    of_workload.map(Remark::name).collect()
}

/// For a change that must not come: a look or two.
fn looks() {
    thread::sleep(POLL * 2 + POLL / 2);
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn workload(name: &str, selector: CgroupSelector) -> Arc<Workload> {
    Arc::new(Workload {
        id: name.bytes().map(u32::from).sum(),
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
        ..Declaration::default()
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
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let running = registry.discovery().borrow().workloads[0].clone();
    assert_eq!(running.cgroups, [(cgroup::id(&web.0).unwrap(), 2)]);
    assert!(running.owns_netns);
    assert_eq!(
        running.addresses,
        ["198.51.100.7".parse::<IpAddr>().unwrap()]
    );
}

#[test]
fn a_workload_stays_where_it_is_whatever_namespaces_it_makes() {
    for options in [OWN_USER, "--net"] {
        let root = TestCgroup::new();
        let web = root.child("web");
        let first = Process::start(&web, ISOLATED);
        let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
        let before = eventually(&registry, |web| web.owns_netns);
        assert_eq!(before.addresses, [ip("198.51.100.7")]);
        let more = Process::start(
            &web,
            &nested(options, &["198.51.100.9/32", "2001:db8::9/128"]),
        );
        looks();
        let same = |registry: &Registry| {
            let after = registry.discovery().borrow().workloads[0].clone();
            let inode = |running: &RunningWorkload| running.netns.as_ref().unwrap().inode;
            assert_eq!(inode(&after), inode(&before), "{options}");
            assert_eq!(after.addresses, before.addresses, "{options}");
        };
        same(&registry);
        let said = if options == OWN_USER {
            vec!["own_namespace"]
        } else {
            vec![]
        };
        assert_eq!(remarks(&registry, "web"), said);
        // The next daemon finds the same.
        drop(registry);
        let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
        same(&registry);
        // By then it is settled who was first.
        looks();
        drop(first);
        if options == OWN_USER {
            // It may have left sockets there.
            thread::sleep(LINGER + POLL * 2);
            same(&registry);
        } else {
            eventually(&registry, |web| web.addresses.contains(&ip("198.51.100.9")));
        }
        drop(more);
        web.kill();
    }
}

#[test]
fn a_workload_whose_first_process_is_in_a_user_namespace_of_the_runtimes_is_where_that_says() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let first = Process::start(
        &web,
        "exec unshare --user --net sh -c 'echo; exec sleep 100 >&-'",
    );
    // As a container runtime does from outside.
    let pid = first.0.id();
    fs::write(format!("/proc/{pid}/uid_map"), "0 100000 65536").unwrap();
    let script = "ip link add wire type bridge; ip addr add 198.51.100.9/32 dev wire";
    let inside = ["--net", "--target", &pid.to_string(), "sh", "-c", script].map(str::to_owned);
    let done = Command::new("nsenter").args(inside).status().unwrap();
    assert!(done.success());
    let found = eventually(&registry, |web| !web.addresses.is_empty());
    assert_eq!(found.addresses, [ip("198.51.100.9")]);
    assert!(found.owns_netns && remarks(&registry, "web").is_empty());
    web.kill();
}

#[test]
fn a_workload_whose_first_process_made_its_user_namespace_itself_is_nowhere() {
    // Root without a capability makes no other one than anybody does.
    for user in ["", "setpriv --reuid=65534 --regid=65534 --clear-groups"] {
        let root = TestCgroup::new();
        let web = root.child("web");
        let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
        let script = nested(OWN_USER, &["198.51.100.9/32"]);
        let script = script.replacen("exec ", &format!("exec {user} "), 1);
        let _first = Process::start(&web, &script);
        let is_nowhere = |registry: &Registry| {
            looks();
            let found = registry.discovery().borrow().workloads[0].clone();
            assert!(
                found.netns.is_none() && found.addresses.is_empty(),
                "{user}"
            );
            assert_eq!(remarks(registry, "web"), ["own_namespace"], "{user}");
        };
        is_nowhere(&registry);
        drop(registry);
        let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
        is_nowhere(&registry);
        web.kill();
    }
}

#[test]
fn an_address_stays_whose_it_was_first() {
    let root = TestCgroup::new();
    let (web, db) = (root.child("web"), root.child("db"));
    let declared = || declare([workload("web", at(&web)), workload("db", at(&db))]);
    let script = |own: &str| nested("--net", &["198.51.100.8/32", "2001:db8::8/128", own]);
    let (first, second) = (
        Process::start(&web, &script("198.51.100.1/32")),
        Process::start(&db, &script("198.51.100.2/32")),
    );
    let addresses = |registry: &Registry| {
        let discovery = registry.discovery().borrow().clone();
        let of = |place: usize| discovery.workloads[place].addresses.clone();
        [of(0), of(1)]
    };
    let all = |own: &str| vec![ip(own), ip("198.51.100.8"), ip("2001:db8::8")];
    // Of two that nobody has seen before, the one that is declared first.
    let registry = start(root.tree(), declared()).unwrap();
    assert_eq!(
        addresses(&registry),
        [all("198.51.100.1"), vec![ip("198.51.100.2")]]
    );
    assert_eq!(remarks(&registry, "db"), ["address_taken"]);
    assert!(remarks(&registry, "web").is_empty());
    drop(registry);
    // What the daemon before has found counts more.
    let held =
        ["198.51.100.8", "2001:db8::8"].map(|address| (ip(address), workload("db", at(&db)).id));
    let registry = Registry::start(root.tree(), declared(), held.into()).unwrap();
    assert_eq!(
        addresses(&registry),
        [vec![ip("198.51.100.1")], all("198.51.100.2")]
    );
    looks();
    assert_eq!(
        addresses(&registry),
        [vec![ip("198.51.100.1")], all("198.51.100.2")]
    );
    // It goes, and the other has it.
    drop(second);
    db.kill();
    drop(db);
    eventually(&registry, |web| web.addresses == all("198.51.100.1"));
    assert!(remarks(&registry, "web").is_empty());
    drop(first);
    web.kill();
}

#[test]
fn addresses_of_the_node_of_peers_and_of_the_loopback_device_are_not_taken() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let addresses = ["198.51.100.1/32", "198.51.100.2/32", "2001:db8::2/128"];
    let script = nested("--net", &addresses).replace(
        "for i",
        "ip addr add 198.51.100.3/32 dev lo; ip addr add 2001:db8::3/128 dev lo; for i",
    );
    let _process = Process::start(&web, &script);
    let whose = |address: &str, whose: &str| (ip(address), whose.to_owned());
    let declaration = Declaration {
        reserved: Arc::new(Reserved {
            addresses: [
                whose("198.51.100.2", "the peer db"),
                whose("2001:db8::2", "the node"),
            ]
            .into(),
        }),
        ..declare([workload("web", at(&web))])
    };
    let registry = start(root.tree(), declaration).unwrap();
    let found = registry.discovery().borrow().workloads[0].clone();
    assert_eq!(found.addresses, [ip("198.51.100.1")]);
    assert_eq!(
        remarks(&registry, "web"),
        ["address_taken", "loopback_address"]
    );
    let said = registry.remarks().load()["web"][0].to_string();
    assert!(
        said.contains("198.51.100.2, which is that of the peer db (and 1 more)"),
        "{said}"
    );
    web.kill();
}

#[test]
fn only_so_many_addresses_are_taken() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let many = "for i in `seq 200`; do ip addr add 198.51.100.$i/32 dev wire; done; for i in 1";
    let _process = Process::start(&web, &nested("--net", &[]).replace("for i in 1", many));
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    let found = registry.discovery().borrow().workloads[0].clone();
    assert_eq!(found.addresses.len(), 128);
    let said = registry.remarks().load()["web"][0].to_string();
    assert!(
        said.contains("has 72 addresses or more beyond the 128"),
        "{said}"
    );
    web.kill();
}

#[test]
fn a_process_in_a_child_cgroup_counts() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let child = web.child("inner");
    let _process = Process::start(&child, ISOLATED);
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
    assert!(registry.discovery().borrow().workloads[0].netns.is_some());
}

#[test]
fn a_service_in_the_hosts_namespace_does_not_own_it() {
    let root = TestCgroup::new();
    let web = root.child("web");
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
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
    let registry = start(
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
    let registry = start(root.tree(), declare([workload("web", selector)])).unwrap();
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
fn a_workload_without_a_cgroup_is_told_of_until_there_is_one() {
    let root = TestCgroup::new();
    let there = root.child("there");
    let selector = CgroupSelector::Cgroup(format!("{}/web", root.path()));
    let declared = declare([workload("web", selector), workload("there", at(&there))]);
    let registry = start(root.tree(), declared).unwrap();
    // A unit that restarts is not told of.
    thread::sleep(ABSENT_FOR / 2);
    assert_eq!(remarks(&registry, "web"), [""; 0]);
    thread::sleep(ABSENT_FOR / 2 + 2 * POLL);
    assert_eq!(remarks(&registry, "web"), ["absent"]);
    assert_eq!(remarks(&registry, "there"), [""; 0]);
    let _web = root.child("web");
    eventually(&registry, |web| !web.cgroups.is_empty());
    looks();
    assert_eq!(remarks(&registry, "web"), [""; 0]);
}

#[test]
fn changes_are_seen_long_before_the_next_poll() {
    let root = TestCgroup::new();
    let selector = CgroupSelector::Cgroup(format!("{}/web", root.path()));
    let registry = start(root.tree(), declare([workload("web", selector)])).unwrap();
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
    let registry = start(root.tree(), declare([workload("web", selector)])).unwrap();
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
fn where_a_workloads_cgroup_will_be_made_is_known_before() {
    let root = TestCgroup::new();
    let slice = root.child("system.slice");
    let _session = root.child("user.service");
    let [root_id, slice_id] = [&root, &slice].map(|cgroup| cgroup::id(&cgroup.0).unwrap());
    let unit = CgroupSelector::Unit("nginx.service".into());
    let cgroup = CgroupSelector::Cgroup(format!("{}/web", root.path()));
    for (selector, name, mut places) in [
        (unit, "nginx.service", vec![(root_id, 2), (slice_id, 3)]),
        (cgroup, "web", vec![(root_id, 2)]),
    ] {
        let web = workload("web", selector);
        let registry = start(root.tree(), declare([web.clone()])).unwrap();
        let expected = registry.discovery().borrow().expected.clone();
        let mut found: Vec<_> = expected
            .iter()
            .map(|expected| (expected.parent, expected.depth))
            .collect();
        found.sort_unstable();
        places.sort_unstable();
        assert_eq!(found, places, "{name}");
        let is_webs = |expected: &Expected| expected.name == name && expected.workload == web.id;
        assert!(expected.iter().all(is_webs), "{name}");
    }
}

#[test]
fn instances_of_a_template_are_one_workload_and_are_followed() {
    let root = TestCgroup::new();
    let system = root.child("system.slice");
    let selector = CgroupSelector::Unit("web@.service".into());
    let registry = start(root.tree(), declare([workload("web", selector)])).unwrap();
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
    let registry = start(root.tree(), declare([workload("jobs", selector)])).unwrap();
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
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
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
    let registry = start(root.tree(), declare([workload("web", at(&web))])).unwrap();
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
    let registry = start(root.tree(), declare([])).unwrap();
    registry.declare(declare([workload("web", at(&web))]));
    assert_eq!(registry.discovery().borrow().workloads.len(), 1);
}

#[test]
fn an_enforced_parent_is_found_when_it_comes() {
    let root = TestCgroup::new();
    let declaration = Declaration {
        enforced_parents: vec![format!("{}/pods", root.path())],
        ..Declaration::default()
    };
    let registry = start(root.tree(), declaration).unwrap();
    assert!(registry.discovery().borrow().enforced_parents.is_empty());
    let pods = root.child("pods");
    let id = cgroup::id(&pods.0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while registry.discovery().borrow().enforced_parents != [(id, 2)] {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}
