//! What another daemon passes instead of the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{
    certs::{Authority, Issued},
    handshake::{OURS, PEERS, bundle, material},
    store::{Told, changed, failed, from, ours, store_with},
    *,
};

/// For something that must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(200);

/// A store that has something in force, and to which another daemon passes certificates from now on. Its
/// source has something newer.
async fn passed_to(root: &Authority) -> (IdentityStore, Arc<Told>, Arc<Svid>) {
    let (store, source) = store_with(root, root.leaf(OURS)).await;
    let old = store.current(&ours()).unwrap();
    assert!(store.expect_passed(true));
    assert!(!store.expect_passed(true), "it is no news");
    let newer = root.leaf(OURS);
    source.now(move || Ok(material(&newer)));
    (store, source, old)
}

fn pass(store: &IdentityStore, issued: &Issued) {
    let material = Arc::new(material(issued));
    store.take_passed(&ours(), Passed::Material(material));
}

/// Waits until another certificate than this is in force.
async fn another(store: &IdentityStore, old: &Svid) -> Arc<Svid> {
    let newer = |store: &IdentityStore| {
        let svid = store.current(&ours())?;
        (svid.generation > old.generation).then_some(svid)
    };
    changed(store, newer).await
}

#[tokio::test]
async fn while_certificates_are_passed_no_source_is_asked_and_afterwards_it_is() {
    let root = Authority::root("example.org");
    let (store, source, old) = passed_to(&root).await;
    tokio::time::sleep(A_WHILE).await;
    store.reload(A_WHILE).await;
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &old));

    let next = root.leaf(OURS);
    pass(&store, &next);
    let taken = another(&store, &old).await;
    assert_eq!(taken.chain(), next.chain);
    // The same again is nothing new.
    pass(&store, &next);
    tokio::time::sleep(A_WHILE).await;
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &taken));

    assert!(store.expect_passed(false));
    let asked = another(&store, &taken).await;
    assert_eq!(asked.chain(), source.fetch(&ours()).await.unwrap().chain);
    // What comes late counts for nothing.
    pass(&store, &root.leaf(OURS));
    tokio::time::sleep(A_WHILE).await;
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &asked));
}

#[tokio::test]
async fn what_is_passed_is_checked_like_what_a_source_gives() {
    let root = Authority::root("example.org");
    let (store, _source, old) = passed_to(&root).await;
    let stranger = Authority::root("example.org");
    let mut mismatched = root.leaf(OURS);
    mismatched.key = root.leaf(OURS).key;
    for (issued, reason) in [
        (root.leaf(PEERS), "wrong_identity"),
        (stranger.leaf(OURS), "untrusted_chain"),
        (mismatched, "key_mismatch"),
    ] {
        pass(&store, &issued);
        let refused = async {
            while failed(&store).await != reason {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), refused)
            .await
            .unwrap();
        assert!(
            Arc::ptr_eq(&store.current(&ours()).unwrap(), &old),
            "{reason}"
        );
    }
    pass(&store, &root.leaf(OURS));
    another(&store, &old).await;
    assert_eq!(store.status()[0].last_error, None);
}

#[tokio::test]
async fn a_denial_that_is_passed_drops_the_certificate_at_once() {
    let root = Authority::root("example.org");
    let (store, _source, old) = passed_to(&root).await;
    store.take_passed(&ours(), Passed::Denied(Denied::NoProcess));
    let none = |store: &IdentityStore| store.current(&ours()).is_none().then_some(());
    changed(&store, none).await;
    // And what is passed then is taken.
    pass(&store, &root.leaf(OURS));
    another(&store, &old).await;
}

#[tokio::test]
async fn the_source_is_asked_for_an_identity_that_the_other_daemon_does_not_know() {
    let root = Authority::root("example.org");
    let (store, source, old) = passed_to(&root).await;
    store.take_passed(&ours(), Passed::Unknown);
    let asked = another(&store, &old).await;
    assert_eq!(asked.chain(), source.fetch(&ours()).await.unwrap().chain);
    pass(&store, &root.leaf(OURS));
    let taken = another(&store, &asked).await;
    // The source is not asked any more.
    let newest = root.leaf(OURS);
    source.now(move || Ok(material(&newest)));
    tokio::time::sleep(A_WHILE).await;
    assert!(Arc::ptr_eq(&store.current(&ours()).unwrap(), &taken));
}

#[tokio::test]
async fn keys_are_forgotten_with_their_use() {
    let root = Authority::root("example.org");
    let (store, _source, old) = passed_to(&root).await;
    let bundle = Arc::new(bundle("example.org", &[&root]));
    let passed = Material {
        bundles: vec![bundle.clone()],
        ..material(&root.leaf(OURS))
    };
    store.take_passed(&ours(), Passed::Material(Arc::new(passed)));
    another(&store, &old).await;
    let holders = || Arc::strong_count(&bundle);
    let held = holders();
    store.keep_passed(&BTreeSet::from([ours()]));
    assert_eq!(holders(), held);
    store.keep_passed(&BTreeSet::new());
    assert_eq!(holders(), held - 1, "what was passed is forgotten");
    store.ensure(&BTreeMap::new());
    let forgotten = async {
        while holders() > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let soon = Duration::from_secs(10);
    let forgotten = tokio::time::timeout(soon, forgotten).await;
    forgotten.expect("what was in force is forgotten as well");
}

#[tokio::test]
async fn what_is_in_force_is_what_is_passed_on() {
    let root = Authority::root("example.org");
    let (store, source) = store_with(&root, root.leaf(OURS)).await;
    let material_of = |store: &IdentityStore| match store.pass(&ours()) {
        Some(Passed::Material(material)) => material,
        other => panic!("it passes {other:?}"),
    };
    let first = material_of(&store);
    assert_eq!(first.chain, store.current(&ours()).unwrap().chain());
    // It is the same value for as long as it says the same.
    store.reload(Duration::from_secs(10)).await;
    assert!(Arc::ptr_eq(&material_of(&store), &first));
    let next = root.leaf(OURS);
    let chain = next.chain.clone();
    source.now(move || Ok(material(&next)));
    let old = store.current(&ours()).unwrap();
    store.reload(Duration::from_secs(10)).await;
    assert_ne!(old.chain(), material_of(&store).chain);
    assert_eq!(material_of(&store).chain, chain);
    // What is refused is not passed on.
    source.now(|| Ok(material(&Authority::root("example.org").leaf(OURS))));
    store.reload(Duration::from_secs(10)).await;
    assert_eq!(material_of(&store).chain, chain);
    // A denial is, and so is that an identity is nobody's.
    source.now(|| Err(Denied::NoProcess.into()));
    store.reload(Duration::from_secs(10)).await;
    assert!(matches!(
        store.pass(&ours()),
        Some(Passed::Denied(Denied::NoProcess))
    ));
    store.ensure(&from("told", &[]));
    assert!(matches!(store.pass(&ours()), Some(Passed::Unknown)));
}
