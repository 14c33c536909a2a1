//! `kind: PolicyTest`: what users expect of their policies, written down.

use std::path::{Path, PathBuf};

use reeve_common::{Reason, protocol};
use serde::{Deserialize, Serialize};

use super::{Enquiry, Explanation, Offline, Verdict, explain};
use crate::{
    config::{Config, ConfigErrors, Inline},
    telemetry::ProtocolName,
    yaml::{
        self, Document, Located, Mistakes, nearest, shown,
        values::{Name, Port},
    },
};

const API_VERSION: &str = "reeve.dev/v1alpha1";
const KIND: &str = "PolicyTest";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    dead_code,
    reason = "the kind is looked at before the document is read, and metadata is for people"
)]
struct PolicyTest {
    api_version: Option<Located<String>>,
    kind: Option<String>,
    metadata: Option<Metadata>,
    config_file: Option<Located<String>>,
    config: Option<Located<Inline>>,
    #[serde(default)]
    cases: Vec<Located<Case>>,
}

#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "for people")]
struct Metadata {
    name: Option<Name>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    name: Option<String>,
    from: Option<Located<String>>,
    to: Option<Located<String>>,
    port: Option<Port>,
    #[serde(default = "tcp")]
    protocol: ProtocolText,
    #[serde(default)]
    plaintext: bool,
    #[serde(default)]
    dry_run: bool,
    expect: Option<Verdict>,
    rule: Option<String>,
    reason: Option<ReasonText>,
}

/// What a case expects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Expected {
    /// What becomes of the connection.
    pub verdict: Verdict,
    /// The rule that says so at one of the ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The reason at one of the ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of a case. Fields of its JSON are never renamed, only added to.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The file.
    pub file: PathBuf,
    /// Line of the case, from 1.
    pub line: usize,
    /// Its name, or what it asks.
    pub name: String,
    /// Whether it is as expected.
    pub passed: bool,
    /// What was expected.
    pub expected: Expected,
    /// What is.
    pub explanation: Explanation,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct ProtocolText(u8);

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct ReasonText(Reason);

/// Runs all cases of a file. Documents that are no tests are policies, for all tests of the file.
///
/// # Errors
/// Every mistake in the file, or in those that it names.
pub fn run(file: &Path) -> Result<Vec<Outcome>, ConfigErrors> {
    let (documents, mut mistakes) = yaml::parse(file, &yaml::read_file(file)?);
    let is_test = |document: &&Document| {
        let kind = document.child(document.root(), "kind");
        kind.and_then(|kind| document.text(kind)) == Some(KIND)
    };
    let (tests, policies): (Vec<&Document>, Vec<&Document>) = documents.iter().partition(is_test);
    if tests.is_empty() && mistakes.is_empty() {
        mistakes.file(
            file,
            format!("holds no test; expected a document of `kind: {KIND}`"),
        );
    }
    let mut outcomes = Vec::new();
    for document in tests {
        match run_test(document, &policies, &mut mistakes) {
            Ok(of_test) => outcomes.extend(of_test),
            Err(more) => mistakes.extend(more),
        }
    }
    mistakes.into_result()?;
    Ok(outcomes)
}

fn run_test(
    document: &Document,
    policies: &[&Document],
    mistakes: &mut Mistakes,
) -> Result<Vec<Outcome>, ConfigErrors> {
    let Some(test) = yaml::read::<PolicyTest>(document, mistakes) else {
        return Ok(Vec::new());
    };
    let root = document.root();
    let version = test.api_version.as_ref();
    if version.is_none_or(|version| version.value != API_VERSION) {
        let node = version.map_or(root, |version| version.node);
        let what = format!("`apiVersion` is to be `{API_VERSION}`");
        mistakes.push(document.mistake(node, what));
    }
    if test.cases.is_empty() && document.child(root, "cases").is_none() {
        mistakes.push(document.mistake(root, "`cases` is missing; add what is expected"));
    }
    let config = match (test.config_file, test.config) {
        (Some(file), None) => {
            let folder = document.file().parent().unwrap_or(Path::new(""));
            Some(Config::load(&folder.join(&file.value))?)
        }
        (None, Some(config)) => config.value.settle(document, config.node, mistakes),
        _ => {
            let what = "expected exactly one of `config`, with workloads and peers, and \
                        `configFile`, the path of a configuration";
            mistakes.push(document.mistake(root, what));
            None
        }
    };
    let Some(config) = config.filter(|_| mistakes.is_empty()) else {
        return Ok(Vec::new());
    };
    let offline = Offline::beside(config, policies)?;
    let outcome = |case| run_case(document, case, &offline, mistakes);
    Ok(test.cases.iter().filter_map(outcome).collect())
}

fn run_case(
    document: &Document,
    case: &Located<Case>,
    offline: &Offline,
    mistakes: &mut Mistakes,
) -> Option<Outcome> {
    let mut require = |field: &str, missing: bool| {
        if missing && document.child(case.node, field).is_none() {
            let what = format!("`{field}` is missing; add it");
            mistakes.push(document.mistake(case.node, what));
        }
    };
    let ported = [protocol::TCP, protocol::UDP, protocol::SCTP].contains(&case.protocol.0);
    require("from", case.from.is_none());
    require("to", case.to.is_none());
    require("port", ported && case.port.is_none());
    require("expect", case.expect.is_none());
    let (from, to, verdict) = (case.from.as_ref()?, case.to.as_ref()?, case.expect?);
    let enquiry = Enquiry {
        from: from.value.clone(),
        to: to.value.clone(),
        port: case.port.map_or(0, |port| port.0),
        protocol: case.protocol.0,
        plaintext: case.plaintext,
        dry_run: case.dry_run,
    };
    let explanation = match explain(&offline.snapshot, offline.config.ports, &enquiry, None) {
        Ok(explanation) => explanation,
        Err(what) => {
            mistakes.push(document.mistake(case.node, what));
            return None;
        }
    };
    let expected = Expected {
        verdict,
        rule: case.rule.clone(),
        reason: case.reason.map(|reason| reason.0.as_str().to_owned()),
    };
    Some(Outcome {
        file: document.file().to_path_buf(),
        line: document.line(case.node),
        name: case.name.clone().unwrap_or_else(|| title(&enquiry)),
        passed: expected.is_met(&explanation),
        expected,
        explanation,
    })
}

fn title(enquiry: &Enquiry) -> String {
    let Enquiry { from, to, port, .. } = enquiry;
    format!("{from} -> {to}, {} {port}", ProtocolName(enquiry.protocol))
}

// === impl Expected ===

impl Expected {
    fn is_met(&self, explanation: &Explanation) -> bool {
        let halves = &explanation.halves;
        let rule = self.rule.as_ref();
        let reason = self.reason.as_ref();
        // Neither is met by some of the addresses of a network.
        !explanation.differs
            && explanation.verdict == self.verdict
            && rule.is_none_or(|rule| halves.iter().any(|half| half.rule == *rule))
            && reason.is_none_or(|reason| halves.iter().any(|half| half.reason == *reason))
    }
}

// === values ===

fn tcp() -> ProtocolText {
    ProtocolText(protocol::TCP)
}

impl TryFrom<String> for ProtocolText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let name = ProtocolName::parse(&text);
        name.map(|name| Self(name.0)).ok_or_else(|| {
            format!(
                "`{}` is no protocol; expected `TCP`, `UDP`, `SCTP`, `ICMP`, or the number of \
                 another one in quotes",
                shown(&text)
            )
        })
    }
}

impl TryFrom<String> for ReasonText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut all = Reason::ALL.iter();
        if let Some(reason) = all.find(|reason| reason.as_str() == text) {
            return Ok(Self(*reason));
        }
        let names = Reason::ALL.iter().map(|reason| reason.as_str());
        Err(match nearest(&text, names) {
            Some(near) => format!("`{}` is no reason; did you mean `{near}`?", shown(&text)),
            None => format!(
                "`{}` is no reason; expected one as in `no_policy`, see `reeve observe --help`",
                shown(&text)
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::reference;

    const REFERENCE: &str = include_str!("../../../docs/answers.md");

    #[test]
    fn every_field_is_described_and_every_description_has_a_field() {
        // What a configuration says is described with it.
        reference::compare_part::<PolicyTest>(REFERENCE, |field| !field.starts_with("config."));
    }

    #[test]
    fn the_example_with_every_field_is_valid() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("test.yaml");
        let text = reference::example(REFERENCE);
        std::fs::write(&file, text).unwrap();
        std::fs::write(folder.path().join("reeve.yaml"), CONFIGURATION).unwrap();
        let outcomes = run(&file).unwrap_or_else(|mistakes| panic!("{mistakes}"));
        assert_eq!(outcomes.len(), text.matches("expect:").count());
        for outcome in outcomes {
            assert!(outcome.passed, "{outcome:?}");
        }
    }

    /// What the example takes `reeve.yaml` to be.
    const CONFIGURATION: &str = "\
trustDomain: example.org
workloads: [{name: web, cgroup: /web}]
peers: [{name: db, addresses: [192.0.2.1], serviceAccount: db}]
";
}
