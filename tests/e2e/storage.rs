//! What the daemon keeps on file systems, and file systems that fail it: a full disk, one that
//! becomes read-only, a bpf file system that is taken away, and no more inotify.

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use harness::{Daemon, Network, Node, Output, Programs, certs::Authority, eventually};
use serde_json::json;

use crate::{
    arrange::{PORT, Pair, Probe, TCP, is_denied, of, send, serve},
    opposite::Guarded,
};

// === the state folder ===

#[test]
fn a_full_disk_stops_nothing_but_what_must_be_written() {
    let (guarded, state) = with_state_of_its_own();
    fill(&guarded.daemon.sees(&state));
    cannot_be_written(&guarded, &state, "No space left on device");
    fs::remove_file(guarded.daemon.sees(&state).join("filler")).unwrap();
    is_written_again(&guarded, &state);
}

#[test]
fn a_state_folder_that_becomes_read_only_stops_nothing_but_what_must_be_written() {
    let (guarded, state) = with_state_of_its_own();
    remount(&guarded.daemon, &state, "remount,ro");
    cannot_be_written(&guarded, &state, "Read-only file system");
    remount(&guarded.daemon, &state, "remount,rw");
    is_written_again(&guarded, &state);
}

#[test]
fn on_a_full_disk_a_ca_does_what_needs_no_room_and_leaves_nothing_half_written() {
    let (guarded, state) = with_state_of_its_own();
    let daemon = &guarded.daemon;
    let files = || {
        let folder = fs::read_dir(daemon.sees(&state).join("ca")).unwrap();
        let read = |file: fs::DirEntry| (file.file_name(), fs::read(file.path()).unwrap());
        let mut files: Vec<_> = folder.flatten().map(read).collect();
        files.sort();
        files
    };
    let has_no_room = |command: &str, words: &[&str]| {
        let before = files();
        let error = ca(daemon, &state, command, words).fails();
        assert!(error.contains("No space left on device"), "{error}");
        assert!(error.contains(&state.display().to_string()), "{error}");
        assert_eq!(files(), before);
        ca(daemon, &state, "show", &[]).ok();
    };
    // A next root is a key, its certificate, and a bundle with both roots: a block for each.
    for blocks in 0..3 {
        fill(&daemon.sees(&state));
        make_room(&daemon.sees(&state), blocks);
        has_no_room("rotate", &[]);
    }
    make_room(&daemon.sees(&state), 8);
    rotate(daemon, &state).ok();
    daemon.wait_for_log(&["the embedded CA has changed"]);
    fill(&daemon.sees(&state));
    has_no_room("revoke", &["--serial", "0a"]);
    // That a root which is trusted already begins to sign gives other names to files, and no more.
    ca(daemon, &state, "rotate", &["--switch"]).ok();
    eventually("the daemon follows", || {
        daemon.logged(&["the embedded CA has changed"]).len() == 2
    });
    guarded.still_serves();
    assert!(daemon.is_ready());
}

#[test]
fn a_first_start_on_a_full_disk_says_what_is_wrong() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("workload");
    let state = node.folder().join("state");
    let path = state.display();
    let mut daemon = node
        .reeve()
        .enrol(&workload)
        .set("/certificates/sources", json!([{"embedded": {}}]))
        .with_mounts(&format!(
            "{}; head -c 1M /dev/zero > {path}/filler 2>/dev/null || true",
            a_small_disk_at(&state)
        ))
        .start_unready();
    let said = daemon.wait_for_log(&["No space left on device"]);
    assert!(said.contains(&state.display().to_string()), "{said}");
    eventually("it does not run without", || daemon.ended().is_some());
}

/// A daemon whose state, with its certificate authority, is on a small disk that nobody else sees.
fn with_state_of_its_own() -> (Guarded, PathBuf) {
    let mut state = PathBuf::new();
    let mut guarded = Guarded::with(|reeve| {
        state = reeve.folder().join("state");
        reeve
            .set("/certificates/sources", json!([{"embedded": {}}]))
            .with_mounts(&a_small_disk_at(&state))
    });
    let read = |name: &str| {
        let file = guarded.daemon.sees(&state).join("ca").join(name);
        fs::read_to_string(file).unwrap()
    };
    guarded.root = Authority::from_pem(&read("root.pem"), &read("root.key"));
    guarded.still_serves();
    (guarded, state)
}

fn a_small_disk_at(folder: &Path) -> String {
    let folder = folder.display();
    format!("mkdir -p {folder}; mount -t tmpfs -o size=256k,mode=0700 none {folder}")
}

/// Writes until nothing more can be written.
fn fill(folder: &Path) {
    let mut filler = fs::File::create(folder.join("filler")).unwrap();
    let full = (0..1 << 20).find_map(|_| filler.write_all(&[0; 512]).err());
    let full = full.expect("the disk is full some time");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
}

/// Gives back so many blocks of what [`fill`] took.
fn make_room(folder: &Path, blocks: u64) {
    let filler = fs::File::options().write(true).open(folder.join("filler"));
    let filler = filler.unwrap();
    let metadata = filler.metadata().unwrap();
    let less = metadata.len() - blocks * metadata.blksize();
    filler.set_len(less).unwrap();
}

fn remount(daemon: &Daemon, folder: &Path, how: &str) {
    let words = ["mount", "-o", how].map(OsStr::new);
    daemon
        .beside(words.into_iter().chain([folder.as_os_str()]))
        .ok();
}

fn rotate(daemon: &Daemon, state: &Path) -> Output {
    ca(daemon, state, "rotate", &[])
}

/// Runs `reeve ca` for the daemon's authority, among its mounts.
fn ca(daemon: &Daemon, state: &Path, command: &str, words: &[&str]) -> Output {
    let reeve = Programs::get().reeve.as_os_str();
    let folder = state.join("ca");
    let first = ["ca", command, "--dir"].map(OsStr::new);
    let first = std::iter::once(reeve).chain(first);
    let words = words.iter().map(OsStr::new);
    daemon.beside(first.chain([folder.as_os_str()]).chain(words))
}

/// Certificates of the server that have been put in force.
fn renewed(daemon: &Daemon) -> f64 {
    let accepted = [("result", "accepted")];
    let metrics = daemon.metrics();
    metrics.sum("reeve_certificate_reloads_total", &accepted)
}

#[track_caller]
fn cannot_be_written(guarded: &Guarded, state: &Path, why: &str) {
    let daemon = &guarded.daemon;
    let before = renewed(daemon);
    // Certificates are renewed all the same: they are nowhere but in memory.
    daemon.command(["reload"]).ok();
    eventually("certificates are renewed", || renewed(daemon) > before);
    guarded.still_serves();
    // A new root is not made, and the old one is as good as before.
    let error = rotate(daemon, state).fails();
    assert!(error.contains(why), "{error}");
    assert!(error.contains(&state.display().to_string()), "{error}");
    daemon.command(["reload"]).ok();
    guarded.still_serves();
    assert!(daemon.is_ready());
}

#[track_caller]
fn is_written_again(guarded: &Guarded, state: &Path) {
    rotate(&guarded.daemon, state).ok();
    guarded
        .daemon
        .wait_for_log(&["the embedded CA has changed"]);
    guarded.still_serves();
}

// === the bpf file system ===

#[test]
fn a_bpffs_that_is_unmounted_changes_no_verdict_and_is_pinned_in_when_it_is_back() {
    let pair = Pair::new();
    let folder = pair.one.folder().join("bpf");
    let path = folder.display();
    let one = pair
        .allowing_at_one()
        .set("/node/bpffs", json!(folder.join("reeve")))
        .with_mounts(&format!("mkdir -p {path}; mount -t bpf none {path}"))
        .start();
    let _two = pair.allowing_at_two().start();
    let _server = serve(&pair.server, PORT, &["--mode", "answer"]);
    let to = pair.server.addresses();
    let allowed = Probe::start(&pair.client, to.port4(PORT), &[]);
    let denied = Probe::start(&pair.client, to.port4(9999), &[]);
    allowed.goes_on(100);
    let within = |words: &[&str]| {
        let words = words.iter().map(OsStr::new);
        one.beside(words.chain([folder.as_os_str()])).ok()
    };
    within(&["umount", "--lazy"]);
    // Where it sees that its mounts are not the host's, it leaves mounting to the host.
    let complains = || !one.logged(&["it would end with this daemon"]).is_empty();
    let heals = || !one.logged(&["is pinned again"]).is_empty();
    eventually("it is noticed", || complains() || heals());
    allowed.goes_on(100);
    denied.goes_on(100);
    if !heals() {
        within(&["mount", "-t", "bpf", "none"]);
    }
    one.wait_for_log(&["is pinned again"]);
    assert!(one.sees(&folder).join("reeve").exists());
    allowed.goes_on(100);
    denied.goes_on(100);
    allowed.all_worked();
    denied.all_failed("not permitted");
}

#[test]
fn a_folder_of_pins_that_others_can_write_in_keeps_the_daemon_from_being_ready() {
    let pair = Pair::new();
    let folder = pair.one.folder().join("bpf");
    let path = folder.display();
    let one = pair
        .allowing_at_one()
        .set("/node/bpffs", json!(folder.join("reeve")))
        .with_mounts(&format!("mkdir -p {path}; mount -t bpf none {path}"))
        .start();
    let _two = pair.allowing_at_two().start();
    let pins = one.sees(&folder).join("reeve");
    let mode = |mode| fs::set_permissions(&pins, fs::Permissions::from_mode(mode)).unwrap();
    assert!(one.is_ready());
    mode(0o777);
    eventually("it is not ready", || !one.is_ready());
    let said = one.status()["notReady"].to_string();
    assert!(said.contains("its mode 0777 lets others write"), "{said}");
    // One who may write takes a link away: it is back as soon as nobody may any more.
    fs::remove_file(pins.join("link_reeve_egress")).unwrap();
    mode(0o700);
    eventually("it is ready again", || one.is_ready());
    one.wait_for_log(&["is pinned again", "link_reeve_egress"]);
    assert!(pins.join("link_reeve_egress").exists());
}

#[test]
fn a_daemon_mounts_no_bpffs_over_what_is_in_a_folder() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let workload = node.pod("workload");
    let folder = node.folder().join("full");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("kept"), "here").unwrap();
    let mut daemon = node
        .reeve()
        .enrol(&workload)
        .set("/node/bpffs", json!(folder.join("reeve")))
        .start_unready();
    let path = folder.display().to_string();
    daemon.wait_for_log(&["it is not empty (it has kept)", "node.bpffs", &path]);
    eventually("it does not run", || daemon.ended().is_some());
    assert_eq!(fs::read_to_string(folder.join("kept")).unwrap(), "here");
}

// === inotify ===

#[test]
fn without_inotify_files_and_workloads_are_found_all_the_same() {
    // A user of its own, since instances are counted by user: none is left for it.
    const ID: u32 = 54321;
    let user = format!("--reuid={ID}");
    let network = Network::new();
    let (one, two) = (Node::new(&network, "one"), Node::new(&network, "two"));
    let (client, late, server) = (one.pod("client"), one.pod("late"), two.pod("server"));
    let _server = serve(&server, PORT, &[]);
    let peer = Programs::get().peer.to_str().unwrap();
    let mut hog = one
        .host()
        .spawn(["setpriv", &user, "--", peer, "hog-inotify"]);
    hog.wait_for("holding");
    // With what root may do: not `+all`, of which a container has not all.
    let all = "+bpf,+perfmon,+net_admin,+net_raw,+net_bind_service,+sys_admin,+sys_ptrace,\
               +dac_override,+dac_read_search,+fowner,+setpcap,+kill";
    let [inherited, ambient] = ["inh", "ambient"].map(|set| format!("--{set}-caps={all}"));
    // What it makes files in is that user's.
    std::os::unix::fs::chown(one.folder(), Some(ID), None).unwrap();
    let pins = one.folder().join("bpf");
    let path = pins.display();
    let mounts = format!("mkdir -p {path}; mount -t bpf none {path}; chown {ID} {path}");
    let daemon = one
        .reeve()
        .enrol(&client)
        .enrol(&late)
        .set("/certificates/sources", json!([{"embedded": {}}]))
        .set("/node/bpffs", json!(pins.join("reeve")))
        .with_mounts(&mounts)
        .launched_by(["setpriv", &user, &inherited, &ambient, "--"])
        .start();
    daemon.wait_for_log(&["files cannot be watched"]);
    // Policies are followed,
    let to = server.addresses().port4(PORT);
    is_denied(&client, to);
    let allowing = of(&client).calls_address(to.ip(), TCP);
    fs::write(daemon.policies().join("late.yaml"), allowing.text()).unwrap();
    eventually("the policy is in force", || {
        send(&client, to, &["--text", "now"]).status.success()
    });
    // and so is a workload that comes to life.
    is_denied(&late, to);
    let _process = serve(&late, PORT, &[]);
    eventually("its namespace is found", || {
        let status = daemon.status();
        let workloads = status["workloads"].as_array().unwrap().clone();
        workloads
            .iter()
            .any(|workload| workload["name"] == "late" && workload["listening"] == true)
    });
}
