//! What the store puts in force, keeps, and drops.

use std::{
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
struct Told {
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

    fn now(&self, answer: impl Fn() -> Result<Material, SourceError> + Send + 'static) {
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

fn ours() -> SpiffeId {
    SpiffeId::parse(OURS).unwrap()
}

/// A store for [`OURS`] that trusts `root`, and has what `issued` is in force.
async fn store_with(root: &Authority, issued: Issued) -> (IdentityStore, Arc<Told>) {
    let source = Told::new(move || Ok(material(&issued)));
    let trust = TrustStore::new([bundle("example.org", &[root])]);
    let store = IdentityStore::new(source.clone(), Arc::new(trust));
    store.ensure(&[ours()]);
    changed(&store, |store| store.current(&ours())).await;
    (store, source)
}

/// Waits until `what` gives something, looking again at each change.
async fn changed<T>(store: &IdentityStore, what: impl Fn(&IdentityStore) -> Option<T>) -> T {
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
async fn failed(store: &IdentityStore) -> &'static str {
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

    source.now(|| Err(SourceError::Withdrawn));
    changed(&store, |store| {
        store.current(&ours()).is_none().then_some(())
    })
    .await;
    assert!(store.status()[0].certificate.is_none());
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
}

#[tokio::test]
async fn a_bundle_and_the_certificate_that_needs_it_are_put_in_force_together() {
    let (old, new) = (
        Authority::root("example.org"),
        Authority::root("example.org"),
    );
    let (store, source) = store_with(&old, old.leaf(OURS)).await;
    let before = store.trust().current();

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
    assert!(Arc::ptr_eq(&store.trust().current(), &before));

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
    store.ensure(&[ours(), gone.clone()]);
    assert_eq!(store.status().len(), 2);
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &old));

    store.ensure(&[gone]);
    assert!(store.current(&ours()).is_none());
    store.ensure(&[ours()]);
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
