//! Tunnels whose certificates come to their end: their streams move to new tunnels ahead of it, and
//! what is left is cut. A peer such as ztunnel keeps a tunnel for as long as it is let.

use std::time::{Duration, Instant};

use harness::{
    certs::{Authority, Issued},
    eventually,
    hbone::Conduct,
};
use time::OffsetDateTime;

use crate::opposite::{APP, CLIENT, Calling, Guarded, SERVER};

/// What the certificates of these tests have left; a tunnel retires at half of it.
const LIFETIME: Duration = Duration::from_secs(8);

#[test]
fn a_clients_tunnel_takes_no_streams_shortly_before_its_certificate_expires() {
    let guarded = Guarded::start();
    let client = guarded.client(&short_lived(&guarded.root, CLIENT));
    let opened = Instant::now();
    let tunnel = client.tunnel(guarded.tunnel_port()).unwrap();
    let mut kept = tunnel.connect(&guarded.authority()).unwrap();
    let cut = tunnel.connect(&guarded.authority()).unwrap();
    assert_eq!((kept.status, cut.status), (200, 200));

    eventually("the tunnel takes no more streams", || {
        tunnel.connect(&guarded.authority()).is_err()
    });
    let retired = opened.elapsed();
    assert!(retired >= LIFETIME / 3 && retired < LIFETIME, "{retired:?}");
    // What stands goes on.
    kept.send("still there?").unwrap();
    kept.finish().unwrap();
    assert_eq!(kept.receive().unwrap(), b"still there?");
    assert!(!tunnel.ended());

    eventually("the tunnel is cut", || tunnel.ended());
    assert!(opened.elapsed() >= LIFETIME - Duration::from_secs(1));
    drop(cut);
    guarded.still_serves();
}

#[test]
fn a_daemon_moves_to_a_new_tunnel_before_its_peers_certificate_expires() {
    let calling = Calling::start();
    let server = calling.impostor(&short_lived(&calling.root, SERVER), Conduct::Echo);
    let opened = Instant::now();
    // Closes its half once the first tunnel has retired, and before it is cut.
    let to = calling.impostor.addresses().port4(APP).to_string();
    let kept = calling
        .client
        .spawn_peer(["send", &to, "--text", "the old one", "--pause", "6000"]);
    eventually("the first tunnel", || server.seen().len() == 1);
    server.present(&calling.root.leaf(SERVER));

    eventually("a second tunnel", || {
        calling.call().ok();
        server.seen().len() == 2
    });
    assert!(opened.elapsed() < LIFETIME, "{:?}", opened.elapsed());
    let answer = kept.wait(harness::SOON).json();
    assert_eq!(answer["received"]["head"], "the old one");
    assert_eq!(calling.failures("certificate_expired"), 0.0);
}

/// A certificate that is as right as can be, and not for long.
fn short_lived(root: &Authority, id: &str) -> Issued {
    root.leaf_with(id, |params| {
        params.not_after = OffsetDateTime::now_utc() + LIFETIME;
    })
}
