//! Revocation lists: what they say counts, and what they do not say is refused.

use rcgen::{
    BasicConstraints, CertificateRevocationListParams, CrlDistributionPoint,
    CrlIssuingDistributionPoint, CrlScope, IsCa, KeyIdMethod, KeyUsagePurpose,
};
use time::Duration;

use super::{
    certs::{Authority, Issued},
    handshake::{PEERS, World},
    *,
};
use std::time::SystemTime;

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

/// We trust these roots, with these lists.
fn world_of(root: Authority, others: &[&Authority], lists: &[&CrlDer]) -> World {
    let lists = lists.iter().map(|list| (*list).clone()).collect();
    World::with_root(root, |root| {
        let domain = TrustDomain::parse("example.org").unwrap();
        let roots = std::iter::once(&root).chain(others);
        let roots = roots.map(|root| root.certificate()).collect();
        vec![TrustBundle::new(domain, roots, lists).unwrap()]
    })
}

/// As a list that was signed before those that say nothing of their age.
fn older(params: &mut CertificateRevocationListParams) {
    params.this_update -= Duration::hours(1);
}

#[test]
fn of_several_lists_of_an_issuer_all_count_in_whichever_order() {
    for is_newer_first in [false, true] {
        let root = Authority::root("example.org");
        let (by_old, by_new, good) = (root.leaf(PEERS), root.leaf(PEERS), root.leaf(PEERS));
        let old = root.revocation_list_with(&[&serial(&by_old)], VALID, older);
        let new = root.revocation_list(&[&serial(&by_new)], VALID);
        let mut lists = [&old, &new];
        if is_newer_first {
            lists.reverse();
        }
        let world = world_of(root, &[], &lists);
        world.refuses(&by_old, RejectReason::Revoked);
        world.refuses(&by_new, RejectReason::Revoked);
        world.accepts(&good);
    }
}

#[test]
fn the_newest_list_of_an_issuer_says_whether_the_lists_are_fresh() {
    let past = Duration::minutes(-1);
    for is_newer_first in [false, true] {
        let (root, other) = (
            Authority::root("example.org"),
            Authority::root("example.org"),
        );
        let ordered = |older, newer| match is_newer_first {
            false => [older, newer],
            true => [newer, older],
        };
        let leaves = [root.leaf(PEERS), other.leaf(PEERS)];
        let expired = root.revocation_list_with(&[], past, older);
        let fresh = root.revocation_list(&[], VALID);
        // The newer one of the other root has expired, by its number.
        let fresh_once = other.revocation_list(&[], VALID);
        let expired_since = other.revocation_list_with(&[], past, |params| {
            params.crl_number = rcgen::SerialNumber::from(256_u64);
        });
        let mut lists = ordered(&expired, &fresh).to_vec();
        lists.extend(ordered(&fresh_once, &expired_since));
        let world = world_of(root, &[&other], &lists);
        world.accepts(&leaves[0]);
        world.refuses(&leaves[1], RejectReason::RevocationListExpired);
        let bundles = world.trust.current();
        let told = bundles.values().next().unwrap().next_update().unwrap();
        assert!(
            told < SystemTime::now(),
            "by the newest list of each issuer"
        );
    }
    let root = Authority::root("example.org");
    let expired = root.revocation_list_with(&[], past, older);
    let fresh = root.revocation_list(&[], VALID);
    let world = world_of(root, &[], &[&expired, &fresh]);
    let bundles = world.trust.current();
    let told = bundles.values().next().unwrap().next_update().unwrap();
    assert!(told > SystemTime::now());
}

/// Two roots of one name.
fn namesakes(change: impl Fn(&mut rcgen::CertificateParams)) -> [Authority; 2] {
    let name = format!("one name {:?}", SystemTime::now());
    [(); 2].map(|()| {
        Authority::root_with("example.org", |params| {
            params.distinguished_name = rcgen::DistinguishedName::new();
            let kind = rcgen::DnType::CommonName;
            params.distinguished_name.push(kind, name.as_str());
            change(params);
        })
    })
}

#[test]
fn roots_of_one_name_are_told_apart_by_their_keys() {
    for is_first in [false, true] {
        let [one, two] = namesakes(|_| {});
        let (bad, good) = (one.leaf(PEERS), one.leaf(PEERS));
        let others = two.leaf_with(PEERS, |params| {
            params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial(&bad)));
        });
        let of_one = one.revocation_list(&[&serial(&bad)], VALID);
        let of_two = two.revocation_list(&[], VALID);
        let lists = match is_first {
            true => [&of_one, &of_two],
            false => [&of_two, &of_one],
        };
        let world = world_of(one, &[&two], &lists);
        world.refuses(&bad, RejectReason::Revoked);
        world.accepts(&good);
        world.accepts(&others);
    }
    // A list of the one says nothing of what the other has signed.
    let [one, two] = namesakes(|_| {});
    let leaf = one.leaf(PEERS);
    let list = two.revocation_list(&[], VALID);
    world_of(one, &[&two], &[&list]).refuses(&leaf, RejectReason::RevocationUnknown);
}

#[test]
fn a_list_that_claims_the_issuers_key_and_is_not_signed_by_it_refuses() {
    let id = || KeyIdMethod::PreSpecified(vec![7; 20]);
    let [one, two] = namesakes(|params| params.key_identifier_method = id());
    let leaf = one.leaf(PEERS);
    let claim = |params: &mut CertificateRevocationListParams| params.key_identifier_method = id();
    let forged = two.revocation_list_with(&[], VALID, claim);
    let right = one.revocation_list_with(&[], VALID, claim);
    let world = world_of(one, &[], &[&right, &forged]);
    world.refuses(&leaf, RejectReason::RevocationListInvalid);
}

#[test]
fn a_list_covers_what_its_scope_says_and_revokes_whatever_it_names() {
    let place = |name: &str| CrlDistributionPoint {
        uris: vec![format!("http://example.org/{name}.crl")],
    };
    let root = Authority::root("example.org");
    let at = |name: &str| {
        let points = vec![place(name)];
        root.leaf_with(PEERS, |params| params.crl_distribution_points = points)
    };
    let (of_a, of_b, nowhere) = (at("a"), at("b"), root.leaf(PEERS));
    let list = |name: &str, scope, revoked: &[&[u8]]| {
        root.revocation_list_with(revoked, VALID, |params| {
            params.issuing_distribution_point = Some(CrlIssuingDistributionPoint {
                distribution_point: place(name),
                scope,
            });
        })
    };
    let only_a = list("a", Some(CrlScope::UserCertsOnly), &[]);
    let for_cas = list("b", Some(CrlScope::CaCertsOnly), &[&serial(&nowhere)]);
    let world = world_of(root, &[], &[&only_a, &for_cas]);
    world.accepts(&of_a);
    world.refuses(&of_b, RejectReason::RevocationUnknown);
    world.refuses(&nowhere, RejectReason::Revoked);
}

#[test]
fn a_root_that_may_not_sign_lists_has_none() {
    let root = Authority::root("example.org");
    let list = root.revocation_list(&[], VALID);
    // The same name and key.
    let without = root.reissued(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
    let leaf = root.leaf(PEERS);
    let world = world_of(without, &[], &[&list]);
    world.refuses(&leaf, RejectReason::RevocationListInvalid);
}

#[test]
fn a_roots_path_length_counts() {
    let bounded = |most| {
        Authority::root_with("example.org", |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(most));
        })
    };
    let world = world_of(bounded(0), &[], &[]);
    world.accepts(&world.root.leaf(PEERS));
    let below = world.root.intermediate(|_| {}).leaf(PEERS);
    world.refuses(&below, RejectReason::PathLength);
    let world = world_of(bounded(1), &[], &[]);
    world.accepts(&world.root.intermediate(|_| {}).leaf(PEERS));
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
