//! Peers that abuse the tunnel port, with a certificate and without: what they send is bounded,
//! their tunnels end for a reason that is told, and others are served meanwhile.

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use harness::{
    Daemon, SOON, Workload, eventually,
    hbone::{
        Client, Conduct, Raw,
        raw::{
            ENHANCE_YOUR_CALM, INITIAL_WINDOW, connect, continuation, endless_connect, frame,
            header, ping, pong, priority, reset, settings, window_update,
        },
    },
};
use serde_json::json;

use crate::opposite::{CLIENT, Calling, EVERY_PORT, Guarded};

/// Memory that a flood may cost, whatever its size. The daemon is one without optimisation.
const HELD: u64 = 24 << 20;
/// Frames of a flood: minutes of work for a daemon that takes them all.
const ENDLESS: usize = 5_000_000;
/// What somebody sends, as far as the daemon takes it.
type Flood<'a> = &'a dyn Fn(&mut Raw) -> Result<(), String>;
/// A type of frames that there is not.
const UNKNOWN: u8 = 0x7f;

// === floods by an authenticated peer ===

#[test]
fn a_flood_of_pings_is_ended() {
    is_ended(|_, raw| raw.flood(&ping(), ENDLESS));
}

#[test]
fn a_flood_of_answers_to_pings_that_nobody_sent_is_ended() {
    is_ended(|_, raw| raw.flood(&pong(), ENDLESS));
}

#[test]
fn a_flood_of_settings_is_ended() {
    is_ended(|guarded, raw| {
        // Each moves the windows of all streams.
        for number in 0..50 {
            let request = connect(2 * number + 1, &guarded.authority());
            raw.send(&request).unwrap();
        }
        let moving = [[(INITIAL_WINDOW, 0)], [(INITIAL_WINDOW, 1 << 20)]];
        raw.flood(&moving.map(|moved| settings(&moved)).concat(), ENDLESS);
    });
}

#[test]
fn floods_of_frames_that_mean_nothing_are_ended() {
    is_ended(|_, raw| raw.flood(&priority(1), ENDLESS));
    is_ended(|_, raw| raw.flood(&frame(UNKNOWN, 0, 0, &[0; 100]), ENDLESS));
}

#[test]
fn a_flood_of_windows_is_ended() {
    is_ended(|_, raw| raw.flood(&window_update(0, 1), ENDLESS));
}

#[test]
fn a_flood_of_resets_is_ended() {
    is_ended(|guarded, raw| {
        let requests = (0..10_000).map(|number| {
            let stream = 2 * number + 1;
            [connect(stream, &guarded.authority()), reset(stream)].concat()
        });
        // The daemon hangs up in the middle.
        let _ = raw.send(&requests.collect::<Vec<_>>().concat());
    });
    is_ended(|guarded, raw| {
        raw.send(&connect(1, &guarded.authority())).unwrap();
        raw.flood(&reset(1), ENDLESS);
    });
}

#[test]
fn headers_without_end_are_ended() {
    is_ended(|guarded, raw| {
        raw.send(&endless_connect(1, &guarded.authority())).unwrap();
        let more = header("baggage", &"x".repeat(100)).repeat(100);
        raw.flood(&continuation(1, &more), ENDLESS);
    });
    is_ended(|guarded, raw| {
        raw.send(&endless_connect(1, &guarded.authority())).unwrap();
        raw.flood(&continuation(1, &[]), ENDLESS);
    });
}

#[test]
fn who_floods_is_told_on_the_wire_to_be_calm() {
    let guarded = Guarded::start();
    // Little enough to be read as a whole: what lies unread when a connection is closed can be in the
    // way of the last word.
    let most = 1100;
    let of_resets = |raw: &mut Raw| {
        let requests = (0..40).flat_map(|number| {
            let stream = 2 * number + 1;
            [connect(stream, &guarded.authority()), reset(stream)].concat()
        });
        raw.send(&requests.collect::<Vec<_>>())
    };
    let of_headers = |raw: &mut Raw| {
        let more = header("baggage", &"x".repeat(100)).repeat(100);
        let begin = endless_connect(1, &guarded.authority());
        raw.send(&[begin, continuation(1, &more).repeat(8)].concat())
    };
    // A method and nothing else: each is an error of its stream alone.
    let of_errors = |raw: &mut Raw| {
        let requests = (0..100).flat_map(|number| frame(1, 4, 2 * number + 1, &[0x82]));
        raw.send(&requests.collect::<Vec<_>>())
    };
    let floods: [Flood<'_>; 9] = [
        &|raw| raw.send(&ping().repeat(most)),
        &|raw| raw.send(&pong().repeat(most)),
        &|raw| raw.send(&settings(&[]).repeat(most)),
        &|raw| raw.send(&priority(1).repeat(most)),
        &|raw| raw.send(&window_update(0, 1).repeat(most)),
        &|raw| raw.send(&frame(UNKNOWN, 0, 0, &[]).repeat(most)),
        &of_resets,
        &of_headers,
        &of_errors,
    ];
    for (number, flood) in floods.iter().enumerate() {
        let mut raw = raw(&guarded);
        flood(&mut raw).unwrap();
        eventually("the tunnel has ended", || raw.seen().ended);
        let told = raw.seen().goaway;
        assert_eq!(told, Some(ENHANCE_YOUR_CALM), "flood {number}");
    }
    guarded.is_calm(floods.len() as f64);
}

#[test]
fn headers_that_are_small_until_they_are_unpacked_cost_nothing() {
    let guarded = Guarded::start();
    let before = guarded.daemon.resident();
    let mut raw = raw(&guarded);
    // A header of 4000 bytes that the server is to remember (RFC 7541, section 6.2.1), and then
    // its number, ten thousand times: 40 MB in a frame of 14 KB.
    let mut bomb = vec![0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
    bomb.extend([b'x'; 4000]);
    bomb.extend([0xbe; 10_000]);
    for number in 0..100 {
        let request = frame(1, 5, 2 * number + 1, &bomb);
        if raw.send(&request).is_err() {
            break;
        }
    }
    guarded.still_serves();
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    assert_eq!(raw.seen().connected, 0);
}

#[test]
fn a_flood_whose_answers_nobody_reads_holds_nothing() {
    let guarded = Guarded::start();
    let before = guarded.daemon.resident();
    let client = guarded.right_client();
    let mut raw = client.raw_and_deaf(guarded.tunnel_port()).unwrap();
    raw.send(&settings(&[])).unwrap();
    raw.flood(&ping(), ENDLESS);
    guarded.is_calm(1.0);
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
}

#[test]
fn streams_without_a_window_hold_nothing_and_end_when_they_are_idle() {
    let guarded = Guarded::with(|reeve| {
        reeve
            .policy(EVERY_PORT)
            .set("/timeouts/idle", json!("4s"))
            .set("/limits/streamsPerTunnel", json!(100))
    });
    let endless = guarded.server.addresses().port4(9000);
    let words = ["serve", "[::]:9000", "--mode", "source"];
    let mut source = guarded
        .server
        .spawn_peer(words.into_iter().chain(["--bytes", "1000000000"]));
    source.wait_for("listening");
    let before = guarded.daemon.resident();
    let tunnels: Vec<_> = (0..3)
        .map(|_| {
            let mut raw = guarded.right_client().raw(guarded.tunnel_port()).unwrap();
            raw.send(&settings(&[(INITIAL_WINDOW, 0)])).unwrap();
            for number in 0..100 {
                raw.send(&connect(2 * number + 1, &endless.to_string()))
                    .unwrap();
            }
            eventually("its streams stand", || raw.seen().connected == 100);
            raw
        })
        .collect();
    guarded.still_serves();
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    assert!(tunnels.iter().all(|raw| raw.seen().bytes == 0));
    eventually("they have ended", || {
        tunnels.iter().all(|raw| raw.seen().resets.len() == 100)
    });
    let streams = || guarded.daemon.metrics().sum("reeve_streams_open", &[]);
    eventually("nothing is left", || streams() == 0.0);
}

#[test]
fn a_tunnel_may_ask_and_set_as_much_as_anybody_needs() {
    let guarded = Guarded::start();
    let mut raw = raw(&guarded);
    raw.send(&connect(1, &guarded.authority())).unwrap();
    for _ in 0..3 {
        raw.flood(&ping(), 300);
        raw.send(&settings(&[(INITIAL_WINDOW, 1 << 20)])).unwrap();
        thread::sleep(Duration::from_millis(1100));
    }
    eventually("each is answered", || raw.seen().pongs >= 900);
    let seen = raw.seen();
    assert_eq!((seen.connected, seen.ended), (1, false), "{seen:?}");
}

#[test]
fn a_server_that_floods_its_client_is_left() {
    let calling = Calling::start();
    let server = calling.right_server(Conduct::Flooding);
    let before = calling.daemon.resident();
    calling.call().fails();
    calling
        .daemon
        .wait_for_log(&["tunnel ended", "flood", "controlFrames"]);
    eventually("the daemon has hung up", || server.open() == 0);
    let held = calling.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    calling.still_calls(&server);
}

// === floods by a peer that is not authenticated ===

#[test]
fn who_has_no_certificate_has_no_frames_read() {
    let guarded = Guarded::start();
    let beside = Beside::start(&guarded);
    let before = guarded.daemon.resident();
    for _ in 0..5 {
        let client = Client::new(&guarded.stranger);
        let Ok(mut raw) = client.raw(guarded.tunnel_port()) else {
            // Refused before the first byte.
            continue;
        };
        raw.flood(&ping(), ENDLESS);
        eventually("the daemon has hung up", || raw.seen().ended);
        assert_eq!(raw.seen().pongs, 0);
    }
    eventually("it is counted", || {
        guarded.handshakes("no_certificate") == 5.0
    });
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    beside.went_on();
}

#[test]
fn what_is_no_tls_and_hellos_without_end_are_refused_at_once() {
    let guarded = Guarded::start();
    let before = guarded.daemon.resident();
    // HTTP/2 as it is, and a hello of 16 MB in records of TLS.
    let plain = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings(&[])].concat();
    let mut record = vec![22, 3, 1, 0x40, 0];
    record.extend([1, 0xff, 0xff, 0xff]);
    record.resize(5 + (16 << 10), 0);
    for (begin, flood) in [(plain, ping()), (Vec::new(), record)] {
        let mut tcp = guarded.right_client().tcp(guarded.tunnel_port()).unwrap();
        tcp.write_all(&begin).unwrap();
        let flood = flood.repeat(100);
        let started = Instant::now();
        // The daemon hangs up in the middle.
        while tcp.write_all(&flood).is_ok() {
            assert!(started.elapsed() < SOON, "it is read for ever");
        }
        let _ = tcp.read_to_end(&mut Vec::new());
    }
    eventually("both are counted", || guarded.handshakes("protocol") == 2.0);
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    guarded.still_serves();
}

#[test]
fn slow_handshakes_by_the_thousand_are_refused_and_others_are_served() {
    let guarded = Guarded::with(|reeve| reeve.set("/timeouts/handshake", json!("5s")));
    let beside = Beside::start(&guarded);
    let before = (guarded.daemon.resident(), guarded.daemon.open_files());
    let stalled: Vec<_> = (0..2000)
        .map(|_| guarded.right_client().tcp(guarded.tunnel_port()))
        .collect();
    // Of one address so many are waited for.
    eventually("the others are refused", || {
        guarded.handshakes("limit") == 2000.0 - 128.0
    });
    refused_beyond(&guarded.daemon, "handshakesPerAddress", 1872.0);
    let line = guarded.daemon.wait_for_log(&["handshake", "limit"]);
    assert!(line.contains("limits.handshakesPerAddress"), "{line}");
    let held = guarded.daemon.resident().saturating_sub(before.0);
    assert!(held < HELD, "{held} bytes are held");
    eventually("those that were waited for are given up", || {
        guarded.handshakes("timeout") == 128.0
    });
    beside.went_on();
    // But for a few: sockets that are kept ready.
    eventually("no file is left open", || {
        guarded.daemon.open_files() <= before.1 + 10
    });
    guarded.still_serves();
    drop(stalled);
}

// === a share for each peer ===

#[test]
fn the_connections_of_one_peer_leave_room_for_the_others() {
    let guarded = Guarded::with(|reeve| {
        reeve
            .policy(FOR_OTHERS)
            .set("/limits/connectionsPerIdentity", json!(5))
    });
    let client = guarded.right_client();
    // However many tunnels it opens.
    let tunnels: Vec<_> = (0..2)
        .map(|_| client.tunnel(guarded.tunnel_port()).unwrap())
        .collect();
    let mut streams: Vec<_> = (0..8)
        .map(|number| tunnels[number % 2].connect(&guarded.authority()).unwrap())
        .collect();
    let statuses: Vec<_> = streams.iter().map(|stream| stream.status).collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 503, 503, 503]);
    refused_beyond(&guarded.daemon, "connectionsPerIdentity", 3.0);
    let line = guarded
        .daemon
        .wait_for_log(&["refused", "limits.connectionsPerIdentity"]);
    assert!(line.contains(CLIENT) && line.contains("limit"), "{line}");
    let tunnel = other(&guarded).tunnel(guarded.tunnel_port()).unwrap();
    assert_eq!(tunnel.connect(&guarded.authority()).unwrap().status, 200);
    // And when some go, others come.
    streams.truncate(2);
    eventually("there is room again", || {
        let stream = tunnels[0].connect(&guarded.authority());
        stream.is_ok_and(|stream| stream.status == 200)
    });
}

#[test]
fn the_tunnels_of_one_peer_leave_room_for_the_others() {
    let guarded = Guarded::with(|reeve| {
        reeve
            .policy(FOR_OTHERS)
            .set("/limits/tunnelsPerIdentity", json!(3))
            .set("/limits/tunnels", json!(5))
    });
    let open = |client: &Client| client.tunnel(guarded.tunnel_port());
    let (client, other) = (guarded.right_client(), other(&guarded));
    let mut tunnels: Vec<_> = (0..3).map(|_| open(&client).unwrap()).collect();
    open(&client).unwrap_err();
    refused_beyond(&guarded.daemon, "tunnelsPerIdentity", 1.0);
    let mut others: Vec<_> = (0..2).map(|_| open(&other).unwrap()).collect();
    // In all.
    open(&other).unwrap_err();
    refused_beyond(&guarded.daemon, "tunnels", 1.0);
    assert_eq!(guarded.handshakes("limit"), 2.0);
    for limit in ["limits.tunnelsPerIdentity`", "limits.tunnels`"] {
        guarded.daemon.wait_for_log(&["handshake", "limit", limit]);
    }
    // Those that stand go on, and when one goes another comes.
    let stream = others[0].connect(&guarded.authority()).unwrap();
    assert_eq!(stream.status, 200);
    tunnels.clear();
    eventually("there is room again", || {
        others.extend(open(&other));
        others.len() == 3
    });
}

// === how it is told, and who is served meanwhile ===

/// Fails the test unless a flood costs its tunnel, and nobody else anything.
#[track_caller]
fn is_ended(flood: impl FnOnce(&Guarded, &mut Raw)) {
    let guarded = Guarded::start();
    let beside = Beside::start(&guarded);
    let before = guarded.daemon.resident();
    let mut raw = raw(&guarded);
    flood(&guarded, &mut raw);
    guarded.is_calm(1.0);
    eventually("the tunnel has ended", || raw.seen().ended);
    assert_eq!(raw.seen().goaway, Some(ENHANCE_YOUR_CALM));
    let held = guarded.daemon.resident().saturating_sub(before);
    assert!(held < HELD, "{held} bytes are held");
    beside.went_on();
    guarded.still_serves();
}

fn raw(guarded: &Guarded) -> Raw {
    let mut raw = guarded.right_client().raw(guarded.tunnel_port()).unwrap();
    raw.send(&settings(&[])).unwrap();
    raw
}

/// Somebody else who may call the server, from another address.
fn other(guarded: &Guarded) -> Client {
    let other = guarded.another("other");
    Client::new(&other).presenting(&guarded.root.leaf(OTHER))
}

#[track_caller]
fn refused_beyond(daemon: &Daemon, limit: &str, number: f64) {
    eventually("it is counted", || {
        let labels = [("limit", limit)];
        daemon.metrics().sum("reeve_limit_refusals_total", &labels) == number
    });
}

impl Guarded {
    /// Fails the test unless so many tunnels were ended for a flood, and it was said whose.
    #[track_caller]
    fn is_calm(&self, number: f64) {
        let labels = [("role", "server"), ("reason", "flood")];
        self.daemon
            .wait_for_metric("reeve_tunnels_closed_total", &labels, number);
        let line = self.daemon.wait_for_log(&["tunnel ended", "flood"]);
        assert!(line.contains(CLIENT), "{line}");
    }
}

/// Requests of somebody who does everything right, one after the other.
struct Beside {
    requests: thread::JoinHandle<(usize, Duration)>,
    done: std::sync::Arc<AtomicBool>,
    _pod: Workload,
}

impl Beside {
    fn start(guarded: &Guarded) -> Self {
        let pod = guarded.another("beside");
        let client = Client::new(&pod).presenting(&guarded.root.leaf(CLIENT));
        let tunnel = client.tunnel(guarded.tunnel_port()).unwrap();
        let authority = guarded.authority();
        let done = std::sync::Arc::new(AtomicBool::new(false));
        let until = done.clone();
        let requests = thread::spawn(move || {
            let (mut number, mut slowest) = (0, Duration::ZERO);
            while !until.load(Ordering::Relaxed) {
                let started = Instant::now();
                let mut stream = tunnel.connect(&authority).unwrap();
                stream.send("beside").unwrap();
                stream.finish().unwrap();
                assert_eq!(stream.receive().unwrap(), b"beside");
                slowest = slowest.max(started.elapsed());
                number += 1;
                thread::sleep(Duration::from_millis(10));
            }
            (number, slowest)
        });
        Self {
            requests,
            done,
            _pod: pod,
        }
    }

    /// Fails the test unless each request was served, and soon.
    #[track_caller]
    fn went_on(self) {
        self.done.store(true, Ordering::Relaxed);
        let (number, slowest) = self.requests.join().expect("requests are served");
        assert!(number > 0);
        eprintln!("beside: {number} requests, the slowest in {slowest:?}");
        assert!(slowest < Duration::from_secs(3), "one took {slowest:?}");
    }
}

const OTHER: &str = "spiffe://example.org/ns/default/sa/other";

const FOR_OTHERS: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: for-others}
spec:
  workloads: {matchLabels: {app: server}}
  ingress:
    - from: [{identity: spiffe://example.org/ns/default/sa/other}]
";
