//! The alert rules of deploy/prometheus/: `promtool`'s own tests of them, and whether a daemon has the
//! metrics that they ask for.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use crate::opposite::Guarded;

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
    // Nothing is left out: each alert fires in one of the tests.
    let read = |name: &str| fs::read_to_string(folder().join(name)).unwrap();
    let (rules, tests) = (read("alerts.yaml"), read("alerts_test.yaml"));
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let fires = format!("alertname: {name}\n        exp_alerts:\n");
        assert!(tests.contains(&fires), "{name} fires in no test");
    }
}

#[test]
fn every_metric_in_the_rules_is_one_that_the_daemon_has() {
    let guarded = Guarded::start();
    let help = guarded.daemon.get("/metrics").unwrap();
    let sources = crate::documents::root().join("daemon/src/telemetry");
    let code: String = fs::read_dir(sources)
        .unwrap()
        .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
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
