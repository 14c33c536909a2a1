//! The embedded CA: a fleet of intermediates below one root, a root that is rotated and a node that
//! is shut out while daemons run. What docs/certificates.md tells people to do is done.

use std::{fs, path::Path, process::Command};

use harness::{
    Daemon, Network, Node, Output, Programs, eventually,
    hbone::{Client, PORT},
};

use crate::{
    arrange::{PORT as APP, Pair, say, send, serve},
    opposite::{CLIENT, Guarded},
};

#[test]
fn the_recipe_for_a_fleet_works_as_it_is_written() {
    let page = crate::documents::root().join("docs/certificates.md");
    let node = Node::new(&Network::new(), "recipe");
    let mut commands = 0;
    for block in crate::documents::blocks(&page) {
        if block.language == "sh" {
            commands += block.text.lines().count();
            run(node.folder(), &block.text);
        }
    }
    assert!(commands > 15, "the page has lost its commands: {commands}");
    let shown: serde_json::Value =
        serde_json::from_str(&run(node.folder(), "reeve ca show --dir node-a --json")).unwrap();
    assert_eq!(shown["problem"], serde_json::Value::Null);
    let revoked = shown["revocationLists"].as_array().unwrap().iter();
    let revoked: usize = revoked
        .map(|list| list["revoked"].as_array().unwrap().len())
        .sum();
    assert_eq!(revoked, 1, "node b");
}

#[test]
fn a_node_that_is_revoked_is_shut_out_and_others_are_not() {
    let pair = Pair::new();
    let folder = pair.one.folder().to_owned();
    run(
        &folder,
        "reeve ca init --trust-domain example.org --dir root",
    );
    for node in ["one", "two"] {
        let line = format!("reeve ca init --root-dir root --intermediate {node}");
        run(&folder, &line);
    }
    let ca_of = |node: &str| serde_json::json!(folder.join(node));
    let place = "/certificates/sources/0/embedded/caDir";
    let one = pair.allowing_at_one().set(place, ca_of("one")).start();
    let two = pair.allowing_at_two().set(place, ca_of("two")).start();
    let _server = serve(&pair.server, APP, &[]);
    let to = pair.server.addresses().port4(APP);
    say(&pair.client, to, "across two intermediates");

    // The list is put on the server's node: the client's node is shut out.
    run(
        &folder,
        "reeve ca revoke --dir root --certificate one/intermediate.pem",
    );
    run(&folder, "cp root/crl.pem two/");
    two.wait_for_log(&["the embedded CA has changed"]);
    eventually("the revoked node is refused", || {
        one_call_fails(&pair) && handshakes(&two, "revoked") >= 1.0
    });
    assert!(two.is_ready(), "its own certificates are good");
    // While a node that is new, and on the list as what it is, is let in.
    run(&folder, "rm -r one");
    run(
        &folder,
        "reeve ca init --root-dir root --intermediate one-anew",
    );
    run(&folder, "cp root/crl.pem two/ && cp root/crl.pem one-anew/");
    run(&folder, "mkdir -m 700 one && cp -p one-anew/* one/");
    one.wait_for_log(&["the embedded CA has changed"]);
    eventually("the node with a new intermediate is let in", || {
        send(&pair.client, to, &["--text", "it is me"])
            .status
            .success()
    });
}

#[test]
fn the_root_is_rotated_under_running_daemons() {
    let (pair, one, two) = Pair::started();
    let _server = serve(&pair.server, APP, &[]);
    let to = pair.server.addresses().port4(APP);
    let serials = |daemon: &Daemon| daemon.status()["certificates"][0]["serial"].clone();
    let ca = pair.network.trust();
    let rotate = |step: &str| {
        let before = [serials(&one), serials(&two)];
        run(ca, &format!("reeve ca rotate --dir . {step}"));
        for (daemon, before) in [&one, &two].into_iter().zip(before) {
            eventually("certificates are renewed", || serials(daemon) != before);
        }
        say(&pair.client, to, &format!("rotated {step}"));
    };
    say(&pair.client, to, "before");
    let old_root = fs::read(ca.join("root.pem")).unwrap();
    rotate("");
    rotate("--switch");
    assert_ne!(fs::read(ca.join("root.pem")).unwrap(), old_root);
    rotate("--finish");
    for daemon in [&one, &two] {
        assert_eq!(daemon.status()["bundles"][0]["certificates"], 1);
        assert_eq!(handshakes(daemon, "untrusted_chain"), 0.0);
    }
}

#[test]
fn a_change_that_is_bad_is_refused_and_what_was_stays_in_force() {
    let guarded = Guarded::start();
    let folder = guarded.daemon.config().parent().unwrap();
    let key = guarded.ca().join("root.key");
    let kept = fs::read(&key).unwrap();
    run(
        folder,
        "reeve ca init --trust-domain example.org --dir other",
    );
    fs::copy(folder.join("other/root.key"), &key).unwrap();
    guarded
        .daemon
        .wait_for_log(&["the changed CA is not used", "does not fit"]);
    guarded.still_serves();
    assert!(guarded.daemon.is_ready());
    // No key is ever told, not even where it is wrong.
    assert!(!guarded.daemon.log().contains("PRIVATE KEY"));
    fs::write(&key, kept).unwrap();
}

#[test]
fn a_workload_whose_certificate_is_revoked_is_refused_by_the_daemon_of_that_ca() {
    let guarded = Guarded::start();
    let ca = guarded.ca().display();
    let out = guarded.stranger.folder();
    let issued = |name: &str| {
        let out = out.join(name);
        let issue = format!(
            "reeve ca issue --dir {ca} --id {CLIENT} --out {}",
            out.display()
        );
        run(Path::new("/"), &issue);
        out
    };
    let (lost, kept) = (issued("lost"), issued("kept"));
    let client = |folder: &Path| {
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        let issued = harness::certs::Issued::from_pem(&read("svid.pem"), &read("svid.key"));
        Client::new(&guarded.stranger).presenting(&issued)
    };
    client(&lost)
        .handshake(guarded.server.addresses().port4(PORT))
        .unwrap();
    let revoke = format!(
        "reeve ca revoke --dir {ca} --certificate {}/svid.pem",
        lost.display()
    );
    run(Path::new("/"), &revoke);
    guarded
        .daemon
        .wait_for_log(&["the embedded CA has changed"]);
    // The list is in force a moment later.
    eventually("the lost one is refused", || {
        client(&lost).handshake(guarded.tunnel_port()).is_err()
    });
    assert_eq!(guarded.handshakes("revoked"), 1.0);
    client(&kept).handshake(guarded.tunnel_port()).unwrap();
}

// === commands ===

/// Runs lines of a shell in a folder, and gives what they print.
fn run(folder: &Path, lines: &str) -> String {
    let programs = Programs::get().reeve.parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", lines])
        .env("PATH", format!("{}:{path}", programs.display()))
        .current_dir(folder)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{lines}: {out}{err}");
    out
}

fn one_call_fails(pair: &Pair) -> bool {
    let to = pair.server.addresses().port4(APP);
    let output: Output = send(&pair.client, to, &["--text", "let me in"]);
    !output.status.success()
}

fn handshakes(daemon: &Daemon, reason: &str) -> f64 {
    let labels = [("reason", reason)];
    daemon.metrics().sum("reeve_tls_handshakes_total", &labels)
}
