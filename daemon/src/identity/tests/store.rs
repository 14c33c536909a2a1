//! What the store puts in force, keeps, and drops.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, future::BoxFuture};
use rustls_pki_types::PrivatePkcs8KeyDer;
use time::OffsetDateTime;
use tokio::{sync::watch, time::timeout};
use zeroize::Zeroizing;

use super::{
    certs::{Authority, Issued, expire},
    handshake::{OURS, PEERS, bundle, material},
    *,
};

/// How long something that is to happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(10);

type Answer = Box<dyn Fn() -> Result<Material, SourceError> + Send>;

/// A source that gives what the test tells it to.
pub(super) struct Told {
    answer: Mutex<Answer>,
    changes: watch::Sender<u64>,
}

impl Told {
    fn new(answer: impl Fn() -> Result<Material, SourceError> + Send + 'static) -> Arc<Self> {
        Arc::new(Self {
            answer: Mutex::new(Box::new(answer)),
            changes: watch::Sender::new(0),
        })
    }

    /// Gives this, and the bundle of these roots with it.
    fn with(issued: &Issued, roots: &[&Authority]) -> Arc<Self> {
        let bundle = Arc::new(bundle("example.org", roots));
        let (chain, key) = (issued.chain.clone(), issued.key.clone_key());
        Self::new(move || {
            Ok(Material {
                chain: chain.clone(),
                key: Zeroizing::new(key.clone_key().into()),
                bundles: vec![bundle.clone()],
            })
        })
    }

    pub(super) fn now(&self, answer: impl Fn() -> Result<Material, SourceError> + Send + 'static) {
        *self.answer.lock().unwrap() = Box::new(answer);
        self.changes.send_modify(|number| *number += 1);
    }
}

impl CertificateSource for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    fn fetch<'a>(&'a self, _id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        std::future::ready((self.answer.lock().unwrap())()).boxed()
    }

    fn changes(&self, _id: &SpiffeId) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told")
    }
}

pub(super) fn ours() -> SpiffeId {
    SpiffeId::parse(OURS).unwrap()
}

/// These identities, from one source.
pub(super) fn from(source: &str, ids: &[SpiffeId]) -> BTreeMap<SpiffeId, String> {
    ids.iter()
        .map(|id| (id.clone(), source.to_owned()))
        .collect()
}

fn store_from<const N: usize>(sources: [(&str, &Arc<Told>); N]) -> IdentityStore {
    let named = sources.map(|(name, source)| (name.to_owned(), source.clone() as _));
    IdentityStore::new(named.into())
}

/// A store for [`OURS`] that trusts `root`, and has what `issued` is in force.
pub(super) async fn store_with(root: &Authority, issued: Issued) -> (IdentityStore, Arc<Told>) {
    let source = Told::new(move || Ok(material(&issued)));
    let store = store_from([("told", &source)]);
    store.fetched_bundles(&[Arc::new(bundle("example.org", &[root]))]);
    store.ensure(&from("told", &[ours()]));
    changed(&store, |store| store.current(&ours())).await;
    (store, source)
}

/// Waits until `what` gives something, looking again at each change.
pub(super) async fn changed<T>(
    store: &IdentityStore,
    what: impl Fn(&IdentityStore) -> Option<T>,
) -> T {
    let mut changes = store.changes();
    let wait = async {
        loop {
            if let Some(found) = what(store) {
                return found;
            }
            changes.changed().await.unwrap();
        }
    };
    timeout(SOON, wait).await.expect("nothing has changed")
}

/// Waits until the store says that the last attempt failed, and why.
pub(super) async fn failed(store: &IdentityStore) -> &'static str {
    let wait = async {
        loop {
            if let Some(error) = &store.status()[0].last_error {
                return error.as_str();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.expect("nothing has failed")
}

#[tokio::test]
async fn bad_material_is_refused_for_what_it_is_and_the_old_stays() {
    let root = Authority::root("example.org");
    let (other_key, other_root) = (root.leaf(OURS).key, Authority::root("example.org"));
    let bad_key = PrivatePkcs8KeyDer::from(vec![0x30, 0x00]);
    let mut mismatched = root.leaf(OURS);
    mismatched.key = other_key;
    let mut keyless = root.leaf(OURS);
    keyless.key = bad_key;
    let mut empty = root.leaf(OURS);
    empty.chain.clear();
    let early = root.leaf_with(OURS, |params| {
        params.not_before = OffsetDateTime::now_utc() + time::Duration::minutes(30);
    });
    for (issued, reason) in [
        (root.leaf(PEERS), "wrong_identity"),
        (root.leaf_with(OURS, expire), "expired"),
        (early, "not_yet_valid"),
        (other_root.leaf(OURS), "untrusted_chain"),
        (mismatched, "key_mismatch"),
        (keyless, "key"),
        (empty, "empty_chain"),
    ] {
        let (store, source) = store_with(&root, root.leaf(OURS)).await;
        let old = store.current(&ours()).unwrap();
        source.now(move || Ok(material(&issued)));
        assert_eq!(failed(&store).await, reason);
        assert!(
            Arc::ptr_eq(&store.current(&ours()).unwrap(), &old),
            "{reason}"
        );
        // What is right again is taken, and the error is forgotten.
        let good = root.leaf(OURS);
        source.now(move || Ok(material(&good)));
        let newer = |store: &IdentityStore| {
            let svid = store.current(&ours())?;
            (svid.generation > old.generation).then_some(svid)
        };
        changed(&store, newer).await;
        assert_eq!(store.status()[0].last_error, None);
    }
}

#[tokio::test]
async fn an_unreachable_source_changes_nothing_and_a_withdrawal_does_at_once() {
    let root = Authority::root("example.org");
    let (store, source) = store_with(&root, root.leaf(OURS)).await;
    source.now(|| Err(SourceError::Unavailable("the socket is gone".into())));
    assert_eq!(failed(&store).await, "unavailable");
    assert!(store.current(&ours()).is_some());

    source.now(|| Err(Denied::NeverGranted("no entry".into()).into()));
    changed(&store, |store| {
        store.current(&ours()).is_none().then_some(())
    })
    .await;
    assert!(store.status()[0].certificate.is_none());
    assert_eq!(failed(&store).await, "withdrawn", "it was granted before");
}

#[tokio::test]
async fn expired_material_is_not_given_out_and_is_dropped() {
    let root = Authority::root("example.org");
    let brief = root.leaf_with(OURS, |params| {
        params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(2);
    });
    let (store, source) = store_with(&root, brief).await;
    let last = Arc::downgrade(&store.current(&ours()).unwrap());
    source.now(|| Err(SourceError::Unavailable("the socket is gone".into())));
    loop {
        let before = SystemTime::now();
        let Some(svid) = store.current(&ours()) else {
            break;
        };
        assert!(before <= svid.not_after, "given out after its end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(store.status()[0].certificate.is_none());
    changed(&store, |_| last.upgrade().is_none().then_some(())).await;
    // What an alert about its end looks at stays.
    let known = store.status()[0].newest.clone().unwrap();
    assert!(known.not_after < SystemTime::now());
}

#[tokio::test]
async fn what_a_certificate_had_left_at_its_renewal_is_remembered() {
    let root = Authority::root("example.org");
    let a_quarter_left = root.leaf_with(OURS, |params| {
        params.not_before = OffsetDateTime::now_utc() - time::Duration::minutes(45);
        params.not_after = OffsetDateTime::now_utc() + time::Duration::minutes(15);
    });
    let (store, source) = store_with(&root, a_quarter_left).await;
    assert_eq!(store.status()[0].renewal_left, 0.1, "none was seen");
    let old = store.current(&ours()).unwrap().generation;
    let next = root.leaf(OURS);
    source.now(move || Ok(material(&next)));
    changed(&store, |store| {
        (store.current(&ours())?.generation > old).then_some(())
    })
    .await;
    let left = store.status()[0].renewal_left;
    assert!((0.24..=0.25).contains(&left), "{left}");
}

#[tokio::test]
async fn a_bundle_and_the_certificate_that_needs_it_are_put_in_force_together() {
    let (old, new) = (
        Authority::root("example.org"),
        Authority::root("example.org"),
    );
    let first = old.leaf(OURS);
    let source = Told::with(&first, &[&old]);
    let store = store_from([("told", &source)]);
    store.ensure(&from("told", &[ours()]));
    changed(&store, |store| store.current(&ours())).await;
    let before = store.trust_of(&ours()).unwrap();

    // The new bundle is right, and the certificate is not: neither is taken.
    let both = Arc::new(bundle("example.org", &[&old, &new]));
    let (wrong, with) = (new.leaf(PEERS), both.clone());
    source.now(move || {
        Ok(Material {
            bundles: vec![with.clone()],
            ..material(&wrong)
        })
    });
    assert_eq!(failed(&store).await, "wrong_identity");
    assert!(Arc::ptr_eq(&store.trust_of(&ours()).unwrap(), &before));

    let right = new.leaf(OURS);
    source.now(move || {
        Ok(Material {
            bundles: vec![both.clone()],
            ..material(&right)
        })
    });
    let two = |store: &IdentityStore| (store.bundles()[0].certificates == 2).then_some(());
    changed(&store, two).await;
    changed(&store, |store| {
        let status = store.status();
        status[0].last_error.is_none().then_some(())
    })
    .await;
}

#[tokio::test]
async fn each_identity_has_its_own_source_and_trusts_what_came_with_it() {
    let (ours_root, others_root) = (
        Authority::root("example.org"),
        Authority::root("example.org"),
    );
    let other = SpiffeId::parse(PEERS).unwrap();
    let one = Told::with(&ours_root.leaf(OURS), &[&ours_root]);
    let two = Told::with(&others_root.leaf(PEERS), &[&others_root]);
    let store = store_from([("one", &one), ("two", &two)]);
    store.ensure(
        &[
            (ours(), "one".to_owned()),
            (other.clone(), "two".to_owned()),
        ]
        .into(),
    );
    changed(&store, |store| store.current(&ours())).await;
    changed(&store, |store| store.current(&other)).await;
    let sources: Vec<_> = store.status().into_iter().map(|s| s.source).collect();
    assert_eq!(sources, ["one", "two"]);
    let only_root = |id: &SpiffeId| {
        let bundles = store.trust_of(id).unwrap();
        let bundle = bundles.values().next().unwrap();
        assert_eq!(bundle.certificates().len(), 1);
        bundle.certificates()[0].clone()
    };
    assert_eq!(only_root(&ours()), ours_root.certificate());
    assert_eq!(only_root(&other), others_root.certificate());
    assert_eq!(store.bundles().len(), 2);

    // A change to one leaves the other's as it is.
    let before = store.trust_of(&other).unwrap();
    let new = Told::with(&ours_root.leaf(OURS), &[&ours_root, &others_root]);
    one.now(move || (new.answer.lock().unwrap())());
    let both = |store: &IdentityStore| {
        let bundles = store.trust_of(&ours()).unwrap();
        (bundles.values().next()?.certificates().len() == 2).then_some(())
    };
    changed(&store, both).await;
    assert!(Arc::ptr_eq(&store.trust_of(&other).unwrap(), &before));
}

#[tokio::test]
async fn a_configured_bundle_counts_instead_of_the_sources() {
    let (root, other) = (
        Authority::root("example.org"),
        Authority::root("example.org"),
    );
    let source = Told::with(&root.leaf(OURS), &[&root]);
    let store = store_from([("told", &source)]);
    store.fetched_bundles(&[Arc::new(bundle("example.org", &[&other]))]);
    store.ensure(&from("told", &[ours()]));
    assert_eq!(failed(&store).await, "untrusted_chain");

    // Replaced at runtime, it counts for what there is at once.
    store.fetched_bundles(&[Arc::new(bundle("example.org", &[&root, &other]))]);
    source.changes.send_modify(|number| *number += 1);
    changed(&store, |store| store.current(&ours())).await;
    assert_eq!(store.bundles()[0].certificates, 2);
}

#[tokio::test]
async fn an_identity_keeps_what_it_has_until_its_new_source_gives_something() {
    let root = Authority::root("example.org");
    let one = Told::with(&root.leaf(OURS), &[&root]);
    let two = Told::new(|| Err(SourceError::Unavailable("not yet".into())));
    let store = store_from([("one", &one), ("two", &two)]);
    store.ensure(&from("one", &[ours()]));
    let old = changed(&store, |store| store.current(&ours())).await;

    store.ensure(&from("two", &[ours()]));
    assert_eq!(failed(&store).await, "unavailable");
    assert_eq!(store.status()[0].source, "two");
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &old));
    let new = Told::with(&root.leaf(OURS), &[&root]);
    two.now(move || (new.answer.lock().unwrap())());
    let newer = |store: &IdentityStore| {
        let svid = store.current(&ours())?;
        (svid.generation > old.generation).then_some(())
    };
    changed(&store, newer).await;
}

#[tokio::test]
async fn a_source_that_there_is_none_of_is_said() {
    let store = store_from([]);
    store.ensure(&from("vault", &[ours()]));
    assert_eq!(failed(&store).await, "unavailable");
    let error = store.status()[0].last_error.clone().unwrap();
    assert!(error.to_string().contains("`vault`"), "{error}");
}

#[tokio::test]
async fn unchanged_material_is_not_swapped() {
    let root = Authority::root("example.org");
    let (store, source) = store_with(&root, root.leaf(OURS)).await;
    let (old, first) = (store.current(&ours()).unwrap(), store.status().remove(0));
    source.changes.send_modify(|number| *number += 1);
    let again = async {
        while store.status()[0].last_success == first.last_success {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, again).await.unwrap();
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &old));
}

#[tokio::test]
async fn identities_come_and_go_without_touching_each_other() {
    let root = Authority::root("example.org");
    let (store, _source) = store_with(&root, root.leaf(OURS)).await;
    let old = store.current(&ours()).unwrap();
    let gone = SpiffeId::parse(PEERS).unwrap();
    store.ensure(&from("told", &[ours(), gone.clone()]));
    assert_eq!(store.status().len(), 2);
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &old));

    store.ensure(&from("told", &[gone]));
    assert!(store.current(&ours()).is_none());
    store.ensure(&from("told", &[ours()]));
    let new = changed(&store, |store| store.current(&ours())).await;
    assert!(new.generation > old.generation);
}

#[tokio::test]
async fn each_expected_peer_has_one_client_configuration() {
    let root = Authority::root("example.org");
    let (store, _source) = store_with(&root, root.leaf(OURS)).await;
    let svid = store.current(&ours()).unwrap();
    let peer = SpiffeId::parse(PEERS).unwrap();
    assert!(Arc::ptr_eq(&svid.client(&peer), &svid.client(&peer)));
    assert!(!Arc::ptr_eq(&svid.client(&peer), &svid.client(&ours())));
}

#[test]
fn a_certificate_is_good_from_its_first_second_to_its_last() {
    let (svid, second) = (handshake::World::new().ours, Duration::from_secs(1));
    assert!(svid.is_valid_at(svid.not_before) && svid.is_valid_at(svid.not_after));
    assert!(!svid.is_valid_at(svid.not_before - second));
    assert!(!svid.is_valid_at(svid.not_after + second));
}

#[test]
fn no_key_is_in_debug_output() {
    let root = Authority::root("example.org");
    let issued = root.leaf(OURS);
    let trust = Arc::new(TrustStore::new([bundle("example.org", &[&root])]));
    let svid = handshake::check(OURS, &issued, &trust.current(), &trust).unwrap();
    let text = format!("{:?} {svid:?}", material(&issued));
    let secret = Zeroizing::new(issued.key.secret_pkcs8_der().to_vec());
    let hex = hex(&secret[40..60]);
    let decimal = format!("{:?}", &secret[40..60]);
    let decimal = decimal.trim_matches(['[', ']']);
    assert!(!text.contains(&hex) && !text.contains(decimal), "{text}");
}

#[tokio::test]
async fn an_identity_that_was_never_granted_is_not_said_to_be_withdrawn() {
    let source = Told::new(|| Err(Denied::NeverGranted("no entry".into()).into()));
    let store = store_from([("told", &source)]);
    store.ensure(&from("told", &[ours()]));
    assert_eq!(failed(&store).await, "never_granted");
    source.now(|| Err(Denied::NotDelegate("who are you?".into()).into()));
    let wait = async {
        while failed(&store).await != "not_a_delegate" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.unwrap();
    let error = store.status()[0].last_error.clone().unwrap();
    assert_eq!(error.to_string(), "reeve is not a delegate: who are you?");
}
