//! `reeve observe`.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, builder::PossibleValuesParser};
use reeve_common::Reason;

use super::{another_question, args::DEFAULT_SOCKET, failed, refused};
use crate::{
    admin::{self, Answer},
    telemetry::{
        Facts, Filter, Happening, Lost, LostIn, ObserveRequest, Observed, ProtocolName, Who,
    },
};

/// The words of `reeve observe`.
#[derive(Debug, Args)]
pub struct Observe {
    /// The local workload: name, SPIFFE ID, address or network
    #[arg(long, value_name = "WHO")]
    workload: Vec<String>,
    /// The far end: name, SPIFFE ID, address or network
    #[arg(long, value_name = "WHO")]
    peer: Vec<String>,
    /// What became of the connection
    #[arg(long, value_parser = ["allow", "deny"])]
    verdict: Vec<String>,
    /// Seen from the local workload
    #[arg(long, value_parser = ["egress", "ingress"])]
    direction: Vec<String>,
    /// Port of the destination
    #[arg(long)]
    port: Vec<u16>,
    /// Why, as in `no_policy`
    #[arg(long, value_parser = reasons(), hide_possible_values = true)]
    reason: Vec<String>,
    /// Whether reeve refuses it, here or at the far end, or something does not work
    #[arg(long, value_parser = ["policy", "failure"])]
    cause: Vec<String>,
    /// `tcp`, `udp`, `icmp`, `sctp`, or the number of another IP protocol
    #[arg(long, value_parser = protocol)]
    protocol: Vec<String>,
    /// Show what happened in this last time too, as in `5m`
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    since: Option<Duration>,
    /// Show the last N that have happened, and end
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Go on showing what happens; the default on a terminal without `--last`
    #[arg(long, overrides_with = "no_follow")]
    follow: bool,
    /// Show what has happened, and end; the default in a pipe
    #[arg(long, overrides_with = "follow")]
    no_follow: bool,
    /// Print JSON, one object on each line
    #[arg(long)]
    json: bool,
    /// The daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// `reeve observe`.
#[must_use]
pub fn observe(words: &Observe) -> ExitCode {
    let request = words.request(io::stdout().is_terminal());
    let follow = request.follow;
    let observing = match admin::observe(&words.socket, request) {
        Ok(observing) => observing,
        Err(error) => return failed(&error),
    };
    let mut out = io::stdout().lock();
    for answer in observing {
        let line = match answer {
            Ok(Answer::Observed(observed)) if words.json => {
                match serde_json::to_string(&observed) {
                    Ok(line) => line,
                    Err(error) => return failed(&error),
                }
            }
            Ok(Answer::Observed(observed)) => render(&observed),
            Ok(Answer::Error(refusal)) => return refused(&refusal),
            Ok(_) => return another_question(),
            Err(error) => return failed(&error),
        };
        match writeln!(out, "{line}") {
            Ok(()) => {}
            // A reader that has gone away, as `head` does, is no failure.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
            Err(error) => return failed(&error),
        }
    }
    if follow {
        return refused("it has ended, and with it what is observed");
    }
    ExitCode::SUCCESS
}

fn reasons() -> PossibleValuesParser {
    PossibleValuesParser::new(Reason::ALL.iter().map(|reason| reason.as_str()))
}

fn protocol(text: &str) -> Result<String, String> {
    let name = ProtocolName::parse(text).ok_or(
        "expected `tcp`, `udp`, `icmp`, `sctp`, or the number of another IP protocol, 1 to 255",
    )?;
    Ok(name.to_string())
}

// === impl Observe ===

impl Observe {
    fn request(&self, terminal: bool) -> ObserveRequest {
        let who = |texts: &[String]| texts.iter().cloned().map(Who::from).collect();
        ObserveRequest {
            filter: Filter {
                workloads: who(&self.workload),
                peers: who(&self.peer),
                verdicts: self.verdict.clone(),
                directions: self.direction.clone(),
                ports: self.port.clone(),
                reasons: self.reason.clone(),
                causes: self.cause.clone(),
                protocols: self.protocol.clone(),
            },
            since_milliseconds: self
                .since
                .map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            last: self.last,
            follow: self.follow || (!self.no_follow && terminal && self.last.is_none()),
        }
    }
}

// === text ===

fn render(observed: &Observed) -> String {
    let mut line = time(observed.time);
    // Writing to a string does not fail.
    let _ = match &observed.happening {
        Happening::Allowed(facts) => connection(&mut line, "allowed", facts),
        Happening::Refused(facts) => {
            let failed = facts.cause.as_deref() == Some("failure");
            let event = if failed { "FAILED" } else { "REFUSED" };
            connection(&mut line, event, facts)
        }
        Happening::HandshakeFailed(facts) => connection(&mut line, "NO TUNNEL", facts),
        Happening::Opened(facts) => connection(&mut line, "opened", facts),
        Happening::Closed(facts) => connection(&mut line, "closed", facts),
        Happening::Unproven(facts) => connection(&mut line, "UNPROVEN", facts),
        Happening::Lost(lost) => write!(line, " LOST     {}", lost_text(lost)),
    };
    line
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

fn connection(line: &mut String, event: &str, facts: &Facts) -> std::fmt::Result {
    write!(
        line,
        " {event:<8} {:<7} {} -> {} {} {}: {}",
        facts.direction,
        end(&facts.source, &facts.source_id, &facts.source_address),
        end(
            &facts.destination,
            &facts.destination_id,
            &facts.destination_address
        ),
        facts.protocol,
        facts.transport,
        facts.reason,
    )?;
    if !facts.rule.is_empty() {
        write!(line, ", rule {}", facts.rule)?;
    }
    if let Some(place) = &facts.rule_at {
        write!(line, " ({place})")?;
    }
    if let Some(id) = &facts.connection {
        write!(line, ", connection {id}")?;
    }
    if let Some(carried) = &facts.carried {
        write!(
            line,
            ", {} B sent, {} B received, {:.3} s",
            carried.bytes_sent, carried.bytes_received, carried.duration_seconds
        )?;
    }
    if let Some(error) = &facts.error {
        write!(line, ": {error}")?;
    }
    Ok(())
}

fn end(
    name: &str,
    id: &Option<crate::identity::SpiffeId>,
    address: &Option<std::net::SocketAddr>,
) -> String {
    let mut text = name.to_owned();
    if let Some(id) = id {
        text.push_str(&format!(" {id}"));
    }
    if let Some(address) = address {
        text.push_str(&format!(" {address}"));
    }
    text
}

fn lost_text(lost: &Lost) -> String {
    let events = lost.events.unwrap_or_default();
    match lost.place {
        LostIn::Kernel => format!(
            "{events} events found the kernel's ring buffer full; a larger `maps.events` loses \
             fewer"
        ),
        LostIn::Queue => format!(
            "{events} events while nobody read here; a filter, or a quicker reader, loses fewer"
        ),
        LostIn::Recent => "until then events are no longer kept; a larger `admin.recentEvents` \
             keeps more"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_was_refused_by_what_and_where_that_is_written() {
        let json = r#"{"time":"2026-11-25T02:11:03.123456Z","event":"refused","verdict":"deny",
            "direction":"egress","transport":"plaintext","protocol":"tcp","source":"web",
            "sourceId":"spiffe://example.org/ns/shop/sa/web","destination":"unknown",
            "destinationAddress":"192.0.2.1:5432","reason":"policy_deny",
            "rule":"shop/no-db/egress[0]","ruleAt":"/etc/reeve/policies/shop.yaml:7"}"#;
        let observed: Observed = serde_json::from_str(json).unwrap();
        assert_eq!(
            render(&observed),
            "2026-11-25T02:11:03.123Z REFUSED  egress  web spiffe://example.org/ns/shop/sa/web \
             -> unknown 192.0.2.1:5432 tcp plaintext: policy_deny, rule shop/no-db/egress[0] \
             (/etc/reeve/policies/shop.yaml:7)"
        );
    }
}
