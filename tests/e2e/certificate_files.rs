//! Certificates from files that somebody else writes: a daemon follows them while it serves, and
//! judges its open tunnels again when the files take trust from somebody.

use std::{fs, path::PathBuf, time::Duration};

use harness::{
    Programs, Reeve,
    certs::{Authority, Issued},
    eventually,
    hbone::{Conduct, Stream, Tunnel},
    holds_for,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::opposite::{CLIENT, Calling, Guarded, SERVER};

/// A daemon whose server has its certificate from files.
struct Filed {
    guarded: Guarded,
    root: Authority,
    folder: PathBuf,
}

/// A client's tunnel with a stream that stands.
struct Open {
    _tunnel: Tunnel,
    stream: Stream,
}

// === impl Filed ===

impl Filed {
    fn start() -> Self {
        Self::with(|reeve| reeve)
    }

    fn with(change: impl FnOnce(Reeve<'_>) -> Reeve<'_>) -> Self {
        let (root, mut folder) = (Authority::root("example.org"), PathBuf::new());
        let guarded = Guarded::with(|reeve| {
            folder = files_of(&reeve);
            put_all(&folder, &root.leaf(SERVER), &[&root]);
            put(&folder, "crl.pem", &lists(&root, &[]));
            let files = json!({"folder": folder, "revocationLists": "crl.pem"});
            let reeve = reeve
                .set("/certificates/sources/1", json!({"files": files}))
                .set("/workloads/0/certificates", json!("files"));
            change(reeve)
        });
        Self {
            guarded,
            root,
            folder,
        }
    }

    /// What `reeve status` says of the server's certificate.
    fn certificate(&self) -> Value {
        certificate(&self.guarded.daemon.status(), SERVER)
    }

    /// The client presents this and has a stream to the server.
    fn open(&self, issued: &Issued) -> Open {
        let client = self.guarded.client(issued);
        let tunnel = client.tunnel(self.guarded.tunnel_port()).unwrap();
        let stream = tunnel.connect(&self.guarded.authority()).unwrap();
        assert_eq!(stream.status, 200);
        let mut open = Open {
            _tunnel: tunnel,
            stream,
        };
        open.echoes();
        open
    }

    /// Number of the server's connections that were closed for this reason.
    fn closed(&self, reason: &str) -> f64 {
        let metrics = self.guarded.daemon.metrics();
        metrics.sum("reeve_connections_closed_total", &[("reason", reason)])
    }
}

impl Open {
    #[track_caller]
    fn echoes(&mut self) {
        self.stream.send("hello").unwrap();
        assert_eq!(self.stream.receive_exactly(5).unwrap(), b"hello");
    }
}

fn certificate(status: &Value, id: &str) -> Value {
    let all = status["certificates"].as_array().unwrap();
    all.iter().find(|it| it["spiffeId"] == id).unwrap().clone()
}

/// A folder for the files of a daemon.
fn files_of(reeve: &Reeve<'_>) -> PathBuf {
    let folder = reeve.folder().join("tls");
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn put(folder: &std::path::Path, name: &str, contents: &str) {
    let new = folder.join(format!(".{name}"));
    fs::write(&new, contents).unwrap();
    fs::rename(new, folder.join(name)).unwrap();
}

fn put_all(folder: &std::path::Path, issued: &Issued, roots: &[&Authority]) {
    let bundle: String = roots.iter().map(|root| root.certificate_pem()).collect();
    put(folder, "tls.key", &issued.key_pem());
    put(folder, "ca.crt", &bundle);
    put(folder, "tls.crt", &issued.chain_pem());
}

/// A revocation list as PEM.
fn lists(root: &Authority, revoked: &[&Issued]) -> String {
    let serials: Vec<_> = revoked.iter().map(|issued| issued.serial()).collect();
    let serials: Vec<&[u8]> = serials.iter().map(Vec::as_slice).collect();
    let der = root.revocation_list(&serials, time::Duration::hours(1));
    pem::encode(&pem::Pem::new("X509 CRL", der.as_ref()))
}

#[test]
fn a_new_certificate_is_presented_and_what_stands_goes_on() {
    let filed = Filed::start();
    let mut open = filed.open(&filed.root.leaf(CLIENT));
    let before = filed.certificate();
    assert_eq!(before["source"], "files");
    let neighbour = "spiffe://example.org/ns/default/sa/neighbour";
    let others = || certificate(&filed.guarded.daemon.status(), neighbour);
    assert_eq!(others()["source"], "embedded");
    let other = others();
    for _ in 0..3 {
        let before = filed.certificate();
        put_all(&filed.folder, &filed.root.leaf(SERVER), &[&filed.root]);
        eventually("a new certificate", || {
            filed.certificate()["serial"] != before["serial"]
        });
        open.echoes();
        filed.open(&filed.root.leaf(CLIENT));
    }
    assert!(filed.certificate()["generation"].as_u64() > before["generation"].as_u64());
    assert_eq!(filed.certificate()["lastResult"], "accepted");
    assert_eq!(others()["serial"], other["serial"]);
    for (name, labels) in [
        ("reeve_certificate_reloads_total", ("result", "accepted")),
        ("reeve_certificate_source_up", ("source", "files")),
    ] {
        assert!(
            filed.guarded.daemon.metrics().sum(name, &[labels]) >= 1.0,
            "{name}"
        );
    }
}

#[test]
fn what_stands_by_a_replaced_certificate_goes_on_for_its_time_and_no_longer() {
    let filed = Filed::with(|reeve| reeve.set("/timeouts/outdated", json!("6s")));
    let mut old = filed.open(&filed.root.leaf(CLIENT));
    let before = filed.certificate();
    put_all(&filed.folder, &filed.root.leaf(SERVER), &[&filed.root]);
    eventually("a new certificate", || {
        filed.certificate()["serial"] != before["serial"]
    });
    let mut new = filed.open(&filed.root.leaf(CLIENT));
    old.echoes();
    eventually("the old one is ended", || {
        filed.closed("certificate_replaced") == 1.0
    });
    assert!(old.stream.receive_exactly(1).is_err());
    new.echoes();
}

#[test]
fn a_revoked_clients_tunnel_is_closed_and_no_other() {
    let filed = Filed::start();
    let (good, bad) = (filed.root.leaf(CLIENT), filed.root.leaf(CLIENT));
    let (mut stays, mut goes) = (filed.open(&good), filed.open(&bad));
    put(&filed.folder, "crl.pem", &lists(&filed.root, &[&bad]));
    eventually("the revoked client's stream ends", || {
        filed.closed("peer_revoked") == 1.0
    });
    assert!(goes.stream.receive().is_err());
    stays.echoes();
    let refused = filed
        .guarded
        .client(&bad)
        .handshake(filed.guarded.tunnel_port());
    refused.unwrap_err();
    filed.guarded.daemon.wait_for_log(&["handshake", "revoked"]);
    let metrics = filed.guarded.daemon.metrics();
    let domain = [("trust_domain", "example.org")];
    assert!(
        metrics.sum(
            "reeve_revocation_list_next_update_timestamp_seconds",
            &domain
        ) > 1e9
    );
}

#[test]
fn a_removed_roots_clients_are_closed_and_no_others() {
    let filed = Filed::start();
    let other = Authority::root("example.org");
    let both = lists(&filed.root, &[]) + &lists(&other, &[]);
    put(&filed.folder, "crl.pem", &both);
    let same = filed.root.leaf(SERVER);
    put_all(&filed.folder, &same, &[&filed.root, &other]);
    eventually("both roots are trusted", || {
        let right = filed.guarded.client(&other.leaf(CLIENT));
        right.handshake(filed.guarded.tunnel_port()).is_ok()
    });
    let (mut stays, mut goes) = (
        filed.open(&filed.root.leaf(CLIENT)),
        filed.open(&other.leaf(CLIENT)),
    );
    put_all(&filed.folder, &same, &[&filed.root]);
    eventually("the removed root's stream ends", || {
        filed.closed("peer_untrusted") == 1.0
    });
    assert!(goes.stream.receive().is_err());
    stays.echoes();
}

#[test]
fn an_expired_clients_tunnel_is_closed_and_no_other() {
    let filed = Filed::start();
    let soon = filed.root.leaf_with(CLIENT, |params| {
        params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(4);
    });
    let (mut stays, mut goes) = (filed.open(&filed.root.leaf(CLIENT)), filed.open(&soon));
    eventually("the expired client's stream ends", || {
        filed.closed("certificate_expired") == 1.0
    });
    assert!(goes.stream.receive().is_err());
    stays.echoes();
}

#[test]
fn an_expired_roots_clients_are_closed_at_its_end_and_no_others() {
    let filed = Filed::start();
    let end = OffsetDateTime::now_utc() + Duration::from_secs(12);
    let other = Authority::root_with("example.org", |params| params.not_after = end);
    let both = lists(&filed.root, &[]) + &lists(&other, &[]);
    put(&filed.folder, "crl.pem", &both);
    put_all(
        &filed.folder,
        &filed.root.leaf(SERVER),
        &[&filed.root, &other],
    );
    eventually("both roots are trusted", || {
        let right = filed.guarded.client(&other.leaf(CLIENT));
        right.handshake(filed.guarded.tunnel_port()).is_ok()
    });
    let mut stays = filed.open(&filed.root.leaf(CLIENT));
    let mut goes = filed.open(&other.leaf(CLIENT));
    eventually("the expired root's stream ends", || {
        filed.closed("certificate_expired") == 1.0
    });
    let late = OffsetDateTime::now_utc() - end;
    assert!(late < Duration::from_secs(4), "{late}");
    assert!(goes.stream.receive().is_err());
    stays.echoes();
    let refused = filed.guarded.client(&other.leaf(CLIENT));
    refused.handshake(filed.guarded.tunnel_port()).unwrap_err();
}

#[test]
fn an_own_ca_that_expires_is_announced_and_then_nothing_is_ready() {
    let filed = Filed::start();
    let daemon = &filed.guarded.daemon;
    let before = filed.certificate();
    let end = OffsetDateTime::now_utc() + Duration::from_secs(10);
    let brief = filed.root.intermediate(|params| params.not_after = end);
    put(
        &filed.folder,
        "crl.pem",
        &(lists(&filed.root, &[]) + &lists(&brief, &[])),
    );
    put_all(&filed.folder, &brief.leaf(SERVER), &[&filed.root]);
    eventually("the certificate below it", || {
        filed.certificate()["serial"] != before["serial"]
    });
    let certificate = filed.certificate();
    assert!(
        certificate["secondsLeft"].as_u64().unwrap() <= 10,
        "{certificate}"
    );
    assert_eq!(certificate["signerNotAfter"], certificate["notAfter"]);
    assert_eq!(certificate["remarks"], json!(["signer_expires"]));
    daemon.wait_for_log(&["a CA above the certificate expires soon"]);
    let page = daemon.command(["certs"]).ok();
    assert!(page.contains("signer_expires"), "{page}");
    let mut open = filed.open(&filed.root.leaf(CLIENT));

    eventually("the daemon is not ready", || !daemon.is_ready());
    daemon.wait_for_log(&["a CA above the certificate has expired"]);
    assert!(filed.certificate()["serial"].is_null());
    assert!(open.stream.receive().is_err());
    let right = filed.guarded.client(&filed.root.leaf(CLIENT));
    right.handshake(filed.guarded.tunnel_port()).unwrap_err();

    put_all(&filed.folder, &filed.root.leaf(SERVER), &[&filed.root]);
    eventually("the daemon is ready", || daemon.is_ready());
    filed.open(&filed.root.leaf(CLIENT));
}

#[test]
fn a_bad_change_keeps_the_old_until_it_expires_and_then_nothing_leaves() {
    let (root, mut folder) = (Authority::root("example.org"), PathBuf::new());
    let lifetime = Duration::from_secs(12);
    let soon = root.leaf_with(CLIENT, |params| {
        params.not_after = OffsetDateTime::now_utc() + lifetime;
    });
    let calling = Calling::with(|reeve| {
        folder = files_of(&reeve);
        put_all(&folder, &soon, &[&root]);
        let files = json!({"files": {"folder": folder}});
        reeve
            .set("/certificates/sources/1", files)
            .set("/workloads/0/certificates", json!("files"))
    });
    let server = calling.impostor(&root.leaf(SERVER), Conduct::Echo);
    calling.call().ok();

    put_all(&folder, &root.leaf(SERVER), &[&root]);
    let daemon = &calling.daemon;
    let labels = [("source", "files"), ("reason", "wrong_identity")];
    daemon.wait_for_metric("reeve_certificate_rejections_total", &labels, 1.0);
    daemon.wait_for_log(&["no new certificate", "wrong_identity"]);
    calling.call().ok();

    eventually("connections are refused for want of a certificate", || {
        !calling.call().status.success() && calling.failures("no_certificate") >= 1.0
    });
    let seen = server.authorities().len();
    holds_for(Duration::from_secs(1), "nothing reaches the peer", || {
        calling.call().fails();
        server.authorities().len() == seen
    });
    assert!(certificate(&daemon.status(), CLIENT)["serial"].is_null());

    put_all(&folder, &root.leaf(CLIENT), &[&root]);
    eventually("the client calls again", || calling.call().status.success());
}

#[test]
fn a_malformed_key_is_named_and_none_of_it_is_shown() {
    let filed = Filed::start();
    let daemon = &filed.guarded.daemon;
    let key = filed.root.leaf(SERVER).key_pem().replace('\r', "");
    let body = key.lines().nth(1).unwrap();
    for (malformed, why) in [
        (key.replace('\n', " "), "its line breaks are gone"),
        (key.replace('\n', "\\n"), "its line breaks are gone"),
        (
            key.replace("END PRIVATE KEY", body),
            "a block begins and does not end",
        ),
        (
            key.replace("PRIVATE KEY", body),
            "there is no PEM block in it",
        ),
        (key.replacen(body, &format!("!{body}"), 1), "is not base64"),
    ] {
        put(&filed.folder, "tls.key", &malformed);
        eventually(why, || {
            filed.certificate()["lastError"].to_string().contains(why)
        });
        assert_eq!(daemon.command(["reload"]).status.code(), Some(1));
        // The same where a certificate, an authority or a list should be.
        let file = filed.folder.join("tls.key");
        let file = file.to_str().unwrap();
        for words in [
            &["certs", "inspect", file][..],
            &["certs", "inspect", file, "--bundle", file, "--crl", file],
        ] {
            let output = std::process::Command::new(&Programs::get().reeve)
                .args(words)
                .output()
                .unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(said.contains("tls.key holds no certificate"), "{said}");
            nothing_of(body, &said);
        }
    }
    let pages = [
        &["certs"][..],
        &["certs", "--json"],
        &["status"],
        &["status", "--json"],
    ];
    for words in pages {
        nothing_of(body, &daemon.command(words.iter().copied()).stdout);
    }
    nothing_of(body, &daemon.get("/metrics").unwrap());
    nothing_of(body, &daemon.log());
}

/// No part of a key is in what is shown, neither as text nor as numbers.
#[track_caller]
fn nothing_of(key: &str, shown: &str) {
    let numbers = format!("{:?}", key.as_bytes());
    for part in [
        &key[..6],
        &key[key.len() - 6..],
        &numbers[1..18],
        &numbers[numbers.len() - 18..numbers.len() - 1],
    ] {
        assert!(!shown.contains(part), "{shown}");
    }
}

#[test]
fn everything_is_read_again_when_asked_and_what_was_refused_is_told() {
    let filed = Filed::start();
    let daemon = &filed.guarded.daemon;
    let text = daemon.command(["reload"]).ok();
    for part in [
        "configuration and policies",
        "trust bundles",
        "certificates: read, 2 of 2",
    ] {
        assert!(text.contains(part), "{text}");
    }
    fs::write(filed.folder.join("tls.crt"), "no certificate").unwrap();
    fs::write(daemon.policies().join("wrong.yaml"), "kind: Nonsense\n").unwrap();
    let output = daemon.command(["reload", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    let refused = |index: usize| report["parts"][index]["refused"][0].to_string();
    assert!(refused(0).contains("wrong.yaml:1:"), "{report}");
    assert!(
        refused(2).contains("does not hold a certificate"),
        "{report}"
    );
    assert!(
        report["parts"][2]["detail"]
            .as_str()
            .unwrap()
            .contains("1 of 2")
    );
    filed.open(&filed.root.leaf(CLIENT));

    fs::remove_file(daemon.policies().join("wrong.yaml")).unwrap();
    put_all(&filed.folder, &filed.root.leaf(SERVER), &[&filed.root]);
    daemon.command(["reload"]).ok();
    // A signal does the same: the embedded CA issues anew.
    let neighbour = "spiffe://example.org/ns/default/sa/neighbour";
    let serial = || certificate(&daemon.status(), neighbour)["serial"].clone();
    let before = serial();
    daemon.signal(Signal::SIGHUP);
    eventually("certificates are issued again", || serial() != before);
}
