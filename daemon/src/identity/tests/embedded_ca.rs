//! The embedded CA: its folder, its root, and what it issues.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Barrier},
    time::{Duration, SystemTime},
};

use tempfile::TempDir;

use super::{
    certs::Authority,
    handshake::{OURS, PEERS, handshake},
    *,
};

const HOUR: Duration = Duration::from_secs(3600);

struct Folder {
    path: PathBuf,
    _parent: TempDir,
}

impl Folder {
    /// A folder that is not there yet.
    fn new() -> Self {
        let parent = tempfile::tempdir().unwrap();
        Self {
            path: parent.path().join("state/ca"),
            _parent: parent,
        }
    }

    fn open(&self) -> Result<EmbeddedCa, CaError> {
        open(&self.path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn mode(&self, name: &str) -> u32 {
        let metadata = fs::metadata(self.file(name)).unwrap();
        metadata.permissions().mode() & 0o7777
    }

    fn set_mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.file(name), Permissions::from_mode(mode)).unwrap();
    }

    /// The error of opening it, which is what an operator reads.
    fn refusal(&self) -> String {
        self.open().unwrap_err().to_string()
    }
}

fn open(folder: &Path) -> Result<EmbeddedCa, CaError> {
    EmbeddedCa::open(folder, &domain("example.org"), HOUR)
}

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn root(ca: &EmbeddedCa) -> Vec<u8> {
    ca.bundle().certificates()[0].to_vec()
}

#[test]
fn the_first_start_makes_a_root_that_the_next_ones_find() {
    let folder = Folder::new();
    let first = folder.open().unwrap();
    assert_eq!(folder.mode(""), 0o700);
    assert_eq!(folder.mode("root.key"), 0o600);
    assert_eq!(root(&first), root(&folder.open().unwrap()));
    assert_ne!(root(&first), root(&Folder::new().open().unwrap()));

    let root = root(&first);
    let parsed = svid_rules::parse(&root).unwrap();
    assert_eq!(svid_rules::only_uri(&parsed), Ok("spiffe://example.org"));
    let ten_years = 10 * 365 * 24 * HOUR;
    let left = first.bundle().earliest_not_after().unwrap();
    let left = left.duration_since(SystemTime::now()).unwrap();
    assert!(left > ten_years - HOUR && left <= ten_years, "{left:?}");
}

#[test]
fn daemons_that_start_at_once_have_one_root() {
    for _ in 0..20 {
        let (folder, start) = (Folder::new(), Barrier::new(4));
        let roots: Vec<_> = std::thread::scope(|scope| {
            let open = || {
                start.wait();
                root(&folder.open().unwrap())
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(roots.iter().all(|root| *root == roots[0]));
    }
}

#[test]
fn a_copy_of_the_folder_is_the_same_ca() {
    let (folder, copy) = (Folder::new(), Folder::new());
    let ca = folder.open().unwrap();
    fs::create_dir_all(&copy.path).unwrap();
    copy.set_mode("", 0o700);
    for name in ["root.key", "root.pem"] {
        fs::copy(folder.file(name), copy.file(name)).unwrap();
    }
    assert_eq!(root(&copy.open().unwrap()), root(&ca));
}

#[test]
fn what_others_can_reach_is_refused() {
    let folder = Folder::new();
    folder.open().unwrap();
    for mode in [0o640, 0o604, 0o620, 0o660, 0o644] {
        folder.set_mode("root.key", mode);
        let text = folder.refusal();
        assert!(text.contains("root.key has mode 0"), "{text}");
        assert!(text.contains("chmod 0600"), "{text}");
    }
    folder.set_mode("root.key", 0o600);
    for mode in [0o755, 0o770, 0o701] {
        folder.set_mode("", mode);
        let text = folder.refusal();
        assert!(text.contains("chmod 0700"), "{text}");
    }
    folder.set_mode("", 0o700);
    folder.set_mode("root.key", 0o400);
    folder.open().unwrap();
}

#[test]
fn half_a_ca_is_refused_and_left_alone() {
    for (gone, left) in [("root.key", "root.pem"), ("root.pem", "root.key")] {
        let folder = Folder::new();
        folder.open().unwrap();
        fs::remove_file(folder.file(gone)).unwrap();
        let before = fs::read(folder.file(left)).unwrap();
        let text = folder.refusal();
        assert!(text.contains(&format!("{gone} is missing")), "{text}");
        assert_eq!(fs::read(folder.file(left)).unwrap(), before);
        assert!(!folder.file(gone).exists());
    }
}

#[test]
fn a_key_that_does_not_fit_is_refused() {
    let (folder, other) = (Folder::new(), Folder::new());
    folder.open().unwrap();
    other.open().unwrap();
    fs::copy(other.file("root.key"), folder.file("root.key")).unwrap();
    let text = folder.refusal();
    assert!(text.contains("does not fit"), "{text}");
}

#[test]
fn what_cannot_be_read_is_refused() {
    for name in ["root.key", "root.pem"] {
        let folder = Folder::new();
        folder.open().unwrap();
        let whole = fs::read(folder.file(name)).unwrap();
        for torn in [&[][..], &whole[..whole.len() / 2], b"\xff\xfe"] {
            fs::write(folder.file(name), torn).unwrap();
            let text = folder.refusal();
            assert!(text.contains(name), "{text}");
        }
    }
}

#[test]
fn another_trust_domains_root_is_refused() {
    let folder = Folder::new();
    folder.open().unwrap();
    let error = EmbeddedCa::open(&folder.path, &domain("other.example"), HOUR).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("root.pem is of spiffe://example.org"),
        "{text}"
    );
}

#[test]
fn an_expired_root_is_refused() {
    let folder = Folder::new();
    folder.open().unwrap();
    let key = fs::read_to_string(folder.file("root.key")).unwrap();
    let key = rcgen::KeyPair::from_pem(&key).unwrap();
    let expired = Authority::root_of("example.org", key, super::certs::expire);
    let pem = pem::encode(&pem::Pem::new("CERTIFICATE", &*expired.certificate()));
    fs::write(folder.file("root.pem"), pem).unwrap();
    fs::remove_file(folder.file("bundle.pem")).unwrap();
    let text = folder.refusal();
    assert!(text.contains("expired"), "{text}");
}

#[test]
fn what_it_issues_is_right_and_short_lived() {
    let folder = Folder::new();
    let ca = folder.open().unwrap();
    let id = SpiffeId::parse(OURS).unwrap();
    let trust = Arc::new(TrustStore::default());
    let mut bundles = TrustBundles::default();
    bundles.insert(domain("example.org"), ca.bundle());
    trust.replace(bundles);
    let issue = || {
        let material = ca.issue(&id).unwrap();
        Svid::check(&id, &material, &trust.current(), &trust, SystemTime::now()).unwrap()
    };
    let (one, two) = (issue(), issue());
    assert_ne!(one.serial, two.serial);
    let left = one.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(
        left <= HOUR && left > HOUR - Duration::from_secs(60),
        "{left:?}"
    );
    assert!(one.not_before < SystemTime::now() - Duration::from_secs(30));
    assert!(one.issuer.contains("O=reeve"), "{}", one.issuer);
    handshake(&one.client(&id), &two.server, two.server_name.clone()).succeeded();
}

#[test]
fn it_issues_for_its_own_trust_domain_only() {
    let ca = Folder::new().open().unwrap();
    let id = SpiffeId::parse("spiffe://other.example/a").unwrap();
    assert!(matches!(ca.issue(&id), Err(SourceError::Unavailable(_))));
}

#[tokio::test]
async fn certificates_are_renewed_before_they_expire() {
    let folder = Folder::new();
    let lifetime = Duration::from_secs(4);
    let ca = EmbeddedCa::open(&folder.path, &domain("example.org"), lifetime).unwrap();
    let store = IdentityStore::new([("ca".to_owned(), Arc::new(ca) as _)].into());
    let ids = [OURS, PEERS].map(|id| SpiffeId::parse(id).unwrap());
    store.ensure(&ids.iter().map(|id| (id.clone(), "ca".into())).collect());
    let mut changes = store.changes();
    while ids.iter().any(|id| store.current(id).is_none()) {
        changes.changed().await.unwrap();
    }
    let first = ids.each_ref().map(|id| store.current(id).unwrap());
    let later = tokio::time::Instant::now() + 2 * lifetime;
    while tokio::time::Instant::now() < later {
        let [ours, peers] = ids.each_ref().map(|id| store.current(id).unwrap());
        let client = ours.client(&ids[1]);
        handshake(&client, &peers.server, peers.server_name.clone()).succeeded();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (id, first) in ids.iter().zip(first) {
        let renewed = store.current(id).unwrap();
        assert!(renewed.generation > first.generation);
        assert_ne!(renewed.serial, first.serial);
    }
}
