//! `reeve certs`: the certificates of this node's workloads, from the daemon.

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    args::Asking,
    ask_status,
    inspect::{Inspect, inspect},
    print, print_json,
};
use crate::admin::{BundleEndpointStatus, CertificateStatus, Status};

/// `reeve certs`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Certs {
    /// What to do instead.
    #[command(subcommand)]
    command: Option<CertsCommand>,
    #[command(flatten)]
    asking: Asking,
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
        None => list(&words.asking),
    }
}

fn list(asking: &Asking) -> ExitCode {
    match ask_status(&asking.socket) {
        Ok(status) if asking.json => print_json(&json!({
            "certificates": status.certificates,
            "bundles": status.bundles,
            "bundleEndpoints": status.bundle_endpoints,
        })),
        Ok(status) => print(&page(&status)),
        Err(code) => code,
    }
}

fn page(status: &Status) -> String {
    let mut page = String::new();
    for certificate in &status.certificates {
        identity(&mut page, certificate);
    }
    if status.certificates.is_empty() {
        page.push_str("there are no identities: no workload of this node runs\n");
    }
    for bundle in &status.bundles {
        title(
            &mut page,
            &format!("trust bundle of {}", bundle.trust_domain),
        );
        let expires = known(&bundle.earliest_not_after);
        let certificates = format!("{}, the first expires {expires}", bundle.certificates);
        line(&mut page, "certificates", &certificates);
        let revocation = match &bundle.next_update {
            Some(time) => format!("checked, the first list expires {time}"),
            None => "not checked: there is no list".to_owned(),
        };
        line(&mut page, "revocation", &revocation);
    }
    for one in &status.bundle_endpoints {
        endpoint(&mut page, one);
    }
    page
}

fn identity(page: &mut String, certificate: &CertificateStatus) {
    title(page, &certificate.spiffe_id);
    line(page, "source", &certificate.source);
    match (&certificate.not_before, &certificate.not_after) {
        (Some(from), Some(until)) => {
            let left = certificate.seconds_left.unwrap_or_default();
            let left = humantime::format_duration(Duration::from_secs(left));
            line(page, "issuer", known(&certificate.issuer));
            line(page, "serial", known(&certificate.serial));
            line(page, "valid", &format!("{from} to {until}, {left} left"));
            if let Some(until) = &certificate.signer_not_after {
                line(
                    page,
                    "signers",
                    &format!("the first CA above it expires {until}"),
                );
            }
            let generation = certificate.generation.unwrap_or_default();
            line(page, "generation", &generation.to_string());
        }
        _ => line(
            page,
            "valid",
            "THERE IS NO VALID CERTIFICATE: connections are refused",
        ),
    }
    // None of a source that tells by itself when there is something new.
    if let Some(next) = &certificate.next_attempt {
        line(page, "renewal", next);
    }
    let result = attempt(
        certificate.last_attempt.as_ref(),
        certificate.last_result.as_ref(),
        certificate.last_error.as_ref(),
        certificate.last_success.as_ref(),
    );
    line(page, "last reload", &result);
    for remark in &certificate.remarks {
        line(page, "remark", explained(remark));
    }
    for bundle in &certificate.refused_bundles {
        let text = format!(
            "THE BUNDLE OF {} IS REFUSED, and everybody of that trust domain: {}",
            bundle.trust_domain, bundle.reason
        );
        line(page, "trust", &text);
    }
}

fn endpoint(page: &mut String, endpoint: &BundleEndpointStatus) {
    title(
        page,
        &format!("bundle endpoint of {}", endpoint.trust_domain),
    );
    line(
        page,
        "url",
        &format!("{} ({})", endpoint.url, endpoint.profile),
    );
    let sequence = endpoint
        .sequence
        .map_or_else(String::new, |number| format!(", sequence number {number}"));
    match &endpoint.origin {
        Some(origin) => line(page, "in force", &format!("{origin}{sequence}")),
        None => line(
            page,
            "in force",
            "NOTHING YET: everybody of the trust domain is refused",
        ),
    }
    line(page, "next", known(&endpoint.next_attempt));
    let result = attempt(
        endpoint.last_attempt.as_ref(),
        endpoint.last_result.as_ref(),
        endpoint.last_error.as_ref(),
        endpoint.last_success.as_ref(),
    );
    line(page, "last answer", &result);
}

/// How the last attempt at something ended.
fn attempt(
    at: Option<&String>,
    result: Option<&String>,
    error: Option<&String>,
    success: Option<&String>,
) -> String {
    match (at, error) {
        (None, _) => "never".to_owned(),
        (Some(at), None) => format!("{at}: {}", result.map_or("-", String::as_str)),
        (Some(at), Some(error)) => {
            let success = success.map_or("-", String::as_str);
            format!("{at}: REFUSED: {error} (last success {success})")
        }
    }
}

/// What a remark means for whoever reads it. One that a newer daemon has is shown as it is.
fn explained(remark: &str) -> &str {
    match remark {
        "polled" => "polled: the files cannot be watched, and are looked at twice a second",
        "mounted_file" => {
            "mounted_file: a file is mounted by itself and will never change; mount its folder"
        }
        "signer_expires" => {
            "signer_expires: a CA above the certificate has less than a tenth of its lifetime left; of \
             the embedded one, `reeve ca rotate` makes a new one"
        }
        "systemd_credential" => {
            "systemd_credential: changes only when the unit is restarted; for renewal, read the \
             files themselves"
        }
        other => other,
    }
}

// Writing to a string does not fail.
fn title(page: &mut String, text: &str) {
    let _ = writeln!(page, "{text}");
}

fn line(page: &mut String, name: &str, text: &str) {
    let _ = writeln!(page, "  {name:<12} {text}");
}

fn known(text: &Option<String>) -> &str {
    text.as_deref().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::RefusedBundle;

    #[test]
    fn what_is_missing_stands_out() {
        let certificate = CertificateStatus {
            spiffe_id: "spiffe://example.org/ns/shop/sa/web".into(),
            source: "files".into(),
            last_attempt: Some("2026-01-01T00:00:00Z".into()),
            last_error: Some("the private key does not fit the certificate".into()),
            remarks: vec!["polled".into()],
            refused_bundles: vec![RefusedBundle {
                trust_domain: "bad.example".into(),
                reason: "it is no bundle".into(),
            }],
            ..CertificateStatus::default()
        };
        let page = page(&Status {
            certificates: vec![certificate],
            bundle_endpoints: vec![BundleEndpointStatus {
                trust_domain: "other.example".into(),
                ..BundleEndpointStatus::default()
            }],
            ..Status::default()
        });
        for text in [
            "spiffe://example.org/ns/shop/sa/web\n  source       files\n",
            "THERE IS NO VALID CERTIFICATE",
            "2026-01-01T00:00:00Z: REFUSED: the private key does not fit the certificate (last success -)",
            "  remark       polled: the files cannot be watched",
            "  trust        THE BUNDLE OF bad.example IS REFUSED, and everybody of that trust domain: it is no bundle\n",
            "bundle endpoint of other.example\n",
            "NOTHING YET",
            "  last answer  never\n",
        ] {
            assert!(page.contains(text), "{text}\nis not in\n{page}");
        }
        assert!(!page.contains("renewal"), "its source pushes: {page}");
    }
}
