//! The alert rules of deploy/prometheus/: `promtool`'s own tests of them, whether a daemon has the
//! metrics that they ask for, and a real Prometheus that scrapes a daemon and evaluates them.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use harness::{Network, Node, Place, Process, certs::Authority, eventually};
use serde_json::Value;

use crate::opposite::Guarded;

/// Where Prometheus listens, on the node's loopback.
const PROMETHEUS: &str = "127.0.0.1:9090";

/// A Prometheus on a node, set up as deploy/prometheus/ says, but quicker.
struct Prometheus {
    process: Process,
    place: Place,
}

impl Prometheus {
    fn start(node: &Node) -> Self {
        let own = node.folder().join("prometheus");
        fs::create_dir(&own).unwrap();
        let config = own.join("prometheus.yaml");
        let rules = folder().join("alerts.yaml");
        let scrape = fs::read_to_string(folder().join("scrape.yaml")).unwrap();
        let settings = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{}']\n{scrape}",
            rules.display()
        );
        fs::write(&config, settings).unwrap();
        // Where the daemon's metrics are: on the node's own loopback, and no workload.
        let place = node.host().clone();
        let process = place.spawn([
            "prometheus".to_owned(),
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", own.join("data").display()),
            format!("--web.listen-address={PROMETHEUS}"),
        ]);
        let mut prometheus = Self { process, place };
        eventually("Prometheus answers", || {
            let ended = prometheus.process.ended();
            assert!(ended.is_none(), "it ended: {}", prometheus.process.stderr());
            prometheus.get("/-/ready").status.success()
        });
        prometheus
    }

    fn get(&self, path: &str) -> harness::Output {
        let url = format!("http://{PROMETHEUS}{path}");
        self.place.exec(["curl", "-sSf", "--max-time", "5", &url])
    }

    /// What it answers to a question of its API.
    fn ask(&self, what: &str) -> Value {
        self.get(&format!("/api/v1/{what}")).json()["data"].clone()
    }

    /// The series that an expression gives.
    fn series(&self, expression: &str) -> Vec<Value> {
        let answer = self.ask(&format!("query?query={expression}"));
        answer["result"].as_array().cloned().unwrap_or_default()
    }
}

/// The value of a series.
fn value(series: &Value) -> f64 {
    series["value"][1].as_str().unwrap().parse().unwrap()
}

fn folder() -> PathBuf {
    crate::documents::root().join("deploy/prometheus")
}

fn promtool(words: &[&str]) -> Output {
    let mut command = Command::new("promtool");
    command.current_dir(folder()).args(words).output().unwrap()
}

#[test]
fn the_rules_pass_their_own_tests() {
    for words in [
        &["check", "rules", "alerts.yaml"][..],
        &["test", "rules", "alerts_test.yaml"],
        &["check", "config", "--syntax-only", "scrape.yaml"],
    ] {
        let output = promtool(words);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
    }
    // Nothing is left out: each alert fires in one of the tests, and is silent in one.
    let read = |name: &str| fs::read_to_string(folder().join(name)).unwrap();
    let (rules, tests) = (read("alerts.yaml"), read("alerts_test.yaml"));
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let fires = format!("alertname: {name}\n        exp_alerts:\n");
        assert!(tests.contains(&fires), "{name} fires in no test");
        let silent = format!("alertname: {name}}}");
        assert!(tests.contains(&silent), "{name} is silent in no test");
    }
}

#[test]
fn every_metric_in_the_rules_is_one_that_the_daemon_has() {
    let guarded = Guarded::start();
    let help = guarded.daemon.get("/metrics").unwrap();
    let sources = crate::documents::root().join("daemon/src/telemetry");
    let code: String = fs::read_dir(sources)
        .unwrap()
        .map(|file| file.unwrap().path())
        // Folders beside a file are its tests, which prove nothing here.
        .filter(|path| path.is_file())
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let rules = fs::read_to_string(folder().join("alerts.yaml")).unwrap();
    let mut seen = 0;
    for word in rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        if word.starts_with("reeve_") || word.starts_with("process_") {
            let shown = help.contains(&format!("# TYPE {word} "));
            // A family without series is not shown, as of what went wrong and never did.
            assert!(shown || code.contains(&format!("\"{word}\"")), "{word}");
            seen += 1;
        }
    }
    assert!(seen > 10);
}

#[test]
fn a_real_prometheus_scrapes_a_daemon_and_evaluates_the_rules() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("server");
    // An authority of whose life a twentieth is left.
    let short = Authority::root_with("other.example", |params| {
        params.not_before = params.not_after - time::Duration::hours(20);
    });
    let daemon = node
        .reeve()
        .enrol(&workload)
        .trust("other.example", &short.certificate_pem())
        .start();
    let prometheus = Prometheus::start(&node);
    eventually("the daemon is up", || {
        let up = prometheus.series("up");
        up.len() == 1 && value(&up[0]) == 1.0 && up[0]["metric"]["job"] == "reeve"
    });

    let ends = "reeve_certificate_not_after_timestamp_seconds";
    let series = prometheus.series(ends);
    let [certificate] = &series[..] else {
        panic!("{series:?}");
    };
    let id = workload.spiffe_id("example.org");
    assert_eq!(certificate["metric"]["identity"], id);
    assert_eq!(value(certificate), daemon.metrics().sum(ends, &[]));

    // By now every rule has been looked at, and one that waits for nothing has fired.
    let expires = |domain: &str| {
        let alerts = prometheus.ask("alerts")["alerts"].clone();
        alerts.as_array().unwrap().iter().any(|alert| {
            alert["labels"]["alertname"] == "ReeveTrustBundleExpires"
                && alert["labels"]["trust_domain"] == domain
                && alert["state"] == "firing"
        })
    };
    eventually("the alert", || expires("other.example"));
    assert!(!expires("example.org"));
    let mut rules = 0;
    eventually("every rule is evaluated", || {
        let groups = prometheus.ask("rules")["groups"].clone();
        let all = groups.as_array().unwrap().iter();
        let all: Vec<Value> = all
            .flat_map(|group| group["rules"].as_array().unwrap().clone())
            .collect();
        rules = all.len();
        all.iter().all(|rule| rule["health"] == "ok")
    });
    assert!(rules > 10, "{rules}");
}
