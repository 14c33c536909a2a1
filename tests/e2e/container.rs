//! Namespaces of its own, as a container has them: what the daemon sees there is not what the host
//! has.

use std::{fs, sync::Arc};

use harness::{Cgroup, Network, Node, Programs, eventually};
use serde_json::json;

use crate::{
    arrange::{PORT, TCP, answers, is_denied, of, say, send, serve},
    deploy::deploy,
};

/// As containers are started on hosts with one hierarchy of cgroups.
const OWN_CGROUPS: [&str; 2] = ["unshare", "--cgroup"];

/// And with process numbers that begin at 1.
const OWN_NUMBERS: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];

#[test]
fn a_daemon_in_a_cgroup_namespace_of_its_own_enforces_what_the_host_has() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (inside, stranger) = (node.pod("inside"), node.pod("stranger"));
    let parent = format!("{}/pods", node.cgroup().below_mount());
    let reeve = || {
        node.reeve()
            .enrol(&inside)
            .set("/enforcedParents", json!([parent]))
    };
    let _server = serve(&stranger, PORT, &[]);
    let to = stranger.addresses();
    // The guard first, then the daemon.
    let born = |name: &str| {
        let cgroup = Cgroup::at(&node.cgroup().path().join("pods").join(name));
        node.host().with_cgroup(Arc::new(cgroup))
    };
    let config = reeve().write();
    let program = Programs::get().reeve.to_str().unwrap();
    let guard = [program, "guard", "--config", config.to_str().unwrap()];
    node.host().exec(OWN_CGROUPS.iter().chain(&guard)).ok();
    is_denied(&inside, to.port4(PORT));
    is_denied(&born("first"), to.port6(PORT));

    let daemon = reeve().launched_by(OWN_CGROUPS).start();
    assert_eq!(daemon.status()["workloads"][0]["state"], "running");
    is_denied(&inside, to.port4(PORT));
    is_denied(&born("second"), to.port6(PORT));
    say(node.host(), to.port4(PORT), "not enrolled");
    // It has stayed in its cgroup, and sees it as the host does.
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/cgroup")).unwrap();
    let host = namespace("self");
    let process = daemon.id().to_string();
    assert_eq!(namespace(&process), host);
    let threads = daemon.threads();
    for thread in &threads {
        let thread = format!("{process}/task/{}", thread.id);
        assert_eq!(namespace(&thread), host);
    }
    let cgroup = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let own = format!("0::{}/daemon", node.cgroup().below_mount());
    assert!(cgroup.lines().any(|line| line == own), "{cgroup}");
}

#[test]
fn the_container_of_the_daemonset_gives_the_daemon_what_it_needs() {
    let node = Node::new(&Network::new(), "node");
    let [client, server, stranger] = ["client", "server", "stranger"].map(|name| node.pod(name));
    let proc = node.folder().join("proc");
    fs::create_dir(&proc).unwrap();
    // As a runtime mounts them: the host's processes elsewhere, settings of the kernel for reading alone.
    let mounts = format!(
        "mount --rbind /proc {}; mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys",
        proc.display()
    );
    let manifest = fs::read_to_string(deploy().join("kubernetes/reeve.yaml")).unwrap();
    let (_, capabilities) = manifest.split_once("add: [").unwrap();
    let (capabilities, _) = capabilities.split_once(']').unwrap();
    let alone = format!("-all,+{}", capabilities.to_lowercase().replace(", ", ",+"));
    let mut daemon = node
        .reeve()
        .enrol(&client)
        .enrol(&server)
        .set("/node/proc", json!(proc))
        .set("/node/addresses", json!([]))
        .set("/node/hostAddresses", json!(true))
        .with_mounts(&mounts)
        .launched_by(OWN_CGROUPS)
        .launched_by(["setpriv", "--bounding-set", &alone])
        .start();
    let _server = serve(&server, PORT, &[]);
    let to = server.addresses();
    is_denied(&client, to.port4(PORT));
    send(&stranger, to.port4(PORT), &["--text", "let me in"]).fails();
    say(node.host(), to.port4(PORT), "the kubelet's probe");
    let policies = [
        of(&client).calls(&server, TCP).text(),
        of(&server).hears(&client, TCP).text(),
    ];
    fs::write(
        daemon.policies().join("both.yaml"),
        policies.join("\n---\n"),
    )
    .unwrap();
    eventually("the policy is in force", || {
        answers(&client, to.port6(PORT))
    });
    let status = daemon.status();
    let tunnels = status["tunnels"]["tunnels"].as_array().unwrap();
    assert_eq!(tunnels.len(), 2, "the two ends of one: {status:#}");
    // An update: the next daemon starts when the one before has ended.
    daemon.stop().ok();
    is_denied(&client, to.port4(PORT));
    is_denied(&client, to.port4(PORT + 1));
    daemon.start_again();
    daemon.wait_until_ready();
    say(&client, to.port4(PORT), "after the update");
    is_denied(&client, to.port4(PORT + 1));
}

#[test]
fn a_daemon_that_cannot_see_the_hosts_cgroups_says_what_it_needs() {
    let node = Node::new(&Network::new(), "node");
    let pod = node.pod("pod");
    let config = node.reeve().enrol(&pod).write();
    let program = Programs::get().reeve.to_str().unwrap();
    let words = ["--config", config.to_str().unwrap()];
    let without = |capability: &str| {
        let without = ["setpriv", "--bounding-set"].map(str::to_owned);
        [&without[..], &[format!("-{capability}")]].concat()
    };
    let own_numbers = OWN_NUMBERS.map(str::to_owned).to_vec();
    for (by, command) in [
        (without("sys_admin"), "run"),
        (without("sys_admin"), "guard"),
        (own_numbers.clone(), "run"),
        (own_numbers, "guard"),
    ] {
        let launched = OWN_CGROUPS.map(str::to_owned).into_iter().chain(by);
        let reeve = [program, command].into_iter().chain(words);
        let ended = node.host().exec(launched.chain(reeve.map(str::to_owned)));
        assert_eq!(ended.status.code(), Some(1), "{command}: {}", ended.stderr);
        for word in ["cgroup", "host", "hostPID: true"] {
            assert!(ended.stderr.contains(word), "{command}: {}", ended.stderr);
        }
        assert!(!node.pins().exists(), "{command} has left something");
    }
}

#[test]
fn a_daemon_with_process_numbers_of_its_own_does_not_take_workloads_for_empty() {
    let node = Node::new(&Network::new(), "node");
    let pod = node.pod("pod");
    let enrolled = || node.reeve().enrol(&pod);
    let mut daemon = enrolled().launched_by(OWN_NUMBERS).start_unready();
    eventually("it says what it cannot see", || {
        assert!(daemon.ended().is_none(), "{}", daemon.log());
        let said = "workload pod: its processes have no numbers here";
        daemon.log().contains(said) && !daemon.is_ready()
    });
    drop(daemon);
    // Where the host's are to be seen, it knows before it starts.
    let proc = node.folder().join("proc");
    fs::create_dir(&proc).unwrap();
    let mount = format!("mount --rbind /proc {}", proc.display());
    let mut daemon = enrolled()
        .set("/node/proc", json!(proc))
        .with_mounts(&mount)
        .launched_by(OWN_NUMBERS)
        .start_unready();
    let mut ended = None;
    eventually("it ends", || {
        ended = daemon.ended();
        ended.is_some()
    });
    assert_eq!(ended.unwrap().code(), Some(1));
    assert!(daemon.log().contains("process numbers of its own"));
}

#[test]
fn what_lies_outside_the_cgroup_root_is_refused_and_not_left_open() {
    let node = Node::new(&Network::new(), "node");
    let pod = node.pod("pod");
    let elsewhere = Cgroup::outside("elsewhere");
    let place = json!({"cgroup": elsewhere.below_mount()});
    let reeve = || node.reeve().enrol_with(&pod, place.clone());
    let config = reeve().write();
    let program = Programs::get().reeve.to_str().unwrap();
    for command in ["run", "guard"] {
        let words = [program, command, "--config", config.to_str().unwrap()];
        let said = node.host().exec(words).fails();
        let expected = format!(
            "workload pod: the cgroup {} is not below {}",
            elsewhere.below_mount(),
            node.cgroup().below_mount()
        );
        assert!(said.contains(&expected), "{said}");
    }
    // A reload is refused as a whole.
    let daemon = node.reeve().enrol(&pod).start();
    node.reeve()
        .enrol(&pod)
        .set("/enforcedParents", json!([elsewhere.below_mount()]))
        .write();
    let said = daemon.command(["reload"]);
    assert!(!said.status.success());
    let refused = "an enforced parent: the cgroup";
    assert!(said.stdout.contains(refused), "{}", said.stdout);
    assert_eq!(daemon.status()["workloads"][0]["state"], "running");
}

#[test]
fn the_hosts_addresses_are_the_nodes_as_they_come_and_go() {
    let node = Node::new(&Network::new(), "node");
    let (pod, peer) = (node.pod("pod"), node.pod("peer"));
    let nobody = || node.reeve().enrol(&pod).set("/node/addresses", json!([]));
    let host = || nobody().set("/node/hostAddresses", json!(true));
    let daemon = nobody().start();
    let _server = serve(&pod, PORT, &[]);
    let to = pod.addresses();
    let refused = |place: &harness::Place| {
        for to in [to.port4(PORT), to.port6(PORT)] {
            send(place, to, &["--text", "let me in"]).fails();
        }
    };
    refused(node.host());
    // A reload is enough.
    host().write();
    let said = daemon.command(["reload"]).ok();
    assert!(!said.contains("restart"), "{said}");
    say(node.host(), to.port4(PORT), "from the host");
    say(node.host(), to.port6(PORT), "from the host");
    refused(&peer);
    // As that of a bridge that a network plugin makes when the first pod comes.
    let another = "10.77.200.1";
    let take = |place: &harness::Place| {
        let add = format!("addr add {another}/16 dev eth0");
        let prefer = format!("route replace {} dev eth0 src {another}", to.v4);
        for line in [add, prefer] {
            place.exec(["ip"].into_iter().chain(line.split(' '))).ok();
        }
    };
    take(node.host());
    let log = daemon.wait_for_log(&["addresses of the node", another]);
    assert!(!log.contains("127.0.0.1") && !log.contains("fe80"), "{log}");
    // The log tells of it first.
    eventually("it counts", || answers(node.host(), to.port4(PORT)));
    let seen = say(node.host(), to.port4(PORT), "from the bridge");
    assert!(
        seen["local"].as_str().unwrap().starts_with(another),
        "{seen}"
    );
    // It goes, and is another machine's.
    let address = format!("{another}/16");
    let give = ["ip", "addr", "del", &address, "dev", "eth0"];
    node.host().exec(give).ok();
    take(&peer);
    eventually("it is not the node's any more", || {
        !answers(&peer, to.port4(PORT))
    });
    say(node.host(), to.port6(PORT), "from the host");
    nobody().write();
    daemon.command(["reload"]).ok();
    refused(node.host());
}
