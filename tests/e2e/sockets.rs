//! Ways around: what a workload can do with sockets of another kind, from another time or from
//! another place changes no verdict.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use harness::eventually;
use socket2::{Domain, Socket, Type};

use crate::arrange::{
    ICMP, PORT, Pair, TCP, UDP, denials, fails_fast, is_denied, of, say, send, serve, tcp,
};

#[test]
fn raw_sockets_carry_neither_tcp_nor_udp() {
    let pair = Pair::new();
    // Even where the policy allows both: no tunnel and no flow stands behind such a packet.
    let policy = of(&pair.client)
        .calls(&pair.server, TCP)
        .calls(&pair.server, UDP)
        .calls(&pair.server, ICMP);
    let one = pair.at_one().policy(&policy.text()).start();
    let capture = pair.client.capture(&pair.network);
    let to = pair.server.addresses().port4(PORT).to_string();
    for protocol in ["tcp", "udp"] {
        let error = pair
            .client
            .peer(["raw", &to, "--protocol", protocol])
            .fails();
        assert!(
            error.contains("Operation not permitted"),
            "{protocol}: {error}"
        );
    }
    assert_eq!(denials(&one, "egress", "raw_socket"), 2.0);
    // ICMP has no other kind of socket, and is judged like everything else.
    pair.client.peer(["raw", &to, "--protocol", "icmp"]).ok();
    let elsewhere = pair.two.addresses().port4(PORT).to_string();
    pair.client
        .peer(["raw", &elsewhere, "--protocol", "icmp"])
        .fails();

    let captured = capture.finish();
    assert!(captured.packets("tcp or udp").is_empty());
    assert!(
        captured
            .packets(&format!("host {}", pair.two.addresses().v4))
            .is_empty()
    );
}

#[test]
fn a_socket_made_outside_is_judged_by_who_uses_it() {
    let (pair, _one, _two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let _other = serve(&pair.server, 8081, &[]);
    let udp = pair.two.host().spawn_peer(["udp-serve", "[::]:9000"]);
    // The client's namespace, and a cgroup that is nobody's.
    let outside = pair
        .client
        .with_cgroup(Arc::new(pair.one.cgroup().child("nobody")));
    let inside = pair.client.cgroup().path().to_str().unwrap();
    let server = pair.server.addresses();
    let error = send(&outside, server.port4(8081), &["--join", inside]).fails();
    assert!(error.contains("Operation not permitted"), "{error}");
    send(
        &outside,
        server.port4(PORT),
        &["--join", inside, "--text", "allowed is allowed"],
    )
    .ok();

    let host = pair.two.addresses().port4(9000).to_string();
    for how in [&["--join", inside][..], &["--connect", "--join", inside]] {
        outside
            .peer([&["udp-send", &host, "--patience", "300"], how].concat())
            .fails();
    }
    assert!(!udp.stdout().contains("datagram"));
}

#[test]
fn a_connection_from_before_enrolment_ends_with_it() {
    let pair = Pair::new();
    let _echo = serve(&pair.server, PORT, &[]);
    let _other = serve(&pair.server, 8081, &[]);
    let server = pair.server.addresses();
    // One that the policy will deny, and one that it will allow in a tunnel only.
    let mut connections = [server.port4(8081), server.port4(PORT)].map(|to| {
        let mut heart = pair
            .client
            .spawn_peer(["heartbeat", &to.to_string(), "--patience", "2"]);
        heart.wait_for("beat 3");
        heart
    });
    let one = pair.allowing_at_one().start();
    for heart in &mut connections {
        eventually("the connection has stopped", || heart.ended().is_some());
    }
    // Each by its next packet, or by the look through all sockets. Who has not seen its beginning
    // may take it for either direction.
    let reasons = ["no_policy", "tunnel_bypassed", "revoked"];
    let counted = ["egress", "ingress"].map(|way| reasons.map(|why| denials(&one, way, why)));
    let all: f64 = counted.iter().flatten().sum();
    assert_eq!(all, 2.0, "{counted:?}");
}

#[test]
fn a_cgroup_made_later_inside_a_workload_belongs_to_it() {
    let (pair, _one, _two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let child = Arc::new(pair.client.cgroup().child("worker"));
    let grandchild = Arc::new(child.child("thread"));
    for cgroup in [&child, &grandchild] {
        let place = pair.client.with_cgroup(cgroup.clone());
        say(&place, pair.server.addresses().port4(PORT), "from within");
        is_denied(&place, pair.server.addresses().port4(8081));
    }
    let child = Arc::new(pair.server.cgroup().child("worker"));
    let _other = serve(&pair.server.with_cgroup(child), 8081, &[]);
    let stranger = pair.two.pod("stranger");
    fails_fast(&stranger, pair.server.addresses().port4(8081), "refused");
}

#[test]
fn nobody_else_takes_reeves_ports() {
    let (pair, one, _two) = Pair::started();
    // Also who is in a workload's namespace and is no workload.
    let nobody = pair
        .client
        .with_cgroup(Arc::new(pair.one.cgroup().child("nobody")));
    for place in [&*pair.client, &nobody] {
        for at in [
            "0.0.0.0:15008",
            "127.0.0.1:15001",
            "[::]:15008",
            "[::1]:15001",
        ] {
            let error = place.peer(["serve", at]).fails();
            assert!(error.contains("Operation not permitted"), "{at}: {error}");
        }
    }
    assert_eq!(denials(&one, "ingress", "reserved_port"), 8.0);
}

#[test]
fn who_listens_on_reeves_ports_before_the_enrolment_is_closed_by_it() {
    let pair = Pair::new();
    let nobody = Arc::new(pair.one.cgroup().child("nobody"));
    let nobody = pair.client.with_cgroup(nobody);
    let mut before = [("127.0.0.1", 15001), ("[::]", 15008)].map(|(ip, port)| {
        let mut server = nobody.spawn_peer(["serve", &format!("{ip}:{port}")]);
        server.wait_for("listening");
        server
    });
    let mut one = pair.allowing_at_one().start();
    let _two = pair.allowing_at_two().start();
    for (server, at) in before.iter_mut().zip(["127.0.0.1:15001", "[::]:15008"]) {
        let line = one.wait_for_log(&["listener on one of reeve's ports was closed", at]);
        assert!(line.contains(&nobody.cgroup().below_mount()), "{line}");
        eventually("its process has noticed", || server.ended().is_some());
        assert!(server.stderr().contains("Invalid argument"));
    }
    let _echo = serve(&pair.server, PORT, &[]);
    say(&pair.client, pair.server.addresses().port4(PORT), "as ever");
    // What is reeve's own stays with it, from one daemon to the next.
    let _old = one.take_over();
    one.wait_until_ready();
    assert!(one.logged(&["was closed: it was here"]).is_empty());
    say(&pair.client, pair.server.addresses().port4(PORT), "again");
}

#[test]
fn a_port_that_its_holder_shares_with_nobody_is_waited_for_and_said() {
    let pair = Pair::new();
    let netns = pair.client.netns().unwrap();
    let holder = netns.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let at: SocketAddr = (Ipv4Addr::LOCALHOST, 15001).into();
        socket.bind(&at.into()).unwrap();
        socket.listen(1).unwrap();
        socket
    });
    let mut one = pair.allowing_at_one().start_unready();
    one.wait_for_log(&["was closed", "127.0.0.1:15001"]);
    let said = |answer: String| answer.contains("port 15001") && answer.contains("in use");
    eventually("it says what is missing", || {
        one.get("/readyz").is_some_and(said)
    });
    drop(holder);
    one.wait_until_ready();
}

#[test]
fn nobody_talks_to_reeves_ports_directly() {
    let pair = Pair::new();
    let one = pair
        .at_one()
        .policy(
            &of(&pair.client)
                .calls(&pair.server, tcp(15008))
                .calls(&pair.server, tcp(15001))
                .text(),
        )
        .start();
    let _two = pair.allowing_at_two().start();
    // A workload: neither to its own daemon nor to another's.
    let (client, server) = (pair.client.addresses(), pair.server.addresses());
    for to in [
        "127.0.0.1:15001".parse().unwrap(),
        "[::1]:15001".parse().unwrap(),
        "127.0.0.1:15008".parse().unwrap(),
        client.port4(15008),
        server.port4(15008),
        server.port6(15008),
    ] {
        is_denied(&pair.client, to);
    }
    assert_eq!(denials(&one, "egress", "reserved_port"), 6.0);

    // A process that is no workload, inside a workload's namespace.
    let nobody = pair
        .client
        .with_cgroup(Arc::new(pair.one.cgroup().child("nobody")));
    for to in ["127.0.0.1:15001", "[::1]:15001"] {
        is_denied(&nobody, to);
    }
    // From outside, the outbound listener is not to be reached at all.
    let stranger = pair.two.pod("stranger");
    fails_fast(&stranger, client.port4(15001), "refused");
}
