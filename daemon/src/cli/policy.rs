//! `reeve policy`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Subcommand, ValueEnum};

use super::{
    EXIT_USAGE,
    args::{DEFAULT_CONFIG, DEFAULT_SOCKET},
    ask,
    explain::render,
    failed, print, print_json,
    table::Table,
};
use crate::{
    admin::{self, Answer},
    answers::{self, Offline, Outcome, PolicyRow},
};

/// What can be done with policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Run tests of policies: do they allow and refuse what is expected?
    #[command(
        long_about = "\
Run tests of policies: workloads, peers and policies, and what is expected of connections between \
them. Needs no daemon and no root; docs/answers.md describes the files.",
        after_help = "\
Examples:
  reeve policy test tests/shop.yaml
  reeve policy test --format junit tests/*.yaml > junit.xml

Exit codes: 0 all is as expected; 1 something is not; 2 a file is wrong."
    )]
    Test {
        /// Files with documents of `kind: PolicyTest`
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Form of the results
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },

    /// List the policies in force, with their rules and the workloads that they are for
    #[command(after_help = "\
Examples:
  reeve policy list
  reeve policy list --json --config ./reeve.yaml

Exit codes: 0 listed; 1 no daemon answers; 2 a file is wrong.")]
    List {
        /// List those of this configuration, without a daemon
        #[arg(long, short, value_name = "FILE", num_args = 0..=1, default_missing_value = DEFAULT_CONFIG)]
        config: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The daemon's admin socket (`admin.socket` of its configuration)
        #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, conflicts_with = "config")]
        socket: PathBuf,
    },

    /// Find what is not wrong in policies, and probably not meant
    #[command(
        long_about = "\
Find what is not wrong in policies, and probably not meant: rules that match nothing, or that \
another rule covers; workloads that cannot resolve names, or that nobody can reach; and egress that \
the destination does not let in. Needs no daemon and no root.",
        after_help = "\
Examples:
  reeve policy lint
  reeve policy lint --config ./reeve.yaml --json | jq -r '.[].kind'

Exit codes: 0 nothing was found; 1 something was; 2 a file is wrong."
    )]
    Lint {
        /// The configuration
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Form of results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people: what is not as expected, and why.
    Text,
    /// One object with all of them.
    Json,
    /// JUnit's XML, which CI systems read.
    Junit,
}

/// `reeve policy`.
#[must_use]
pub fn policy(command: &PolicyCommand) -> ExitCode {
    match command {
        PolicyCommand::Test { files, format } => test(files, *format),
        PolicyCommand::List {
            config,
            json,
            socket,
        } => list(config.as_deref(), *json, socket),
        PolicyCommand::Lint { config, json } => lint(config, *json),
    }
}

// === reeve policy list ===

fn list(config: Option<&Path>, json: bool, socket: &Path) -> ExitCode {
    let rows = match config {
        Some(file) => match Offline::load(file) {
            Ok(offline) => answers::list(&offline.snapshot),
            Err(mistakes) => {
                eprintln!("{mistakes}");
                return ExitCode::from(EXIT_USAGE);
            }
        },
        None => {
            let answered = ask(socket, admin::Command::Policies, |answer| match answer {
                Answer::Policies(rows) => Some(rows),
                _ => None,
            });
            match answered {
                Ok(rows) => rows,
                Err(code) => return code,
            }
        }
    };
    if json {
        return print_json(&rows);
    }
    let mut page = String::new();
    for row in &rows {
        page.push_str(&row_text(row));
    }
    page.push_str(&format!("{} policies\n", rows.len()));
    print(&page)
}

fn row_text(row: &PolicyRow) -> String {
    let workloads = if row.workloads.is_empty() {
        "no workload of this node".to_owned()
    } else {
        row.workloads.join(", ")
    };
    let mut table = Table::new(["RULE", "FAR ENDS", "PORTS", "AT"]);
    for rule in &row.rules {
        let name = rule.name.rsplit('/').next().unwrap_or_default();
        table.push([
            name.to_owned(),
            rule.far_ends.join(", or "),
            rule.ports.join(", "),
            rule.at.clone(),
        ]);
    }
    format!(
        "{} ({}, {}), for {workloads}\n{table}\n",
        row.name, row.kind, row.at
    )
}

// === reeve policy lint ===

fn lint(config: &Path, json: bool) -> ExitCode {
    let offline = match Offline::load(config) {
        Ok(offline) => offline,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let findings = answers::lint(&offline);
    let printed = if json {
        print_json(&findings)
    } else {
        let line = |finding: &answers::Finding| {
            format!(
                "{}: {}: {}\n",
                finding.at,
                finding.kind.as_str(),
                finding.what
            )
        };
        let lines: String = findings.iter().map(line).collect();
        print(&format!("{lines}{} findings\n", findings.len()))
    };
    if printed != ExitCode::SUCCESS {
        return ExitCode::from(EXIT_USAGE);
    }
    if findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

// === reeve policy test ===

fn test(files: &[PathBuf], format: Format) -> ExitCode {
    let mut outcomes = Vec::new();
    let mut mistaken = false;
    for file in files {
        match answers::run_cases(file) {
            Ok(of_file) => outcomes.extend(of_file),
            Err(mistakes) => {
                eprintln!("{mistakes}");
                mistaken = true;
            }
        }
    }
    if mistaken && outcomes.is_empty() {
        return ExitCode::from(EXIT_USAGE);
    }
    let failures = outcomes.iter().filter(|outcome| !outcome.passed).count();
    let text = match format {
        Format::Text => text(&outcomes, failures),
        Format::Junit => junit(&outcomes, failures),
        Format::Json => {
            let whole = serde_json::json!({
                "cases": outcomes.len(),
                "failed": failures,
                "results": outcomes,
            });
            match serde_json::to_string_pretty(&whole) {
                Ok(text) => text + "\n",
                Err(error) => return failed(&error),
            }
        }
    };
    let printed = print(&text);
    if printed != ExitCode::SUCCESS {
        return printed;
    }
    if mistaken {
        return ExitCode::from(EXIT_USAGE);
    }
    if failures > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn text(outcomes: &[Outcome], failures: usize) -> String {
    let mut page = String::new();
    for outcome in outcomes.iter().filter(|outcome| !outcome.passed) {
        page.push_str(&format!(
            "FAILED {}:{}: {}\n",
            outcome.file.display(),
            outcome.line,
            outcome.name
        ));
        page.push_str(&indented(&difference(outcome)));
    }
    page.push_str(&format!(
        "{} cases: {} as expected, {failures} not\n",
        outcomes.len(),
        outcomes.len() - failures
    ));
    page
}

/// What was expected, what is, and why.
fn difference(outcome: &Outcome) -> String {
    let expected = &outcome.expected;
    let mut wanted = expected.verdict.as_str().to_owned();
    if let Some(rule) = &expected.rule {
        wanted.push_str(&format!(", by the rule {rule}"));
    }
    if let Some(reason) = &expected.reason {
        wanted.push_str(&format!(", for the reason {reason}"));
    }
    let halves = outcome.explanation.halves.iter();
    let got: Vec<_> = halves
        .map(|half| format!("{} {} by {}", half.direction, half.reason, half.rule))
        .collect();
    format!(
        "expected: {wanted}\ngot:      {} ({})\n{}",
        outcome.explanation.verdict.as_str(),
        got.join("; "),
        render(&outcome.explanation)
    )
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn junit(outcomes: &[Outcome], failures: usize) -> String {
    let mut page = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"reeve policy test\" \
         tests=\"{}\" failures=\"{failures}\">\n",
        outcomes.len()
    );
    for outcome in outcomes {
        page.push_str(&format!(
            "  <testcase classname=\"{}\" name=\"{}\" line=\"{}\"",
            xml(&outcome.file.display().to_string()),
            xml(&outcome.name),
            outcome.line
        ));
        if outcome.passed {
            page.push_str("/>\n");
        } else {
            let text = xml(&difference(outcome));
            page.push_str(&format!(
                ">\n    <failure message=\"not as expected\">{text}</failure>\n  </testcase>\n"
            ));
        }
    }
    page.push_str("</testsuite>\n");
    page
}

fn xml(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() || *c == '\n')
        .map(|c| match c {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            '"' => "&quot;".to_owned(),
            other => other.to_string(),
        })
        .collect()
}
