//! `reeve ca`: the embedded CA, from the making of its root to its replacement.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};

use super::{failed, print, print_json, table::Table};
use crate::identity::{
    CertificateSummary, SpiffeId, TrustDomain,
    ca::{self, CaError, CaStatus, ROOT_LIFETIME, Revocation, Role},
};

const DEFAULT_FOLDER: &str = "/var/lib/reeve/ca";

/// What can be done with a CA.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a root, or an intermediate for a node below a root that stays elsewhere
    #[command(
        long_about = "\
Make a root, or an intermediate for a node below a root that stays elsewhere.

A daemon whose CA folder is empty makes a root of its own. Make one by hand where several nodes \
shall trust each other: either every node gets a copy of the root's folder, or, better, the root's \
folder stays on a machine that is offline and each node gets an intermediate, which signs \
workloads' certificates and nothing else.",
        after_help = "\
Examples:
  reeve ca init --trust-domain example.org --dir ./root
  reeve ca init --root-dir ./root --intermediate ./node-a

The second is for /var/lib/reeve/ca of node-a. Keys have mode 0600 and are refused otherwise."
    )]
    Init(Init),

    /// Issue a certificate for a machine or program that runs no daemon with this CA
    #[command(after_help = "\
Examples:
  reeve ca issue --dir ./root --id spiffe://example.org/ns/shop/sa/db --out ./db

Writes svid.pem, svid.key, bundle.pem and, where there are revocation lists, crl.pem, all of them \
with mode 0600.")]
    Issue(Issue),

    /// Replace the root, or a node's intermediate, while everything goes on
    #[command(
        long_about = "\
Replace the root, or a node's intermediate, while everything goes on.

A root is replaced in three steps, with time between them for every node to get the folder's \
files: without a flag a next root is made, which is trusted and signs nothing yet; with --switch it \
signs, and the one before is still trusted; with --finish only the new one is trusted. A running \
daemon notices each step by itself.

With --root-dir and --intermediate a node's intermediate is replaced by one that the root signs \
now, and the roots beside it by those that are trusted now.",
        after_help = "\
Examples:
  reeve ca rotate --dir ./root
  reeve ca rotate --dir ./root --switch
  reeve ca rotate --dir ./root --finish
  reeve ca rotate --root-dir ./root --intermediate ./node-a"
    )]
    Rotate(Rotate),

    /// Put certificates on the CA's revocation list
    #[command(
        long_about = "\
Put certificates on the CA's revocation list, `crl.pem` in its folder.

A daemon with this folder refuses them from then on, in new tunnels and in those that stand. Once \
there is one list, every CA of the trust domain needs one: an intermediate that was made by \
`reeve ca init` has an empty one in the root's `crl.pem`, which is what other nodes need a copy of.",
        after_help = "\
Examples:
  reeve ca revoke --dir ./root --certificate ./node-a/intermediate.pem
  reeve ca revoke --serial 5f0c9a7e31d24b18
  reeve ca revoke --valid-for 7days

The last one revokes nothing more and signs the list anew."
    )]
    Revoke(Revoke),

    /// Show a CA: who signs, who is trusted, what is revoked
    #[command(after_help = "\
Examples:
  reeve ca show
  reeve ca show --dir ./root --json | jq '.roots[] | select(.role == \"next\")'

Exit codes: 0 the CA is in order, 1 there is none or a daemon would not use it.")]
    Show(Show),
}

/// `reeve ca init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Trust domain of the new root
    #[arg(long, value_name = "NAME", required_unless_present = "root_dir", conflicts_with = "root_dir", value_parser = trust_domain)]
    trust_domain: Option<TrustDomain>,
    /// Folder of the new root
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_FOLDER, conflicts_with = "root_dir")]
    dir: PathBuf,
    /// Folder of the root that signs the intermediate
    #[arg(long, value_name = "FOLDER", requires = "intermediate")]
    root_dir: Option<PathBuf>,
    /// Folder of the new intermediate
    #[arg(long, value_name = "FOLDER", requires = "root_dir")]
    intermediate: Option<PathBuf>,
    /// How long it is valid: 10 years for a root, 1 year for an intermediate if not given
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    lifetime: Option<Duration>,
}

/// `reeve ca issue`.
#[derive(Debug, Args)]
pub struct Issue {
    /// Folder of the CA
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_FOLDER)]
    dir: PathBuf,
    /// Whose certificate
    #[arg(long, value_name = "SPIFFE-ID", value_parser = spiffe_id)]
    id: SpiffeId,
    /// Folder that the files are written to
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// How long it is valid
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = lifetime)]
    lifetime: Duration,
}

/// `reeve ca rotate`.
#[derive(Debug, Args)]
pub struct Rotate {
    /// Folder of the root
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_FOLDER, conflicts_with = "root_dir")]
    dir: PathBuf,
    /// Sign with the next root from now on
    #[arg(long, conflicts_with_all = ["finish", "root_dir"])]
    switch: bool,
    /// Trust the old roots no longer
    #[arg(long, conflicts_with = "root_dir")]
    finish: bool,
    /// Folder of the root that signs the intermediate
    #[arg(long, value_name = "FOLDER", requires = "intermediate")]
    root_dir: Option<PathBuf>,
    /// Folder of the intermediate that is replaced
    #[arg(long, value_name = "FOLDER", requires = "root_dir")]
    intermediate: Option<PathBuf>,
    /// How long the new one is valid: 10 years for a root, 1 year for an intermediate if not given
    #[arg(long, value_name = "DURATION", value_parser = lifetime, conflicts_with_all = ["switch", "finish"])]
    lifetime: Option<Duration>,
}

/// `reeve ca revoke`.
#[derive(Debug, Args)]
pub struct Revoke {
    /// Folder of the CA that issued it
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_FOLDER)]
    dir: PathBuf,
    /// Serial number, hexadecimal; may be given several times
    #[arg(long, value_name = "HEX", value_parser = serial)]
    serial: Vec<Serial>,
    /// The certificate itself, PEM; may be given several times
    #[arg(long, value_name = "FILE")]
    certificate: Vec<PathBuf>,
    /// How long the list counts; after that, all that the CA issued is refused until the list is
    /// signed anew. As long as the CA's own certificate if not given
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    valid_for: Option<Duration>,
}

/// `reeve ca show`.
#[derive(Debug, Args)]
pub struct Show {
    /// Folder of the CA
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_FOLDER)]
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A serial number; a type of its own, since clap takes a vector for several values.
#[derive(Clone, Debug)]
struct Serial(Vec<u8>);

/// A year: somebody has to bring the next one to the node.
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// What a certificate has to live at least; it would be over before it is where it is needed.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(60);
/// A hundred years: later dates do not fit everybody's clock.
const LONGEST_LIFETIME: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
/// Bytes of the longest serial number (RFC 5280, section 4.1.2.2).
const LONGEST_SERIAL: usize = 20;

/// `reeve ca`.
#[must_use]
pub fn ca(command: &CaCommand) -> ExitCode {
    let done = match command {
        CaCommand::Init(options) => init(options),
        CaCommand::Issue(options) => issue(options),
        CaCommand::Rotate(options) => rotate(options),
        CaCommand::Revoke(options) => revoke(options),
        CaCommand::Show(options) => return show(options),
    };
    match done {
        Ok(said) => print(&said),
        Err(error) => failed(&error),
    }
}

fn init(options: &Init) -> Result<String, CaError> {
    match (
        &options.root_dir,
        &options.intermediate,
        &options.trust_domain,
    ) {
        (Some(root), Some(folder), _) => {
            let lifetime = options.lifetime.unwrap_or(INTERMEDIATE_LIFETIME);
            ca::init_intermediate(root, folder, lifetime)?;
            Ok(format!(
                "made an intermediate in {}: it belongs into `caDir` of one node\n",
                folder.display()
            ))
        }
        (_, _, Some(trust_domain)) => {
            let lifetime = options.lifetime.unwrap_or(ROOT_LIFETIME);
            ca::init_root(&options.dir, trust_domain, lifetime)?;
            Ok(format!(
                "made a root for {trust_domain} in {}: whoever can read its key can forge every \
                 identity\n",
                options.dir.display()
            ))
        }
        // The command line does not let this through.
        _ => Err(CaError::Missing {
            folder: options.dir.clone(),
        }),
    }
}

fn issue(options: &Issue) -> Result<String, CaError> {
    let chain = ca::issue(&options.dir, &options.id, options.lifetime, &options.out)?;
    let leaf = chain.first().map(|leaf| CertificateSummary::of(leaf));
    let until = match leaf {
        Some(Ok(leaf)) => format!(", serial {}, until {}", leaf.serial, time(leaf.not_after)),
        _ => String::new(),
    };
    Ok(format!(
        "issued {}{until}: {}\n",
        options.id,
        options.out.display()
    ))
}

fn rotate(options: &Rotate) -> Result<String, CaError> {
    let folder = options.dir.display();
    if let (Some(root), Some(intermediate)) = (&options.root_dir, &options.intermediate) {
        let lifetime = options.lifetime.unwrap_or(INTERMEDIATE_LIFETIME);
        ca::renew_intermediate(root, intermediate, lifetime)?;
        Ok(format!(
            "the intermediate in {} is new, and the roots beside it are those that are trusted now\n",
            intermediate.display()
        ))
    } else if options.switch {
        ca::switch_root(&options.dir)?;
        Ok(format!(
            "the root in {folder} is new, and the one before is still trusted. Once no certificate of \
             the old one is in use, nor an intermediate: `reeve ca rotate --finish`\n"
        ))
    } else if options.finish {
        let gone = ca::drop_old_roots(&options.dir)?;
        Ok(format!(
            "old roots that {folder} trusts no longer: {gone}. Nodes with a copy of bundle.pem need it again\n"
        ))
    } else {
        ca::prepare_root(&options.dir, options.lifetime.unwrap_or(ROOT_LIFETIME))?;
        Ok(format!(
            "the next root is in {folder} and trusted. Once every node trusts it too: \
             `reeve ca rotate --switch`\n"
        ))
    }
}

fn revoke(options: &Revoke) -> Result<String, CaError> {
    let serials = options
        .serial
        .iter()
        .map(|serial| Revocation::Serial(serial.0.clone()));
    let certificates = options
        .certificate
        .iter()
        .cloned()
        .map(Revocation::Certificate);
    let all: Vec<_> = serials.chain(certificates).collect();
    let revoked = ca::revoke(&options.dir, &all, options.valid_for)?;
    Ok(format!(
        "certificates that the CA in {} has revoked: {revoked}. Other nodes need its crl.pem\n",
        options.dir.display()
    ))
}

fn show(options: &Show) -> ExitCode {
    let status = match ca::show(&options.dir) {
        Ok(status) => status,
        Err(error) => return failed(&error),
    };
    let printed = if options.json {
        print_json(&status)
    } else {
        print(&page(&options.dir, &status))
    };
    match status.problem {
        Some(_) => ExitCode::FAILURE,
        None => printed,
    }
}

fn page(folder: &Path, status: &CaStatus) -> String {
    let mut page = format!(
        "CA in {}, trust domain {}\n",
        folder.display(),
        status.trust_domain.as_deref().unwrap_or("-")
    );
    // Writing to a string does not fail.
    if let Some(problem) = &status.problem {
        let _ = writeln!(page, "A DAEMON WOULD NOT USE IT: {problem}");
    }
    let mut table = Table::new(["", "SUBJECT", "SERIAL", "KEY", "UNTIL", "LEFT"]);
    let row = |what: &str, certificate: &CertificateSummary| {
        [
            what.to_owned(),
            certificate.subject.clone(),
            certificate.serial.clone(),
            certificate.key.to_string(),
            time(certificate.not_after),
            left(certificate.not_after),
        ]
    };
    let root_signs = status.roots.iter().any(|root| root.role == Role::Signs);
    for (number, certificate) in status.signer.iter().enumerate() {
        if !root_signs {
            table.push(row(
                if number == 0 { "signs" } else { "above it" },
                certificate,
            ));
        }
    }
    for root in &status.roots {
        let what = match root.role {
            Role::Signs => "signs, trusted",
            Role::Next => "next, trusted",
            Role::Trusted => "trusted",
        };
        table.push(row(what, &root.certificate));
    }
    let _ = write!(page, "{table}");
    if status.revocation_lists.is_empty() {
        page.push_str("Revocation is not checked: there are no revocation lists\n");
        return page;
    }
    page.push_str("Revocation lists\n");
    let mut table = Table::new(["ISSUER", "UNTIL", "REVOKED"]);
    for list in &status.revocation_lists {
        let revoked: Vec<_> = list.revoked.iter().map(|entry| &*entry.serial).collect();
        table.push([
            list.issuer.clone(),
            list.next_update.clone().unwrap_or_else(|| "-".to_owned()),
            if revoked.is_empty() {
                "-".to_owned()
            } else {
                revoked.join(", ")
            },
        ]);
    }
    let _ = write!(page, "{table}");
    page
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

pub(super) fn left(until: SystemTime) -> String {
    match until.duration_since(SystemTime::now()) {
        Ok(left) => humantime::format_duration(Duration::from_secs(left.as_secs())).to_string(),
        Err(_) => "EXPIRED".to_owned(),
    }
}

// === values ===

pub(super) fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    TrustDomain::parse(text).map_err(|error| error.to_string())
}

pub(super) fn spiffe_id(text: &str) -> Result<SpiffeId, String> {
    SpiffeId::parse(text).map_err(|error| error.to_string())
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = humantime::parse_duration(text)
        .map_err(|_| "expected a duration, as in `1h` or `90days`".to_owned())?;
    match (SHORTEST_LIFETIME..=LONGEST_LIFETIME).contains(&lifetime) {
        true => Ok(lifetime),
        false => Err("expected a duration from 1m to 100years".to_owned()),
    }
}

fn serial(text: &str) -> Result<Serial, String> {
    let wrong = || "expected hexadecimal digits of at most 20 bytes, as in `5f0c9a7e`".to_owned();
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    let digits = if digits.len() % 2 == 1 {
        format!("0{digits}")
    } else {
        digits
    };
    let digits = digits.into_bytes();
    let bytes: Option<Vec<u8>> = digits
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            // A sign is no digit, whatever the parser thinks of it.
            let all = pair.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(pair, 16).ok().filter(|_| all)
        })
        .collect();
    let bytes = bytes.ok_or_else(wrong)?;
    match bytes.iter().skip_while(|byte| **byte == 0).count() {
        1..=LONGEST_SERIAL => Ok(Serial(bytes)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_number_is_read_as_tools_print_it() {
        for text in ["0abc", "abc", "0A:BC", "00:0a:bc"] {
            let read = serial(text).unwrap().0;
            assert_eq!(read[read.len() - 2..], [0x0a, 0xbc], "{text}");
        }
        for text in ["", "0", "xyz", "+1", "-1", "0x1", &"f".repeat(42), "é"] {
            assert!(serial(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_lifetime_is_neither_nothing_nor_forever() {
        assert_eq!(lifetime("90days"), Ok(Duration::from_secs(90 * 86_400)));
        for text in ["", "1s", "200years", "soon"] {
            assert!(lifetime(text).is_err(), "{text}");
        }
    }
}
