//! `reeve certs`: what it tells of this node's certificates, and what `reeve certs inspect` finds
//! wrong with any other, in a file or behind a live port.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use harness::{
    Network, Node, Output, Programs,
    certs::{Authority, Flaw, Issued},
    hbone::{Conduct, PORT, Server},
};
use serde_json::Value;
use time::Duration;

use crate::opposite::{CLIENT, Guarded, SERVER};

#[test]
fn a_nodes_certificates_are_told_with_where_they_come_from_and_how_long_they_live() {
    let guarded = Guarded::start();
    let told = guarded.daemon.command(["certs", "--json"]).json();
    let certificates = told["certificates"].as_array().unwrap();
    assert_eq!(certificates.len(), 2, "of the server and its neighbour");
    let server = certificates
        .iter()
        .find(|one| one["spiffeId"] == SERVER)
        .unwrap();
    for field in [
        "serial",
        "notBefore",
        "notAfter",
        "nextAttempt",
        "lastAttempt",
        "lastSuccess",
    ] {
        assert!(server[field].is_string(), "{field}: {server}");
    }
    assert!(
        server["issuer"].as_str().unwrap().contains("reeve root"),
        "{server}"
    );
    assert!(server["secondsLeft"].as_u64().unwrap() > 3000, "{server}");
    assert!(server["generation"].as_u64().unwrap() >= 1, "{server}");
    assert_eq!(server["lastError"], Value::Null);
    assert_eq!(told["bundles"][0]["trustDomain"], "example.org");

    let page = guarded.daemon.command(["certs"]).ok();
    for text in [
        SERVER,
        server["serial"].as_str().unwrap(),
        "left",
        "accepted",
    ] {
        assert!(page.contains(text), "{text}\nis not in\n{page}");
    }
}

#[test]
fn every_flaw_of_a_certificate_in_a_file_is_named() {
    let folder = Folder::new();
    let root = Authority::root("example.org");
    let bundle = folder.write("bundle.pem", &root.certificate_pem());
    for flaw in Flaw::ALL {
        let file = folder.write("svid.pem", &flaw.issue(&root, CLIENT).chain_pem());
        let (found, is_right) = inspect(&[&file, "--bundle", &bundle]);
        assert!(!is_right, "{flaw:?}");
        let rules = rules(&found);
        assert!(
            rules.contains(&flaw.reason().to_owned()),
            "{flaw:?}: {rules:?}"
        );
    }
    let file = folder.write("svid.pem", &root.leaf(CLIENT).chain_pem());
    let (found, is_right) = inspect(&[&file, "--bundle", &bundle]);
    assert!(is_right, "{found}");
    assert_eq!(found["spiffeId"], CLIENT);
    assert_eq!(found["trustChecked"], true);
    assert_eq!(found["revocationChecked"], false);
}

#[test]
fn all_that_is_wrong_is_named_at_once() {
    let folder = Folder::new();
    let root = Authority::root("example.org");
    let file = folder.write(
        "svid.pem",
        &root
            .leaf_with("https://example.org/web", |params| {
                params.key_usages.clear();
                harness::certs::expire(params);
            })
            .chain_pem(),
    );
    let (found, _) = inspect(&[&file]);
    let mut rules = rules(&found);
    rules.sort();
    assert_eq!(rules, ["expired", "invalid_spiffe_id", "leaf_key_usage"]);
}

#[test]
fn trust_revocation_identity_and_profile_are_checked_where_they_are_given() {
    let folder = Folder::new();
    let root = Authority::root("example.org");
    let (one, two) = (root.leaf(CLIENT), root.leaf(CLIENT));
    let serial = harness::certs::serial(&one.chain[0]);
    let list = root.revocation_list(&[&serial], Duration::hours(1));
    let bundle = folder.write("bundle.pem", &root.certificate_pem());
    let other = folder.write(
        "other.pem",
        &Authority::root("example.org").certificate_pem(),
    );
    let crl = folder.write("crl.pem", &harness::certs::crl_pem(&list));
    let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let ed25519 = folder.write("ed.pem", &root.leaf_of(CLIENT, ed25519, |_| {}).chain_pem());
    let one = folder.write("one.pem", &one.chain_pem());
    let two = folder.write("two.pem", &two.chain_pem());
    for (words, wanted) in [
        (vec![&*one], vec![]),
        (vec![&one, "--bundle", &bundle], vec![]),
        (vec![&one, "--bundle", &other], vec!["untrusted_chain"]),
        (
            vec![&one, "--bundle", &bundle, "--crl", &crl],
            vec!["revoked"],
        ),
        (vec![&two, "--bundle", &bundle, "--crl", &crl], vec![]),
        (
            vec![&one, "--bundle", &bundle, "--trust-domain", "other.example"],
            vec!["unknown_trust_domain"],
        ),
        (vec![&one, "--id", SERVER], vec!["wrong_identity"]),
        (vec![&one, "--id", CLIENT], vec![]),
        (vec![&ed25519, "--profile", "fips"], vec!["key_type"]),
        (vec![&ed25519], vec![]),
    ] {
        let (found, is_right) = inspect(&words);
        assert_eq!(rules(&found), wanted, "{words:?}");
        assert_eq!(is_right, wanted.is_empty(), "{words:?}");
    }
}

#[test]
fn the_path_is_judged_and_not_what_is_presented_besides() {
    let folder = Folder::new();
    let root = Authority::root("example.org");
    let bundle = folder.write("bundle.pem", &root.certificate_pem());
    let issued = root.intermediate(|_| {}).leaf(CLIENT);
    let spare = root.intermediate(harness::certs::expire);
    let chain = issued.chain_pem();
    let more = folder.write("more.pem", &(chain.clone() + &spare.certificate_pem()));
    for words in [vec![&*more], vec![&more, "--bundle", &bundle]] {
        let (found, is_right) = inspect(&words);
        assert!(is_right, "{found}");
        assert_eq!(found["unused"], serde_json::json!([3]));
    }
    // Reissued under the same name, and presented beside the one that has expired.
    let (old, new) = (root.reissued(harness::certs::expire), root.reissued(|_| {}));
    let both = folder.write(
        "both.pem",
        &(old.certificate_pem() + &new.certificate_pem()),
    );
    let leaf = folder.write("leaf.pem", &root.leaf(CLIENT).chain_pem());
    assert!(inspect(&[&leaf, "--bundle", &both]).1);

    let reversed: Vec<String> = issued.chain.iter().rev().map(|der| pem(der)).collect();
    let reversed = folder.write("reversed.pem", &reversed.concat());
    let (found, _) = inspect(&[&reversed, "--bundle", &bundle]);
    assert_eq!(rules(&found), ["chain_reversed"]);

    let joined = folder.write("joined.pem", &(chain.trim_end().to_owned() + &chain));
    let marked = folder.write("marked.pem", &format!("\u{feff}{chain}"));
    let key = folder.write("svid.key", &issued.key_pem());
    let binary = folder.write("svid.der", "");
    fs::write(&binary, &issued.chain[0]).unwrap();
    for (words, said) in [
        (
            vec![&*joined],
            "joined.pem holds no certificate: a BEGIN line does not start",
        ),
        (
            vec![&marked],
            "marked.pem holds no certificate: it begins with a byte order mark",
        ),
        (
            vec![&binary],
            "svid.der holds no certificate: it is DER, not PEM",
        ),
        (
            vec![&key],
            "svid.key holds no certificate: it holds only a block of the kind `PRIVATE KEY`",
        ),
        (
            vec![&leaf, "--bundle", &leaf],
            "leaf.pem: certificate 1 of the trust bundle",
        ),
    ] {
        let output = reeve(&words);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(said), "{text}");
    }
}

fn pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

#[test]
fn a_roots_path_length_and_its_right_to_sign_lists_are_judged() {
    let folder = Folder::new();
    let root = Authority::root_with("example.org", |params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    });
    let bundle = folder.write("bundle.pem", &root.certificate_pem());
    let leaf = folder.write("leaf.pem", &root.leaf(CLIENT).chain_pem());
    let below = folder.write(
        "below.pem",
        &root.intermediate(|_| {}).leaf(CLIENT).chain_pem(),
    );
    assert!(inspect(&[&leaf, "--bundle", &bundle]).1);
    let (found, _) = inspect(&[&below, "--bundle", &bundle]);
    assert_eq!(rules(&found), ["path_length"]);
}

#[test]
fn a_live_tunnel_port_is_inspected() {
    let guarded = Guarded::start();
    let folder = Folder::new();
    let bundle = folder.write("bundle.pem", &guarded.root.certificate_pem());
    let pair = |name: &str, issued: &Issued| {
        let chain = folder.write(&format!("{name}.pem"), &issued.chain_pem());
        (
            chain,
            folder.write(&format!("{name}.key"), &issued.key_pem()),
        )
    };
    let (right, right_key) = pair("right", &guarded.root.leaf(CLIENT));
    let (wrong, wrong_key) = pair("wrong", &Authority::root("example.org").leaf(CLIENT));
    let reeve = Programs::get().reeve.to_str().unwrap().to_owned();
    let look = |address: String, words: &[&str]| -> Output {
        let start = [&reeve, "certs", "inspect", &address];
        guarded.stranger.exec([&start[..], words].concat())
    };
    let v4 = || guarded.tunnel_port().to_string();
    let v6 = guarded.server.addresses().port6(PORT).to_string();
    for address in [v4(), v6] {
        let page = look(address, &["--bundle", &bundle, "--id", SERVER]).ok();
        for text in [
            SERVER,
            "asks for a certificate, and was shown none",
            "would accept it",
        ] {
            assert!(page.contains(text), "{text}\nis not in\n{page}");
        }
    }
    let shown = look(
        v4(),
        &["--certificate", &right, "--key", &right_key, "--json"],
    )
    .json();
    assert_eq!(shown["tls"]["asksForCertificate"], true);
    assert_eq!(shown["tls"]["refusal"], Value::Null);
    assert_eq!(shown["tls"]["group"], "X25519MLKEM768");
    let refused = look(v4(), &["--certificate", &wrong, "--key", &wrong_key]);
    assert!(!refused.status.success());
    assert!(refused.stdout.contains("REFUSES"), "{}", refused.stdout);
    guarded.still_serves();

    // Somebody else's port, with something wrong behind it.
    let expired = Flaw::Expired.issue(&guarded.root, SERVER);
    let _impostor = Server::start(&guarded.stranger, PORT, &expired, Conduct::Echo);
    let at = guarded.stranger.addresses().port4(PORT).to_string();
    let found = look(at, &["--bundle", &bundle]);
    assert!(!found.status.success());
    assert!(found.stdout.contains("BROKEN: expired"), "{}", found.stdout);
    let nobody = guarded.stranger.addresses().port4(1).to_string();
    assert!(look(nobody, &[]).fails().contains("cannot connect to"));
}

#[test]
fn what_cannot_be_inspected_is_said() {
    let folder = Folder::new();
    let empty = folder.write("empty.pem", "");
    for (words, text) in [
        (vec![&*empty], "empty.pem holds no certificate: it is empty"),
        (
            vec!["./nowhere.pem"],
            "neither a file nor an address with a port",
        ),
    ] {
        let output = reeve(&words);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(text), "{said}");
    }
    assert_eq!(reeve(&[&empty, "--crl", &empty]).status.code(), Some(2));
}

// === commands ===

struct Folder {
    path: PathBuf,
    _node: Node,
}

impl Folder {
    fn new() -> Self {
        let node = Node::new(&Network::new(), "files");
        Self {
            path: node.folder().to_owned(),
            _node: node,
        }
    }

    fn write(&self, name: &str, text: &str) -> String {
        let file: &Path = &self.path.join(name);
        fs::write(file, text).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

fn reeve(words: &[&str]) -> std::process::Output {
    let mut command = Command::new(&Programs::get().reeve);
    command
        .args(["certs", "inspect"])
        .args(words)
        .output()
        .unwrap()
}

/// What is found, and whether all is well.
fn inspect(words: &[&str]) -> (Value, bool) {
    let output = reeve(&[words, &["--json"]].concat());
    let found = serde_json::from_slice(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    (
        found.unwrap_or_else(|_| panic!("{words:?}: {said}")),
        output.status.success(),
    )
}

fn rules(found: &Value) -> Vec<String> {
    let rules = found["brokenRules"].as_array().unwrap().iter();
    rules
        .map(|rule| rule["rule"].as_str().unwrap().to_owned())
        .collect()
}
