//! What certificates in files cost: for 1, 100 and 1,000 identities on one node, the time from a
//! changed file to the new certificate's being in force and to the first handshake that shows it,
//! memory, and what a change to one identity costs all others.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use harness::{Daemon, FileIssuer, Network, Node, Workload};
use serde_json::json;

use super::{memory::resident, report::Report, scene::processor_seconds};

/// Identities on the node.
const NUMBERS: [u32; 3] = [1, 100, 1000];
/// Changes that are timed.
const CHANGES: usize = 15;
/// Port at which the workload's certificate is presented.
const TUNNEL: u16 = 15008;
/// For a daemon to read the files of all identities.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at the daemon's log.
const LOOK: Duration = Duration::from_millis(2);
/// For memory to become what it stays at.
const SETTLE: Duration = Duration::from_secs(3);

/// Measures for each number of identities.
pub(crate) fn measure(report: &mut Report) {
    let mut alone = 0.0;
    for number in NUMBERS {
        eprintln!("{number} identities: writing their files, and starting the daemon");
        let scene = Scene::set(number);
        let memory = resident(scene.daemon.id());
        if number == 1 {
            alone = memory;
        } else {
            let each = (memory - alone) / f64::from(number - 1);
            report.note(
                &format!("reload_{number}_identities_resident_kib_each"),
                each / 1024.0,
            );
        }
        eprintln!("{number} identities: ten seconds of doing nothing");
        let idle = scene.processor_time(|| thread::sleep(Duration::from_secs(10)));
        report.note(
            &format!("reload_{number}_identities_idle_cpu_percent"),
            idle * 10.0,
        );
        let read = scene.attempts();
        let (mut in_force, mut shown) = (Vec::new(), Vec::new());
        let processor = scene.processor_time(|| {
            for change in 1..=CHANGES {
                let (first, then) = scene.change();
                eprintln!(
                    "{number} identities: change {change} of {CHANGES} in force after {first:.0} ms, \
                     seen in a handshake after {then:.0} ms"
                );
                in_force.push(first);
                shown.push(then);
            }
        });
        let name = |what: &str| format!("reload_{number}_identities_{what}");
        for (what, mut times) in [("in_force", in_force), ("handshake", shown)] {
            times.sort_by(f64::total_cmp);
            let figure = |end: &str| name(&format!("change_to_{what}_ms_{end}"));
            report.note(&figure("p50"), times[CHANGES / 2]);
            report.note(&figure("max"), times[CHANGES - 1]);
        }
        report.note(
            &name("cpu_ms_per_change"),
            processor * 1000.0 / CHANGES as f64,
        );
        report.note(
            &name("sets_read_per_change"),
            (scene.attempts() - read) / CHANGES as f64,
        );
    }
}

struct Scene {
    daemon: Daemon,
    server: Workload,
    stranger: Workload,
    issuer: FileIssuer,
    base: std::path::PathBuf,
    _nodes: [Node; 2],
    _network: Network,
}

impl Scene {
    fn set(number: u32) -> Self {
        let network = Network::new();
        let (node, elsewhere) = (
            Node::new(&network, "node"),
            Node::new(&network, "elsewhere"),
        );
        let (server, stranger) = (node.pod("server"), elsewhere.pod("stranger"));
        let base = node.folder().join("certificates");
        let issuer = FileIssuer::new(node.folder().join("issuer"));
        issuer.issue(&id("server"), &base.join("server"));
        issuer.issue(&id("stranger"), &base.join("stranger"));
        // The others run nowhere: what their certificates cost is the same.
        let mut workloads = vec![json!({
            "name": "server",
            "cgroup": server.cgroup().below_mount(),
        })];
        for other in 1..number {
            let name = format!("other-{other}");
            issuer.issue(&id(&name), &base.join(&name));
            workloads.push(json!({"name": name, "cgroup": format!("/reeve-bench/{name}")}));
        }
        let daemon = node
            .reeve()
            .set("/certificates/sources", json!([FileIssuer::source(&base)]))
            .set("/workloads", json!(workloads))
            .set("/log/level", json!("info"))
            .start();
        let scene = Self {
            daemon,
            server,
            stranger,
            issuer,
            base,
            _nodes: [node, elsewhere],
            _network: network,
        };
        let deadline = Instant::now() + PATIENCE;
        while scene.accepted() < f64::from(number) {
            assert!(Instant::now() < deadline, "not all certificates are read");
            thread::sleep(Duration::from_millis(50));
        }
        thread::sleep(SETTLE);
        scene
    }

    fn accepted(&self) -> f64 {
        let labels = [("result", "accepted")];
        let metrics = self.daemon.metrics();
        metrics.sum("reeve_certificate_reloads_total", &labels)
    }

    /// Times that any identity's files were read.
    fn attempts(&self) -> f64 {
        let metrics = self.daemon.metrics();
        metrics.sum("reeve_certificate_reloads_total", &[])
    }

    /// Seconds of processor that the daemon takes meanwhile.
    fn processor_time(&self, meanwhile: impl FnOnce()) -> f64 {
        let before = processor_seconds(self.daemon.id());
        meanwhile();
        processor_seconds(self.daemon.id()) - before
    }

    /// Replaces the server's certificate. Milliseconds from the last file until the daemon says
    /// that the new one is in force, and until a handshake shows it, to within one handshake of a
    /// program that is started for it.
    fn change(&self) -> (f64, f64) {
        let before = self.presented();
        let told = || self.daemon.logged(&["certificate in force", &id("server")]);
        let told_before = told().len();
        self.issuer.issue(&id("server"), &self.base.join("server"));
        let start = Instant::now();
        let milliseconds = || start.elapsed().as_secs_f64() * 1000.0;
        while told().len() == told_before {
            assert!(start.elapsed() < PATIENCE, "the new one is not in force");
            thread::sleep(LOOK);
        }
        let in_force = milliseconds();
        while self.presented() == before {
            assert!(start.elapsed() < PATIENCE, "the new one is not presented");
        }
        (in_force, milliseconds())
    }

    /// The serial number that the server's tunnel port presents.
    fn presented(&self) -> String {
        let own = self.base.join("stranger");
        let file = |name: &str| path(&own.join(name));
        let reeve = path(&harness::Programs::get().reeve);
        let output = self.stranger.exec([
            &reeve,
            "certs",
            "inspect",
            &self.server.addresses().port4(TUNNEL).to_string(),
            "--certificate",
            &file("svid.pem"),
            "--key",
            &file("svid.key"),
            "--json",
        ]);
        let line = output
            .stdout
            .lines()
            .find(|line| line.contains("\"serial\""))
            .unwrap_or_default();
        assert!(!line.is_empty(), "no certificate is presented: {output:?}");
        line.to_owned()
    }
}

fn id(name: &str) -> String {
    format!("spiffe://example.org/ns/default/sa/{name}")
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
