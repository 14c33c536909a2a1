//! The crypto policy: a daemon with the profile `fips` refuses keys, lifetimes, groups and suites that
//! it does not approve, as server and as client, and two of them talk to each other.

use harness::{Reeve, hbone::Conduct};
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::{
    arrange::{PORT, Pair, say, serve},
    certificates::{refused_client, refused_server},
    opposite::{CLIENT, Calling, Guarded, SERVER},
};

fn fips(reeve: Reeve<'_>) -> Reeve<'_> {
    reeve.set("/tls", json!({"profile": "fips", "maxLifetime": "30days"}))
}

fn ed25519() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).unwrap()
}

fn since_a_month(params: &mut rcgen::CertificateParams) {
    params.not_before = OffsetDateTime::now_utc() - Duration::days(31);
}

#[test]
fn a_client_is_refused_for_a_key_or_a_lifetime_that_is_not_approved() {
    let guarded = Guarded::with(fips);
    let root = &guarded.root;
    refused_client(
        &guarded,
        &root.leaf_of(CLIENT, ed25519(), |_| {}),
        "key_type",
    )
    .unwrap();
    let below = root.intermediate_of(ed25519(), |_| {}).leaf(CLIENT);
    refused_client(&guarded, &below, "key_type").unwrap();
    let long = root.leaf_with(CLIENT, since_a_month);
    refused_client(&guarded, &long, "lifetime").unwrap();
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let right = guarded.client(&root.leaf_of(CLIENT, p384, |_| {}));
    right.tunnel(guarded.tunnel_port()).unwrap();
}

#[test]
fn a_server_is_refused_for_a_key_or_a_lifetime_that_is_not_approved() {
    let calling = Calling::with(fips);
    let impostor = calling.right_server(Conduct::Echo);
    impostor.present(&calling.root.leaf_of(SERVER, ed25519(), |_| {}));
    refused_server(&calling, "key_type").unwrap();
    impostor.present(&calling.root.leaf_with(SERVER, since_a_month));
    refused_server(&calling, "lifetime").unwrap();
    calling.still_calls(&impostor);
}

#[test]
fn only_approved_groups_and_suites_are_spoken() {
    let guarded = Guarded::with(fips);
    let certificate = guarded.stranger.folder().join("client.pem");
    let issued = guarded.root.leaf(CLIENT);
    std::fs::write(&certificate, issued.chain_pem() + &issued.key_pem()).unwrap();
    let speaks = |option: &str, value: &str| {
        let port = guarded.tunnel_port().to_string();
        let certificate = certificate.to_str().unwrap();
        let words = [
            "openssl", "s_client", "-tls1_3", "-alpn", "h2", "-connect", &port,
        ];
        let output = guarded
            .stranger
            .exec([&words[..], &["-cert", certificate, option, value]].concat());
        output.stdout.contains("ALPN protocol: h2")
    };
    for (option, approved, other) in [
        ("-groups", "P-256", "X25519"),
        ("-groups", "P-384", "P-521"),
        (
            "-ciphersuites",
            "TLS_AES_256_GCM_SHA384",
            "TLS_CHACHA20_POLY1305_SHA256",
        ),
    ] {
        assert!(speaks(option, approved), "{approved}");
        assert!(!speaks(option, other), "{other}");
    }
    // With the default profile, what `fips` leaves out is spoken.
    let guarded_by_default = Guarded::start();
    let port = guarded_by_default.tunnel_port().to_string();
    let output = guarded_by_default.stranger.exec([
        "openssl", "s_client", "-tls1_3", "-alpn", "h2", "-connect", &port, "-groups", "X25519",
    ]);
    assert!(
        output.stdout.contains("ALPN protocol: h2"),
        "{}",
        output.stdout
    );
}

#[test]
fn two_daemons_with_the_profile_talk_to_each_other() {
    let pair = Pair::new();
    let _one = fips(pair.allowing_at_one()).start();
    let _two = fips(pair.allowing_at_two()).start();
    let _server = serve(&pair.server, PORT, &[]);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "approved",
    );
    say(
        &pair.client,
        pair.server.addresses().port6(PORT),
        "approved too",
    );
}
