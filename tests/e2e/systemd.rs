//! As a service of a real systemd: the unit in `deploy/`, in a machine that boots.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use harness::{Machine, Network, Node, Output, Thread, Workload, eventually};

use crate::arrange::{PORT, serve};

/// Exposure that `systemd-analyze security` finds, in tenths. docs/deploy.md has the figure and
/// what is left.
const EXPOSURE: &str = "31";

/// The program that is tested is not static, as that of a release is.
pub(crate) const LIBRARIES: &str = "[Service]\nExecPaths=-/usr/lib -/lib -/lib64\n";

const EARLY: &str = "
[Service]
Type=oneshot
ExecStart=/usr/local/bin/peer send SERVER --text early --patience 2
[Install]
WantedBy=multi-user.target
";

#[test]
fn what_starts_behind_the_service_is_judged_from_its_first_packet() {
    let scene = Scene::new("enforcedParents: [/system.slice]", "");
    let machine = scene.boot();
    let time = |unit: &str| {
        let time = machine.property(unit, "ActiveEnterTimestampMonotonic");
        time.parse::<u64>().unwrap()
    };
    assert_eq!(machine.property("reeve.service", "ActiveState"), "active");
    let ready = time("reeve.service");
    for later in ["network-pre.target", "sysinit.target", "multi-user.target"] {
        assert!(ready < time(later), "{later}");
    }
    assert_eq!(machine.property("early.service", "Result"), "exit-code");
    let log = machine.log("early.service");
    assert!(log.contains("Operation not permitted"), "{log}");
}

#[test]
fn with_the_guard_nothing_is_open_where_the_daemon_does_not_come_up() {
    let broken = "[Service]\nExecStart=\nExecStart=/bin/false\nTimeoutStartSec=5s\n";
    let scene = Scene::new("enforcedParents: [/system.slice]", broken);
    let machine = scene.boot_with(&["reeve-guard.service", "reeve.service", "early.service"]);
    assert_ne!(machine.property("reeve.service", "ActiveState"), "active");
    assert_eq!(machine.property("reeve-guard.service", "Result"), "success");
    assert_eq!(machine.property("early.service", "Result"), "exit-code");
    let log = machine.log("early.service");
    assert!(log.contains("Operation not permitted"), "{log}");
}

#[test]
fn the_guard_has_systemd_keep_a_slice_whose_units_come_and_go() {
    let scene = Scene::new("enforcedParents: [/jobs.slice, /kubepods]", "");
    let machine = scene.boot_with(&["reeve-guard.service"]);
    assert_eq!(machine.property("reeve-guard.service", "Result"), "success");
    assert_eq!(machine.property("jobs.slice", "ActiveState"), "active");
    let inode = |cgroup: &str| {
        machine
            .shell(&format!("stat -c %i /sys/fs/cgroup{cgroup}"))
            .ok()
    };
    let (jobs, _) = (inode("/jobs.slice"), inode("/kubepods"));
    for _ in 0..3 {
        let refused = start_in("jobs.slice", &machine, &scene);
        assert!(!refused.status.success(), "{}", refused.stdout);
        assert_eq!(inode("/jobs.slice"), jobs);
    }
    assert!(start_in("system.slice", &machine, &scene).status.success());

    // Whether a unit that is still to come is covered, systemd tells by its slice.
    let web = |lines: &str| {
        let unit = format!("[Service]\nExecStart=/bin/sleep infinity\n{lines}");
        machine.write("/run/systemd/system/web.service", &unit);
        machine.run(["systemctl", "daemon-reload"]).ok();
    };
    let guard = |parent: &str| {
        let lines =
            format!("enforcedParents: [{parent}]\nworkloads: [{{name: web, unit: web.service}}]");
        machine.write("/etc/reeve/reeve.yaml", &scene.config(&lines, ""));
        let restarted = machine.run(["systemctl", "restart", "reeve-guard"]);
        let status = machine.property("reeve-guard.service", "ExecMainStatus");
        assert_eq!(restarted.status.success(), status == "0");
        (status, machine.log("reeve-guard.service"))
    };
    web("Slice=jobs.slice\n");
    let (status, log) = guard("/jobs.slice");
    assert_eq!(status, "0", "{log}");
    assert!(
        log.contains("web: to come, below an enforced parent"),
        "{log}"
    );
    web("");
    let (status, log) = guard("/jobs.slice");
    assert_eq!(status, "3", "{log}");
    assert!(log.contains("NOT GUARDED: workload web"), "{log}");
    let (status, log) = guard("/system.slice/web.service");
    assert_eq!(status, "1", "{log}");
    assert!(log.contains("goes whenever web.service stops"), "{log}");
}

#[test]
fn the_service_reloads_drains_and_has_the_tightest_sandbox() {
    let scene = Scene::new("", "");
    let machine = scene.boot();
    // What was written is in force when `systemctl reload` returns.
    assert!(start_in("jobs.slice", &machine, &scene).status.success());
    machine.write("/etc/reeve/reeve.yaml", &scene.config(JOBS, ""));
    machine.run(["systemctl", "reload", "reeve"]).ok();
    let refused = start_in("jobs.slice", &machine, &scene);
    assert!(!refused.status.success(), "{}", refused.stdout);
    machine.write("/etc/reeve/reeve.yaml", "nonsense");
    machine.run(["systemctl", "reload", "reeve"]).fails();
    let refused = start_in("jobs.slice", &machine, &scene);
    assert!(!refused.status.success(), "what was in force stays so");

    let judged = machine.run([
        "systemd-analyze",
        "security",
        "--no-pager",
        &format!("--threshold={EXPOSURE}"),
        "reeve.service",
    ]);
    judged.ok();
    // Among its mounts it can be run, and nothing that lies where it could be written.
    let main = machine.property("reeve.service", "MainPID");
    let run = |program: &str| machine.run(["nsenter", "-t", &main, "-m", program, "--version"]);
    run("/usr/local/bin/reeve").ok();
    for folder in [
        "/var/lib/reeve",
        "/run/reeve",
        "/tmp",
        "/var/tmp",
        "/dev/shm",
    ] {
        let program = format!("{folder}/true");
        let copy = format!("install -m 755 /usr/bin/true /proc/{main}/root{program}");
        machine.shell(&copy).ok();
        let refused = run(&program).fails();
        assert!(refused.contains("Permission denied"), "{refused}");
    }
    assert_eq!(machine.property("reeve.service", "StatusText"), "ready");
    let main = machine.main_process("reeve.slice", "reeve.service");
    let exposed = Thread::all_of(main);
    let exposed = exposed.iter().filter(|thread| thread.name == "tunnel-0");
    for thread in exposed {
        assert_eq!(thread.capabilities("CapEff"), 0);
    }

    machine.run(["systemctl", "stop", "reeve"]).ok();
    assert_eq!(machine.property("reeve.service", "Result"), "success");
    assert!(machine.log("reeve.service").contains("shutting down"));
    let refused = start_in("jobs.slice", &machine, &scene);
    assert!(!refused.status.success(), "what is pinned goes on refusing");
}

#[test]
fn instances_of_a_template_and_slices_are_followed_when_they_restart() {
    let scene = Scene::new(WEB_AND_JOBS, "");
    let machine = scene.boot();
    // A slice that stays enrols its units from their first packet.
    machine.run(["systemctl", "start", "jobs.slice"]).ok();
    for _ in 0..5 {
        let refused = start_in("jobs.slice", &machine, &scene);
        assert!(!refused.status.success(), "{}", refused.stdout);
    }
    assert!(start_in("system.slice", &machine, &scene).status.success());

    // What a template's instances may do is what the template's workload may.
    machine.write("/etc/reeve/policies/web.yaml", &scene.policy_of("web"));
    machine.write("/run/systemd/system/web@.service", WEB);
    machine.run(["systemctl", "daemon-reload"]).ok();
    machine.run(["systemctl", "reload", "reeve"]).ok();
    for instance in ["web@1.service", "web@2.service"] {
        for action in ["start", "restart"] {
            machine.run(["systemctl", action, instance]).ok();
            let cgroup = machine.property(instance, "ControlGroup");
            let say = |to: &str| {
                machine.shell(&format!(
                    "echo $$ > /sys/fs/cgroup{cgroup}/cgroup.procs && \
                     exec peer send {to} --text hello --patience 5"
                ))
            };
            eventually("the instance is enrolled", || {
                !say(&scene.elsewhere()).status.success()
            });
            say(&scene.server()).ok();
        }
    }
}

#[test]
fn a_oneshot_unit_may_connect_at_once() {
    let scene = Scene::new(ONCE_AND_JOBS, "");
    let machine = scene.boot();
    for workload in ["once", "jobs"] {
        let file = format!("/etc/reeve/policies/{workload}.yaml");
        machine.write(&file, &scene.policy_of(workload));
    }
    let unit = ONCE.replace("SERVER", &scene.server());
    let waiting = unit.replace("Type=", "ExecStartPre=+/usr/local/bin/reeve wait\nType=");
    for unit in [unit, waiting] {
        machine.write("/run/systemd/system/once.service", &unit);
        machine.run(["systemctl", "daemon-reload"]).ok();
        machine.run(["systemctl", "reload", "reeve"]).ok();
        // Its cgroup is another one at each start.
        for _ in 0..5 {
            machine.run(["systemctl", "start", "once"]).ok();
        }
    }
    // In a slice that is the workload, the slice's cgroup stays.
    machine.run(["systemctl", "start", "jobs.slice"]).ok();
    for _ in 0..5 {
        start_in("jobs.slice", &machine, &scene).ok();
    }
    let wait = "systemd-run --quiet --wait --pipe reeve wait --timeout 100ms";
    let failed = machine.shell(wait).fails();
    assert!(failed.contains("no workload"), "{failed}");
}

#[test]
fn a_unit_that_does_not_exist_is_found_by_check_and_told_of_by_the_daemon() {
    let scene = Scene::new(WEB_AND_JOBS, "");
    let machine = scene.boot();
    let file = "/etc/reeve/reeve.yaml";
    let check =
        |more: &[&str]| machine.run(["reeve", "check", "--config", file].iter().chain(more));
    // A template and a unit with files, and a slice, which needs none.
    machine.write("/run/systemd/system/web@.service", WEB);
    machine.write("/run/systemd/system/one.service", WEB);
    let known = format!("{WEB_AND_JOBS}\n  - {{name: one, unit: one.service}}");
    machine.write(file, &scene.config(&known, ""));
    machine.run(["systemctl", "daemon-reload"]).ok();
    check(&[]).ok();
    let misspelt = known.replace("one.service", "noe.service");
    machine.write(file, &scene.config(&misspelt, ""));
    let refused = check(&[]);
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
    let words = "workload `one`: systemd knows no unit `noe.service`";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    assert!(!refused.stdout.contains(": ok"), "{}", refused.stdout);
    check(&["--elsewhere"]).ok();

    machine.run(["systemctl", "reload", "reeve"]).ok();
    eventually("it is told of", || {
        machine
            .run(["reeve", "status"])
            .ok()
            .contains("one: no unit noe.service runs")
    });
    let log = machine.log("reeve.service");
    assert!(
        log.contains("workload one: no unit noe.service runs"),
        "{log}"
    );
    assert_eq!(machine.property("reeve.service", "StatusText"), "ready");
    machine.write(file, &scene.config(&known, ""));
    machine.run(["systemctl", "reload", "reeve"]).ok();
    machine.run(["systemctl", "start", "one"]).ok();
    eventually("it is there", || {
        !machine
            .run(["reeve", "status"])
            .ok()
            .contains("one: no unit")
    });
}

#[test]
fn a_restart_finds_its_listeners_in_the_service_managers_store() {
    let scene = Scene::new(WEB_AND_JOBS, "");
    let machine = scene.boot();
    // A socket's inode is its own for as long as it lives.
    let listeners = || {
        let table = machine.shell("cat /proc/net/tcp6").ok();
        let port = format!(":{:04X} ", 15008);
        let mut inodes: Vec<_> = table
            .lines()
            .filter(|line| {
                line.split_whitespace()
                    .nth(1)
                    .is_some_and(|local| format!("{local} ").ends_with(&port))
            })
            .filter_map(|line| line.split_whitespace().nth(9).map(str::to_owned))
            .collect();
        inodes.sort();
        inodes
    };
    eventually("it listens for tunnels", || !listeners().is_empty());
    let before = listeners();
    let process = machine.property("reeve.service", "MainPID");
    machine.run(["systemctl", "restart", "reeve"]).ok();
    assert_ne!(machine.property("reeve.service", "MainPID"), process);
    assert_eq!(listeners(), before);
    eventually("the store is empty again", || {
        machine.property("reeve.service", "NFileDescriptorStore") == "0"
    });
}

#[test]
fn a_daemon_whose_worker_hangs_is_started_again() {
    let scene = Scene::new("", "[Service]\nWatchdogSec=3s\n");
    let machine = scene.boot();
    let before = machine.main_process("reeve.slice", "reeve.service");
    let threads = Thread::all_of(before);
    let worker = threads.iter().find(|thread| thread.name == "tunnel-0");
    let hung = crate::health::Hung::of(worker.unwrap().id);
    eventually("systemd gives it up", || {
        machine.log("reeve.service").contains("Watchdog timeout")
    });
    // What is dead is buried by the debugger first.
    drop(hung);
    eventually("another daemon runs", || {
        machine.main_process("reeve.slice", "reeve.service") != before
    });
    eventually("it is up", || {
        machine.property("reeve.service", "ActiveState") == "active"
    });
    let log = machine.log("reeve.service");
    assert!(log.contains("tunnel worker 0 does not answer"), "{log}");
}

#[test]
fn keys_come_from_the_service_managers_credentials() {
    let scene = Scene::new("", "");
    let machine = scene.boot();
    let root = machine.shell("cat /var/lib/reeve/ca/root.pem").ok();
    machine
        .shell("mkdir -m 700 /etc/keys && mv /var/lib/reeve/ca/root.* /etc/keys/")
        .ok();
    machine.write(
        "/etc/systemd/system/reeve.service.d/keys.conf",
        "[Service]\n\
         LoadCredential=root.key:/etc/keys/root.key\n\
         LoadCredential=root.pem:/etc/keys/root.pem\n",
    );
    let config = scene.config(
        WEB_AND_JOBS,
        "certificates: {sources: [{name: ca, embedded: {caDir: /run/credentials/reeve.service}}]}",
    );
    machine.write("/etc/reeve/reeve.yaml", &config);
    machine.run(["systemctl", "daemon-reload"]).ok();
    machine.run(["systemctl", "restart", "reeve"]).ok();
    eventually("the key signs certificates", || {
        let status = machine.run(["reeve", "status", "--json"]).json();
        status["certificates"][0]["serial"].is_string()
    });
    assert_eq!(
        machine
            .shell("cat /run/credentials/reeve.service/root.pem")
            .ok(),
        root
    );
    assert!(
        !machine
            .shell("ls /var/lib/reeve/ca/root.key")
            .status
            .success(),
        "no other key was made"
    );
}

#[test]
fn a_kernel_without_landlock_is_told_of_and_refused_where_it_is_required() {
    let scene = Scene::new("", "[Service]\nSystemCallFilter=~landlock_create_ruleset\n");
    let machine = scene.boot();
    assert_eq!(machine.property("reeve.service", "ActiveState"), "active");
    let log = machine.log("reeve.service");
    assert!(log.contains("is not shut off from files"), "{log}");
    // And of what it is that lacks it.
    assert!(log.contains("by a filter of system calls"), "{log}");
    let warnings = logged_as("warning", &machine);
    assert!(
        warnings.contains("is not shut off from files"),
        "{warnings}"
    );
    assert!(!warnings.contains(" INFO "), "{warnings}");
    assert!(!warnings.contains("<4>"), "{warnings}");

    let config = scene.config("", "sandbox: {landlock: required}");
    machine.write("/etc/reeve/reeve.yaml", &config);
    let restarted = machine.run(["systemctl", "restart", "reeve"]);
    assert!(!restarted.status.success());
    let log = machine.log("reeve.service");
    assert!(log.contains("`sandbox.landlock` is `required`"), "{log}");
    let errors = logged_as("err", &machine);
    assert!(
        errors.contains("`sandbox.landlock` is `required`"),
        "{errors}"
    );
    assert!(!errors.contains("is not shut off from files"), "{errors}");
}

/// What the service has logged, of this severity and worse.
fn logged_as(priority: &str, machine: &Machine) -> String {
    let words = [
        "journalctl",
        "--output=cat",
        "--unit=reeve.service",
        "--priority",
    ];
    machine.run(words.iter().chain(&[priority])).ok()
}

const ONCE_AND_JOBS: &str = "enforcedParents: [/system.slice]
workloads:
  - {name: once, unit: once.service}
  - {name: jobs, unit: jobs.slice}";

const ONCE: &str = "
[Service]
Type=oneshot
ExecStart=/usr/local/bin/peer send SERVER --text hello --patience 5
";

const JOBS: &str = "workloads: [{name: jobs, unit: jobs.slice}]";

const WEB_AND_JOBS: &str = "workloads:
  - {name: web, unit: web@.service}
  - {name: jobs, unit: jobs.slice}";

const WEB: &str = "
[Service]
ExecStart=/bin/sleep infinity
";

/// A node for a machine, and a server on another that answers at two ports.
struct Scene {
    node: Node,
    server: Workload,
    _servers: [harness::Process; 2],
    _other: Node,
    files: PathBuf,
}

impl Scene {
    /// With these lines in the daemon's configuration, and this drop-in for its unit.
    fn new(config: &str, unit: &str) -> Self {
        let network = Network::new();
        let (node, other) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let server = other.pod("server");
        let servers = [PORT, PORT + 1].map(|port| serve(&server, port, &[]));
        let files = node.folder().join("machine");
        let scene = Self {
            files,
            node,
            _servers: servers,
            server,
            _other: other,
        };
        let early = EARLY.replace("SERVER", &scene.server());
        for (file, text) in [
            ("reeve/reeve.yaml", scene.config(config, "").as_str()),
            ("reeve/policies/none.yaml", ""),
            ("drop-in/test.conf", unit),
            ("drop-in/libraries.conf", LIBRARIES),
            ("drop-in-guard/libraries.conf", LIBRARIES),
            ("early.service", &early),
        ] {
            let file = scene.files.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        scene
    }

    /// A machine that starts the service when it boots, and `early.service` behind it.
    fn boot(&self) -> Machine {
        self.boot_with(&["reeve.service", "early.service"])
    }

    /// A machine that starts these units when it boots.
    fn boot_with(&self, wanted: &[&str]) -> Machine {
        boot(&self.node, &self.files, "early.service", wanted)
    }

    fn config(&self, lines: &str, more: &str) -> String {
        format!(
            "trustDomain: example.org\n\
             peers: [{{name: server, addresses: [{}]}}]\n\
             policies: {{folder: policies}}\n\
             {lines}\n{more}\n",
            self.server.addresses().v4
        )
    }

    /// Lets a workload call the server.
    fn policy_of(&self, workload: &str) -> String {
        format!(
            "apiVersion: reeve.dev/v1alpha1\n\
             kind: ConnectionPolicy\n\
             metadata: {{name: {workload}}}\n\
             spec:\n\
             \x20 workloads: {{names: [{workload}]}}\n\
             \x20 egress:\n\
             \x20   - to: [{{cidr: {}/32}}]\n\
             \x20     ports: [{{port: {PORT}}}]\n",
            self.server.addresses().v4
        )
    }

    fn server(&self) -> String {
        self.server.addresses().port4(PORT).to_string()
    }

    /// Where no policy lets anybody.
    fn elsewhere(&self) -> String {
        self.server.addresses().port4(PORT + 1).to_string()
    }
}

/// Boots a machine with the shipped units and files of this folder: the configuration in `reeve`, drop-ins of
/// the units in `drop-in` and `drop-in-guard`, and one more unit. It starts those that are wanted.
pub(crate) fn boot(node: &Node, folder: &Path, unit: &str, wanted: &[&str]) -> Machine {
    let files = |name: &str| folder.join(name);
    let deploy = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    for unit in ["reeve.service", "reeve-guard.service"] {
        fs::copy(deploy.join(unit), files(unit)).unwrap();
    }
    fs::create_dir(files("wants")).unwrap();
    for unit in wanted {
        symlink(format!("../{unit}"), files("wants").join(unit)).unwrap();
    }
    let at = |name: &str| format!("/etc/systemd/system/{name}");
    Machine::boot(
        node,
        &[
            (&files("reeve"), "/etc/reeve"),
            (&files("reeve.service"), &at("reeve.service")),
            (&files("reeve-guard.service"), &at("reeve-guard.service")),
            (&files(unit), &at(unit)),
            (&files("drop-in"), &at("reeve.service.d")),
            (&files("drop-in-guard"), &at("reeve-guard.service.d")),
            (&files("wants"), &at("sysinit.target.wants")),
        ],
    )
}

/// Runs a client in a unit of its own, in a slice, which calls the server at once.
fn start_in(slice: &str, machine: &Machine, scene: &Scene) -> Output {
    machine.run([
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        "--slice",
        slice,
        "peer",
        "send",
        &scene.server(),
        "--text",
        "hello",
        "--patience",
        "5",
    ])
}
