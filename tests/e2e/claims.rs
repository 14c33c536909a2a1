//! Addresses that a workload says are its own.

use std::{thread, time::Duration};

use harness::{Daemon, Workload, eventually};
use serde_json::{Value, json};

use crate::arrange::{PORT, Pair, TCP, fails_fast, of, say, serve, tcp};

/// For a change that must not come: the daemon looks once a second.
const LOOKS: Duration = Duration::from_millis(2500);

/// Port of a server that is known by its address alone.
const PLAIN: u16 = 8081;

#[test]
fn a_network_namespace_of_its_own_making_gives_a_workload_no_address() {
    let scene = Scene::new();
    let Scene { pair, one, .. } = &scene;
    let mallory = &scene.mallory;
    let before = of_mallory(one)["addresses"].clone();
    let claims: Vec<String> = [&pair.server, &pair.client, &scene.guest]
        .iter()
        .flat_map(|other| other.addresses().both())
        .map(|ip| format!("ip addr add {ip} dev wire"))
        .collect();
    let script = format!(
        "ip link set lo up; ip link add wire type bridge; ip link set wire up; {}; \
         for i in 1 2 3 4 5; do sleep 100 & done; echo claimed; exec sleep 100",
        claims.join("; ")
    );
    // Whatever runs there is no root.
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let apart = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "sh",
        "-c",
        &script,
    ];
    let mut nested = mallory.spawn(nobody.iter().chain(&apart).copied());
    nested.wait_for("claimed");
    one.wait_for_log(&["mallory", "own_namespace"]);
    thread::sleep(LOOKS);
    let after = of_mallory(one);
    assert_eq!(after["addresses"], before);
    assert!(
        after["remarks"][0]
            .as_str()
            .unwrap()
            .contains("made itself")
    );
    scene.all_is_as_before();
    let remark = [("remark", "own_namespace")];
    one.wait_for_metric("reeve_workload_remarks", &remark, 1.0);
    assert!(one.is_ready());
}

#[test]
fn whoever_rules_its_own_network_namespace_takes_no_address_that_is_known_to_be_anothers() {
    let scene = Scene::new();
    let Scene { pair, one, .. } = &scene;
    let mallory = &scene.mallory;
    let before = of_mallory(one)["addresses"].clone();
    let node = pair.one.addresses();
    // It claims them, and answers nobody on the link who asks for them.
    mallory
        .exec(["ip", "link", "add", "wire", "type", "bridge"])
        .ok();
    mallory.sysctl("ipv4/conf/all/arp_ignore", "1");
    for ip in [&pair.server, &pair.client]
        .iter()
        .flat_map(|other| other.addresses().both())
        .chain(node.both())
    {
        let host = if ip.is_ipv4() { "32" } else { "128" };
        let words = ["ip", "addr", "add", &format!("{ip}/{host}"), "dev", "wire"];
        mallory.exec(words.map(str::to_owned)).ok();
    }
    one.wait_for_log(&["mallory", "address_taken"]);
    thread::sleep(LOOKS);
    assert_eq!(of_mallory(one)["addresses"], before);
    scene.all_is_as_before();

    // However many there are, the others have room, and everything can be told.
    let many = "for i in 0 1 2; do for j in `seq 1 200`; do \
                echo addr add 100.64.$i.$j/32 dev eth0; done; done | ip -batch -";
    mallory.exec(["sh", "-c", many]).ok();
    one.wait_for_log(&["mallory", "too_many_addresses"]);
    let taken = || of_mallory(one)["addresses"].as_array().unwrap().clone();
    eventually("some are taken", || taken().len() == 128);
    for address in before.as_array().unwrap() {
        assert!(taken().contains(address), "{address} was there before");
    }
    let page = one.command(["status"]).ok();
    assert!(page.contains("and 120 more"), "{page}");
    assert!(page.contains("addresses or more beyond the 128"), "{page}");
    scene.all_is_as_before();
    assert!(one.is_ready());
}

#[test]
fn a_route_of_its_own_making_makes_no_workload_speak_as_another_of_its_identity() {
    let pair = Pair::new();
    let twin = pair.one.pod("twin");
    let shared = json!({"serviceAccount": "shared"});
    let as_shared = |workload: &Workload| json!({"serviceAccount": "shared", "addresses": workload.addresses().both(), "tunnel": true});
    let one = pair
        .one
        .reeve()
        .enrol_with(&pair.client, shared.clone())
        .enrol_with(&twin, shared)
        .peer(&pair.server)
        .policy(&of(&pair.client).calls(&pair.server, TCP).text())
        .policy(&of(&twin).calls(&pair.server, TCP).text())
        .start();
    let hears_client = json!({
        "apiVersion": "reeve.dev/v1alpha1",
        "kind": "ConnectionPolicy",
        "metadata": {"name": "hears-client"},
        "spec": {
            "workloads": {"names": ["server"]},
            "ingress": [{"from": [{"namespace": "default", "labels": {"app": "client"}}]}],
        },
    });
    let _two = pair
        .two
        .reeve()
        .enrol(&pair.server)
        .peer_with(&pair.client, as_shared(&pair.client))
        .peer_with(&twin, as_shared(&twin))
        .policy(&hears_client.to_string())
        .start();
    let _server = serve(&pair.server, PORT, &[]);
    let to = pair.server.addresses().port4(PORT);
    say(&pair.client, to, "as it may");
    let theirs = pair.client.addresses().v4.to_string();
    let add = ["ip", "address", "add", &theirs, "dev", "lo"];
    twin.exec(add).ok();
    let there = to.ip().to_string();
    let route = [
        "ip", "route", "replace", &there, "dev", "eth0", "src", &theirs,
    ];
    twin.exec(route).ok();
    // Answers find it, as where it has told the link that the address is its own.
    let link = twin.exec(["ip", "-brief", "link", "show", "eth0"]).ok();
    let own = link.split_whitespace().nth(2).unwrap();
    let neighbour = ["ip", "neigh", "replace", &theirs, "lladdr", own];
    let forever = ["dev", "eth0", "nud", "permanent"];
    pair.server.exec(neighbour.into_iter().chain(forever)).ok();
    fails_fast(&twin, to, "Connection reset by peer");
    one.wait_for_log(&["twin", "forged_source", &theirs]);
}

/// A client that may call a server through a tunnel and a guest by its address, and one beside it who
/// means no good.
struct Scene {
    one: Daemon,
    _two: Daemon,
    _servers: [harness::Process; 2],
    mallory: Workload,
    guest: Workload,
    pair: Pair,
}

impl Scene {
    fn new() -> Self {
        let pair = Pair::new();
        let (guest, mallory) = (pair.two.pod("guest"), pair.one.pod("mallory"));
        let policy = of(&pair.client)
            .calls(&pair.server, TCP)
            .calls_address(guest.addresses().v4, tcp(PLAIN))
            .calls_address(guest.addresses().v6, tcp(PLAIN));
        let one = pair.at_one().enrol(&mallory).policy(&policy.text()).start();
        let scene = Self {
            _two: pair.allowing_at_two().start(),
            _servers: [serve(&pair.server, PORT, &[]), serve(&guest, PLAIN, &[])],
            one,
            mallory,
            guest,
            pair,
        };
        scene.all_is_as_before();
        scene
    }

    #[track_caller]
    fn all_is_as_before(&self) {
        let client = &self.pair.client;
        let (server, guest) = (self.pair.server.addresses(), self.guest.addresses());
        for to in [
            server.port4(PORT),
            server.port6(PORT),
            guest.port4(PLAIN),
            guest.port6(PLAIN),
        ] {
            say(client, to, "as before");
        }
    }
}

fn of_mallory(daemon: &Daemon) -> Value {
    let status = daemon.status();
    let mut workloads = status["workloads"].as_array().unwrap().iter();
    workloads
        .find(|workload| workload["name"] == "mallory")
        .unwrap()
        .clone()
}
