//! What is fuzzed: each parser of reeve's own that meets bytes of others. A target panics when a
//! parser does, and when it accepts what a second, naive look at the same bytes does not.
//!
//! `cargo xtask fuzz` runs these with libFuzzer, and `daemon/tests/fuzz` in the ordinary tests with
//! the corpus and some mutations of it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use reeve::{
    config::Config,
    identity::{
        BundleDocument, FilesLayout, FilesSource, PathPattern, SpiffeId, TrustBundle, TrustBundles,
        TrustDomain, ca, inspect,
    },
    policy::{Known, PolicySet},
    tunnel::parse_authority,
    workload::Namespaces,
};
use rustls_pki_types::CertificateDer;

/// What is done with an input.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also its folder's in the corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("spiffe-id", spiffe_id),
    ("authority", authority),
    ("configuration", configuration),
    ("policy", policy),
    ("certificate", certificate),
    ("ca-folder", ca_folder),
    ("bundle-document", bundle_document),
    ("pem-files", pem_files),
];

/// The time at which certificates are judged: always the same, and when those of the corpus were valid.
const NOW: Duration = Duration::from_secs(1_795_578_000);

fn spiffe_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(id) = SpiffeId::parse(text) else {
        return;
    };
    assert_eq!(id.as_str(), text);
    assert!(text.len() <= 2048);
    let (domain, path) = text
        .strip_prefix("spiffe://")
        .unwrap()
        .split_once('/')
        .unwrap();
    assert!((1..=255).contains(&domain.len()));
    assert!(
        domain
            .chars()
            .all(|c| "abcdefghijklmnopqrstuvwxyz0123456789.-_".contains(c))
    );
    for segment in path.split('/') {
        assert!(!["", ".", ".."].contains(&segment));
        assert!(
            segment
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
        );
    }
    assert_eq!(TrustDomain::parse(domain).as_ref(), Ok(id.trust_domain()));
    if let Some((namespace, account)) = id.service_account() {
        let again = SpiffeId::for_service_account(id.trust_domain(), namespace, account);
        assert_eq!(again.as_ref(), Ok(&id));
    }
}

fn authority(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Some(address) = parse_authority(text) else {
        return;
    };
    assert_ne!(address.port(), 0);
    assert!(!text.contains(['@', '/', '%', ' ']), "{text}");
    // What is accepted says one thing, whoever reads it.
    let naive: SocketAddr = text.parse().unwrap();
    assert_eq!(naive.ip().to_canonical(), address.ip());
    assert_eq!(parse_authority(&address.to_string()), Some(address));
}

fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let file = Path::new("/etc/reeve/reeve.yaml");
    match Config::parse(file, text) {
        Ok(config) => {
            let again = Config::parse(file, text).unwrap();
            assert_eq!(again, config);
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty());
            assert!(mistakes.to_string().starts_with("/etc/reeve/reeve.yaml"));
        }
    }
}

fn policy(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let nobody = Known {
        workloads: &[],
        peers: &[],
        namespaces: &Namespaces::default(),
    };
    match PolicySet::parse(Path::new("policy.yaml"), text, &nobody) {
        Ok(policies) => {
            let warnings = policies.warnings().iter().map(ToString::to_string);
            assert!(warnings.into_iter().all(|warning| !warning.is_empty()));
        }
        Err(mistakes) => assert!(!mistakes.is_empty()),
    }
}

/// Certificates one behind the other, each after its length in two bytes; what is behind the last
/// one is one more. They are a chain, and all of them a trust bundle too.
fn certificate(data: &[u8]) {
    let mut chain = Vec::new();
    let mut rest = data;
    while let [high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (der, behind) = after.split_at(length);
        chain.push(CertificateDer::from(der.to_vec()));
        rest = behind;
    }
    let domain = TrustDomain::parse("example.org").unwrap();
    let mut bundles = TrustBundles::default();
    if let Ok(bundle) = TrustBundle::new(domain.clone(), chain.clone(), Vec::new()) {
        bundles.insert(domain, bundle.into());
    }
    let now = SystemTime::UNIX_EPOCH + NOW;
    let with_trust = inspect(&chain, &bundles, true, now);
    let without = inspect(&chain, &bundles, false, now);
    if !with_trust.broken.is_empty() {
        assert!(without.broken.len() <= with_trust.broken.len());
    } else {
        let id = with_trust.id.unwrap();
        assert_eq!(SpiffeId::parse(id.as_str()), Ok(id));
    }
}

/// A CA folder in which one file, by the first byte, holds the rest.
fn ca_folder(data: &[u8]) {
    let Some((which, contents)) = data.split_first() else {
        return;
    };
    let folder = folder();
    let name = match which % 3 {
        0 => "bundle.pem",
        1 => "crl.pem",
        _ => "next.pem",
    };
    let file = folder.join(name);
    let before = fs::read(&file).ok();
    fs::write(&file, contents).unwrap();
    if let Ok(status) = ca::show(folder)
        && status.problem.is_none()
    {
        assert!(!status.signer.is_empty() && !status.roots.is_empty());
    }
    match before {
        Some(before) => fs::write(&file, before).unwrap(),
        None => fs::remove_file(&file).unwrap(),
    }
    assert!(
        ca::show(folder).unwrap().problem.is_none(),
        "what is there is left alone"
    );
}

fn bundle_document(data: &[u8]) {
    let Ok(document) = BundleDocument::parse(data) else {
        return;
    };
    assert_eq!(BundleDocument::parse(data).as_ref(), Ok(&document));
    // What is taken of it is what a search for the words finds.
    let text = std::str::from_utf8(data).unwrap();
    let most = text.matches('{').count().saturating_sub(1);
    assert!(document.ignored <= most);
    let domain = TrustDomain::parse("example.org").unwrap();
    if let Ok(bundle) = document.bundle(domain) {
        assert!(bundle.certificates().len() + document.ignored <= most);
        assert_eq!(bundle.is_empty(), bundle.certificates().is_empty());
        assert_eq!(bundle.revocation_lists(), 0);
    }
}

/// An identity's files, of which one, by the first byte, holds the rest; or all of them are one.
fn pem_files(data: &[u8]) {
    let Some((which, contents)) = data.split_first() else {
        return;
    };
    let name = match which % 5 {
        0 => "svid.pem",
        1 => "svid.key",
        2 => "bundle.pem",
        3 => "crl.pem",
        _ => "all.pem",
    };
    let folder = issued();
    let file = folder.join(name);
    let before = fs::read(&file).unwrap();
    fs::write(&file, contents).unwrap();
    let pattern = |name: &str| PathPattern::parse(name).unwrap();
    let part = |own: &str| pattern(if name == "all.pem" { name } else { own });
    let source = FilesSource::new(FilesLayout {
        folder: pattern(folder.to_str().unwrap()),
        certificate: part("svid.pem"),
        key: part("svid.key"),
        bundle: Some(part("bundle.pem")),
        revocation_lists: Some(pattern("crl.pem")),
    });
    let id = SpiffeId::parse(ISSUED).unwrap();
    match source.read(&id) {
        Ok(material) => {
            assert!(!material.chain.is_empty() && material.bundles.len() == 1);
            assert!(material.bundles[0].revocation_lists() > 0);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    fs::write(&file, before).unwrap();
    assert!(source.read(&id).is_ok(), "what is right is read again");
}

const ISSUED: &str = "spiffe://example.org/ns/shop/sa/web";

/// A folder with an identity's files in it, made once: apart, and all in one.
fn issued() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let (ca, out) = ["ca", "issued"]
            .map(|it| folder().with_extension(it))
            .into();
        let domain = TrustDomain::parse("example.org").unwrap();
        ca::init_root(&ca, &domain, ca::ROOT_LIFETIME).unwrap();
        let id = SpiffeId::parse(ISSUED).unwrap();
        ca::issue(&ca, &id, Duration::from_secs(3600), &out).unwrap();
        ca::revoke(&ca, &[ca::Revocation::Serial(vec![1])], None).unwrap();
        fs::copy(ca.join("crl.pem"), out.join("crl.pem")).unwrap();
        let read = |folder: &Path, name: &str| fs::read(folder.join(name)).unwrap();
        let names = ["svid.pem", "svid.key", "bundle.pem"];
        let all = names.map(|name| read(&out, name)).concat();
        fs::write(out.join("all.pem"), all).unwrap();
        out
    })
}

/// A folder with a CA in it, made once.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("reeve-fuzz-{}", std::process::id()));
        let domain = TrustDomain::parse("example.org").unwrap();
        ca::init_root(&folder, &domain, ca::ROOT_LIFETIME).unwrap();
        folder
    })
}
