//! `reeve certs`: the certificates of this node's workloads, from the daemon.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    args::DEFAULT_SOCKET,
    failed,
    inspect::{Inspect, inspect},
    print, refused,
};
use crate::admin::{self, Answer, BundleStatus, CertificateStatus, Status};

/// `reeve certs`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Certs {
    /// What to do instead.
    #[command(subcommand)]
    command: Option<CertsCommand>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// What can be done with certificates besides.
#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// Check any certificate, or what any tunnel port presents, as reeve would
    #[command(
        long_about = "\
Check any certificate, or what any tunnel port presents, with the rules by which reeve judges its \
peers, and name every rule that is broken.

A file is PEM, the workload's certificate first, then those above it; a key in it is not looked at. \
An address is a host and a port, such as that of reeve or of ztunnel. Without a bundle nothing is \
said of whether the chain leads to somebody who is trusted.",
        after_help = "\
Examples:
  reeve certs inspect ./svid.pem
  reeve certs inspect ./svid.pem --bundle ./bundle.pem --crl ./crl.pem
  reeve certs inspect 10.0.0.7:15008 --bundle ./bundle.pem --id spiffe://example.org/ns/shop/sa/db
  reeve certs inspect '[fd00::7]:15008' --certificate ./svid.pem --key ./svid.key --json

Exit codes: 0 no rule is broken; 1 one is, the other end refused the certificate that it was \
shown, or there was nothing to inspect; 2 the command line is wrong."
    )]
    Inspect(Inspect),
}

/// `reeve certs`, and what is below it.
#[must_use]
pub fn certs(words: &Certs) -> ExitCode {
    match &words.command {
        Some(CertsCommand::Inspect(words)) => inspect(words),
        None => list(&words.socket, words.json),
    }
}

fn list(socket: &Path, json: bool) -> ExitCode {
    match admin::ask(socket, admin::Command::Status) {
        Ok(Answer::Status(status)) if json => {
            let Status {
                certificates,
                bundles,
                ..
            } = *status;
            let answer = json!({"certificates": certificates, "bundles": bundles});
            match serde_json::to_string_pretty(&answer) {
                Ok(text) => print(&(text + "\n")),
                Err(error) => failed(&error),
            }
        }
        Ok(Answer::Status(status)) => print(&page(&status.certificates, &status.bundles)),
        Ok(Answer::Error(refusal)) => refused(&refusal),
        Ok(_) => refused("it answered another question: is it another version?"),
        Err(error) => failed(&error),
    }
}

fn page(certificates: &[CertificateStatus], bundles: &[BundleStatus]) -> String {
    let mut page = String::new();
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    // Writing to a string does not fail.
    for certificate in certificates {
        let _ = writeln!(page, "{}", certificate.spiffe_id);
        let mut line = |title: &str, text: &str| {
            let _ = writeln!(page, "  {title:<12} {text}");
        };
        line("source", &certificate.source);
        match (&certificate.not_before, &certificate.not_after) {
            (Some(from), Some(until)) => {
                let left = certificate.seconds_left.unwrap_or_default();
                let left = humantime::format_duration(Duration::from_secs(left));
                line("issuer", &known(&certificate.issuer));
                line("serial", &known(&certificate.serial));
                line("valid", &format!("{from} to {until}, {left} left"));
                let generation = certificate.generation.unwrap_or_default();
                line("generation", &generation.to_string());
            }
            _ => line(
                "valid",
                "THERE IS NO VALID CERTIFICATE: connections are refused",
            ),
        }
        line("renewal", &known(&certificate.next_attempt));
        let result = match (&certificate.last_attempt, &certificate.last_error) {
            (None, _) => "never".to_owned(),
            (Some(at), None) => format!("{at}: in force"),
            (Some(at), Some(error)) => format!(
                "{at}: REFUSED: {error} (last success {})",
                known(&certificate.last_success)
            ),
        };
        line("last reload", &result);
    }
    if certificates.is_empty() {
        page.push_str("there are no identities: no workload of this node runs\n");
    }
    for bundle in bundles {
        let _ = writeln!(page, "trust bundle of {}", bundle.trust_domain);
        let _ = writeln!(
            page,
            "  certificates {}, the first expires {}",
            bundle.certificates,
            known(&bundle.earliest_not_after)
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_stands_out() {
        let certificate = CertificateStatus {
            spiffe_id: "spiffe://example.org/ns/shop/sa/web".into(),
            source: "files".into(),
            last_attempt: Some("2026-01-01T00:00:00Z".into()),
            last_error: Some("the private key does not fit the certificate".into()),
            ..CertificateStatus::default()
        };
        let page = page(&[certificate], &[]);
        for text in [
            "spiffe://example.org/ns/shop/sa/web\n  source       files\n",
            "THERE IS NO VALID CERTIFICATE",
            "2026-01-01T00:00:00Z: REFUSED: the private key does not fit the certificate (last success -)",
        ] {
            assert!(page.contains(text), "{text}\nis not in\n{page}");
        }
    }
}
