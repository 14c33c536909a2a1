//! `reeve guard`: denied before any daemon runs, with next to nothing to go by.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc};

use harness::{Node, Output, Place, Programs, SOON, holds_for};
use serde_json::json;

use crate::arrange::{PORT, Pair, TCP, is_denied, of, say, serve, tcp};

#[test]
fn a_guard_denies_before_any_daemon_runs_and_the_daemon_takes_over_from_it() {
    let pair = Pair::new();
    let (guest, ghost) = (pair.two.pod("guest"), pair.one.pod("ghost"));
    let pods = format!("{}/pods", pair.one.cgroup().below_mount());
    let policies = pair.one.folder().join("policies");
    let reeve = || {
        pair.at_one()
            .enrol_with(&ghost, json!({"cgroup": format!("{pods}/ghost")}))
            .set("/enforcedParents", json!([pods]))
    };
    let nowhere = format!(
        "{}/not-there-and-below-no-parent",
        pair.one.cgroup().below_mount()
    );
    let with_orphan = json!({"cgroup": nowhere});
    let config = reeve()
        .enrol_with(&pair.two.pod("orphan"), with_orphan)
        .set(
            "/certificates/sources/0/embedded/caDir",
            json!("/proc/self/comm"),
        )
        .set("/metrics/address", json!("192.0.2.1:1"))
        .write();
    fs::write(policies.join("broken.yaml"), "{{{ no policy at all").unwrap();

    let said = guard(&pair.one, &config);
    for line in [
        format!("{pods}: everything below is refused"),
        "client: refused until".to_owned(),
        "ghost: to come, below an enforced parent".to_owned(),
    ] {
        let said = &said.stdout;
        assert!(said.contains(&line), "{line}\nis not in\n{said}");
    }
    // What is open until the daemon runs is no success.
    assert_eq!(said.status.code(), Some(3), "{}", said.stderr);
    let open = "NOT GUARDED: workload orphan has no cgroup yet";
    assert!(said.stderr.contains(open), "{}", said.stderr);
    let _server = serve(&guest, PORT, &[]);
    let to = guest.addresses();
    let born = |name: &str| {
        let folder = pair.one.cgroup().path().join("pods").join(name);
        let cgroup = harness::Cgroup::at(&folder);
        pair.one.host().with_cgroup(Arc::new(cgroup))
    };
    let first = born("first");
    for place in [&*pair.client, &first] {
        is_denied(place, to.port4(PORT));
        is_denied(place, to.port6(PORT));
    }
    // Loopback is nobody else's business, and who is not named is not meant.
    let _own = serve(&pair.client, 8081, &[]);
    say(&pair.client, "127.0.0.1:8081", "to myself");
    say(pair.one.host(), to.port4(PORT), "not guarded");

    // What was broken is mended, and the daemon starts where the guard left off.
    fs::remove_file(policies.join("broken.yaml")).unwrap();
    let daemon = reeve()
        .policy(&of(&pair.client).calls_address(to.v4, TCP).text())
        .start();
    say(&pair.client, to.port4(PORT), "now it is allowed");
    is_denied(&pair.client, to.port6(PORT));
    is_denied(&first, to.port4(PORT));
    is_denied(&born("second"), to.port4(PORT));
    drop(daemon);
}

#[test]
fn a_guard_changes_nothing_of_what_a_daemon_has_put_in_place() {
    let pair = Pair::new();
    let guest = pair.two.pod("guest");
    let policy = of(&pair.client)
        .calls_address(guest.addresses().v4, tcp(8081))
        .calls(&pair.server, TCP)
        .text();
    let mut one = pair.at_one().policy(&policy).start();
    let _two = pair.allowing_at_two().start();
    let _servers = [serve(&pair.server, PORT, &[]), serve(&guest, 8081, &[])];
    let to = guest.addresses().port4(8081);
    let mut heart = pair.client.spawn_peer(["heartbeat", &to.to_string()]);
    heart.wait_for("beat 2");
    let before = one.status()["generation"].clone();
    guard(&pair.one, one.config()).ok();
    assert_eq!(one.status()["generation"], before);
    say(
        &pair.client,
        pair.server.addresses().port4(PORT),
        "through the tunnel",
    );
    say(&pair.client, to, "in plaintext");
    // Nor when it is gone.
    one.kill();
    guard(&pair.one, one.config()).ok();
    say(&pair.client, to, "in plaintext");
    is_denied(&pair.client, guest.addresses().port4(PORT));
    one.start_again();
    one.wait_until_ready();
    holds_for(SOON / 40, "the connection lives", || {
        heart.ended().is_none()
    });
}

/// As the root of the hierarchy is on every host: root's, and not to be written.
fn close(node: &Node) {
    fs::set_permissions(node.cgroup().path(), fs::Permissions::from_mode(0o555)).unwrap();
}

#[test]
fn a_parent_that_cannot_be_made_fails_the_guard_and_the_rest_is_guarded() {
    let pair = Pair::new();
    let root = pair.one.cgroup().below_mount();
    let pods = format!("{root}/pods");
    let config = pair.at_one().set("/enforcedParents", json!([pods])).write();
    close(&pair.one);
    let guest = pair.two.pod("guest");
    let _server = serve(&guest, PORT, &[]);
    let to = guest.addresses().port4(PORT);
    let reeve = Programs::get().reeve.to_str().unwrap();
    let by = |launcher: &[&str]| {
        let words = ["guard", "--config", config.to_str().unwrap()];
        let all = launcher.iter().copied().chain([reeve]).chain(words);
        pair.one.host().exec(all)
    };
    let without = ["setpriv", "--bounding-set", "-dac_override"];
    let folder = pair.one.cgroup().path().to_str().unwrap();
    let mount = folder.strip_suffix(&root).unwrap();
    let read_only = format!("mount -o remount,bind,ro {mount} && exec \"$@\"");
    let protected = ["unshare", "--mount", "sh", "-c", &read_only, "sh"];
    for (launcher, why) in [
        (&without[..], "without CAP_DAC_OVERRIDE"),
        (&protected[..], "`ProtectControlGroups=`"),
    ] {
        let said = by(launcher);
        assert_eq!(said.status.code(), Some(1), "{}", said.stderr);
        let what =
            format!("NOT GUARDED: the enforced parent {pods} is not there and cannot be made");
        for words in [&*what, why, "`reeve guard`"] {
            assert!(said.stderr.contains(words), "{words}: {}", said.stderr);
        }
        is_denied(&pair.client, to);
    }
    // Who may, makes it, and all is guarded.
    by(&[]).ok();
    assert!(pair.one.cgroup().path().join("pods").exists());
}

#[test]
fn a_daemon_makes_its_parents_before_it_gives_up_what_that_takes() {
    let pair = Pair::new();
    let root = pair.one.cgroup().below_mount();
    let with = |parents: &[&str]| {
        let parents: Vec<_> = parents
            .iter()
            .map(|name| format!("{root}/{name}"))
            .collect();
        pair.at_one().set("/enforcedParents", json!(parents))
    };
    close(&pair.one);
    let daemon = with(&["pods"]).start();
    assert!(pair.one.cgroup().path().join("pods").exists());
    // Later it cannot, and takes nothing of a configuration that it could not enforce.
    with(&["pods", "jobs"]).write();
    let said = daemon.command(["reload"]);
    assert!(!said.status.success());
    for words in ["/jobs is not there and cannot be made", "CAP_DAC_OVERRIDE"] {
        assert!(said.stdout.contains(words), "{words}: {}", said.stdout);
    }
    drop(daemon);
    let without = ["setpriv", "--bounding-set", "-dac_override"];
    let config = with(&["pods", "jobs"]).write();
    let reeve = Programs::get().reeve.to_str().unwrap();
    let words = [reeve, "run", "--config", config.to_str().unwrap()];
    let said = pair.one.host().exec(without.iter().chain(&words)).fails();
    assert!(
        said.contains("/jobs is not there and cannot be made"),
        "{said}"
    );
}

#[test]
fn a_guard_that_cannot_read_its_configuration_says_so() {
    let pair = Pair::new();
    let config = pair
        .at_one()
        .set("/enforcedParent", json!(["/pods"]))
        .write();
    let refused = guard(&pair.one, &config);
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("did you mean `enforcedParents`?"),
        "{}",
        refused.stderr
    );
    assert!(!pair.one.pins().exists());
}

fn guard(node: &Node, config: &std::path::Path) -> Output {
    let place: &Place = node.host();
    let reeve = Programs::get().reeve.as_os_str();
    let words = ["guard", "--config"].map(std::ffi::OsStr::new);
    place.exec([reeve, words[0], words[1], config.as_os_str()])
}
