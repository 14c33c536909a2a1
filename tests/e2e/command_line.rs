//! The command line: what `reeve` says to people and scripts, right or wrong, and the admin socket
//! behind it.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::Command,
};

use harness::{Daemon, Network, Node, Programs, Workload, eventually};
use serde_json::Value;

use crate::program::{Files, Said, reeve};

// === check ===

#[test]
fn check_is_content_with_a_good_configuration() {
    let files = Files::new();
    files.write("policies/out.yaml", POLICY);
    let config = files.write("reeve.yaml", CONFIG);
    let checked = reeve(&["check", "--config", &config]);
    assert_eq!(checked.code(), 0, "{checked:?}");
    assert!(
        checked.out().contains("1 workloads, 1 peers"),
        "{checked:?}"
    );
    assert_eq!(checked.err(), "");
}

#[test]
fn check_reports_every_mistake_of_every_file_at_once() {
    let files = Files::new();
    files.write("policies/a.yaml", &POLICY.replace("egress:", "egres:"));
    files.write(
        "policies/b.yaml",
        &POLICY.replace("port: 80", "port: eighty"),
    );
    files.write(
        "policies/c.yaml",
        "kind: ConnectionPolicy\n  metadata: broken\n",
    );
    let config = files.write("reeve.yaml", WRONG_CONFIG);
    let checked = reeve(&["check", "--config", &config]);
    assert_eq!(checked.code(), 2, "{checked:?}");
    assert_eq!(checked.out(), "");
    let said = checked.err();
    for mistake in [
        "reeve.yaml:2:14: trustDomain: ",
        "reeve.yaml:4:5: workloads[0].nmae: ",
        "reeve.yaml:6:13: workloads[0].cgroup: ",
        "reeve.yaml:9:17: peers[0].addresses[0]: ",
        "reeve.yaml:11:3: limits.conections: ",
        "did you mean `connections`?",
        "reeve.yaml:13:12: timeouts.connect: ",
        "a.yaml:7:3: spec.egres: ",
        "did you mean `egress`?",
        "b.yaml:9:22: spec.egress[0].ports[0].port: ",
        "c.yaml:2:",
    ] {
        assert!(said.contains(mistake), "{mistake}\nis not in\n{said}");
    }
    // The daemon finds the same, and does not start.
    let ran = reeve(&["run", "--config", &config]);
    assert_eq!(ran.code(), 2, "{ran:?}");
    assert!(
        ran.err().contains("reeve.yaml:2:14: trustDomain: "),
        "{ran:?}"
    );
}

#[test]
fn check_says_which_file_it_cannot_read() {
    let files = Files::new();
    let checked = reeve(&["check", "--config", "/nowhere/reeve.yaml"]);
    assert_eq!(checked.code(), 2, "{checked:?}");
    assert!(checked.err().contains("/nowhere/reeve.yaml"), "{checked:?}");
    let config = files.write("reeve.yaml", CONFIG);
    let checked = reeve(&["check", "--config", &config]);
    assert_eq!(
        checked.code(),
        2,
        "there is no folder `policies`: {checked:?}"
    );
    assert!(checked.err().contains("policies"), "{checked:?}");
}

#[test]
fn check_survives_what_is_no_configuration() {
    let files = Files::new();
    let deep = "[".repeat(100_000);
    for (name, text) in [
        ("empty.yaml", ""),
        ("text.yaml", "hello"),
        ("list.yaml", "- a\n- b\n"),
        ("json.yaml", "{\"trustDomain\": 1}"),
        ("tab.yaml", "trustDomain:\t\texample.org\n\tnode: {}\n"),
        ("deep.yaml", deep.as_str()),
        (
            "bomb.yaml",
            "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrustDomain: *c\n",
        ),
    ] {
        let config = files.write(name, text);
        let checked = reeve(&["check", "--config", &config]);
        assert_eq!(checked.code(), 2, "{name}: {checked:?}");
        assert!(checked.err().contains(name), "{name}: {checked:?}");
        assert!(!checked.err().contains("panicked"), "{name}: {checked:?}");
    }
    let config = files.write("binary.yaml", "");
    fs::write(&config, [0, 159, 146, 150, 255]).unwrap();
    assert_eq!(reeve(&["check", "--config", &config]).code(), 2);
}

// === status ===

#[test]
fn status_without_a_daemon_says_so() {
    let said = reeve(&["status", "--socket", "/nowhere/admin.sock"]);
    assert_eq!(said.code(), 1, "{said:?}");
    for text in ["/nowhere/admin.sock", "reeve run", "because: No such file"] {
        assert!(said.err().contains(text), "{said:?}");
    }
}

#[test]
fn status_tells_people_and_programs_how_the_daemon_is() {
    let (_node, client, daemon) = running();
    let page = daemon.command(["status"]).ok();
    let v4 = client.addresses().v4.to_string();
    let id = client.spiffe_id("example.org");
    for text in [
        "on node, trust domain example.org",
        "ready\n",
        &v4,
        &id,
        "embedded",
        "VERDICTS",
    ] {
        assert!(page.contains(text), "{text}\nis not in\n{page}");
    }
    assert!(!page.contains("NOT READY"), "{page}");

    let status = daemon.status();
    assert_eq!(status["ready"], true);
    assert_eq!(status["node"], "node");
    assert_eq!(status["trustDomain"], "example.org");
    assert_eq!(status["process"], daemon.id());
    assert_eq!(status["policies"]["policies"], 1);
    let workload = &status["workloads"][0];
    for (field, value) in [
        ("name", Value::from("client")),
        ("spiffeId", id.clone().into()),
        ("state", "running".into()),
        ("ownsNetns", true.into()),
        ("listening", true.into()),
        ("certificate", true.into()),
    ] {
        assert_eq!(workload[field], value, "{field} in {workload}");
    }
    let addresses = workload["addresses"].to_string();
    assert!(addresses.contains(&v4), "{addresses}");
    let certificate = &status["certificates"][0];
    assert_eq!(certificate["spiffeId"], id);
    let left = certificate["secondsLeft"].as_u64().unwrap();
    assert!((3500..=3600).contains(&left), "{left}");
    assert_eq!(status["bundles"][0]["certificates"], 1);
    assert_eq!(status["lostEvents"], 0);
}

#[test]
fn status_into_a_pipe_that_nobody_reads_is_no_failure() {
    let (_node, _client, daemon) = running();
    let line = format!(
        "set -o pipefail; {} status --socket {} | true",
        Programs::get().reeve.display(),
        daemon.socket().display()
    );
    let ran = Command::new("bash").args(["-c", &line]).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

// === the admin socket ===

#[test]
fn the_admin_socket_is_for_its_owner() {
    let (_node, _client, mut daemon) = running();
    let socket = daemon.socket().to_owned();
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(readable_reeve(&socket))
        .args(["status", "--socket"])
        .arg(&socket)
        .output()
        .unwrap();
    assert_eq!(nobody.code(), 1, "{nobody:?}");
    assert!(nobody.err().contains("root"), "{nobody:?}");
    daemon.stop().ok();
    assert!(!socket.exists(), "the socket goes with the daemon");
}

#[test]
fn garbage_on_the_admin_socket_is_answered_and_changes_nothing() {
    let (_node, _client, daemon) = running();
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.set_read_timeout(Some(harness::SOON)).unwrap();
        // It may hang up before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    let noise: Vec<u8> = (0_u32..100_000)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for bytes in [
        &b""[..],
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}\n",
        br#"{"version":1,"command":"status"#,
        b"{\"version\":1,\"command\":\"destroy\"}\n",
        b"{\"version\":4294967296,\"command\":\"status\"}\n",
        &[b'['; 100_000],
        &noise,
    ] {
        let answer = ask(bytes);
        assert!(!answer.contains("workloads"), "{answer}");
    }
    // Those who connect and say nothing take no more than their own time.
    let _silent: Vec<_> = (0..8)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    assert_eq!(daemon.status()["ready"], true);
}

#[test]
fn more_silent_callers_than_the_admin_socket_serves_are_hung_up_on() {
    let (_node, _client, daemon) = running();
    let silent: Vec<_> = (0..40)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    eventually("they have been hung up on, and others are served", || {
        daemon.command(["status"]).status.success()
    });
    drop(silent);
}

#[test]
fn a_second_daemon_does_not_start_beside_the_first() {
    let (node, _client, daemon) = running();
    let config = daemon.config().to_str().unwrap();
    let reeve = Programs::get().reeve.to_str().unwrap();
    let second = node.host().exec([reeve, "run", "--config", config]);
    assert_eq!(second.status.code(), Some(1), "{}", second.stderr);
    assert!(
        second
            .stderr
            .contains("another daemon answers on the admin socket"),
        "{}",
        second.stderr
    );
    assert!(daemon.is_ready());
    assert_eq!(daemon.status()["process"], daemon.id());
}

// === help ===

#[test]
fn help_teaches() {
    let help = reeve(&["--help"]);
    assert_eq!(help.code(), 0);
    let commands = [
        "run",
        "guard",
        "check",
        "status",
        "observe",
        "explain",
        "policy",
        "detach",
        "completions",
        "man",
    ];
    for text in commands
        .iter()
        .chain(&["Exit codes", "reeve check --config"])
    {
        assert!(
            help.out().contains(text),
            "{text}\nis not in\n{}",
            help.out()
        );
    }
    for command in commands {
        let help = reeve(&[command, "--help"]);
        assert_eq!(help.code(), 0, "{help:?}");
        assert!(
            help.out().contains(&format!("Usage: reeve {command}")),
            "{help:?}"
        );
        assert!(help.out().contains("Examples:"), "{help:?}");
    }
    let version = reeve(&["--version"]);
    assert!(version.out().starts_with("reeve 0."), "{version:?}");
}

#[test]
fn a_wrong_command_line_says_what_would_be_right() {
    for (words, text) in [
        (&[][..], "Usage: reeve"),
        (&["statsu"], "status"),
        (&["run", "--confg", "x"], "--config"),
        (&["completions", "cmd"], "bash"),
        (&["man", "ca", "isue"], "`reeve ca --help`"),
        (&["status", "--json", "extra"], "extra"),
    ] {
        let wrong = reeve(words);
        assert_eq!(wrong.code(), 2, "{words:?}: {wrong:?}");
        assert!(wrong.err().contains(text), "{words:?}: {wrong:?}");
        assert_eq!(wrong.out(), "", "{words:?}");
    }
}

#[test]
fn completions_complete() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = reeve(&["completions", shell]);
        assert_eq!(script.code(), 0);
        assert!(script.out().contains("completions"), "{shell}");
    }
    // What a user of bash sees who types `reeve st` and the tab key.
    let script = reeve(&["completions", "bash"]).out();
    let line = format!(
        "{script}\nCOMP_WORDS=(reeve st); COMP_CWORD=1; _reeve reeve st reeve; echo \"${{COMPREPLY[@]}}\""
    );
    let completed = Command::new("bash").args(["-c", &line]).output().unwrap();
    assert_eq!(completed.out().trim(), "status", "{completed:?}");
}

#[test]
fn run_without_root_says_what_is_needed() {
    let files = Files::new();
    let config = files.write("reeve.yaml", "trustDomain: example.org\n");
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--bounding-set=-all",
        ])
        .arg(readable_reeve(Path::new(&config)))
        // Open already: the way to the file is not for everybody.
        .args(["run", "--config", "/dev/stdin"])
        .stdin(fs::File::open(&config).unwrap())
        .output()
        .unwrap();
    assert_eq!(ran.code(), 1, "{ran:?}");
    assert!(ran.err().contains("root"), "{ran:?}");
}

// === the arrangement ===

/// A daemon with one workload.
fn running() -> (Node, Workload, Daemon) {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let client = node.pod("client");
    let policy = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: out}
spec: {workloads: {names: [client]}, egress: [{to: [{any: {}}]}]}
";
    let daemon = node.reeve().enrol(&client).policy(policy).start();
    (node, client, daemon)
}

/// The program where everybody may run it.
fn readable_reeve(beside: &Path) -> std::path::PathBuf {
    let copy = beside.with_file_name("reeve");
    fs::copy(&Programs::get().reeve, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

const CONFIG: &str = "\
trustDomain: example.org
workloads:
  - name: web
    cgroup: /web
peers:
  - name: db
    addresses: [192.0.2.1]
policies: {folder: policies}
";

const WRONG_CONFIG: &str = "\
# Line 2 is wrong, and most of what follows.
trustDomain: Example.ORG
workloads:
  - nmae: web
    # No slash.
    cgroup: web
peers:
  - name: db
    addresses: [192.0.2.256]
limits:
  conections: 5
timeouts:
  connect: fast
policies: {folder: policies}
";

const POLICY: &str = "\
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata:
  name: out
spec:
  workloads: {names: [web]}
  egress:
    - to: [{cidr: 192.0.2.0/24}]
      ports: [{port: 80}]
";
