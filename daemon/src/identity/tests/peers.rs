//! A peer's certificate, wrong in each way, as we see it in both roles.

use rcgen::{DnType, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType};

use super::{
    certs::{Authority, Flaw, OpensslFlaw, uri},
    handshake::{OURS, PEERS, World, bundle, handshake},
    *,
};

#[test]
fn every_flaw_is_refused_for_what_it_is_in_both_roles() {
    let world = World::new();
    for flaw in Flaw::ALL {
        let issued = flaw.issue(&world.root, PEERS);
        for (role, result) in [
            ("client", world.as_client(&issued)),
            ("server", world.as_server(&issued)),
        ] {
            let error = result.expect_err(&format!("{flaw:?} passed as {role}"));
            let reason = RejectReason::of(&error).map(RejectReason::as_str);
            assert_eq!(reason, Some(flaw.reason()), "{flaw:?} as {role}: {error}");
        }
    }
}

#[test]
fn what_only_openssl_makes_wrong_is_refused_in_both_roles() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    for flaw in OpensslFlaw::ALL {
        let issued = flaw.issue(&world.root, PEERS, folder.path());
        for result in [world.as_client(&issued), world.as_server(&issued)] {
            let error = result.expect_err(&format!("{flaw:?} passed"));
            let reason = RejectReason::of(&error).map(RejectReason::as_str);
            assert_eq!(reason, Some(flaw.reason()), "{flaw:?}: {error}");
        }
    }
}

#[test]
fn what_is_right_is_accepted() {
    let world = World::new();
    world.accepts(&world.root.leaf(PEERS));
    // Other kinds of names beside the ID.
    world.accepts(&world.root.leaf_with(PEERS, |params| {
        params.subject_alt_names.extend([
            SanType::DnsName("stock.shop.svc".try_into().unwrap()),
            SanType::IpAddress([10, 0, 0, 1].into()),
        ]);
    }));
    // ExtendedKeyUsage may be missing, and a subject may be there.
    world.accepts(&world.root.leaf_with(PEERS, |params| {
        params.extended_key_usages.clear();
        params.distinguished_name.push(DnType::CommonName, "stock");
    }));
    // BasicConstraints may be missing.
    world.accepts(&world.root.leaf_with(PEERS, |params| {
        params.is_ca = rcgen::IsCa::NoCa;
    }));
    // Intermediates without an ID, with the trust domain's, and with another trust domain's.
    world.accepts(&world.root.intermediate(|_| {}).leaf(PEERS));
    for domain in ["spiffe://example.org", "spiffe://upstream.example"] {
        let named = |params: &mut rcgen::CertificateParams| {
            params.subject_alt_names = vec![uri(domain)];
        };
        world.accepts(
            &world
                .root
                .intermediate(named)
                .intermediate(|_| {})
                .leaf(PEERS),
        );
    }
}

#[test]
fn other_kinds_of_keys_are_accepted() {
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let root = Authority::root_of("example.org", key, |_| {});
        let world = World::with_root(root, |root| vec![bundle("example.org", &[root])]);
        let key = KeyPair::generate_for(algorithm).unwrap();
        world.accepts(&world.root.leaf_of(PEERS, key, |_| {}));
    }
}

#[test]
fn a_server_with_another_identity_than_expected_is_refused() {
    let world = World::new();
    let other = world.root.leaf("spiffe://example.org/ns/shop/sa/other");
    let error = world.as_client(&other).unwrap_err();
    assert_eq!(RejectReason::of(&error), Some(RejectReason::WrongIdentity));
    // Whoever is right may come to us: it is the policy that judges.
    assert_eq!(world.as_server(&other), Ok(()));
}

#[test]
fn an_id_is_compared_whole_and_by_case() {
    let world = World::new();
    for near in [
        "spiffe://example.org/ns/shop/sa/stoc",
        "spiffe://example.org/ns/shop/sa/stock2",
        "spiffe://example.org/ns/shop/sa/Stock",
        "spiffe://example.org/ns/shop/sa/stock/x",
    ] {
        let error = world.as_client(&world.root.leaf(near)).unwrap_err();
        assert_eq!(RejectReason::of(&error), Some(RejectReason::WrongIdentity));
    }
}

#[test]
fn a_certificate_without_its_key_is_of_no_use() {
    let world = World::new();
    let mut stolen = world.root.leaf(PEERS);
    stolen.key = world.root.leaf(PEERS).key;
    world.refuses(&stolen, RejectReason::KeyNotHeld);
}

#[test]
fn after_the_handshake_the_peers_id_is_known() {
    let world = World::new();
    let client = world.ours.client(&SpiffeId::parse(OURS).unwrap());
    let done = handshake(&client, &world.ours.server, world.ours.server_name.clone());
    done.succeeded();
    let id = peer_id(done.server.peer_certificates().unwrap());
    assert_eq!(id, Ok(world.ours.id.clone()));
    // The first certificate's, whatever stands above it.
    let below = world.root.intermediate(|_| {}).leaf(PEERS);
    assert_eq!(peer_id(&below.chain).unwrap().as_str(), PEERS);
    assert_eq!(peer_id(&[]), Err(RejectReason::Malformed));
}
