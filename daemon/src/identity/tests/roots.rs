//! Whose signature counts, and in which trust domain.

use rcgen::{IsCa, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

use super::{
    certs::{Authority, expire, uri},
    handshake::{OURS, PEERS, World, bundle, bundles, try_bundle},
    *,
};

#[test]
fn an_expired_root_signs_for_nothing() {
    let root = Authority::root_with("example.org", |params| {
        params.not_before = OffsetDateTime::now_utc() - Duration::hours(2);
    });
    let world = World::with_root(root, |root| {
        // The same name and key, so that only the validity tells them apart.
        vec![bundle("example.org", &[&root.reissued(expire)])]
    });
    world.refuses(&world.root.leaf(PEERS), RejectReason::AnchorValidity);
    let below = world.root.intermediate(|_| {}).leaf(PEERS);
    world.refuses(&below, RejectReason::AnchorValidity);
}

#[test]
fn a_root_that_is_not_yet_valid_signs_for_nothing() {
    let world = World::trusting(|root| {
        let early = root.reissued(|params| {
            params.not_before = OffsetDateTime::now_utc() + Duration::minutes(30);
        });
        vec![bundle("example.org", &[&early])]
    });
    world.refuses(&world.root.leaf(PEERS), RejectReason::AnchorValidity);
}

#[test]
fn an_expired_root_does_not_hide_its_successor() {
    let world = World::trusting(|root| {
        let expired = root.reissued(expire);
        vec![bundle("example.org", &[&expired, root])]
    });
    world.accepts(&world.root.leaf(PEERS));
}

#[test]
fn an_expired_root_does_not_live_on_by_a_namesake() {
    let named = |params: &mut rcgen::CertificateParams| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "one name for both");
    };
    let namesake = Authority::root_with("example.org", named);
    let world = World::with_root(Authority::root_with("example.org", named), |root| {
        vec![bundle("example.org", &[&root.reissued(expire), &namesake])]
    });
    world.refuses(&world.root.leaf(PEERS), RejectReason::AnchorValidity);
    world.accepts(&namesake.leaf(PEERS));
}

#[test]
fn old_and_new_root_count_while_both_are_in_the_bundle() {
    let new = Authority::root("example.org");
    let world = World::trusting(|root| vec![bundle("example.org", &[root, &new])]);
    world.accepts(&world.root.leaf(PEERS));
    world.accepts(&new.leaf(PEERS));
    world
        .trust
        .replace(bundles([bundle("example.org", &[&new])]));
    world.refuses(&world.root.leaf(PEERS), RejectReason::UntrustedChain);
}

#[test]
fn another_trust_domains_root_cannot_forge_our_identities() {
    let other = Authority::root("other.example");
    let world = World::trusting(|root| {
        vec![
            bundle("example.org", &[root]),
            bundle("other.example", &[&other]),
        ]
    });
    world.refuses(&other.leaf(PEERS), RejectReason::UntrustedChain);
    let forged = world.root.leaf("spiffe://other.example/ns/shop/sa/stock");
    world.refuses(&forged, RejectReason::UntrustedChain);
}

#[test]
fn another_trust_domain_with_a_bundle_may_come_to_us() {
    let other = Authority::root("other.example");
    let bundles = |root: &Authority| {
        vec![
            bundle("example.org", &[root]),
            bundle("other.example", &[&other]),
        ]
    };
    let world = World::trusting(bundles);
    let stranger = other.leaf("spiffe://other.example/ns/shop/sa/stock");
    assert_eq!(world.as_server(&stranger), Ok(()));
}

#[test]
fn a_trust_domain_without_a_bundle_is_unknown() {
    let world = World::new();
    for id in [
        "spiffe://other.example/ns/shop/sa/stock",
        "spiffe://example.org.other/ns/shop/sa/stock",
        "spiffe://sub.example.org/ns/shop/sa/stock",
    ] {
        world.refuses(&world.root.leaf(id), RejectReason::UnknownTrustDomain);
    }
    let nobody = World::trusting(|_| Vec::new());
    nobody.refuses(&nobody.root.leaf(PEERS), RejectReason::UnknownTrustDomain);
}

#[test]
fn an_empty_bundle_revokes_its_trust_domain() {
    let world = World::trusting(|_| vec![bundle("example.org", &[])]);
    world.refuses(&world.root.leaf(PEERS), RejectReason::TrustDomainRevoked);
}

#[test]
fn a_bundle_replaced_at_runtime_counts_at_the_next_handshake() {
    let world = World::new();
    world.accepts(&world.root.leaf(PEERS));
    let trust = &world.trust;
    assert!(trust.replace(bundles([bundle("example.org", &[])])));
    world.refuses(&world.root.leaf(PEERS), RejectReason::TrustDomainRevoked);
    assert!(!trust.replace(bundles([bundle("example.org", &[])])));
    assert!(trust.replace(bundles([bundle("example.org", &[&world.root])])));
    world.accepts(&world.root.leaf(PEERS));
}

#[test]
fn what_may_not_sign_is_no_root() {
    let reason = |change: fn(&mut rcgen::CertificateParams)| {
        let root = Authority::root_with("example.org", change);
        match try_bundle("example.org", &[&Authority::root("example.org"), &root]) {
            Err(BundleError::Certificate {
                position: 2,
                reason,
                ..
            }) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        reason(|params| params.is_ca = IsCa::ExplicitNoCa),
        RejectReason::SignerNotCa
    );
    assert_eq!(
        reason(|params| params.is_ca = IsCa::NoCa),
        RejectReason::SignerNotCa
    );
    assert_eq!(
        reason(|params| params.key_usages.clear()),
        RejectReason::SignerKeyUsage
    );
    assert_eq!(
        reason(|params| params.key_usages = vec![KeyUsagePurpose::CrlSign]),
        RejectReason::SignerKeyUsage
    );
    assert_eq!(
        reason(|params| params.subject_alt_names = vec![uri(OURS)]),
        RejectReason::SignerIdHasPath
    );
    assert_eq!(
        reason(|params| params.subject_alt_names = vec![uri("spiffe://example.org/")]),
        RejectReason::SignerIdHasPath
    );
}

#[test]
fn what_is_older_than_version_3_of_x509_is_no_root() {
    // [0] { INTEGER 2 }: a trust anchor's signature is nobody's to check.
    let version_3 = [0xa0, 3, 2, 1, 2];
    let mut der = Authority::root("example.org").certificate().to_vec();
    let found = der.windows(5).position(|bytes| bytes == version_3).unwrap();
    der[found + 4] = 1;
    let domain = TrustDomain::parse("example.org").unwrap();
    let error = TrustBundle::new(domain, vec![der.into()], Vec::new()).unwrap_err();
    assert!(
        matches!(
            error,
            BundleError::Certificate {
                reason: RejectReason::SignerNotCa,
                ..
            }
        ),
        "{error}"
    );
}
