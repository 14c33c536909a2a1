//! `reeve guard`: denied before any daemon runs, with next to nothing to go by.

use std::{fs, sync::Arc};

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
    let with_orphan = json!({"cgroup": "/not-yet-there-and-below-nothing"});
    let config = reeve()
        .enrol_with(&pair.two.pod("orphan"), with_orphan)
        .set(
            "/certificates/sources/0/embedded/caDir",
            json!("/proc/self/comm"),
        )
        .set("/metrics/address", json!("192.0.2.1:1"))
        .write();
    fs::write(policies.join("broken.yaml"), "{{{ no policy at all").unwrap();

    let said = guard(&pair.one, &config).ok();
    for line in [
        format!("{pods}: everything below is refused"),
        "client: refused until".to_owned(),
        "ghost: to come, below an enforced parent".to_owned(),
        "orphan: NOT COVERED".to_owned(),
    ] {
        assert!(said.contains(&line), "{line}\nis not in\n{said}");
    }
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
