//! Certificates: what a daemon accepts of the other end of a tunnel, as server and as client. The
//! other end is the test itself. Whatever is wrong with a certificate, the daemon refuses it, counts
//! it under the right reason, says in its log which rule was broken, and goes on serving others.

use std::time::Duration;

use harness::{
    certs::{Authority, Flaw, Issued, OpensslFlaw},
    eventually,
    hbone::{Client, Conduct, Server},
};
use time::OffsetDateTime;

use crate::opposite::{APP, CLIENT, Calling, Guarded, SERVER};

/// Another trust domain.
const OTHER: &str = "other.example";
/// An identity of it.
const ALIEN: &str = "spiffe://other.example/ns/default/sa/client";
/// Another one.
const ALIEN_SERVER: &str = "spiffe://other.example/ns/default/sa/server";

// === a client comes to a daemon ===

#[test]
fn a_client_is_refused_for_each_flaw_of_its_certificate() {
    let guarded = Guarded::start();
    let wrong: Vec<_> = Flaw::ALL
        .iter()
        .filter_map(|flaw| {
            let issued = flaw.issue(&guarded.root, CLIENT);
            refused_client(&guarded, &issued, flaw.reason())
                .err()
                .map(|wrong| format!("{flaw:?}: {wrong}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    guarded.still_serves();
}

#[test]
fn a_client_is_refused_for_what_only_openssl_makes_wrong() {
    let guarded = Guarded::start();
    for flaw in OpensslFlaw::ALL {
        let issued = flaw.issue(&guarded.root, CLIENT, guarded.stranger.folder());
        refused_client(&guarded, &issued, flaw.reason())
            .unwrap_or_else(|wrong| panic!("{flaw:?}: {wrong}"));
    }
    guarded.still_serves();
}

#[test]
fn a_client_that_no_revocation_list_speaks_of_is_refused_and_so_is_everybody_when_the_list_ends() {
    let guarded = Guarded::start();
    let list = guarded
        .root
        .revocation_list(&[], time::Duration::seconds(6));
    let file = guarded.ca().join("crl.pem");
    std::fs::write(file, harness::certs::crl_pem(&list)).unwrap();
    guarded
        .daemon
        .wait_for_log(&["the embedded CA has changed"]);
    let right = guarded.root.leaf(CLIENT);
    guarded
        .client(&right)
        .handshake(guarded.tunnel_port())
        .unwrap();
    let below = guarded.root.intermediate(|_| {}).leaf(CLIENT);
    refused_client(&guarded, &below, "revocation_unknown").unwrap();
    // Not by asking again and again: what is told too often is told no more.
    std::thread::sleep(Duration::from_secs(7));
    refused_client(&guarded, &right, "revocation_list_expired").unwrap();
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let guarded = Guarded::start();
    let nobody = Client::new(&guarded.stranger);
    nobody.handshake(guarded.tunnel_port()).unwrap_err();
    guarded.counted("no_certificate", 1.0);
    guarded.still_serves();
}

#[test]
fn a_client_with_a_stolen_certificate_is_refused() {
    let guarded = Guarded::start();
    let mut stolen = guarded.root.leaf(CLIENT);
    stolen.key = guarded.root.leaf(CLIENT).key;
    refused_client(&guarded, &stolen, "key_not_held").unwrap();
}

#[test]
fn a_client_of_a_trust_domain_without_a_bundle_is_refused() {
    let guarded = Guarded::start();
    let alien = Authority::root(OTHER).leaf(ALIEN);
    refused_client(&guarded, &alien, "unknown_trust_domain").unwrap();
}

#[test]
fn one_trust_domain_cannot_vouch_for_another() {
    let other = Authority::root(OTHER);
    let guarded = Guarded::with(|reeve| reeve.trust(OTHER, &other.certificate_pem()));
    refused_client(&guarded, &other.leaf(CLIENT), "untrusted_chain").unwrap();
    let alien = guarded.root.leaf(ALIEN);
    refused_client(&guarded, &alien, "untrusted_chain").unwrap();
    // While its own identities are believed.
    let alien = guarded.client(&other.leaf(ALIEN));
    alien.tunnel(guarded.tunnel_port()).unwrap();
}

#[test]
fn an_authority_that_has_expired_vouches_for_nobody() {
    let other = Authority::root_with(OTHER, |params| {
        params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(2);
    });
    let guarded = Guarded::with(|reeve| reeve.trust(OTHER, &other.certificate_pem()));
    std::thread::sleep(Duration::from_secs(3));
    refused_client(&guarded, &other.leaf(ALIEN), "anchor_validity").unwrap();
}

#[test]
fn what_is_not_hbone_is_refused() {
    let guarded = Guarded::start();
    let right = guarded.right_client();
    for (number, protocols) in [&[][..], &["http/1.1"], &["h3", "spdy/3"]]
        .iter()
        .enumerate()
    {
        let result = right
            .clone()
            .alpn(protocols)
            .handshake(guarded.tunnel_port());
        assert!(result.is_err(), "ALPN {protocols:?}: {result:?}");
        guarded.counted("protocol", number as f64 + 1.0);
    }
    right
        .clone()
        .alpn(&["http/1.1", "h2"])
        .handshake(guarded.tunnel_port())
        .unwrap();
    guarded.still_serves();
}

#[test]
fn only_tls_1_3_is_spoken() {
    let guarded = Guarded::start();
    let certificate = guarded.stranger.folder().join("client.pem");
    let issued = guarded.root.leaf(CLIENT);
    std::fs::write(&certificate, issued.chain_pem() + &issued.key_pem()).unwrap();
    let openssl = |version: &str| {
        guarded.stranger.exec([
            "openssl",
            "s_client",
            version,
            "-alpn",
            "h2",
            "-connect",
            &guarded.tunnel_port().to_string(),
            "-cert",
            certificate.to_str().unwrap(),
        ])
    };
    let refused = openssl("-tls1_2");
    assert!(!refused.status.success(), "{}", refused.stdout);
    assert!(
        refused.stderr.contains("protocol version"),
        "{}",
        refused.stderr
    );
    guarded.counted("protocol", 1.0);
    let accepted = openssl("-tls1_3");
    assert!(
        accepted.stdout.contains("ALPN protocol: h2"),
        "{}",
        accepted.stdout
    );
}

#[test]
fn no_session_is_resumed_or_offered_for_it() {
    let guarded = Guarded::start();
    let client = guarded.right_client();
    // A session from elsewhere, under a name that makes the client offer it to the daemon too.
    let client = client.server_name("server.example");
    let generous = Server::start(
        &guarded.stranger,
        APP,
        &guarded.root.leaf(SERVER),
        Conduct::Echo,
    );
    let elsewhere = guarded.stranger.addresses().port4(APP);
    assert!(client.handshake(elsewhere).unwrap().tickets > 0);
    assert!(client.handshake(elsewhere).unwrap().resumed);
    for _ in 0..2 {
        let handshake = client.handshake(guarded.tunnel_port()).unwrap();
        assert!(!handshake.resumed);
        assert_eq!(handshake.tickets, 0);
        assert_eq!(handshake.presented, SERVER);
    }
    drop(generous);
}

// === a daemon comes to a server ===

#[test]
fn a_server_is_refused_for_each_flaw_of_its_certificate() {
    let calling = Calling::start();
    let impostor = calling.right_server(Conduct::Echo);
    let wrong: Vec<_> = Flaw::ALL
        .iter()
        .filter_map(|flaw| {
            impostor.present(&flaw.issue(&calling.root, SERVER));
            refused_server(&calling, flaw.reason())
                .err()
                .map(|wrong| format!("{flaw:?}: {wrong}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(
        impostor.authorities().is_empty(),
        "it was asked for something"
    );
    calling.still_calls(&impostor);
}

#[test]
fn a_server_is_refused_for_what_only_openssl_makes_wrong() {
    let calling = Calling::start();
    let impostor = calling.right_server(Conduct::Echo);
    for flaw in OpensslFlaw::ALL {
        impostor.present(&flaw.issue(&calling.root, SERVER, calling.impostor.folder()));
        refused_server(&calling, flaw.reason()).unwrap_or_else(|wrong| panic!("{flaw:?}: {wrong}"));
    }
    calling.still_calls(&impostor);
}

#[test]
fn a_server_that_is_revoked_or_that_no_list_speaks_of_is_refused() {
    let calling = Calling::start();
    let impostor = calling.right_server(Conduct::Echo);
    let revoked = calling.root.leaf(SERVER);
    let serial = harness::certs::serial(&revoked.chain[0]);
    let list = calling
        .root
        .revocation_list(&[&serial], time::Duration::hours(1));
    let file = calling.ca().join("crl.pem");
    std::fs::write(file, harness::certs::crl_pem(&list)).unwrap();
    calling
        .daemon
        .wait_for_log(&["the embedded CA has changed"]);
    impostor.present(&revoked);
    refused_server(&calling, "revoked").unwrap();
    impostor.present(&calling.root.intermediate(|_| {}).leaf(SERVER));
    refused_server(&calling, "revocation_unknown").unwrap();
    calling.still_calls(&impostor);
}

#[test]
fn a_server_whose_authority_has_expired_is_refused() {
    let other = Authority::root_with(OTHER, |params| {
        params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(2);
    });
    let calling = Calling::with(|reeve| {
        reeve
            .trust(OTHER, &other.certificate_pem())
            .set("/peers/0/spiffeId", serde_json::json!(ALIEN_SERVER))
            .set("/peers/0/namespace", serde_json::Value::Null)
            .set("/peers/0/serviceAccount", serde_json::Value::Null)
            .policy(
                "apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\n\
                 metadata: {name: to-elsewhere}\nspec:\n  \
                 workloads: {matchLabels: {app: client}}\n  \
                 egress: [{to: [{identity: spiffe://other.example/ns/default/sa/server}]}]\n",
            )
    });
    let impostor = calling.impostor(&other.leaf(ALIEN_SERVER), Conduct::Echo);
    std::thread::sleep(Duration::from_secs(3));
    refused_server(&calling, "anchor_validity").unwrap();
    assert!(
        impostor.authorities().is_empty(),
        "it was asked for something"
    );
}

#[test]
fn a_server_that_is_somebody_else_is_refused() {
    let calling = Calling::start();
    let somebody = "spiffe://example.org/ns/default/sa/somebody";
    let impostor = calling.impostor(&calling.root.leaf(somebody), Conduct::Echo);
    refused_server(&calling, "wrong_identity").unwrap();
    // Nor does it help to be somebody near.
    for near in [
        format!("{SERVER}2"),
        format!("{SERVER}/2"),
        CLIENT.to_owned(),
    ] {
        impostor.present(&calling.root.leaf(&near));
        refused_server(&calling, "wrong_identity").unwrap();
    }
    assert!(
        impostor.authorities().is_empty(),
        "it was asked for something"
    );
}

#[test]
fn a_server_with_a_stolen_certificate_is_refused() {
    let calling = Calling::start();
    let mut stolen = calling.root.leaf(SERVER);
    stolen.key = calling.root.leaf(SERVER).key;
    let _impostor = calling.impostor(&stolen, Conduct::Echo);
    refused_server(&calling, "key_not_held").unwrap();
}

#[test]
fn a_server_of_another_trust_domain_cannot_pose_as_ours() {
    let other = Authority::root(OTHER);
    let calling = Calling::with(|reeve| reeve.trust(OTHER, &other.certificate_pem()));
    let impostor = calling.impostor(&other.leaf(SERVER), Conduct::Echo);
    refused_server(&calling, "untrusted_chain").unwrap();
    impostor.present(&other.leaf("spiffe://other.example/ns/default/sa/server"));
    refused_server(&calling, "wrong_identity").unwrap();
    let unknown = Authority::root("unknown.example");
    impostor.present(&unknown.leaf("spiffe://unknown.example/ns/default/sa/server"));
    refused_server(&calling, "unknown_trust_domain").unwrap();
}

#[test]
fn the_daemon_presents_its_workload_and_asks_for_its_peer() {
    let calling = Calling::start();
    let server = calling.right_server(Conduct::Echo);
    calling.call().ok();
    let seen = &server.seen()[0];
    assert_eq!(seen.presented, CLIENT);
    // The first 32 hexadecimal digits of `printf %s SERVER | sha256sum`.
    let asked = seen.server_name.as_deref();
    assert_eq!(
        asked,
        Some("410aea522be0c55d897a9d1d8a2a6fe2.svid.reeve.internal")
    );
    let authority = calling.impostor.addresses().port4(APP).to_string();
    assert_eq!(server.authorities(), [authority]);
}

#[test]
fn the_daemon_resumes_no_session() {
    let calling = Calling::start();
    // Each tunnel takes one connection, so each connection needs a handshake.
    let server = calling.right_server(Conduct::EchoOnce);
    for _ in 0..3 {
        calling.call().ok();
    }
    let seen = server.seen();
    assert!(seen.len() >= 3, "{seen:?}");
    assert!(seen.iter().all(|seen| !seen.resumed), "{seen:?}");
}

// === what is refused how ===

/// Whether the daemon refuses a client that presents this, breaking this rule.
pub(crate) fn refused_client(guarded: &Guarded, issued: &Issued, rule: &str) -> Result<(), String> {
    let reason = counted_as(rule);
    let told = || guarded.daemon.logged(&["handshake", rule]).len();
    let (counted_before, told_before) = (guarded.handshakes(reason), told());
    if guarded
        .client(issued)
        .handshake(guarded.tunnel_port())
        .is_ok()
    {
        return Err("it was let in".into());
    }
    soon(&format!("a handshake counted as {reason}"), || {
        guarded.handshakes(reason) == counted_before + 1.0
    })?;
    soon(&format!("{rule} in the log"), || told() > told_before)
}

/// Whether the client's call fails since the daemon refuses the server for breaking this rule.
pub(crate) fn refused_server(calling: &Calling, rule: &str) -> Result<(), String> {
    let reason = counted_as(rule);
    let failure = match reason {
        "wrong_identity" => "peer_identity",
        _ => "peer_certificate",
    };
    let told = || calling.daemon.logged(&["handshake", rule]).len();
    let (counted_before, failed_before, told_before) = (
        calling.handshakes(reason),
        calling.failures(failure),
        told(),
    );
    // A peer that failed is given a moment before it is tried again: a call within it fails for
    // the reason of the one before.
    let mut calls = 0.0;
    soon(&format!("a handshake counted as {reason}"), || {
        calls += 1.0;
        assert!(!calling.call().status.success(), "the server was believed");
        calling.handshakes(reason) > counted_before
    })?;
    soon(&format!("a call that failed for {failure}"), || {
        calling.failures(failure) > failed_before
    })?;
    soon(&format!("{rule} in the log"), || told() > told_before)
}

/// The reason in metrics for each rule that a certificate can break.
fn counted_as(rule: &str) -> &'static str {
    match rule {
        "unknown_trust_domain" => "unknown_trust_domain",
        "wrong_identity" => "wrong_identity",
        "expired" | "not_yet_valid" | "anchor_validity" => "validity",
        "revoked" | "revocation_unknown" | "revocation_list_expired" => "revoked",
        "untrusted_chain" | "bad_signature" | "algorithm" | "path_length" | "signer_not_ca"
        | "signer_key_usage" | "signer_id_has_path" => "untrusted_chain",
        _ => "invalid_svid",
    }
}

/// Waits until this is so; says what was waited for in vain.
fn soon(what: &str, mut so: impl FnMut() -> bool) -> Result<(), String> {
    for _ in 0..500 {
        if so() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("there was no {what}"))
}

impl Guarded {
    /// Fails the test unless this many handshakes ended like this.
    #[track_caller]
    fn counted(&self, reason: &str, number: f64) {
        eventually(&format!("{number} handshakes counted as {reason}"), || {
            self.handshakes(reason) == number
        });
    }
}
