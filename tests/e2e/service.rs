//! The service is upgraded and restarted by a real systemd, under connections in tunnels.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use harness::{Daemon, Machine, Network, Node, Process, Programs, Workload, eventually};
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, TCP, of, serve, tcp},
    systemd::{LIBRARIES, boot},
};

/// Short, so that a test may outlast it.
const WATCHDOG: Duration = Duration::from_secs(4);
/// Of the server that answers and closes.
const ANSWERS: u16 = PORT + 1;

#[test]
fn an_upgrade_in_the_unit_outlives_the_watchdog_and_no_connection_notices() {
    let scene = Scene::new("timeouts: {drain: 3s}");
    let machine = scene.boot();
    let first = scene.process();
    for round in 0..2 {
        let before = scene.process();
        let said = machine.run(["reeve", "upgrade"]).ok();
        let now = scene.process();
        assert_ne!(now, before, "round {round}");
        let line = format!("process {now}, has taken over from reeve ");
        assert!(said.contains(&line), "{said}");
        assert!(said.contains(&format!("process {before}, whose")), "{said}");
        assert_eq!(machine.property("reeve.service", "MainPID"), now);
        // What would end it has the time to.
        thread::sleep(WATCHDOG * 2);
        assert_eq!(machine.property("reeve.service", "MainPID"), now);
        scene.goes_on();
    }
    // The first connection is still the first daemon's.
    assert!(machine.shell(&format!("kill -0 {first}")).status.success());
    let log = machine.log("reeve.service");
    for bad in [
        "Watchdog timeout",
        "reception only permitted",
        "not our child",
        "Failed",
    ] {
        assert!(!log.contains(bad), "{bad}: {log}");
    }
    assert_eq!(machine.property("reeve.service", "NRestarts"), "0");
    assert_eq!(
        machine
            .property("reeve.service", "StatusText")
            .split(':')
            .next(),
        Some("ready; a daemon before still drains")
    );
    // And it is a service like any other after it.
    let hung = {
        let main = machine.number_of(&scene.process());
        let threads = harness::Thread::all_of(main);
        let worker = threads.iter().find(|thread| thread.name == "tunnel-0");
        crate::health::Hung::of(worker.unwrap().id)
    };
    eventually("systemd gives it up", || {
        machine.log("reeve.service").contains("Watchdog timeout")
    });
    drop(hung);
    // The daemon that systemd starts next knows of the old one, and a stop ends that as well.
    eventually("the next daemon knows of the first one", || {
        let status = machine.run(["reeve", "status", "--json"]);
        status.status.success() && {
            let status = status.json();
            let old = status["predecessors"].as_array().unwrap();
            old.iter()
                .any(|old| old["process"].as_u64() == first.parse().ok())
        }
    });
    let beats = scene.beats();
    eventually("the first connection goes on", || scene.beats() > beats + 5);
    machine.run(["systemctl", "stop", "reeve"]).ok();
    let left = "cat /sys/fs/cgroup/reeve.slice/reeve.service/cgroup.procs 2>/dev/null; pgrep -x reeve; true";
    assert_eq!(machine.shell(left).ok(), "");
    machine
        .run(["reeve", "detach", "--config", "/etc/reeve/reeve.yaml"])
        .ok();
}

#[test]
fn an_upgrade_to_another_layout_of_the_kernel_maps_and_back_goes_on_in_the_unit() {
    let scene = Scene::new("timeouts: {drain: 3s}");
    let other = "/etc/reeve/other";
    fs::copy(Programs::other_layout(), scene.files.join("reeve/other")).unwrap();
    let machine = scene.boot();
    let first = scene.process();
    let install = format!("mount --bind {other} /usr/local/bin/reeve");
    for put in [install.as_str(), "umount --lazy /usr/local/bin/reeve"] {
        machine.shell(put).ok();
        let before = scene.process();
        let said = machine.run(["reeve", "upgrade"]).ok();
        let now = scene.process();
        assert_ne!(now, before, "{said}");
        assert_eq!(machine.property("reeve.service", "MainPID"), now);
        scene.goes_on();
    }
    // The first connection is still the first daemon's, in whose layout it is.
    assert!(machine.shell(&format!("kill -0 {first}")).status.success());
    let pins = machine.shell("ls /sys/fs/bpf").ok();
    assert!(pins.contains("reeve-old-"), "{pins}");
    assert_eq!(machine.property("reeve.service", "NRestarts"), "0");
    machine.run(["systemctl", "stop", "reeve"]).ok();
    let pins = machine.shell("ls /sys/fs/bpf").ok();
    assert_eq!(pins.trim(), "reeve", "those of daemons that have ended go");
    machine
        .run(["reeve", "detach", "--config", "/etc/reeve/reeve.yaml"])
        .ok();
}

#[test]
fn who_takes_over_from_outside_the_unit_is_refused_and_a_failed_upgrade_changes_nothing() {
    let scene = Scene::new("");
    let machine = scene.boot();
    let process = scene.process();
    let config = "/etc/reeve/reeve.yaml";
    let run = ["reeve", "run", "--takeover", "--config", config];
    let outside = ["systemd-run", "--quiet", "--wait", "--pipe"];
    let refused = machine.run(outside.iter().chain(&run)).fails();
    assert!(refused.contains("run `reeve upgrade`"), "{refused}");
    // Nor does it help to have systemd listen, or to be somewhere in the unit without that.
    let notify = ["--setenv=NOTIFY_SOCKET=/run/systemd/notify"];
    let refused = machine.run(outside.iter().chain(&notify).chain(&run));
    let refused = refused.fails();
    assert!(refused.contains("run `reeve upgrade`"), "{refused}");
    let inside = format!(
        "echo $$ > /sys/fs/cgroup/reeve.slice/reeve.service/cgroup.procs && exec {}",
        run.join(" ")
    );
    let refused = machine.shell(&inside).fails();
    assert!(refused.contains("run `reeve upgrade`"), "{refused}");

    // A new daemon that cannot do what the old one can.
    machine
        .shell("mv /etc/reeve/ca/root.key /etc/reeve/ca/away && echo none > /etc/reeve/ca/root.key")
        .ok();
    let failed = machine.run(["reeve", "upgrade"]).fails();
    assert!(failed.contains("nothing has changed"), "{failed}");
    assert!(failed.contains("root.key"), "{failed}");
    machine
        .shell("mv /etc/reeve/ca/away /etc/reeve/ca/root.key")
        .ok();
    // Or a configuration that it does not take.
    machine
        .shell(&format!(
            "cp {config} /tmp/good && echo 'more: 1' >> {config}"
        ))
        .ok();
    let failed = machine.run(["reeve", "upgrade"]).fails();
    assert!(failed.contains("more"), "{failed}");
    machine.shell(&format!("cp /tmp/good {config}")).ok();
    // Or a unit that reloads in another way.
    let drop_in = "/etc/systemd/system/reeve.service.d/old.conf";
    for (lines, said) in [
        ("ExecReload=\nExecReload=/bin/true", "deploy/reeve.service"),
        ("NotifyAccess=main", "NotifyAccess=exec"),
    ] {
        machine.write(drop_in, &format!("[Service]\n{lines}\n"));
        machine.run(["systemctl", "daemon-reload"]).ok();
        let failed = machine.run(["reeve", "upgrade"]).fails();
        assert!(failed.contains(said), "{failed}");
    }
    machine
        .shell(&format!("rm {drop_in} && systemctl daemon-reload"))
        .ok();

    assert_eq!(scene.process(), process);
    assert_eq!(machine.property("reeve.service", "MainPID"), process);
    assert_eq!(machine.property("reeve.service", "ActiveState"), "active");
    scene.goes_on();
    machine.run(["systemctl", "reload", "reeve"]).ok();
    assert_eq!(scene.process(), process, "a reload is a reload");
    machine.run(["reeve", "upgrade"]).ok();
    assert_ne!(scene.process(), process);
    scene.goes_on();
}

#[test]
fn a_restart_under_a_long_connection_keeps_no_new_one_waiting() {
    let scene = Scene::new("");
    let machine = scene.boot();
    let before = scene.process();
    let begun = Instant::now();
    machine.run(["systemctl", "restart", "reeve"]).ok();
    let taken = begun.elapsed();
    // One that waited for the long connection would take `timeouts.drain`, half a minute.
    assert!(
        taken < Duration::from_secs(15),
        "the restart took {taken:?}"
    );
    assert_ne!(scene.process(), before);
    // The long connection is still the old daemon's, and lives for `timeouts.drain`.
    assert!(machine.shell(&format!("kill -0 {before}")).status.success());
    scene.goes_on();
    let seen = scene.probed();
    let slowest = seen["slowest_ms"].as_u64().unwrap();
    eprintln!("a restart took {taken:?}; meanwhile {seen}");
    assert!(slowest < 5000, "{seen}");
    eventually("the store is empty again", || {
        machine.property("reeve.service", "NFileDescriptorStore") == "0"
    });
    thread::sleep(WATCHDOG * 2);
    assert_eq!(
        machine.property("reeve.service", "MainPID"),
        scene.process()
    );
    assert_eq!(machine.property("reeve.service", "NRestarts"), "0");
    // A stop waits for the last connection, and leaves nothing that runs.
    machine.run(["systemctl", "restart", "client"]).ok();
    machine.run(["systemctl", "stop", "client"]).ok();
    machine.run(["systemctl", "stop", "reeve"]).ok();
    assert_eq!(machine.property("reeve.service", "Result"), "success");
    eventually("the old daemon has ended", || {
        !machine.shell(&format!("kill -0 {before}")).status.success()
    });
    machine
        .run(["reeve", "detach", "--config", "/etc/reeve/reeve.yaml"])
        .ok();
}

/// A service with a client in a machine, whose connections go through tunnels to another node.
struct Scene {
    machine: std::cell::OnceCell<Machine>,
    node: Node,
    files: PathBuf,
    _servers: [Process; 2],
    _far: Daemon,
    _server: Workload,
    _other: Node,
}

impl Scene {
    /// With these lines in the daemon's configuration.
    fn new(lines: &str) -> Self {
        let network = Network::new();
        let (node, other) = (Node::new(&network, "one"), Node::new(&network, "two"));
        let (client, server) = (node.service("client"), other.pod("server"));
        let ports = [TCP, tcp(ANSWERS)];
        let hears = ports
            .iter()
            .fold(of(&server), |policy, port| policy.hears(&client, *port));
        let calls = ports
            .iter()
            .fold(of(&client), |policy, port| policy.calls(&server, *port));
        let far = other
            .reeve()
            .enrol(&server)
            .peer(&client)
            .policy(&hears.text())
            .start();
        let servers = [
            serve(&server, PORT, &[]),
            serve(&server, ANSWERS, &["--mode", "answer"]),
        ];
        let files = node.folder().join("machine");
        let address = |port| server.addresses().port4(port);
        let unit = format!(
            "[Unit]\nAfter=reeve.service\n[Service]\n\
             ExecStart=/bin/sh -c 'peer heartbeat {} --every 100 & exec peer probe {} --pause 20'\n",
            address(PORT),
            address(ANSWERS)
        );
        let config = format!(
            "trustDomain: example.org\n\
             node: {{addresses: {:?}}}\n\
             workloads: [{{name: client, namespace: default, serviceAccount: client, labels: {{app: client}}, \
             unit: client.service}}]\n\
             peers: [{{name: server, namespace: default, serviceAccount: server, labels: {{app: server}}, \
             addresses: {:?}, tunnel: true}}]\n\
             policies: {{folder: policies}}\n\
             certificates: {{sources: [{{embedded: {{caDir: /etc/reeve/ca}}}}]}}\n\
             {lines}\n",
            node.addresses().both().map(|ip| ip.to_string()),
            server.addresses().both().map(|ip| ip.to_string()),
        );
        let watchdog = format!("[Service]\nWatchdogSec={}s\n", WATCHDOG.as_secs());
        for (file, text) in [
            ("reeve/reeve.yaml", config.as_str()),
            ("reeve/policies/client.yaml", &calls.text()),
            ("drop-in/test.conf", &watchdog),
            ("drop-in/libraries.conf", LIBRARIES),
            ("drop-in-guard/libraries.conf", LIBRARIES),
            ("client.service", &unit),
        ] {
            let file = files.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let copied = std::process::Command::new("cp")
            .args(["-a".as_ref(), network.trust().as_os_str()])
            .arg(files.join("reeve/ca"))
            .status();
        assert!(copied.unwrap().success());
        Self {
            machine: std::cell::OnceCell::new(),
            node,
            files,
            _servers: servers,
            _far: far,
            _server: server,
            _other: other,
        }
    }

    /// Boots the machine; connections are made when this returns.
    fn boot(&self) -> &Machine {
        let boot = || {
            boot(
                &self.node,
                &self.files,
                "client.service",
                &["reeve.service"],
            )
        };
        let machine = self.machine.get_or_init(boot);
        eventually("the service is ready", || {
            machine.property("reeve.service", "ActiveState") == "active"
        });
        // Once it is enrolled and served.
        eventually("connections are made", || {
            machine.run(["systemctl", "restart", "client"]).ok();
            thread::sleep(Duration::from_millis(500));
            self.beats() > 2 && self.probed()["worked"].as_u64() > Some(2)
        });
        machine
    }

    fn machine(&self) -> &Machine {
        self.machine.get().unwrap()
    }

    /// The process that answers at the admin socket.
    fn process(&self) -> String {
        let status = self.machine().run(["reeve", "status", "--json"]).json();
        status["process"].to_string()
    }

    fn last_line(&self, with: &str) -> String {
        // Of this start of the client.
        let invocation = self.machine().property("client.service", "InvocationID");
        let filter = format!("_SYSTEMD_INVOCATION_ID={invocation}");
        let words = ["journalctl", "--output", "cat", "--lines", "200", &filter];
        let log = self.machine().run(words).ok();
        let mut lines = log.lines().rev();
        lines
            .find(|line| line.starts_with(with))
            .unwrap_or_default()
            .to_owned()
    }

    fn beats(&self) -> u64 {
        let line = self.last_line("beat ");
        line.trim_start_matches("beat ").parse().unwrap_or(0)
    }

    /// What became of short connections.
    fn probed(&self) -> Value {
        serde_json::from_str(&self.last_line("{")).unwrap_or_default()
    }

    /// Fails the test unless the long connection lives, and every short one has worked.
    #[track_caller]
    fn goes_on(&self) {
        let begun = Instant::now();
        let (beats, worked) = (self.beats(), self.probed()["worked"].as_u64().unwrap());
        eventually("the long connection goes on", || self.beats() > beats + 5);
        eventually("short connections go on", || {
            self.probed()["worked"].as_u64().unwrap() > worked + 20
        });
        let seen = self.probed();
        assert_eq!(seen["failed"], json!({}), "{seen}, {:?}", begun.elapsed());
    }
}
