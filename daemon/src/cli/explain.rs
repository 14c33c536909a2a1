//! `reeve explain`.

use std::{fmt::Write, path::PathBuf, process::ExitCode};

use clap::Args;
use reeve_common::protocol;

use super::{
    EXIT_USAGE, another_question,
    args::{DEFAULT_CONFIG, DEFAULT_SOCKET},
    failed, print,
};
use crate::{
    admin::{self, Answer},
    answers::{self, Enquiry, Explanation, Half, Offline, Verdict},
    telemetry::ProtocolName,
};

/// Denied.
const EXIT_DENIED: u8 = 1;
/// The kernel's maps hold something else than what was explained.
const EXIT_DISAGREES: u8 = 3;

/// The words of `reeve explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// Who opens the connection: name of a workload or peer, SPIFFE ID, or address
    #[arg(long, value_name = "WHO")]
    from: String,
    /// To whom: name of a workload or peer, SPIFFE ID, or address
    #[arg(long, value_name = "WHO")]
    to: String,
    /// Port of the destination; ICMP has none
    #[arg(long, required_unless_present = "protocol")]
    port: Option<u16>,
    /// `tcp`, `udp`, `icmp`, `sctp`, or the number of another IP protocol
    #[arg(long, default_value = "tcp", value_parser = protocol_number)]
    protocol: u8,
    /// The source has no reeve: what it sends comes as plaintext, whoever it is
    #[arg(long)]
    plaintext: bool,
    /// As if the policies in dry run were in force
    #[arg(long)]
    dry_run: bool,
    /// Answer from this configuration and its policies, without a daemon
    #[arg(long, short, value_name = "FILE", num_args = 0..=1, default_missing_value = DEFAULT_CONFIG)]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, conflicts_with = "config")]
    socket: PathBuf,
}

/// `reeve explain`.
#[must_use]
pub fn explain(words: &Explain) -> ExitCode {
    match ask(words) {
        Ok(explanation) => show(&explanation, words.json),
        Err(code) => code,
    }
}

fn ask(words: &Explain) -> Result<Explanation, ExitCode> {
    let has_ports = [protocol::TCP, protocol::UDP, protocol::SCTP].contains(&words.protocol);
    if has_ports && words.port.is_none() {
        let name = ProtocolName(words.protocol);
        return Err(wrong(&format!("{name} has ports: add `--port`")));
    }
    let enquiry = Enquiry {
        from: words.from.clone(),
        to: words.to.clone(),
        port: words.port.unwrap_or_default(),
        protocol: words.protocol,
        plaintext: words.plaintext,
        dry_run: words.dry_run,
    };
    if let Some(file) = &words.config {
        let offline = Offline::load(file).map_err(|mistakes| wrong(&mistakes.to_string()))?;
        let ports = offline.config.ports;
        return answers::explain(&offline.snapshot, ports, &enquiry, None)
            .map_err(|error| wrong(&error));
    }
    match admin::ask(&words.socket, admin::Command::Explain(Box::new(enquiry))) {
        Ok(Answer::Explanation(explanation)) => Ok(*explanation),
        Ok(Answer::Error(refusal)) => Err(wrong(&refusal)),
        Ok(_) => {
            another_question();
            Err(ExitCode::from(EXIT_USAGE))
        }
        Err(error) => {
            failed(&error);
            Err(ExitCode::from(EXIT_USAGE))
        }
    }
}

/// An error is never taken for a verdict.
fn wrong(what: &str) -> ExitCode {
    eprintln!("reeve: {what}");
    ExitCode::from(EXIT_USAGE)
}

fn show(explanation: &Explanation, json: bool) -> ExitCode {
    let text = if json {
        match serde_json::to_string_pretty(explanation) {
            Ok(text) => text + "\n",
            Err(error) => return wrong(&error.to_string()),
        }
    } else {
        render(explanation)
    };
    if print(&text) != ExitCode::SUCCESS {
        return ExitCode::from(EXIT_USAGE);
    }
    if explanation.disagrees() {
        eprintln!(
            "reeve: the kernel does not do what the policies say: what is above as `kernel` holds. \
             See `reeve status` for what is missing, and report this if nothing is"
        );
        return ExitCode::from(EXIT_DISAGREES);
    }
    match explanation.verdict {
        Verdict::Allow => ExitCode::SUCCESS,
        Verdict::Deny => ExitCode::from(EXIT_DENIED),
    }
}

fn protocol_number(text: &str) -> Result<u8, String> {
    ProtocolName::parse(text).map(|name| name.0).ok_or_else(|| {
        "expected `tcp`, `udp`, `icmp`, `sctp`, or the number of another IP protocol, 1 to 255"
            .to_owned()
    })
}

/// The answer for people.
pub(super) fn render(explanation: &Explanation) -> String {
    let mut page = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut page, explanation);
    page
}

fn write(page: &mut String, explanation: &Explanation) -> std::fmt::Result {
    write!(
        page,
        "{} -> {}, {}",
        explanation.from, explanation.to, explanation.protocol
    )?;
    if explanation.port != 0 {
        write!(page, " {}", explanation.port)?;
    }
    writeln!(page, ": {}", shout(explanation.verdict))?;
    for half in &explanation.halves {
        write_half(page, half)?;
    }
    for note in &explanation.notes {
        writeln!(page, "  note: {note}")?;
    }
    if let Some(failure) = &explanation.last_failure {
        write!(
            page,
            "  the last attempt failed, {} ({}): {}: {}",
            failure.time, failure.direction, failure.reason, failure.because
        )?;
        match &failure.error {
            Some(error) => writeln!(page, " {error}")?,
            None => writeln!(page)?,
        }
    }
    for what in &explanation.would_allow {
        writeln!(page, "  would allow it: {what}")?;
    }
    Ok(())
}

fn write_half(page: &mut String, half: &Half) -> std::fmt::Result {
    let to = if half.direction == "egress" {
        "to"
    } else {
        "from"
    };
    write!(
        page,
        "  {} of {} {to} {}",
        half.direction, half.workload, half.far_end
    )?;
    match (&half.network, half.address) {
        (Some(network), _) => write!(page, " in {network}")?,
        (None, Some(address)) if half.far_end != address.to_string() => {
            write!(page, " at {address}")?;
        }
        _ => {}
    }
    writeln!(
        page,
        ", {}: {} by {}{}",
        match half.transport.as_str() {
            "tunnel" => "through a tunnel",
            _ => "plaintext",
        },
        shout(half.verdict),
        half.rule,
        at(&half.rule_at)
    )?;
    writeln!(page, "    {}: {}", half.reason, half.because)?;
    for near in &half.nearest {
        writeln!(page, "    nearest: {}{}", near.rule, at(&near.rule_at))?;
        for misfit in &near.misfits {
            writeln!(page, "      {}", misfit.why)?;
        }
    }
    if let Some(kernel) = &half.kernel {
        let agrees = if kernel.agrees { "agrees" } else { "DISAGREES" };
        writeln!(page, "    kernel {agrees}: {}", kernel.holds)?;
    }
    Ok(())
}

fn at(place: &Option<String>) -> String {
    place
        .as_ref()
        .map_or_else(String::new, |place| format!(" ({place})"))
}

fn shout(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allow => "allowed",
        Verdict::Deny => "DENIED",
    }
}
