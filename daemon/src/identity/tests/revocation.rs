//! Revocation lists: what they say counts, and what they do not say is refused.

use time::Duration;

use super::{
    certs::{Authority, Issued},
    handshake::{PEERS, World},
    *,
};

const VALID: Duration = Duration::hours(1);

/// We trust the CA, with the lists that `lists` makes.
fn world_with(lists: impl FnOnce(&Authority) -> Vec<CrlDer>) -> World {
    World::trusting(|root| {
        let domain = TrustDomain::parse("example.org").unwrap();
        vec![TrustBundle::new(domain, vec![root.certificate()], lists(root)).unwrap()]
    })
}

type CrlDer = rustls_pki_types::CertificateRevocationListDer<'static>;

fn serial(issued: &Issued) -> Vec<u8> {
    svid_rules::parse(&issued.chain[0])
        .unwrap()
        .raw_serial()
        .to_vec()
}

#[test]
fn a_revoked_certificate_is_refused_and_others_are_not() {
    let root = Authority::root("example.org");
    let (revoked, other) = (root.leaf(PEERS), root.leaf(PEERS));
    let list = root.revocation_list(&[&serial(&revoked)], VALID);
    let world = World::with_root(root, |root| {
        let domain = TrustDomain::parse("example.org").unwrap();
        vec![TrustBundle::new(domain, vec![root.certificate()], vec![list]).unwrap()]
    });
    world.refuses(&revoked, RejectReason::Revoked);
    world.accepts(&other);
}

#[test]
fn a_revoked_intermediate_is_refused() {
    let root = Authority::root("example.org");
    let intermediate = root.intermediate(|_| {});
    let leaf = intermediate.leaf(PEERS);
    let ca_serial = svid_rules::parse(&leaf.chain[1])
        .unwrap()
        .raw_serial()
        .to_vec();
    let lists = vec![
        root.revocation_list(&[&ca_serial], VALID),
        intermediate.revocation_list(&[], VALID),
    ];
    let world = World::with_root(root, |root| {
        let domain = TrustDomain::parse("example.org").unwrap();
        vec![TrustBundle::new(domain, vec![root.certificate()], lists).unwrap()]
    });
    world.refuses(&leaf, RejectReason::Revoked);
}

#[test]
fn with_lists_what_none_of_them_speaks_of_is_refused() {
    let world = world_with(|root| vec![root.revocation_list(&[], VALID)]);
    world.accepts(&world.root.leaf(PEERS));
    let below = world.root.intermediate(|_| {}).leaf(PEERS);
    world.refuses(&below, RejectReason::RevocationUnknown);
    let others = world_with(|_| vec![Authority::root("example.org").revocation_list(&[], VALID)]);
    others.refuses(&others.root.leaf(PEERS), RejectReason::RevocationUnknown);
}

#[test]
fn an_expired_list_refuses_everybody() {
    let world = world_with(|root| vec![root.revocation_list(&[], Duration::minutes(-1))]);
    world.refuses(&world.root.leaf(PEERS), RejectReason::RevocationListExpired);
}

#[test]
fn a_list_that_cannot_be_read_spoils_the_bundle() {
    let root = Authority::root("example.org");
    let domain = TrustDomain::parse("example.org").unwrap();
    let garbage = vec![CrlDer::from(vec![0x30, 0x00])];
    let bundle = TrustBundle::new(domain, vec![root.certificate()], garbage);
    assert!(matches!(
        bundle,
        Err(BundleError::RevocationList { position: 1, .. })
    ));
}

#[test]
fn status_says_whether_revocation_is_checked() {
    let world = world_with(|root| vec![root.revocation_list(&[], VALID)]);
    let checked = |world: &World| {
        let bundles = world.trust.current();
        let statuses = bundles.values().map(|bundle| BundleStatus::from(&**bundle));
        statuses
            .map(|status| status.revocation_checked)
            .collect::<Vec<_>>()
    };
    assert_eq!(checked(&world), [true]);
    assert_eq!(checked(&World::new()), [false]);
}
