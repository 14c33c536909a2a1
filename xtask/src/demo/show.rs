//! Doing something and showing it.

use harness::{Daemon, Output, Place};
use serde_json::Value;

use super::stage::Stage;

/// Runs curl somewhere, and shows it.
pub(crate) fn curl(stage: &Stage, who: &str, place: &Place, arguments: &[&str]) -> Output {
    stage.command(who, &[&["curl"], arguments].concat());
    let output = place.exec(["curl", "--silent", "--show-error"].iter().chain(arguments));
    let telling = |line: &&str| line.starts_with("curl:") || line.contains("connect fail");
    for line in output.stderr.lines().filter(telling) {
        stage.output(line);
    }
    stage.output(&output.stdout);
    output
}

/// Shows what a daemon logged of a refusal, and claims that it was for this reason.
pub(crate) fn refusal(
    stage: &mut Stage,
    node: &str,
    daemon: &Daemon,
    texts: &[&str],
    reason: &str,
) -> String {
    let texts: Vec<_> = texts
        .iter()
        .copied()
        .chain(["connection refused"])
        .collect();
    let line = daemon.wait_for_log(&texts);
    let [direction, source, destination, given] =
        ["direction", "source", "destination", "reason"].map(|name| field(&line, name));
    stage.output(&format!(
        "{node} logged: {direction} {source} → {destination}, {given}"
    ));
    stage.claim(
        &format!("{node} gives the reason {reason}"),
        given == reason,
    );
    line
}

/// A field of a log line in JSON, empty where it is not there.
pub(crate) fn field(line: &str, name: &str) -> String {
    let line: Value = serde_json::from_str(line).unwrap_or_default();
    match &line[name] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}
