//! The life of tunnels: certificates that change, peers that fail, and the daemon's own end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::spawn_local,
    time::{Instant, sleep, timeout},
};

use super::{
    node::{ALLOW, Node, is_reset},
    rig::{Authority, authority, authority_for, id, run},
};
use crate::{
    config::{Limits, Timeouts},
    identity::{CertificateSource, Material, SourceError, SpiffeId, TrustBundle, TrustDomain},
};

/// Accepts and keeps.
fn accept(listener: TcpListener) -> Arc<tokio::sync::Mutex<Vec<TcpStream>>> {
    let accepted = Arc::new(tokio::sync::Mutex::new(Vec::new()));
    let keep = accepted.clone();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(b"!").await.unwrap();
            keep.lock().await.push(stream);
        }
    });
    accepted
}

async fn stands(stream: &mut TcpStream) {
    assert_eq!(stream.read_u8().await.unwrap(), b'!');
}

/// Waits until `condition` holds.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(
        timeout(Duration::from_secs(10), waiting).await.is_ok(),
        "{what}"
    );
}

#[test]
fn a_new_certificate_retires_the_tunnel_and_leaves_its_connections_alone() {
    run(async {
        let source = authority();
        let node =
            Node::without_proofs(Limits::default(), Timeouts::default(), source.clone()).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut old = node.connect("10.0.0.2:80").await;
        stands(&mut old).await;
        let generation = node.identities.current(&id("cart")).unwrap().generation;
        source.rotate();
        until("no new certificate", async || {
            node.identities.current(&id("cart")).unwrap().generation > generation
        })
        .await;
        until("the tunnel is not retired", async || {
            node.status()
                .await
                .tunnels
                .iter()
                .all(|tunnel| tunnel.retired)
        })
        .await;
        let mut new = node.connect("10.0.0.2:80").await;
        stands(&mut new).await;
        assert_eq!(node.client_tunnels().await, 2);

        old.write_all(b"more").await.unwrap();
        let mut text = [0; 4];
        accepted.lock().await[0]
            .read_exact(&mut text)
            .await
            .unwrap();
        assert_eq!(&text, b"more");
        drop(old);
        accepted.lock().await.remove(0);
        until("the retired tunnel does not end", async || {
            node.status().await.tunnels_open == 2
        })
        .await;
        assert!(
            node.status()
                .await
                .tunnels
                .iter()
                .all(|tunnel| !tunnel.retired)
        );
    });
}

#[test]
fn what_a_retired_tunnel_has_brought_reaches_an_application_that_reads_late() {
    /// More than the kernel keeps for an application.
    const LENGTH: usize = 16 << 20;
    run(async {
        let source = authority();
        let limits = Limits {
            stream_window: 2 * LENGTH as u32,
            tunnel_window: 2 * LENGTH as u32,
            ..Limits::default()
        };
        let node = Node::without_proofs(limits, Timeouts::default(), source.clone()).await;
        let listener = node.listen("10.0.0.2:80");
        let mut client = node.connect("10.0.0.2:80").await;
        let (mut server, _) = listener.accept().await.unwrap();
        source.rotate();
        until("the tunnel is not retired", async || {
            let status = node.status().await;
            status.tunnels.iter().all(|tunnel| tunnel.retired)
        })
        .await;
        client.shutdown().await.unwrap();
        server.write_all(&vec![7; LENGTH]).await.unwrap();
        drop(server);
        until("the tunnel does not end", async || {
            node.status().await.tunnels_open == 0
        })
        .await;
        // Longer than it takes to look after every connection.
        sleep(Duration::from_secs(2)).await;
        let mut whole = Vec::new();
        client.read_to_end(&mut whole).await.unwrap();
        assert_eq!(whole.len(), LENGTH);
        node.counts(&["connections_closed", "egress", "\"closed\""])
            .await;
    });
}

#[test]
fn tunnels_in_which_the_peer_takes_no_more_streams_are_passed_over_however_many_they_are() {
    run(async {
        let source = authority();
        let limits = Limits {
            streams_per_tunnel: 2,
            ..Limits::default()
        };
        let timeouts = Timeouts::default();
        let node = Node::without_proofs(limits, timeouts, source.clone()).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut streams = Vec::new();
        for _ in 0..10 {
            let mut stream = node.connect("10.0.0.2:80").await;
            stands(&mut stream).await;
            streams.push(stream);
        }
        assert_eq!(node.client_tunnels().await, 5);
        // Of each tunnel's two streams one ends.
        let every_other = || (0..).map(|number: u32| number.is_multiple_of(2));
        let mut keep = every_other();
        streams.retain(|_| keep.next() == Some(true));
        let mut keep = every_other();
        accepted.lock().await.retain(|_| keep.next() == Some(true));
        until("the others are not gone", async || {
            node.status().await.connections == 10
        })
        .await;
        let stock = id("stock");
        source.rotate_those(|id| *id == stock);
        until("the server's ends are not retired", async || {
            let tunnels = node.status().await.tunnels;
            let mut servers = tunnels.iter().filter(|tunnel| tunnel.role == "server");
            servers.all(|tunnel| tunnel.retired)
        })
        .await;
        sleep(Duration::from_millis(100)).await;
        let mut new = node.connect("10.0.0.2:80").await;
        stands(&mut new).await;
        assert_eq!(node.client_tunnels().await, 6);
    });
}

#[test]
fn who_waits_for_a_stream_of_a_tunnel_that_takes_no_more_gets_one_of_another() {
    run(async {
        let source = authority();
        let limits = Limits {
            streams_per_tunnel: 1,
            tunnels_per_peer: 1,
            ..Limits::default()
        };
        let timeouts = Timeouts::default();
        let node = Node::without_proofs(limits, timeouts, source.clone()).await;
        let _accepted = accept(node.listen("10.0.0.2:80"));
        let mut first = node.connect("10.0.0.2:80").await;
        stands(&mut first).await;
        let mut waiting = node.connect("10.0.0.2:80").await;
        let stands_soon = timeout(Duration::from_millis(500), waiting.read_u8());
        assert!(stands_soon.await.is_err(), "there is room");
        let stock = id("stock");
        source.rotate_those(|id| *id == stock);
        let standing = timeout(Duration::from_secs(5), stands(&mut waiting));
        standing.await.expect("it waits for ever");
    });
}

#[test]
fn a_connection_of_a_replaced_certificate_has_its_time_and_is_then_ended_by_name() {
    run(async {
        let source = authority();
        let outdated = Duration::from_secs(3);
        let timeouts = Timeouts {
            outdated,
            ..Timeouts::default()
        };
        let limits = Limits::default();
        let node = Node::without_proofs(limits, timeouts, source.clone()).await;
        let _accepted = accept(node.listen("10.0.0.2:80"));
        let mut old = node.connect("10.0.0.2:80").await;
        stands(&mut old).await;
        source.rotate();
        let rotated = Instant::now();
        until("the tunnel is not retired", async || {
            let status = node.status().await;
            status.tunnels.iter().all(|tunnel| tunnel.retired)
        })
        .await;
        let mut new = node.connect("10.0.0.2:80").await;
        stands(&mut new).await;
        is_reset(Ok(&mut old)).await;
        assert!(rotated.elapsed() >= outdated, "{:?}", rotated.elapsed());
        node.counts(&["connections_closed", "certificate_replaced"])
            .await;
        // The other one goes on.
        new.write_all(b"more").await.unwrap();
        assert_eq!(node.client_tunnels().await, 1);
    });
}

#[test]
fn a_withdrawn_identity_ends_its_connections() {
    run(async {
        let source = authority();
        let node = Node::with_source(
            ALLOW,
            Limits::default(),
            Timeouts::default(),
            source.clone(),
        )
        .await;
        let _accepted = accept(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        stands(&mut stream).await;
        source.withdraw();
        is_reset(Ok(&mut stream)).await;
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        node.counts(&["connections_failed", "egress", "no_certificate"])
            .await;
    });
}

#[test]
fn who_is_vouched_for_by_nobody_any_longer_loses_what_stands() {
    run(async {
        let domain = TrustDomain::parse("example.org").unwrap();
        let nobody = TrustBundle::new(domain, Vec::new(), Vec::new()).unwrap();
        for (bundle, reason) in [
            (authority().bundle(), "peer_untrusted"),
            (Arc::new(nobody), "peer_revoked"),
        ] {
            let node =
                Node::with_source(ALLOW, Limits::default(), Timeouts::default(), authority()).await;
            let _accepted = accept(node.listen("10.0.0.2:80"));
            let mut stream = node.connect("10.0.0.2:80").await;
            stands(&mut stream).await;
            node.identities.fetched_bundles(&[bundle]);
            is_reset(Ok(&mut stream)).await;
            node.counts(&["connections_closed", reason]).await;
        }
    });
}

#[test]
fn no_connection_outlives_the_certificates_that_it_was_opened_with() {
    run(async {
        let lifetime = Duration::from_secs(4);
        let source = authority_for(lifetime);
        let (limits, timeouts) = (Limits::default(), Timeouts::default());
        let node = Node::without_proofs(limits, timeouts, source).await;
        let _accepted = accept(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        stands(&mut stream).await;
        is_reset(Ok(&mut stream)).await;
        node.counts(&["connections_closed", "certificate_expired"])
            .await;
    });
}

#[test]
fn a_connection_waits_for_a_renewal_that_is_under_way_and_for_no_other() {
    run(async {
        let source = Arc::new(Late {
            authority: authority_for(Duration::from_secs(4)),
            // Begun at half of the time, it ends after the certificate.
            delay: Duration::from_millis(2500),
            asked: AtomicUsize::new(0),
        });
        let (limits, timeouts) = (Limits::default(), Timeouts::default());
        let node = Node::with_source(ALLOW, limits, timeouts, source.clone()).await;
        let _accepted = accept(node.listen("10.0.0.2:80"));
        let id = id("cart");
        until("the certificate does not expire", async || {
            node.identities.current(&id).is_none()
        })
        .await;
        let mut stream = node.connect("10.0.0.2:80").await;
        stands(&mut stream).await;
        // Where the source gives nothing, nothing is waited for.
        source.authority.withdraw();
        until("the identity is not withdrawn", async || {
            node.identities.current_soon(&id).await.is_none()
        })
        .await;
        let refused = Instant::now();
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        assert!(refused.elapsed() < Duration::from_secs(1));
    });
}

/// An authority that takes its time, but for the first certificate of each of three identities.
#[derive(Debug)]
struct Late {
    authority: Arc<Authority>,
    delay: Duration,
    asked: AtomicUsize,
}

impl CertificateSource for Late {
    fn name(&self) -> &'static str {
        "late"
    }

    fn fetch<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Material, SourceError>> {
        async move {
            if self.asked.fetch_add(1, Ordering::Relaxed) >= 3 {
                sleep(self.delay).await;
            }
            self.authority.fetch(id).await
        }
        .boxed()
    }

    fn changes(&self, id: &SpiffeId) -> watch::Receiver<u64> {
        self.authority.changes(id)
    }
}

#[test]
fn a_drain_waits_for_connections_to_end_and_then_ends_them() {
    run(async {
        let node = Node::new(ALLOW).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut first = node.connect("10.0.0.2:80").await;
        let mut second = node.connect("10.0.0.2:80").await;
        stands(&mut first).await;
        stands(&mut second).await;
        let (node, started) = (Arc::new(node), Instant::now());
        let draining = {
            let node = node.clone();
            spawn_local(async move { node.tunnels.drain(Duration::from_secs(1)).await })
        };
        sleep(Duration::from_millis(200)).await;
        // Nothing listens any more, and what is open goes on.
        assert!(
            node.socket()
                .connect("127.0.0.1:15001".parse().unwrap())
                .await
                .is_err()
        );
        first.shutdown().await.unwrap();
        accepted.lock().await.remove(0);
        drop(first);
        is_reset(Ok(&mut second)).await;
        draining.await.unwrap();
        assert!(started.elapsed() >= Duration::from_secs(1));
        assert!(started.elapsed() < Duration::from_secs(4));
        assert_eq!(node.status().await.tunnels_open, 0);
    });
}

#[test]
fn a_drain_without_connections_is_over_at_once() {
    run(async {
        let node = Node::new(ALLOW).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        stands(&mut stream).await;
        drop(stream);
        accepted.lock().await.clear();
        sleep(Duration::from_millis(100)).await;
        let started = Instant::now();
        node.tunnels.drain(Duration::from_secs(20)).await;
        assert!(started.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn a_tunnel_without_connections_is_closed() {
    run(async {
        let timeouts = Timeouts {
            tunnel_idle: Duration::from_secs(1),
            ..Timeouts::default()
        };
        let node = Node::with(ALLOW, Limits::default(), timeouts).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        stands(&mut stream).await;
        sleep(Duration::from_secs(2)).await;
        assert_eq!(node.client_tunnels().await, 1, "one in use stays");
        drop(stream);
        accepted.lock().await.clear();
        until("the tunnel stays", async || {
            node.status().await.tunnels_open == 0
        })
        .await;
    });
}

#[test]
fn a_tunnel_that_is_old_takes_no_new_connections_and_keeps_those_it_has() {
    run(async {
        let timeouts = Timeouts {
            tunnel_age: Duration::from_secs(1),
            ..Timeouts::default()
        };
        let node = Node::without_proofs(Limits::default(), timeouts, authority()).await;
        let accepted = accept(node.listen("10.0.0.2:80"));
        let mut old = node.connect("10.0.0.2:80").await;
        stands(&mut old).await;
        until("the tunnel is not retired", async || {
            let status = node.status().await;
            status.tunnels.iter().any(|tunnel| tunnel.retired)
        })
        .await;
        let mut new = node.connect("10.0.0.2:80").await;
        stands(&mut new).await;
        assert_eq!(node.client_tunnels().await, 2);
        old.write_all(b"more").await.unwrap();
        let mut text = [0; 4];
        let mut accepted = accepted.lock().await;
        accepted[0].read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"more");
    });
}

#[test]
fn attempts_at_a_peer_that_fails_are_few_handshakes() {
    run(async {
        let node = Node::new(ALLOW).await;
        for _ in 0..100 {
            is_reset(node.try_connect("10.0.0.3:80").await).await;
        }
        let handshakes = client_handshakes(&node);
        assert!(handshakes <= 30.0, "{handshakes} handshakes");
    });
}

#[test]
fn a_burst_to_a_peer_that_fails_is_few_handshakes() {
    run(async {
        let node = Node::new(ALLOW).await;
        // The tunnel port answers with stock's certificate, and `other` is expected.
        let mut streams = Vec::new();
        for _ in 0..100 {
            streams.push(node.try_connect("10.0.0.3:80").await);
        }
        for stream in streams {
            is_reset(stream).await;
        }
        let handshakes = client_handshakes(&node);
        assert!(handshakes <= 10.0, "{handshakes} handshakes");
    });
}

/// Handshakes that the node has begun.
fn client_handshakes(node: &Node) -> f64 {
    let text = node.shared.metrics.render().unwrap();
    text.lines()
        .filter(|line| line.contains("handshakes_total") && line.contains("client"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
