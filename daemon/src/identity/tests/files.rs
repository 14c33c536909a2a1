//! Certificates from files: what is taken, what is kept, and when, row by row of what happens to
//! files in the field.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use time::OffsetDateTime;
use tokio::time::{Instant, timeout};

use super::{
    certs::{Authority, Issued, expire},
    handshake::{OURS, PEERS},
    *,
};

/// How long something that is to happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);
/// How long a change may take to be in force, by the promise.
const PROMISED: Duration = Duration::from_secs(1);

/// The files of [`OURS`], and a store that has the first certificate in force.
struct Scene {
    folder: tempfile::TempDir,
    root: Authority,
    store: IdentityStore,
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

/// Files in `folder`, by the names that cert-manager gives them, with a list if there is one.
fn layout(folder: &Path) -> FilesLayout {
    let pattern = |text: &str| PathPattern::parse(text).unwrap();
    FilesLayout {
        folder: pattern(folder.to_str().unwrap()),
        certificate: pattern("tls.crt"),
        key: pattern("tls.key"),
        bundle: Some(pattern("ca.crt")),
        revocation_lists: None,
    }
}

fn store_of(layout: FilesLayout, ids: &[&str]) -> IdentityStore {
    let source = Arc::new(FilesSource::new(layout));
    let store = IdentityStore::new([("files".to_owned(), source as _)].into());
    store.ensure(&ids.iter().map(|it| (id(it), "files".to_owned())).collect());
    store
}

/// Writes a file as careful writers do: it is whole or not there.
fn put(path: PathBuf, contents: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let new = path.with_extension("new");
    fs::write(&new, contents).unwrap();
    fs::rename(new, path).unwrap();
}

fn put_all(folder: &Path, issued: &Issued, roots: &[&Authority]) {
    put(folder.join("tls.key"), &issued.key_pem());
    put(folder.join("ca.crt"), &bundle_pem(roots));
    put(folder.join("tls.crt"), &issued.chain_pem());
}

fn bundle_pem(roots: &[&Authority]) -> String {
    roots.iter().map(|root| root.certificate_pem()).collect()
}

/// Waits until `what` gives something.
async fn until<T>(what: impl Fn() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(found) = what() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.expect("it does not come")
}

impl Scene {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With something else in the first certificate.
    async fn with(change: impl FnOnce(&mut rcgen::CertificateParams)) -> Self {
        let (folder, root) = (tempfile::tempdir().unwrap(), Authority::root("example.org"));
        put_all(folder.path(), &root.leaf_with(OURS, change), &[&root]);
        let store = store_of(layout(folder.path()), &[OURS]);
        let scene = Self {
            folder,
            root,
            store,
        };
        until(|| scene.current()).await;
        // Until the folder is watched, for tests that time what follows.
        tokio::time::sleep(Duration::from_millis(200)).await;
        scene
    }

    fn current(&self) -> Option<Arc<Svid>> {
        self.store.current(&id(OURS))
    }

    fn put(&self, issued: &Issued, roots: &[&Authority]) {
        put_all(self.folder.path(), issued, roots);
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn counts(&self) -> ReloadCounts {
        self.store.reload_counts()["files"].clone()
    }

    /// Waits until a certificate newer than this one is in force.
    async fn newer(&self, old: &Svid) -> Arc<Svid> {
        let newer = || {
            self.current()
                .filter(|svid| svid.generation > old.generation)
        };
        until(newer).await
    }

    /// Waits until a refusal is counted under this reason.
    async fn refused(&self, reason: &str) {
        until(|| self.counts().rejected.get(reason).copied()).await;
    }
}

#[tokio::test]
async fn each_tool_s_files_are_read_as_it_leaves_them() {
    let root = Authority::root("example.org");
    let pattern = |text: &str| PathPattern::parse(text).unwrap();
    let tempdir = tempfile::tempdir().unwrap();
    let base = tempdir.path();
    let issued = root.intermediate(|_| {}).leaf(OURS);
    let (chain, key, roots) = (issued.chain_pem(), issued.key_pem(), root.certificate_pem());

    // cert-manager, in a Kubernetes volume.
    let volume = base.join("volume");
    put_all(&volume.join("..1"), &issued, &[&root]);
    symlink("..1", volume.join("..data")).unwrap();
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(Path::new("..data").join(name), volume.join(name)).unwrap();
    }
    // spiffe-helper.
    let helper = base.join("helper");
    put(helper.join("svid.pem"), &chain);
    put(helper.join("svid_key.pem"), &key);
    put(helper.join("svid_bundle.pem"), &roots);
    // Vault agent: all in one file, the key in the middle.
    put(base.join("vault/cart.pem"), &format!("{chain}{key}{roots}"));
    // systemd credentials: one folder for all.
    for (name, contents) in [("cart-cert", &chain), ("cart-key", &key), ("ca", &roots)] {
        put(base.join("credentials").join(name), contents);
    }
    let named = |folder: &str, names: [&str; 3]| FilesLayout {
        folder: pattern(base.join(folder).to_str().unwrap()),
        certificate: pattern(names[0]),
        key: pattern(names[1]),
        bundle: Some(pattern(names[2])),
        revocation_lists: None,
    };
    let one = "{serviceAccount}.pem";
    for layout in [
        named("volume", ["tls.crt", "tls.key", "ca.crt"]),
        named("helper", ["svid.pem", "svid_key.pem", "svid_bundle.pem"]),
        named("vault", [one, one, one]),
        named(
            "credentials",
            ["{serviceAccount}-cert", "{serviceAccount}-key", "ca"],
        ),
    ] {
        let store = store_of(layout.clone(), &[OURS]);
        let svid = until(|| store.current(&id(OURS))).await;
        assert_eq!(svid.chain()[..2], issued.chain[..2], "{layout:?}");
        assert!(store.status()[0].remarks.is_empty(), "{layout:?}");
    }
}

#[tokio::test]
async fn a_change_is_in_force_within_a_second() {
    let scene = Scene::new().await;
    for _ in 0..3 {
        let old = scene.current().unwrap();
        scene.put(&scene.root.leaf(OURS), &[&scene.root]);
        let start = Instant::now();
        scene.newer(&old).await;
        let took = start.elapsed();
        assert!(took < PROMISED, "{took:?}");
    }
}

#[tokio::test]
async fn files_written_one_by_one_are_taken_when_they_fit() {
    let scene = Scene::new().await;
    let old = scene.current().unwrap();
    let new = scene.root.leaf(OURS);
    // In place, and slower than any writer: each state is looked at.
    fs::write(scene.at("tls.crt"), &new.chain_pem()[..200]).unwrap();
    scene.refused("unreadable").await;
    fs::write(scene.at("tls.crt"), new.chain_pem()).unwrap();
    scene.refused("key_mismatch").await;
    assert!(Arc::ptr_eq(&scene.current().unwrap(), &old));
    fs::write(scene.at("tls.key"), new.key_pem()).unwrap();
    assert_eq!(scene.newer(&old).await.chain(), new.chain);
}

#[tokio::test]
async fn a_bad_change_is_counted_by_its_reason_and_the_old_stays() {
    let scene = Scene::new().await;
    let old = scene.current().unwrap();
    let root = &scene.root;
    let early = root.leaf_with(OURS, |params| {
        params.not_before = OffsetDateTime::now_utc() + time::Duration::minutes(30);
    });
    for (issued, reason) in [
        (root.leaf_with(OURS, expire), "expired"),
        (early, "not_yet_valid"),
        (root.leaf(PEERS), "wrong_identity"),
        (Authority::root("example.org").leaf(OURS), "untrusted_chain"),
    ] {
        scene.put(&issued, &[root]);
        scene.refused(reason).await;
        assert!(Arc::ptr_eq(&scene.current().unwrap(), &old), "{reason}");
        let status = scene.store.status().remove(0);
        assert_eq!(status.last_result, Some(ReloadResult::Rejected));
        assert_eq!(status.last_error.unwrap().as_str(), reason);
    }
    // A bundle that would not vouch for the certificate any more is no better.
    let good = root.leaf(OURS);
    scene.put(&good, &[&Authority::root("example.org")]);
    let before = scene.counts().rejected["untrusted_chain"];
    until(|| (scene.counts().rejected["untrusted_chain"] > before).then_some(())).await;
    assert!(Arc::ptr_eq(&scene.current().unwrap(), &old));
    let trusted = scene.store.trust_of(&id(OURS)).unwrap();
    let trusted = trusted.values().next().unwrap();
    assert_eq!(trusted.certificates()[0], root.certificate());
    scene.put(&good, &[root]);
    scene.newer(&old).await;
    assert_eq!(scene.store.status()[0].last_error, None);
}

#[tokio::test]
async fn unchanged_contents_are_counted_apart_and_nothing_is_swapped() {
    let scene = Scene::new().await;
    let (old, before) = (scene.current().unwrap(), scene.counts());
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        let contents = fs::read_to_string(scene.at(name)).unwrap();
        put(scene.at(name), &contents);
    }
    until(|| (scene.counts().unchanged > before.unchanged).then_some(())).await;
    assert!(Arc::ptr_eq(&scene.current().unwrap(), &old));
    assert_eq!(scene.counts().accepted, before.accepted);
    let status = scene.store.status().remove(0);
    assert_eq!(status.last_result, Some(ReloadResult::Unchanged));
}

#[tokio::test]
async fn a_folder_that_goes_and_comes_again_costs_nothing_but_the_wait() {
    let scene = Scene::new().await;
    let old = scene.current().unwrap();
    let volume = scene.at("");
    for name in ["tls.crt", "tls.key", "ca.crt"] {
        fs::remove_file(scene.at(name)).unwrap();
    }
    fs::remove_dir(&volume).unwrap();
    scene.refused("unavailable").await;
    assert!(Arc::ptr_eq(&scene.current().unwrap(), &old));
    let new = scene.root.leaf(OURS);
    scene.put(&new, &[&scene.root]);
    assert_eq!(scene.newer(&old).await.chain(), new.chain);
}

#[tokio::test]
async fn a_certificate_lasts_as_long_as_what_is_above_it() {
    let scene = Scene::new().await;
    let old = scene.current().unwrap();
    assert!(!old.signer_expires_soon(SystemTime::now()));
    let in_seconds = |seconds| OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
    let brief = Authority::root_with("example.org", |params| params.not_after = in_seconds(60));
    let issued = brief.leaf(OURS);
    scene.put(&issued, &[&brief]);
    let svid = scene.newer(&old).await;
    let minute = SystemTime::now() + Duration::from_secs(61);
    assert!(svid.not_after < minute && svid.signer.not_after == svid.not_after);
    assert!(
        scene.store.status()[0]
            .remarks
            .contains(&Remark::SignerExpires)
    );

    // The root is reissued: the same certificate lasts longer. Then it is about to end.
    let longer = brief.reissued(|params| params.not_after = in_seconds(1800));
    scene.put(&issued, &[&brief, &longer]);
    until(|| scene.current().filter(|svid| svid.not_after > minute)).await;
    assert!(scene.store.status()[0].remarks.is_empty());
    let last = brief.reissued(|params| params.not_after = in_seconds(3));
    scene.put(&issued, &[&last]);
    until(|| scene.current().filter(|svid| svid.not_after < minute)).await;
    until(|| scene.current().is_none().then_some(())).await;
    assert!(scene.store.status()[0].certificate.is_none());
}

#[tokio::test]
async fn both_roots_count_while_both_are_in_the_file() {
    let scene = Scene::new().await;
    let (old, new_root) = (&scene.root, Authority::root("example.org"));
    let judge = |issued: &Issued| {
        let bundles = scene.store.trust_of(&id(OURS)).unwrap();
        verify_chain(
            &bundles,
            &issued.chain[0],
            &issued.chain[1..],
            SystemTime::now(),
        )
    };
    let (olds, news) = (old.leaf(PEERS), new_root.leaf(PEERS));
    assert!(judge(&olds).is_ok() && judge(&news).is_err());
    let same = old.leaf(OURS);
    scene.put(&same, &[old, &new_root]);
    until(|| judge(&news).ok()).await;
    assert!(judge(&olds).is_ok());
    // Our own certificate has to move before the old root goes.
    scene.put(&new_root.leaf(OURS), &[&new_root]);
    until(|| judge(&olds).err()).await;
    assert!(judge(&news).is_ok());
    assert!(scene.current().is_some());
}

#[tokio::test]
async fn what_has_expired_without_a_successor_is_not_presented() {
    let soon = OffsetDateTime::now_utc() + time::Duration::seconds(2);
    let scene = Scene::with(|params| params.not_after = soon).await;
    scene.put(&scene.root.leaf_with(OURS, expire), &[&scene.root]);
    scene.refused("expired").await;
    until(|| scene.current().is_none().then_some(())).await;
    assert!(SystemTime::now() >= SystemTime::from(soon) - Duration::from_secs(1));
    scene.put(&scene.root.leaf(OURS), &[&scene.root]);
    until(|| scene.current()).await;
}

/// Less than the ten seconds after which the clock is looked at for no reason.
const LIST: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_revocation_list_in_the_files_counts_until_it_expires() {
    let (folder, root) = (tempfile::tempdir().unwrap(), Authority::root("example.org"));
    let with_lists = FilesLayout {
        revocation_lists: PathPattern::parse("crl.pem").ok(),
        ..layout(folder.path())
    };
    put_all(folder.path(), &root.leaf(OURS), &[&root]);
    let list = |revoked: &[&[u8]], valid| {
        let der = root.revocation_list(revoked, valid);
        pem::encode(&pem::Pem::new("X509 CRL", der.as_ref()))
    };
    put(
        folder.path().join("crl.pem"),
        &list(&[], time::Duration::hours(1)),
    );
    let store = store_of(with_lists, &[OURS]);
    until(|| store.current(&id(OURS))).await;
    let (peer, other) = (root.leaf(PEERS), root.leaf(PEERS));
    let judge_this = |issued: &Issued| {
        let bundles = store.trust_of(&id(OURS)).unwrap();
        verify_chain(&bundles, &issued.chain[0], &[], SystemTime::now())
    };
    let judge = || judge_this(&peer);
    assert!(judge().is_ok());
    assert!(store.bundles()[0].revocation_checked);

    let serial = svid_rules::parse(&peer.chain[0]).unwrap();
    let revoked = list(&[serial.raw_serial()], LIST.try_into().unwrap());
    put(folder.path().join("crl.pem"), &revoked);
    until(|| judge().err()).await;
    assert_eq!(judge(), Err(RejectReason::Revoked));
    assert!(judge_this(&other).is_ok());

    // Whoever has judged by the list is to judge again when it has expired.
    let (before, start) = (store.trust_of(&id(OURS)).unwrap(), Instant::now());
    until(|| (!Arc::ptr_eq(&before, &store.trust_of(&id(OURS)).unwrap())).then_some(())).await;
    assert!(start.elapsed() < 2 * LIST, "{:?}", start.elapsed());
    assert_eq!(judge_this(&other), Err(RejectReason::RevocationListExpired));
    // What a list names stays revoked.
    assert_eq!(judge(), Err(RejectReason::Revoked));
}

#[tokio::test]
async fn configured_lists_are_for_whichever_source_the_bundle_is_of() {
    let scene = Scene::new().await;
    let domain = TrustDomain::parse("example.org").unwrap();
    let peer = scene.root.leaf(PEERS);
    let judge = || {
        let bundles = scene.store.trust_of(&id(OURS)).unwrap();
        verify_chain(&bundles, &peer.chain[0], &[], SystemTime::now())
    };
    assert!(judge().is_ok());
    let serial = svid_rules::parse(&peer.chain[0]).unwrap();
    let der = scene
        .root
        .revocation_list(&[serial.raw_serial()], time::Duration::hours(1));
    let path = scene.at("ca.crl");
    fs::write(&path, &der).unwrap();
    let lists = read_revocation_lists(&path).unwrap();
    scene.store.configure_trust(&[], [(domain, lists)].into());
    assert_eq!(judge(), Err(RejectReason::Revoked));
    scene.store.configure_trust(&[], RevocationLists::new());
    assert!(judge().is_ok());
    fs::write(&path, "nothing of the kind").unwrap();
    let error = read_revocation_lists(&path).unwrap_err().to_string();
    assert!(error.contains("a revocation list in PEM"), "{error}");
}

#[tokio::test]
async fn a_change_to_one_identity_leaves_the_others_alone() {
    let (base, root) = (tempfile::tempdir().unwrap(), Authority::root("example.org"));
    let folder = |name: &str| base.path().join("ns/shop/sa").join(name);
    put_all(&folder("cart"), &root.leaf(OURS), &[&root]);
    put_all(&folder("stock"), &root.leaf(PEERS), &[&root]);
    let store = store_of(layout(&base.path().join("{path}")), &[OURS, PEERS]);
    let old = until(|| store.current(&id(OURS))).await;
    let other = until(|| store.current(&id(PEERS))).await;
    let bundles = |it| {
        store
            .trust_of(&id(it))
            .unwrap()
            .values()
            .next()
            .unwrap()
            .clone()
    };
    assert!(Arc::ptr_eq(&bundles(OURS), &bundles(PEERS)), "kept once");
    let attempts = || store.status()[1].last_attempt;
    let before = attempts();

    put_all(&folder("cart"), &root.leaf(OURS), &[&root]);
    until(|| (store.current(&id(OURS))?.generation > old.generation).then_some(())).await;
    assert!(Arc::ptr_eq(&store.current(&id(PEERS)).unwrap(), &other));
    assert_eq!(
        attempts(),
        before,
        "the other's files were read for nothing"
    );
}

#[tokio::test]
async fn everything_can_be_read_again_at_once_and_refusals_are_told() {
    let scene = Scene::new().await;
    assert_eq!(scene.store.reload(SOON).await, []);
    let before = scene.counts();
    assert_eq!(scene.store.reload(SOON).await, []);
    assert_eq!(scene.counts().unchanged, before.unchanged + 1);

    scene.put(&scene.root.leaf(PEERS), &[&scene.root]);
    let refused = scene.store.reload(SOON).await;
    let [(whose, why)] = &refused[..] else {
        panic!("{refused:?}");
    };
    assert_eq!(*whose, id(OURS));
    assert!(why.contains("another SPIFFE ID"), "{why}");
}
