//! `reeve certs inspect`: a certificate in a file or behind a port, judged as a peer's.

use std::{
    fmt::Write as _,
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use clap::{Args, ValueEnum};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use serde_json::json;
use zeroize::Zeroizing;

use super::{ca, failed, print, print_json};
use crate::identity::{
    BundleError, CryptoPolicy, CryptoProfile, CryptoRules, Inspection, PemError, Presented,
    ProbeError, Probed, SpiffeId, TrustBundle, TrustBundles, TrustDomain, inspect as judge,
    peer_id, pem_file, probe,
};

/// For a connection, and for each answer on it.
const PATIENCE: Duration = Duration::from_secs(10);

/// `reeve certs inspect`.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A PEM file, or the address of a tunnel port, as in `10.0.0.7:15008`
    #[arg(value_name = "FILE|ADDRESS")]
    what: String,
    /// The certificates that are trusted, PEM
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Revocation lists, PEM
    #[arg(long, value_name = "FILE", requires = "bundle")]
    crl: Option<PathBuf>,
    /// Whose bundle it is; that of the certificate itself if not given
    #[arg(long, value_name = "NAME", requires = "bundle", value_parser = ca::trust_domain)]
    trust_domain: Option<TrustDomain>,
    /// The identity that is expected; of a port that several share, also the one that is asked for
    #[arg(long, value_name = "SPIFFE-ID", value_parser = ca::spiffe_id)]
    id: Option<SpiffeId>,
    /// The cryptography that is accepted
    #[arg(long, value_enum, default_value_t = Profile::Default)]
    profile: Profile,
    /// A certificate to present to a port, PEM with those above it
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Profile {
    Default,
    Fips,
}

/// Why there is nothing to judge.
#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error("{} cannot be read: {error}", .path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{} holds no {what}: {error}", .path.display())]
    Pem {
        path: PathBuf,
        what: &'static str,
        error: PemError,
    },
    #[error("found PEM; expected the path of the file that holds it, or an address")]
    Text,
    #[error("`{what}` is neither a file nor an address with a port: {source}")]
    Nothing { what: String, source: io::Error },
    #[error("{}: {error}", .path.display())]
    Bundle { path: PathBuf, error: BundleError },
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// What was found.
struct Found {
    inspection: Inspection,
    /// Whether there was a bundle to lead to.
    trust_checked: bool,
    revocation_checked: bool,
    /// Of a port.
    tls: Option<Probed>,
    presented: bool,
}

/// Looks, and says what is wrong.
pub(super) fn inspect(words: &Inspect) -> ExitCode {
    let found = match look(words) {
        Ok(found) => found,
        Err(error) => return failed(&error),
    };
    let printed = if words.json {
        print_json(&found.json())
    } else {
        print(&found.page())
    };
    match found.is_right() {
        true => printed,
        false => ExitCode::FAILURE,
    }
}

fn look(words: &Inspect) -> Result<Found, InspectError> {
    let profile = match words.profile {
        Profile::Default => CryptoProfile::Default,
        Profile::Fips => CryptoProfile::Fips,
    };
    let policy = Arc::new(CryptoPolicy::new(CryptoRules::of(profile)));
    let file = Path::new(&words.what);
    let (chain, tls) = if file.exists() {
        (certificates(file)?, None)
    } else {
        let presented = match (&words.certificate, &words.key) {
            (Some(chain), Some(key)) => Some(Presented {
                chain: certificates(chain)?,
                key: read(key, "private key", pem_file::private_key)?,
            }),
            _ => None,
        };
        let address = address(&words.what)?;
        let seen = probe(address, words.id.as_ref(), presented, &policy, PATIENCE)?;
        (seen.chain.clone(), Some(seen))
    };

    let mut bundles = TrustBundles::with_policy(policy);
    let mut revocation_checked = false;
    if let Some(file) = &words.bundle {
        let lists = match &words.crl {
            Some(file) => revocation_lists(file)?,
            None => Vec::new(),
        };
        revocation_checked = !lists.is_empty();
        let own = peer_id(&chain).ok().map(|id| id.trust_domain().clone());
        let roots = certificates(file)?;
        // Without an ID there is no bundle to look into, and that is said.
        if let Some(domain) = words.trust_domain.clone().or(own) {
            let bundle = TrustBundle::new(domain.clone(), roots, lists);
            let bundle = bundle.map_err(|error| InspectError::Bundle {
                path: match (&error, &words.crl) {
                    (BundleError::RevocationList { .. }, Some(lists)) => lists.clone(),
                    _ => file.clone(),
                },
                error,
            })?;
            bundles.insert(domain, Arc::new(bundle));
        }
    }
    let mut inspection = judge(&chain, &bundles, words.bundle.is_some(), SystemTime::now());
    if let Some(expected) = &words.id {
        inspection.expect(expected);
    }
    Ok(Found {
        inspection,
        trust_checked: words.bundle.is_some(),
        revocation_checked,
        tls,
        presented: words.certificate.is_some(),
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, InspectError> {
    read(path, "certificate", pem_file::certificates)
}

fn revocation_lists(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, InspectError> {
    read(path, "revocation list", pem_file::revocation_lists)
}

/// What a file holds. Any of them may hold a key.
fn read<T>(
    path: &Path,
    what: &'static str,
    parse: impl FnOnce(&[u8]) -> Result<T, PemError>,
) -> Result<T, InspectError> {
    let path = path.to_owned();
    match fs::read(&path).map(Zeroizing::new) {
        Ok(text) => parse(&text).map_err(|error| InspectError::Pem { path, what, error }),
        Err(error) => Err(InspectError::File { path, error }),
    }
}

fn address(text: &str) -> Result<SocketAddr, InspectError> {
    if text.contains("-----BEGIN ") {
        return Err(InspectError::Text);
    }
    let nothing = |source| InspectError::Nothing {
        what: text.to_owned(),
        source,
    };
    let mut found = text.to_socket_addrs().map_err(nothing)?;
    let none = || nothing(io::Error::from(io::ErrorKind::NotFound));
    found.next().ok_or_else(none)
}

// === impl Found ===

impl Found {
    fn is_right(&self) -> bool {
        self.inspection.broken.is_empty() && self.refusal().is_none()
    }

    /// Why the other end did not want the certificate that it was shown.
    fn refusal(&self) -> Option<&str> {
        let refusal = self.tls.as_ref()?.refusal.as_deref();
        refusal.filter(|_| self.presented)
    }

    fn json(&self) -> serde_json::Value {
        let broken = self.inspection.broken.iter();
        let broken = broken.map(|broken| {
            json!({
                "rule": broken.rule.as_str(),
                "certificate": broken.certificate,
                "message": broken.rule.to_string(),
            })
        });
        json!({
            "spiffeId": self.inspection.id.as_ref().map(SpiffeId::as_str),
            "certificates": self.inspection.certificates,
            "unused": self.inspection.unused,
            "trustChecked": self.trust_checked,
            "revocationChecked": self.revocation_checked,
            "brokenRules": broken.collect::<Vec<_>>(),
            "tls": self.tls.as_ref().map(|tls| json!({
                "group": tls.group,
                "cipherSuite": tls.cipher_suite,
                "asksForCertificate": tls.asked_for_certificate,
                "refusal": tls.refusal,
            })),
        })
    }

    fn page(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        for (certificate, number) in self.inspection.certificates.iter().zip(1..) {
            let name = match certificate.uris.as_slice() {
                [] => certificate.subject.clone(),
                uris => uris.join(", "),
            };
            let _ = writeln!(page, "{number}. {name}");
            let mut line = |title: &str, text: &str| {
                let _ = writeln!(page, "   {title:<8} {text}");
            };
            if !certificate.subject.is_empty() {
                line("subject", &certificate.subject);
            }
            line("issuer", &certificate.issuer);
            line("serial", &certificate.serial);
            line("key", &certificate.key.to_string());
            let time = |time| humantime::format_rfc3339_seconds(time).to_string();
            let (from, until) = (time(certificate.not_before), time(certificate.not_after));
            line(
                "valid",
                &format!("{from} to {until}, {}", ca::left(certificate.not_after)),
            );
            line("sha256", &certificate.sha256);
        }
        if let Some(tls) = &self.tls {
            let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            let client = match (tls.asked_for_certificate, self.presented, &tls.refusal) {
                (false, ..) => "asks for no certificate".to_owned(),
                (true, false, _) => "asks for a certificate, and was shown none".to_owned(),
                (true, true, None) => "accepts the certificate that it was shown".to_owned(),
                (true, true, Some(refusal)) => {
                    format!("REFUSES THE CERTIFICATE THAT IT WAS SHOWN: {refusal}")
                }
            };
            let (group, suite) = (known(&tls.group), known(&tls.cipher_suite));
            let _ = writeln!(page, "TLS 1.3, {group}, {suite}; the other end {client}");
        }
        for number in &self.inspection.unused {
            let _ = writeln!(
                page,
                "certificate {number} is not on the path, and is not judged"
            );
        }
        for broken in &self.inspection.broken {
            let place = broken.certificate.map_or_else(
                || "the chain".to_owned(),
                |number| format!("certificate {number}"),
            );
            let _ = writeln!(
                page,
                "BROKEN: {} ({place}): {}",
                broken.rule.as_str(),
                broken.rule
            );
        }
        let verdict = match (self.inspection.broken.is_empty(), self.trust_checked) {
            (false, _) => "reeve would refuse it",
            (true, true) => "reeve would accept it",
            (true, false) => {
                "no rule is broken; whether it leads to a trusted root was not checked: `--bundle`"
            }
        };
        let _ = writeln!(page, "{verdict}");
        if self.trust_checked && !self.revocation_checked {
            page.push_str("revocation was not checked: `--crl`\n");
        }
        page
    }
}
