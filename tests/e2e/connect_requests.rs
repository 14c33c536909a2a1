//! CONNECT requests: what a tunnel's client may ask a daemon for, and what it is answered. The
//! client is the test itself, with a certificate as right as can be.

use harness::{
    Network, Node, eventually,
    hbone::{
        Client, PORT, Tunnel,
        raw::{REFUSED_STREAM, connect, settings},
    },
};
use http::{Method, Request};
use serde_json::json;

use crate::opposite::{APP, CLIENT, EVERY_PORT, Guarded, SERVER, root_of};

/// Allowed by the policy, and nobody listens there.
const NOBODY: u16 = 8081;

#[test]
fn who_is_allowed_is_connected_to_the_application() {
    let guarded = Guarded::start();
    guarded.still_serves();
    // And by IPv6.
    let to = guarded.server.addresses();
    let tunnel = guarded.right_client().tunnel(to.port6(PORT)).unwrap();
    let stream = tunnel.connect(&to.port6(APP).to_string()).unwrap();
    assert_eq!(stream.status, 200);
    drop(stream);
    let line = guarded
        .daemon
        .wait_for_log(&["connection closed", &to.port6(APP).to_string()]);
    assert!(line.contains(CLIENT) && line.contains(SERVER), "{line}");
}

#[test]
fn an_authority_that_is_not_the_workloads_is_refused() {
    let guarded = Guarded::start();
    let to = guarded.server.addresses();
    let tunnel = guarded.right_client().tunnel(to.port4(PORT)).unwrap();
    for authority in [
        // Another workload's address, somebody's, nobody's, and loopback.
        guarded.neighbour.addresses().port4(APP).to_string(),
        guarded.stranger.addresses().port4(APP).to_string(),
        format!("192.0.2.1:{APP}"),
        format!("127.0.0.1:{APP}"),
        // Its own other address: the tunnel was opened to this one.
        to.port6(APP).to_string(),
    ] {
        assert_eq!(answer(&tunnel, &authority), "421", "{authority}");
        failed(&guarded, "wrong_authority", &authority);
    }
    assert_eq!(answer(&tunnel, &format!("0.0.0.0:{APP}")), "421");
    // The tunnel has suffered nothing.
    assert_eq!(answer(&tunnel, &guarded.authority()), "200");
}

#[test]
fn an_authority_that_is_no_address_and_port_is_refused() {
    let guarded = Guarded::start();
    let v4 = guarded.server.addresses().v4;
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    for authority in [
        format!("server:{APP}"),
        format!("localhost:{APP}"),
        format!("{v4}"),
        format!("{v4}:0"),
        format!("user@{v4}:{APP}"),
        format!("0{v4}:{APP}"),
    ] {
        assert_eq!(answer(&tunnel, &authority), "400", "{authority}");
    }
    eventually("each is counted as a bad request", || {
        guarded.failures("bad_request") == 6.0
    });
    assert_eq!(answer(&tunnel, &guarded.authority()), "200");
}

#[test]
fn anything_but_connect_is_refused() {
    let guarded = Guarded::start();
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let uri = format!("http://{}/", guarded.authority());
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let request = Request::builder().method(&method).uri(&uri);
        let stream = tunnel.ask(request.body(()).unwrap()).unwrap();
        assert_eq!(stream.status, 400, "{method}");
    }
    eventually("each is counted as a bad request", || {
        guarded.failures("bad_request") == 3.0
    });
    assert_eq!(answer(&tunnel, &guarded.authority()), "200");
}

#[test]
fn reeves_own_ports_are_nobodys() {
    let guarded = Guarded::with(|reeve| reeve.policy(EVERY_PORT));
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    for port in [15001, PORT] {
        let authority = guarded.server.addresses().port4(port).to_string();
        assert_eq!(answer(&tunnel, &authority), "503", "{authority}");
        failed(&guarded, "reserved_port", &authority);
    }
}

#[test]
fn an_application_that_is_not_there_is_said_so() {
    let guarded = Guarded::with(|reeve| reeve.policy(EVERY_PORT));
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let authority = guarded.server.addresses().port4(NOBODY).to_string();
    assert_eq!(answer(&tunnel, &authority), "503");
    failed(&guarded, "application_unreachable", &authority);
}

#[test]
fn the_policy_judges_the_identity_and_the_port() {
    let guarded = Guarded::start();
    let somebody = "spiffe://example.org/ns/default/sa/somebody";
    for (identity, port, status) in [
        (CLIENT, APP, "200"),
        (CLIENT, NOBODY, "401"),
        (somebody, APP, "401"),
        // Near the right one, and no nearer for it.
        ("spiffe://example.org/ns/default/sa/client2", APP, "401"),
        ("spiffe://example.org/ns/default/sa/client/x", APP, "401"),
        ("spiffe://example.org/ns/other/sa/client", APP, "401"),
        // Nor may the server call itself from elsewhere.
        (SERVER, APP, "401"),
    ] {
        let client = guarded.client(&guarded.root.leaf(identity));
        let tunnel = client.tunnel(guarded.tunnel_port()).unwrap();
        let authority = guarded.server.addresses().port4(port).to_string();
        assert_eq!(answer(&tunnel, &authority), status, "{identity} {port}");
    }
    let line = guarded.daemon.wait_for_log(&["refused", somebody]);
    for text in ["no_policy", SERVER, &guarded.authority()] {
        assert!(line.contains(text), "{text} is not in {line}");
    }
    let denied = [
        ("direction", "ingress"),
        ("verdict", "deny"),
        ("reason", "no_policy"),
    ];
    guarded
        .daemon
        .wait_for_metric("reeve_verdicts_total", &denied, 6.0);
}

#[test]
fn a_refusal_tells_nothing_but_its_status() {
    let guarded = Guarded::start();
    let somebody = guarded.root.leaf("spiffe://example.org/somebody");
    let tunnel = guarded
        .client(&somebody)
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let mut stream = tunnel.connect(&guarded.authority()).unwrap();
    assert_eq!(stream.status, 401);
    assert_eq!(stream.headers, 0);
    assert_eq!(stream.receive().unwrap(), b"");
}

#[test]
fn headers_beyond_the_limit_are_refused() {
    let guarded = Guarded::with(|reeve| reeve.set("/limits/headerList", json!(4096)));
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let asking = |bytes: usize| {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(guarded.authority())
            .header("baggage", "x".repeat(bytes));
        tunnel.ask(request.body(()).unwrap())
    };
    assert_eq!(asking(2000).unwrap().status, 200);
    for bytes in [5000, 100_000, 1_000_000] {
        let refused = asking(bytes);
        let refused = refused.map(|stream| stream.status);
        assert!(matches!(refused, Err(_) | Ok(431)), "{bytes}: {refused:?}");
    }
    guarded.still_serves();
}

#[test]
fn streams_beyond_the_limit_are_refused() {
    let guarded = Guarded::with(|reeve| reeve.set("/limits/streamsPerTunnel", json!(5)));
    // Who knows the limit stays below it.
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let streams: Vec<_> = (0..5)
        .map(|_| tunnel.connect(&guarded.authority()).unwrap())
        .collect();
    assert!(!tunnel.takes_more(&guarded.authority()));
    drop(streams);
    eventually("there is room again", || {
        tunnel.takes_more(&guarded.authority())
    });
    // Who does not is told.
    let mut burst = guarded.right_client().raw(guarded.tunnel_port()).unwrap();
    let requests = (0..20).map(|number| connect(2 * number + 1, &guarded.authority()));
    let requests = requests.flatten().collect::<Vec<_>>();
    burst.send(&[settings(&[]), requests].concat()).unwrap();
    eventually("each request is answered", || {
        let seen = burst.seen();
        seen.connected == 5 && seen.resets == [REFUSED_STREAM; 15]
    });
    guarded.still_serves();
}

#[test]
fn streams_that_are_opened_and_reset_leave_nothing() {
    let guarded = Guarded::start();
    guarded.still_serves();
    let files = guarded.daemon.settled_files();
    for _ in 0..5 {
        let tunnel = guarded
            .right_client()
            .tunnel(guarded.tunnel_port())
            .unwrap();
        for _ in 0..100 {
            // Dropped before the answer: reset. The daemon may end the tunnel for it.
            if tunnel.connect_and_leave(&guarded.authority()).is_err() {
                break;
            }
        }
    }
    guarded.still_serves();
    eventually("files and streams are as before", || {
        let streams = guarded.daemon.metrics().sum("reeve_streams_open", &[]);
        streams == 0.0 && guarded.daemon.open_files() <= files + 1
    });
}

#[test]
fn the_server_name_chooses_among_the_workloads_of_an_address() {
    let network = Network::new();
    let (node, elsewhere) = (
        Node::new(&network, "node"),
        Node::new(&network, "elsewhere"),
    );
    let (first, second) = (node.service("first"), node.service("second"));
    let stranger = elsewhere.pod("stranger");
    let mut servers = Vec::new();
    for (service, port) in [(&first, APP), (&second, NOBODY)] {
        let mut echo = service.spawn_peer(["serve", &format!("[::]:{port}")]);
        echo.wait_for("listening");
        servers.push(echo);
    }
    let daemon = node
        .reeve()
        .enrol_with(&first, json!({"ports": [APP]}))
        .enrol_with(&second, json!({"ports": [NOBODY]}))
        .policy(EVERY_PORT)
        .start();
    let root = root_of(&network);
    let client = Client::new(&stranger).presenting(&root.leaf(CLIENT));
    let ids = [
        first.spiffe_id("example.org"),
        second.spiffe_id("example.org"),
    ];
    let to = node.addresses();
    let tunnel = |client: Client| client.tunnel(to.port4(PORT)).unwrap();

    // Each by its name; without one, or with one that nobody has, the first.
    let (of_first, of_second) = (
        tunnel(client.clone().asking_for(&ids[0])),
        tunnel(client.clone().asking_for(&ids[1])),
    );
    assert_eq!(
        [&of_first.presented, &of_second.presented],
        [&ids[0], &ids[1]]
    );
    assert_eq!(tunnel(client.clone()).presented, ids[0]);
    let unknown = client.asking_for("spiffe://example.org/unknown");
    assert_eq!(tunnel(unknown).presented, ids[0]);

    // A tunnel serves whom it presented, and not the neighbour behind the same address.
    let (at_first, at_second) = (to.port4(APP).to_string(), to.port4(NOBODY).to_string());
    assert_eq!(answer(&of_first, &at_first), "200");
    assert_eq!(answer(&of_second, &at_second), "200");
    assert_eq!(answer(&of_first, &at_second), "421");
    assert_eq!(answer(&of_second, &at_first), "421");
    daemon.wait_for_log(&["wrong_authority", CLIENT, &at_first]);
}

/// The status of the answer to a request for `authority`, or why there was none.
fn answer(tunnel: &Tunnel, authority: &str) -> String {
    match tunnel.connect(authority) {
        Ok(stream) => stream.status.to_string(),
        Err(error) => error,
    }
}

/// Fails the test unless a request for `authority` was counted and logged as failed for this
/// reason.
#[track_caller]
fn failed(guarded: &Guarded, reason: &str, authority: &str) {
    guarded
        .daemon
        .wait_for_log(&["refused", reason, authority, CLIENT]);
    assert!(guarded.failures(reason) >= 1.0);
}

impl Guarded {
    /// Number of requests that failed for this reason.
    fn failures(&self, reason: &str) -> f64 {
        let labels = [
            ("direction", "ingress"),
            ("transport", "tunnel"),
            ("reason", reason),
        ];
        let metrics = self.daemon.metrics();
        metrics.sum("reeve_connections_failed_total", &labels)
    }
}
