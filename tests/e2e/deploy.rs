//! What is given to those who run reeve, beside the binary: the dashboard, the alert rules and the
//! manifests are about this daemon.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use harness::{certs::crl_pem, eventually};
use nix::sys::signal::Signal;
use serde_json::json;
use time::Duration;

use crate::{
    arrange::{PORT, Pair, is_denied, say, send, serve},
    opposite::root_of,
};

/// How the names of all of them begin.
const METRIC: &str = "reeve_";
/// There is none where there is no old daemon.
const OF_OLD_DAEMONS: &str = "reeve_predecessor_age_seconds";

#[test]
fn every_metric_of_the_dashboard_and_the_alerts_is_there() {
    let pair = Pair::new();
    let mut one = pair.allowing_at_one().start();
    // The first of them has made the root; the second has a list of it, whose end it tells.
    let list = pair.network.trust().join("crl.pem");
    let root = root_of(&pair.network);
    fs::write(
        &list,
        crl_pem(&root.revocation_list(&[], Duration::hours(1))),
    )
    .unwrap();
    let lists = json!({"example.org": [list]});
    let two = pair
        .allowing_at_two()
        .set("/certificates/revocationLists", lists)
        // Nobody is there, which is told too.
        .set(
            "/certificates/bundleEndpoints",
            json!([{
                "trustDomain": "elsewhere.example",
                "url": "https://127.0.0.1:1/",
                "profile": "https_web",
            }]),
        )
        .start();
    let server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    // Something of everything: what is allowed, what is denied, what fails, what ends early.
    say(&pair.client, to, "hello");
    is_denied(&pair.client, pair.server.addresses().port4(PORT + 1));
    drop(server);
    send(&pair.client, to, &["--text", "nobody there"]).fails();
    one.signal(Signal::SIGHUP);
    for file in ["grafana/reeve.json", "prometheus/alerts.yaml"] {
        let names = metrics_in(&deploy().join(file));
        assert!(names.len() > 5, "{file}: {names:?}");
        for name in names.iter().filter(|name| **name != OF_OLD_DAEMONS) {
            eventually(&format!("{file}: a daemon tells {name}"), || {
                one.metrics().has(name) || two.metrics().has(name)
            });
        }
    }
    // An old daemon, for as long as a connection keeps it.
    let _server = serve(&pair.server, PORT, &[]);
    let mut heart = pair.client.spawn_peer(["heartbeat", &to.to_string()]);
    heart.wait_for("beat 2");
    let _old = one.take_over();
    eventually("a daemon tells the age of the one before", || {
        one.metrics().has(OF_OLD_DAEMONS)
    });
}

#[test]
fn the_manifests_are_what_kubernetes_takes() {
    let validator = beside_target("kubernetes-validate");
    let checked = Command::new("python3")
        .args(["-m", "kubernetes_validate", "--strict"])
        .arg(deploy().join("kubernetes/reeve.yaml"))
        .env("PYTHONPATH", validator)
        .output()
        .unwrap();
    let said = [checked.stdout, checked.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(checked.status.success(), "{said}");
    assert!(said.contains("daemonset/reeve"), "{said}");
}

#[test]
fn the_kubelet_is_as_patient_with_a_busy_node_as_systemd_is() {
    let manifest = fs::read_to_string(deploy().join("kubernetes/reeve.yaml")).unwrap();
    let unit = fs::read_to_string(deploy().join("reeve.service")).unwrap();
    let number = |line: &str, name: &str| {
        let value = line.trim().strip_prefix(name)?;
        value.trim_end_matches('s').trim().parse::<u32>().ok()
    };
    let watchdog = unit
        .lines()
        .find_map(|line| number(line, "WatchdogSec="))
        .unwrap();
    for probe in ["startupProbe:", "livenessProbe:", "readinessProbe:"] {
        // Its fields, each on a line of its own.
        let (_, fields) = manifest.split_once(probe).unwrap();
        let field = |name: &str| {
            fields
                .lines()
                .skip(1)
                .take_while(|line| !line.contains("Probe:") && !line.contains("resources:"))
                .find_map(|line| number(line, name))
        };
        // The kubelet's default is one second, which load alone exceeds.
        let timeout = field("timeoutSeconds:").unwrap_or(1);
        assert!(timeout >= 5, "{probe} waits {timeout} s for an answer");
        let patience = field("periodSeconds:").unwrap() * field("failureThreshold:").unwrap_or(3);
        if probe != "readinessProbe:" {
            assert!(patience >= watchdog, "{probe} gives up after {patience} s");
        }
    }
}

#[test]
fn the_dashboard_is_one_grafana_can_read() {
    let text = fs::read_to_string(deploy().join("grafana/reeve.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let numbers: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(
        numbers.len(),
        panels.len(),
        "each panel has a number of its own"
    );
    for panel in panels {
        assert!(panel["targets"][0]["expr"].is_string(), "{panel}");
    }
}

/// Names of metrics that a text has.
fn metrics_in(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let mut names = BTreeSet::new();
    for (start, _) in text.match_indices(METRIC) {
        let name = text[start..].split(|c: char| !c.is_ascii_lowercase() && c != '_');
        names.extend(name.take(1).map(str::to_owned));
    }
    names
}

/// What is shipped beside the binary.
pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// A tool that `cargo xtask setup` keeps in cargo's target folder.
pub(crate) fn beside_target(tool: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let found = program
        .ancestors()
        .map(|folder| folder.join("tools").join(tool))
        .find(|folder| folder.is_dir());
    found.unwrap_or_else(|| panic!("{tool} is not there: run `cargo xtask setup`"))
}
