//! A peer that stalls: at each stage of a tunnel, in both roles, the daemon waits for no longer
//! than it was told to, says why it gave up, lets go of what it held, and serves others meanwhile.
//! The peer is the test itself.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use harness::{Output, Process, Reeve, SOON, eventually, hbone::Conduct, holds_for};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::opposite::{APP, Calling, Guarded};

/// Every time-out that is not about transfers, in these tests.
const LIMIT: Duration = Duration::from_secs(1);
/// When a time-out of [`LIMIT`] must have been noticed: the daemon looks once a second, and the
/// machine may be busy.
const NOTICED: Duration = Duration::from_secs(6);

// === clients that stall ===

#[test]
fn a_client_that_says_nothing_is_dropped() {
    let guarded = guarded();
    let stalled = guarded.right_client().tcp(guarded.tunnel_port()).unwrap();
    dropped(stalled, LIMIT);
    guarded.gave_up_handshakes(1.0);
}

#[test]
fn a_client_that_says_half_a_hello_is_dropped() {
    let guarded = guarded();
    let client = guarded.right_client();
    let mut stalled = client.tcp(guarded.tunnel_port()).unwrap();
    let hello = client.hello();
    stalled.write_all(&hello[..hello.len() / 2]).unwrap();
    dropped(stalled, LIMIT);
    guarded.gave_up_handshakes(1.0);
}

#[test]
fn a_client_that_drips_its_hello_is_dropped() {
    let guarded = guarded();
    let client = guarded.right_client();
    let stalled = client.tcp(guarded.tunnel_port()).unwrap();
    let mut dripping = stalled.try_clone().unwrap();
    let hello = client.hello();
    let drips = thread::spawn(move || {
        for byte in hello {
            if dripping.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(LIMIT / 10);
        }
    });
    dropped(stalled, LIMIT);
    drips.join().unwrap();
    guarded.gave_up_handshakes(1.0);
}

#[test]
fn a_client_that_speaks_tls_and_no_http_is_dropped() {
    let guarded = guarded();
    let stalled = guarded.right_client().only_tls(guarded.tunnel_port());
    dropped(stalled, LIMIT);
    guarded.gave_up_handshakes(1.0);
}

#[test]
fn a_tunnel_without_a_request_is_ended() {
    let guarded = guarded();
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    guarded.has_tunnels(1.0);
    // From the handshake to the first request, and then the grace of a retired tunnel.
    ends_within(2 * LIMIT, || tunnel.ended());
    guarded.has_tunnels(0.0);
}

#[test]
fn a_client_that_answers_no_ping_is_dropped() {
    let guarded = guarded();
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let stream = tunnel.connect(&guarded.authority()).unwrap();
    assert_eq!(stream.status, 200);
    tunnel.freeze();
    // A PING, and the wait for its answer.
    ends_within(2 * LIMIT, || guarded.tunnels() == 0.0);
    guarded
        .daemon
        .wait_for_log(&["connection closed", "timeout"]);
    guarded.holds_nothing();
}

#[test]
fn clients_that_stall_leave_room_for_others() {
    let guarded = Guarded::with(|reeve| short(reeve).set("/timeouts/handshake", json!("5s")));
    let stalled: Vec<_> = (0..100)
        .map(|_| guarded.right_client().tcp(guarded.tunnel_port()).unwrap())
        .collect();
    let started = Instant::now();
    guarded.still_serves();
    assert!(started.elapsed() < Duration::from_secs(3), "others waited");
    drop(stalled);
}

#[test]
fn handshakes_beyond_the_limit_are_refused_until_some_end() {
    let guarded = Guarded::with(|reeve| short(reeve).set("/limits/handshakes", json!(4)));
    let stalled: Vec<_> = (0..10)
        .map(|_| guarded.right_client().tcp(guarded.tunnel_port()).unwrap())
        .collect();
    guarded
        .right_client()
        .handshake(guarded.tunnel_port())
        .unwrap_err();
    eventually("the ones beyond are counted", || {
        guarded.handshakes("limit") == 7.0
    });
    eventually("the others ran into their time limit", || {
        guarded.handshakes("timeout") == 4.0
    });
    guarded.still_serves();
    drop(stalled);
}

#[test]
fn a_client_that_reads_nothing_holds_up_only_itself() {
    let guarded = Guarded::with(|reeve| {
        short(reeve)
            .set("/timeouts/idle", json!("2s"))
            .policy(ALL_PORTS)
    });
    // The application has more to send than anybody would hold for a client.
    let endless = guarded.server.addresses().port4(9000);
    let mut source = guarded.server.spawn_peer([
        "serve",
        "[::]:9000",
        "--mode",
        "source",
        "--bytes",
        "1000000000",
    ]);
    source.wait_for("listening");
    let before = guarded.daemon.resident();
    // Its window for the tunnel is wide: it is for the stream that it reads nothing.
    let mut settings = h2::client::Builder::new();
    settings.initial_connection_window_size(16 << 20);
    let tunnel = guarded
        .right_client()
        .tunnel_with(guarded.tunnel_port(), &settings)
        .unwrap();
    let stalled = tunnel.connect(&endless.to_string()).unwrap();
    assert_eq!(stalled.status, 200);
    // Beside it, in the same tunnel, all is well.
    let mut beside = tunnel.connect(&guarded.authority()).unwrap();
    beside.send("beside").unwrap();
    beside.finish().unwrap();
    assert_eq!(beside.receive().unwrap(), b"beside");
    guarded
        .daemon
        .wait_for_log(&["connection closed", "timeout", &endless.to_string()]);
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < 32 << 20, "{held} bytes are held");
    drop((stalled, tunnel));
    guarded.holds_nothing();
}

#[test]
fn a_transfer_that_pauses_is_nobodys_failure() {
    // By default a connection may be silent for as long as it wants.
    let guarded = guarded();
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let mut stream = tunnel.connect(&guarded.authority()).unwrap();
    thread::sleep(4 * LIMIT);
    stream.send("after a while").unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.receive().unwrap(), b"after a while");
}

#[test]
fn a_half_closed_stream_that_stalls_is_ended() {
    let guarded = Guarded::with(|reeve| short(reeve).policy(ALL_PORTS));
    let mut hold = guarded
        .server
        .spawn_peer(["serve", "[::]:9000", "--mode", "hold"]);
    hold.wait_for("listening");
    let held = guarded.server.addresses().port4(9000).to_string();
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let mut stream = tunnel.connect(&held).unwrap();
    stream.finish().unwrap();
    stream.receive().unwrap_err();
    guarded
        .daemon
        .wait_for_log(&["connection closed", "timeout", &held]);
    drop((stream, tunnel));
    guarded.holds_nothing();
}

#[test]
fn an_application_that_does_not_accept_is_given_up() {
    let guarded = Guarded::with(|reeve| short(reeve).policy(ALL_PORTS));
    let full = FullBacklog::new(&guarded, 9000);
    let tunnel = guarded
        .right_client()
        .tunnel(guarded.tunnel_port())
        .unwrap();
    let started = Instant::now();
    let stream = tunnel.connect(&full.address.to_string()).unwrap();
    assert_eq!(stream.status, 503);
    let taken = started.elapsed();
    assert!(LIMIT <= taken && taken < NOTICED, "it took {taken:?}");
    guarded
        .daemon
        .wait_for_log(&["refused", "timeout", &full.address.to_string()]);
    // While another application is reached.
    assert_eq!(tunnel.connect(&guarded.authority()).unwrap().status, 200);
}

// === servers that stall ===

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let calling = calling();
    let server = calling.right_server(Conduct::Silence);
    calling.gives_up(LIMIT, "timeout");
    assert!(calling.handshakes("timeout") >= 1.0);
    eventually("the daemon has hung up", || server.open() == 0);
    calling.still_calls(&server);
}

#[test]
fn a_server_that_drips_is_given_up() {
    let calling = calling();
    let server = calling.right_server(Conduct::Dripping);
    calling.gives_up(LIMIT, "timeout");
    assert!(calling.handshakes("timeout") >= 1.0);
    eventually("the daemon has hung up", || server.open() == 0);
    calling.still_calls(&server);
}

#[test]
fn a_server_that_speaks_tls_and_no_http_is_given_up() {
    let calling = calling();
    let server = calling.right_server(Conduct::OnlyTls);
    calling.gives_up(LIMIT, "timeout");
    assert!(calling.handshakes("timeout") >= 1.0);
    eventually("the daemon has hung up", || server.open() == 0);
    calling.still_calls(&server);
}

#[test]
fn a_server_that_answers_no_request_is_given_up() {
    let calling = calling();
    let server = calling.right_server(Conduct::NoAnswer);
    calling.gives_up(LIMIT, "timeout");
    assert_eq!(calling.handshakes("ok"), 1.0);
    assert_eq!(server.authorities().len(), 1);
    // The tunnel itself was fine: it goes when nobody needs it.
    eventually("the daemon has hung up", || server.open() == 0);
    calling.still_calls(&server);
}

#[test]
fn a_server_that_answers_no_ping_is_given_up() {
    let calling = calling();
    let server = calling.right_server(Conduct::Freezing);
    let mut call = calling.start_call();
    ends_within(2 * LIMIT, || call.ended().is_some());
    ended_badly(call);
    calling
        .daemon
        .wait_for_log(&["connection closed", "timeout"]);
    calling.still_calls(&server);
}

#[test]
fn a_server_that_reads_nothing_holds_up_only_its_client() {
    let calling = Calling::with(|reeve| short(reeve).set("/timeouts/idle", json!("2s")));
    let server = calling.right_server(Conduct::NoReading);
    let before = calling.daemon.resident();
    let to = calling.impostor.addresses().port4(APP).to_string();
    let call = calling
        .client
        .spawn_peer(["send", &to, "--bytes", "1000000000"]);
    ended_badly(call);
    calling
        .daemon
        .wait_for_log(&["connection closed", "timeout"]);
    let held = calling.daemon.resident().saturating_sub(before);
    assert!(held < 32 << 20, "{held} bytes are held");
    // The tunnel is still there, and was good in all else.
    drop(server);
    calling.still_calls(&calling.right_server(Conduct::Echo));
}

#[test]
fn a_tunnel_port_where_nobody_listens_fails_at_once() {
    let calling = calling();
    let started = Instant::now();
    ended_badly(calling.start_call());
    // Starting the program included.
    assert!(started.elapsed() < NOTICED, "{:?}", started.elapsed());
    assert_eq!(calling.failures("peer_unreachable"), 1.0);
}

#[test]
fn a_tunnel_port_that_does_not_answer_is_given_up() {
    let calling = calling();
    // Packets to it vanish.
    let nowhere = calling.impostor.addresses().v4;
    calling
        .client
        .exec([
            "ip",
            "neigh",
            "replace",
            &nowhere.to_string(),
            "lladdr",
            "02:00:00:00:00:01",
            "dev",
            "eth0",
        ])
        .ok();
    calling.gives_up(LIMIT, "peer_unreachable");
}

// === how long, and what is left ===

/// Short time-outs. Pauses of applications are not limited.
fn short(reeve: Reeve<'_>) -> Reeve<'_> {
    let limit: Value = json!(format!("{}s", LIMIT.as_secs()));
    [
        "connect",
        "handshake",
        "request",
        "halfClosed",
        "tunnelIdle",
        "drain",
        "ping",
        "pingAnswer",
        "silent",
    ]
    .into_iter()
    .fold(reeve, |reeve, name| {
        reeve.set(&format!("/timeouts/{name}"), limit.clone())
    })
}

fn guarded() -> Guarded {
    Guarded::with(short)
}

fn calling() -> Calling {
    Calling::with(short)
}

/// Fails the test unless the daemon closes a connection, no sooner and not much later than this.
#[track_caller]
fn dropped(mut stalled: TcpStream, limit: Duration) {
    let started = Instant::now();
    // Whatever it says before; a reset is an end too.
    let _ = stalled.read_to_end(&mut Vec::new());
    let taken = started.elapsed();
    assert!(
        limit * 9 / 10 < taken && taken < NOTICED,
        "it took {taken:?}"
    );
}

/// Fails the test unless this happens no sooner and not much later than this.
#[track_caller]
fn ends_within(limit: Duration, mut so: impl FnMut() -> bool) {
    // Half: the moment from which the daemon counts may lie back a little.
    holds_for(limit / 2, "too early", || !so());
    let started = Instant::now();
    eventually("it ends", so);
    let taken = started.elapsed();
    assert!(taken < limit + NOTICED, "it took {taken:?}");
}

#[track_caller]
fn ended_badly(call: Process) -> Output {
    let output = call.wait(SOON);
    assert!(
        !output.status.success(),
        "the call went well: {}",
        output.stdout
    );
    output
}

impl Guarded {
    #[track_caller]
    fn gave_up_handshakes(&self, number: f64) {
        eventually("it is counted", || self.handshakes("timeout") == number);
        self.daemon.wait_for_log(&["handshake", "timeout"]);
        self.still_serves();
        self.holds_nothing();
    }

    fn tunnels(&self) -> f64 {
        self.daemon.metrics().sum("reeve_tunnels_open", &[])
    }

    #[track_caller]
    fn has_tunnels(&self, number: f64) {
        eventually("tunnels are as they should be", || self.tunnels() == number);
    }

    /// Fails the test unless everything of earlier connections is let go.
    #[track_caller]
    fn holds_nothing(&self) {
        eventually("no tunnel and no stream is open", || {
            let streams = self.daemon.metrics().sum("reeve_streams_open", &[]);
            streams == 0.0 && self.tunnels() == 0.0
        });
    }
}

impl Calling {
    /// Fails the test unless a call fails for this reason, no sooner and not much later than this.
    #[track_caller]
    fn gives_up(&self, limit: Duration, reason: &str) {
        let started = Instant::now();
        ended_badly(self.start_call());
        let taken = started.elapsed();
        assert!(
            limit * 9 / 10 < taken && taken < NOTICED,
            "it took {taken:?}"
        );
        eventually("it is counted", || self.failures(reason) == 1.0);
        self.daemon.wait_for_log(&["connection refused", reason]);
    }
}

/// A socket that listens and whose queue is full: one more connection gets no answer.
struct FullBacklog {
    address: SocketAddr,
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl FullBacklog {
    fn new(guarded: &Guarded, port: u16) -> Self {
        let address = guarded.server.addresses().port4(port);
        let connect = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            let connected = socket.connect_timeout(&address.into(), LIMIT / 5);
            connected.map(|()| socket)
        };
        let netns = guarded.server.netns().unwrap();
        let (listener, queued) = netns.enter(|| {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            listener.bind(&address.into()).unwrap();
            listener.listen(1).unwrap();
            (listener, std::iter::from_fn(|| connect().ok()).collect())
        });
        Self {
            address,
            _listener: listener,
            _queued: queued,
        }
    }
}

const ALL_PORTS: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: all-ports}
spec:
  workloads: {matchLabels: {app: server}}
  ingress:
    - from: [{identity: spiffe://example.org/ns/default/sa/client}]
";
