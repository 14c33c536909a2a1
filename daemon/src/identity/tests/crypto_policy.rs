//! The crypto policy, in real handshakes: each rule refuses what it is about, and nothing else.

use std::sync::Arc;

use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519,
    PKCS_RSA_SHA256, RsaKeySize,
};
use rustls::{CipherSuite as Suite, NamedGroup};
use time::{Duration, OffsetDateTime};

use super::{
    certs::Authority,
    handshake::{OURS, PEERS, World, bundle, check, handshake},
    *,
};

fn fips() -> CryptoRules {
    CryptoRules::of(CryptoProfile::Fips)
}

fn world(rules: CryptoRules) -> World {
    World::with_rules(Authority::root("example.org"), rules)
}

fn rsa(bits: RsaKeySize) -> KeyPair {
    KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, bits).unwrap()
}

#[test]
fn keys_of_another_kind_than_permitted_are_refused() {
    let (usual, fips) = (World::new(), world(fips()));
    for algorithm in [&PKCS_ED25519, &PKCS_ECDSA_P521_SHA512] {
        let leaf = |root: &Authority| {
            root.leaf_of(PEERS, KeyPair::generate_for(algorithm).unwrap(), |_| {})
        };
        usual.accepts(&leaf(&usual.root));
        fips.refuses(&leaf(&fips.root), RejectReason::KeyType);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    fips.accepts(&fips.root.leaf_of(PEERS, key, |_| {}));
    let only = |kind| CryptoRules {
        key_types: vec![kind],
        ..CryptoRules::default()
    };
    // P-256, which nearly everybody has, is nothing special.
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let root = Authority::root_of("example.org", key, |_| {});
    let trust = TrustStore::with_policy(
        Arc::new(CryptoPolicy::new(only(KeyType::Ed25519))),
        [bundle("example.org", &[&root])],
    );
    let refused = check(OURS, &root.leaf(OURS), &trust.current(), &Arc::default()).unwrap_err();
    assert_eq!(refused, ReloadError::Rejected(RejectReason::KeyType));
}

#[test]
fn rsa_keys_that_are_too_small_are_refused() {
    let (usual, fips) = (World::new(), world(fips()));
    let small = |root: &Authority| root.leaf_of(PEERS, rsa(RsaKeySize::_2048), |_| {});
    usual.accepts(&small(&usual.root));
    fips.refuses(&small(&fips.root), RejectReason::KeySize);
    fips.accepts(&fips.root.leaf_of(PEERS, rsa(RsaKeySize::_3072), |_| {}));
}

#[test]
fn what_signs_is_held_to_the_same_keys() {
    let root_of = |key| Authority::root_of("example.org", key, |_| {});
    let ed25519 = || KeyPair::generate_for(&PKCS_ED25519).unwrap();
    for (root, reason) in [
        (root_of(ed25519()), RejectReason::KeyType),
        (root_of(rsa(RsaKeySize::_2048)), RejectReason::KeySize),
    ] {
        let trust = TrustStore::with_policy(
            Arc::new(CryptoPolicy::new(fips())),
            [bundle("example.org", &[&root])],
        );
        for issued in [root.leaf(OURS), root.intermediate(|_| {}).leaf(OURS)] {
            let refused = check(OURS, &issued, &trust.current(), &Arc::default()).unwrap_err();
            assert_eq!(refused, ReloadError::Rejected(reason));
        }
    }
    // An intermediate between two that are right.
    let world = world(fips());
    let below = world.root.intermediate_of(ed25519(), |_| {}).leaf(PEERS);
    world.refuses(&below, RejectReason::KeyType);
}

#[test]
fn certificates_that_live_too_long_are_refused() {
    let world = World::new();
    let living = |lifetime: Duration| {
        move |params: &mut CertificateParams| {
            params.not_before = OffsetDateTime::now_utc() - Duration::minutes(1);
            params.not_after = params.not_before + lifetime;
        }
    };
    let long_root = Authority::root_with("example.org", living(Duration::days(3650)));
    let world_of_ten_years = World::with_rules(long_root, CryptoRules::default());
    for (lifetime, accepted) in [(Duration::days(90), true), (Duration::days(91), false)] {
        let leaf = world_of_ten_years.root.leaf_with(PEERS, living(lifetime));
        match accepted {
            true => world_of_ten_years.accepts(&leaf),
            false => world_of_ten_years.refuses(&leaf, RejectReason::Lifetime),
        }
    }
    // Nor may our own.
    let long = world.root.leaf_with(OURS, living(Duration::days(365)));
    let refused = check(OURS, &long, &world.trust.current(), &world.trust).unwrap_err();
    assert_eq!(refused, ReloadError::Rejected(RejectReason::Lifetime));
}

#[test]
fn without_a_group_or_a_suite_in_common_there_is_no_handshake() {
    let with_groups = |groups: &[KeyExchangeGroup]| CryptoRules {
        groups: groups.to_vec(),
        ..CryptoRules::default()
    };
    let with_suites = |suites: &[CipherSuite]| CryptoRules {
        cipher_suites: suites.to_vec(),
        ..CryptoRules::default()
    };
    let speak = |client: CryptoRules, server: CryptoRules| {
        let root = Authority::root("example.org");
        let end = |rules: CryptoRules| {
            let bundle = bundle("example.org", &[&root]);
            let trust = Arc::new(TrustStore::with_policy(
                Arc::new(CryptoPolicy::new(rules)),
                [bundle],
            ));
            check(OURS, &root.leaf(OURS), &trust.current(), &trust).unwrap()
        };
        let (client, server) = (end(client), end(server));
        let client = client.client(&SpiffeId::parse(OURS).unwrap());
        handshake(&client, &server.server, server.server_name.clone())
    };
    let x25519 = with_groups(&[KeyExchangeGroup::X25519]);
    let chacha = with_suites(&[CipherSuite::Chacha20Poly1305]);
    for foreign in [x25519, chacha] {
        for (client, server) in [(foreign.clone(), fips()), (fips(), foreign.clone())] {
            let done = speak(client, server);
            done.client_result.unwrap_err();
            done.server_result.unwrap_err();
        }
        speak(foreign.clone(), CryptoRules::default()).succeeded();
        speak(CryptoRules::default(), foreign).succeeded();
    }
    let done = speak(fips(), fips());
    done.succeeded();
    let group = done.server.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::secp256r1MLKEM768);
    // With everybody else a curve of NIST's is what is left.
    let done = speak(fips(), CryptoRules::default());
    done.succeeded();
    let group = done.server.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::secp256r1);
    let suite = done.server.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, Suite::TLS13_AES_128_GCM_SHA256);
}
