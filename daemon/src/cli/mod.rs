//! The command line: what can be asked of `reeve`, and how the answers look.
//!
//! In: words. Out: a [`Command`]; the ones that need no daemon of their own run here.

mod args;
mod ca;
mod certs;
mod detach;
mod explain;
mod inspect;
mod man;
mod observe;
mod policy;
mod reload;
mod status;
mod table;
mod upgrade;
mod wait;

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap::CommandFactory;
use serde::Serialize;

pub use args::{Asking, Cli, Command};
pub use ca::{CaCommand, ca};
pub use certs::{Certs, certs};
pub use explain::{Explain, explain};
pub use man::man;
pub use observe::{Observe, observe};
pub use policy::{PolicyCommand, policy};
pub use upgrade::{Upgrade, report, upgrade};
pub use wait::{Wait, wait};

use crate::{
    admin::{self, Answer, Status},
    config::{self, Config},
    control::{self, Guarded},
    datapath, telemetry,
};

/// The command line or a file is wrong: the same again will fail again.
pub const EXIT_USAGE: u8 = 2;

/// What could be guarded is, and something is open until the daemon has seen it.
const EXIT_UNCOVERED: u8 = 3;

/// Prints an error with what caused it, one line each.
pub fn print_error(error: &dyn std::error::Error) {
    let prefix = telemetry::journal_prefix(tracing::Level::ERROR);
    let mut text = format!("{prefix}reeve: {}\n", lines(error, prefix));
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!("{prefix}  because: {}\n", lines(cause, prefix)));
        source = cause.source();
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// What an error says, with the beginning that each of its lines is to have.
fn lines(error: &dyn std::error::Error, prefix: &str) -> String {
    error.to_string().replace('\n', &format!("\n{prefix}"))
}

/// `reeve status`.
#[must_use]
pub fn status(asking: &Asking) -> ExitCode {
    match ask_status(&asking.socket) {
        Ok(status) if asking.json => print_json(&status),
        Ok(status) => print(&status::render(&status)),
        Err(code) => code,
    }
}

fn ask_status(socket: &Path) -> Result<Box<Status>, ExitCode> {
    ask(socket, admin::Command::Status, |answer| match answer {
        Answer::Status(status) => Some(status),
        _ => None,
    })
}

/// `reeve reload`; of a `service`, what the unit's `ExecReload=` does.
#[must_use]
pub fn reload(asking: &Asking, service: bool) -> ExitCode {
    if service {
        upgrade::reload_service(asking)
    } else {
        reload_running(asking)
    }
}

fn reload_running(asking: &Asking) -> ExitCode {
    let answered = ask(
        &asking.socket,
        admin::Command::Reload,
        |answer| match answer {
            Answer::Reloaded(report) => Some(report),
            _ => None,
        },
    );
    let report = match answered {
        Ok(report) => report,
        Err(code) => return code,
    };
    let printed = if asking.json {
        print_json(&report)
    } else {
        print(&reload::render(&report))
    };
    if report.is_accepted() {
        printed
    } else {
        ExitCode::FAILURE
    }
}

/// `reeve check`.
#[must_use]
pub fn check(config: &Path, elsewhere: bool) -> ExitCode {
    match config::check(config) {
        Ok(summary) if elsewhere => print(&format!("{}: {summary}\n", config.display())),
        Ok(summary) => {
            let unknown = summary.config.as_ref().map(control::unknown_units);
            let unknown = unknown.unwrap_or_default();
            for (workload, unit) in &unknown {
                let _ = writeln!(
                    io::stderr(),
                    "{}: workload `{workload}`: systemd knows no unit `{unit}`, so that nothing would be \
                     enforced for it; correct the name, or check with `--elsewhere` what is for another machine",
                    config.display()
                );
            }
            let mut text = match unknown.is_empty() {
                true => format!("{}: {summary}\n", config.display()),
                false => String::new(),
            };
            let warnings = [
                datapath::untested_kernel(),
                datapath::gap_of_running_kernel(),
            ];
            let running = summary.config.as_ref().map(differs_from_running);
            let warnings = warnings.into_iter().flatten();
            for warning in warnings.chain(running.into_iter().flatten()) {
                text.push_str(&format!("warning: {warning}\n"));
            }
            match print(&text) {
                printed if unknown.is_empty() => printed,
                _ => ExitCode::from(EXIT_USAGE),
            }
        }
        Err(mistakes) => {
            let _ = writeln!(io::stderr(), "{mistakes}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// What the daemon that runs with this configuration's admin socket, if one does, would not take of it.
fn differs_from_running(config: &Config) -> Vec<String> {
    match admin::ask(&config.admin.socket, admin::Command::Status) {
        // Fingerprints are comparable within a version.
        Ok(Answer::Status(status)) if status.version == env!("CARGO_PKG_VERSION") => {
            config.restart_needed(&status.settings).warnings()
        }
        _ => Vec::new(),
    }
}

/// `reeve detach`.
#[must_use]
pub fn detach(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(mistakes) => {
            let _ = writeln!(io::stderr(), "{mistakes}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let socket = &config.admin.socket;
    if admin::ask(socket, admin::Command::Status).is_ok() {
        let _ = writeln!(
            io::stderr(),
            "reeve: a daemon answers on {}: stop it first, or it would go on without a kernel side",
            socket.display()
        );
        return ExitCode::FAILURE;
    }
    match detach::everything(&config) {
        Ok(removed) if removed.is_empty() => {
            print("nothing of reeve is left on this node, and nothing was\n")
        }
        Ok(removed) => {
            let mut text = String::new();
            for what in removed {
                text.push_str(&format!("removed {what}\n"));
            }
            text.push_str("nothing is enforced on this node any more\n");
            print(&text)
        }
        Err(error) => failed(&*error),
    }
}

/// `reeve guard`.
#[must_use]
pub fn guard(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(mistakes) => {
            let _ = writeln!(io::stderr(), "{mistakes}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if let Err(error) = telemetry::start_logging(&config.log) {
        return failed(&error);
    }
    let guarded = match control::guard(&config) {
        Ok(guarded) => guarded,
        Err(error) => return failed(&error),
    };
    let printed = print(&guard_report(&guarded));
    let prefix = telemetry::journal_prefix(tracing::Level::ERROR);
    for failure in &guarded.failed {
        let _ = writeln!(io::stderr(), "{prefix}reeve: NOT GUARDED: {failure}");
    }
    for name in &guarded.uncovered {
        let _ = writeln!(
            io::stderr(),
            "{prefix}reeve: NOT GUARDED: workload {name} has no cgroup yet, and no enforced parent above: it \
             is open until `reeve run` has found it; run it below one of `enforcedParents`, or have its \
             unit require reeve.service"
        );
    }
    if !guarded.failed.is_empty() {
        ExitCode::FAILURE
    } else if !guarded.uncovered.is_empty() {
        ExitCode::from(EXIT_UNCOVERED)
    } else {
        printed
    }
}

fn guard_report(guarded: &Guarded) -> String {
    let mut text = String::new();
    let mut lines = |names: &[String], what: &str| {
        for name in names {
            text.push_str(&format!("{name}: {what}\n"));
        }
    };
    lines(
        &guarded.parents,
        "everything below is refused from its birth until the daemon knows it",
    );
    lines(&guarded.workloads, "refused until the daemon knows it");
    lines(&guarded.covered, "to come, below an enforced parent");
    if text.is_empty() && guarded.failed.is_empty() && guarded.uncovered.is_empty() {
        text.push_str("the configuration names no workload and no enforced parent\n");
    }
    text
}

/// `reeve completions`.
#[must_use]
pub fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "reeve", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// What the daemon answers, where that is what is `wanted`; else it has been printed what it says.
fn ask<T>(
    socket: &Path,
    command: admin::Command,
    wanted: impl FnOnce(Answer) -> Option<T>,
) -> Result<T, ExitCode> {
    match admin::ask(socket, command) {
        Ok(Answer::Error(refusal)) => Err(refused(&refusal)),
        Ok(answer) => wanted(answer).ok_or_else(another_question),
        Err(error) => Err(failed(&error)),
    }
}

fn another_question() -> ExitCode {
    refused("it answered another question: is it another version?")
}

fn refused(refusal: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "reeve: the daemon: {refusal}");
    ExitCode::FAILURE
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    print_error(error);
    ExitCode::FAILURE
}

fn print_json(value: &impl Serialize) -> ExitCode {
    match serde_json::to_string_pretty(value) {
        Ok(text) => print(&(text + "\n")),
        Err(error) => failed(&error),
    }
}

/// Prints to standard output. A reader that has gone away, as `head` does, is no failure.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&error),
        _ => ExitCode::SUCCESS,
    }
}
