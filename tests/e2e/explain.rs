//! `reeve explain`: the verdict of both halves, by the code that decides, held against the kernel.

use std::process::{Command, Stdio};

use harness::{Daemon, Network, Node, Output, Programs, eventually};
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, TCP, UDP, fails_fast, is_denied, of, say, serve, tcp};

#[test]
fn what_is_explained_is_what_happens() {
    let (pair, one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "allowed");
    for (daemon, direction, rule) in [
        (&one, "egress", "of-client/egress[0]"),
        (&two, "ingress", "of-server/ingress[0]"),
    ] {
        let page = explain(
            daemon,
            &["--from", "client", "--to", "server", "--port", "8080"],
        )
        .ok();
        for text in [
            "client -> server, tcp 8080: allowed",
            direction,
            "through a tunnel",
            rule,
            "policies/0.yaml:1",
            "kernel agrees",
        ] {
            assert!(page.contains(text), "{text} is not in {page}");
        }
        let half = json(
            daemon,
            &["--from", "client", "--to", "server", "--port", "8080"],
            0,
        );
        assert_eq!(half["verdict"], "allow");
        assert_eq!(half["halves"].as_array().unwrap().len(), 1, "{half}");
        assert_eq!(half["halves"][0]["direction"], direction);
        assert_eq!(half["halves"][0]["kernel"]["agrees"], true);
    }

    is_denied(&pair.client, pair.server.addresses().port4(8081));
    let half = json(
        &one,
        &["--from", "client", "--to", "server", "--port", "8081"],
        1,
    );
    assert_eq!(half["verdict"], "deny");
    let egress = &half["halves"][0];
    assert_eq!(
        (&egress["reason"], &egress["rule"]),
        (&"no_policy".into(), &"default deny".into())
    );
    let nearest = &egress["nearest"][0];
    assert_eq!(nearest["rule"], "of-client/egress[0]");
    assert_eq!(nearest["misfits"][0]["part"], "port");
    assert_eq!(egress["kernel"]["agrees"], true);

    // By address, and what comes from there without reeve.
    let (from, by_id) = (
        pair.client.addresses().v4.to_string(),
        pair.client.spiffe_id("example.org"),
    );
    for who in [from.as_str(), by_id.as_str()] {
        json(
            &two,
            &["--from", who, "--to", "server", "--port", "8080"],
            0,
        );
        let words = [
            "--from",
            who,
            "--to",
            "server",
            "--port",
            "8080",
            "--plaintext",
        ];
        let half = json(&two, &words, 1);
        assert_eq!(half["halves"][0]["reason"], "plaintext_refused");
        assert_eq!(half["halves"][0]["kernel"]["agrees"], true);
    }
    fails_fast(pair.one.host(), to, "Connection refused");
    let host = pair.one.addresses().v4.to_string();
    let half = json(
        &two,
        &["--from", &host, "--to", "server", "--port", "8080"],
        1,
    );
    assert_eq!(half["halves"][0]["reason"], "no_policy");
    let udp = [
        "--from",
        "client",
        "--to",
        "server",
        "--port",
        "8080",
        "--protocol",
        "udp",
    ];
    assert_eq!(
        json(&one, &udp, 1)["halves"][0]["nearest"][0]["misfits"][0]["part"],
        "protocol"
    );
}

#[test]
fn both_halves_are_judged_where_both_ends_are_here() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (client, server) = (node.pod("client"), node.pod("server"));
    let daemon = node
        .reeve()
        .enrol(&client)
        .enrol(&server)
        .policy(&of(&client).calls(&server, TCP).calls(&server, UDP).text())
        .policy(&of(&server).hears(&client, UDP).text())
        .start();
    let words = ["--from", "client", "--to", "server", "--port", "8080"];
    let both = json(&daemon, &words, 1);
    assert_eq!(both["halves"][0]["verdict"], "allow");
    assert_eq!(both["halves"][1]["verdict"], "deny");
    assert_eq!(both["halves"][1]["direction"], "ingress");
    let _echo = serve(&server, PORT, &[]);
    let to = server.addresses().port4(PORT);
    client
        .peer(["send", &to.to_string(), "--text", "x"])
        .fails();
    let would = both["wouldAllow"][0].as_str().unwrap();
    let client_id = client.spiffe_id("example.org");
    assert!(
        would.contains("for server with ingress") && would.contains(&client_id),
        "{would}"
    );
    let udp = json(&daemon, &[&words[..], &["--protocol", "UDP"]].concat(), 0);
    assert_eq!(udp["halves"][1]["transport"], "plaintext");
    assert_eq!(udp["halves"][1]["reason"], "not_tunnelled");
    let own = json(
        &daemon,
        &["--from", "client", "--to", "client", "--port", "1"],
        0,
    );
    assert!(
        own["notes"][0]
            .as_str()
            .unwrap()
            .contains("never in question")
    );
}

#[test]
fn a_kernel_that_holds_something_else_is_a_loud_failure() {
    let pair = Pair::new();
    // Two verdicts, of which one has room: the kernel refuses both.
    let policy = of(&pair.client)
        .calls(&pair.server, TCP)
        .calls(&pair.server, tcp(8081))
        .text();
    let one = pair
        .at_one()
        .policy(&policy)
        .set("/maps/verdicts", json!(1))
        // Its rule would need room too.
        .set("/node/addresses", json!([]))
        .start_unready();
    let ports = ["8080", "8081"];
    eventually("the daemon answers", || {
        ports.iter().all(|port| code(&one, port) == 3)
    });
    let words = ["--from", "client", "--to", "server", "--port", ports[0]];
    let said = explain(&one, &words);
    assert!(
        said.stdout.contains("kernel DISAGREES: deny"),
        "{}",
        said.stdout
    );
    assert!(
        said.stderr.contains("does not do what the policies say"),
        "{}",
        said.stderr
    );
}

#[test]
fn files_alone_are_enough() {
    let files = Node::new(&Network::new(), "files");
    let folder = files.folder();
    std::fs::create_dir_all(folder.join("policies")).unwrap();
    std::fs::write(folder.join("policies/web.yaml"), POLICY).unwrap();
    let config = folder.join("reeve.yaml");
    std::fs::write(&config, CONFIG).unwrap();
    let config = config.to_str().unwrap();
    let ask = |words: &str| {
        let output = Command::new(&Programs::get().reeve)
            .args(["explain", "--config", config])
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        (output.status.code().unwrap(), said)
    };
    for (words, code, texts) in [
        (
            "--from web --to db --port 5432",
            0,
            &["web/egress[0]", "web.yaml:7", "db is on another node"][..],
        ),
        (
            "--from web --to db --port 5433",
            1,
            &["nearest: web/egress[0]", "tcp 5432"],
        ),
        (
            "--from web --to 192.0.2.9 --port 53 --protocol udp",
            1,
            &["no_policy"],
        ),
        ("--from web --to db --protocol icmp", 1, &["no_policy"]),
        (
            "--from db --to web --port 80",
            1,
            &["ingress of web from db", "through a tunnel"],
        ),
        // On a shared host a service's own address is everybody's there: the policy is asked.
        (
            "--from svc --to svc --port 80",
            1,
            &["no_policy", "would allow it:"],
        ),
        (
            "--from svc --to 192.0.2.50 --port 80",
            1,
            &["ingress of other"],
        ),
        (
            "--from 192.0.2.50 --to db --port 80",
            2,
            &["shared by svc, other"],
        ),
        ("--from weeb --to db --port 1", 2, &["did you mean `web`?"]),
        (
            "--from db --to 192.0.2.77 --port 1",
            2,
            &["neither `db` nor `192.0.2.77`"],
        ),
        ("--from web --to spiffe:// --port 1", 2, &["SPIFFE ID"]),
        ("--from web --to db --protocol udp", 2, &["add `--port`"]),
    ] {
        let (got, said) = ask(words);
        assert_eq!(got, code, "{words}: {said}");
        for text in texts {
            assert!(said.contains(text), "{words}: {text} is not in {said}");
        }
    }
    std::fs::write(
        folder.join("policies/web.yaml"),
        POLICY.replace("port:", "prt:"),
    )
    .unwrap();
    let (code, said) = ask("--from web --to db --port 5432");
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("web.yaml:") && said.contains("did you mean `port`?"),
        "{said}"
    );
}

// === the arrangement ===

fn explain(daemon: &Daemon, words: &[&str]) -> Output {
    daemon.command([&["explain"], words].concat())
}

/// The exit code of what the client may do.
fn code(daemon: &Daemon, port: &str) -> i32 {
    let words = ["--from", "client", "--to", "server", "--port", port];
    explain(daemon, &words).status.code().unwrap()
}

/// The answer, which has this exit code.
#[track_caller]
fn json(daemon: &Daemon, words: &[&str], code: i32) -> Value {
    let said = explain(daemon, &[words, &["--json"]].concat());
    assert_eq!(said.status.code(), Some(code), "{words:?}: {said:?}");
    serde_json::from_str(&said.stdout).unwrap()
}

const CONFIG: &str = "\
trustDomain: example.org
workloads:
  - {name: web, cgroup: /web}
  - {name: svc, unit: svc.service, addresses: [192.0.2.50]}
  - {name: other, unit: other.service, ports: [80], addresses: [192.0.2.50]}
peers:
  - {name: db, serviceAccount: db, addresses: [192.0.2.1]}
policies: {folder: policies}
";

const POLICY: &str = "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: web}
spec:
  workloads: {names: [web]}
  egress:
    - to: [{serviceAccount: db}]
      ports: [{port: 5432}]
";
