//! Peers that stop at some point, or are not who they should be: each costs its time-out and no
//! more, and the application is told by a reset.

use std::{future::pending, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::spawn_local,
    time::Instant,
};

use super::{
    node::{ALLOW, Node, OTHER, is_reset},
    rig::{id, run},
};
use crate::config::{Limits, Ports, Timeouts};

const LIMIT: Duration = Duration::from_millis(400);

async fn impatient() -> Node {
    let timeouts = Timeouts {
        connect: LIMIT,
        handshake: LIMIT,
        request: LIMIT,
        ..Timeouts::default()
    };
    Node::with(ALLOW, Limits::default(), timeouts).await
}

async fn fails_in_time(node: &Node, reason: &str) {
    let started = Instant::now();
    is_reset(node.try_connect("10.0.0.3:80").await).await;
    assert!(started.elapsed() < LIMIT + Duration::from_secs(2));
    node.counts(&["connections_failed", "egress", reason]).await;
}

#[test]
fn a_peer_that_does_not_accept() {
    run(async {
        let node = impatient().await;
        let _listener = node.other();
        // The kernel accepts as many as the backlog holds.
        let address = format!("{OTHER}:{}", Ports::default().tunnel);
        let mut filling = Vec::new();
        for _ in 0..4 {
            let connecting = node.socket().connect(address.parse().unwrap());
            filling.push(spawn_local(connecting));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        fails_in_time(&node, "peer_unreachable").await;
    });
}

#[test]
fn a_peer_that_has_no_such_workload() {
    run(async {
        // This node's own listener answers there, and knows of no workload with the address.
        fails_in_time(&impatient().await, "handshake_failed").await;
    });
}

#[test]
fn a_peer_that_is_silent_in_the_handshake() {
    run(async {
        let node = impatient().await;
        node.serve_other(async |_stream| pending().await);
        fails_in_time(&node, "timeout").await;
    });
}

#[test]
fn a_peer_that_sends_no_settings() {
    run(async {
        let node = impatient().await;
        let acceptor = node.acceptor("other");
        node.serve_other(move |stream| {
            let accepting = acceptor.accept(stream);
            async {
                let _tls = accepting.await.unwrap();
                pending().await
            }
        });
        fails_in_time(&node, "timeout").await;
    });
}

#[test]
fn a_peer_that_does_not_answer_connect() {
    run(async {
        let node = impatient().await;
        let acceptor = node.acceptor("other");
        node.serve_other(move |stream| {
            let accepting = acceptor.accept(stream);
            async {
                let tls = accepting.await.unwrap();
                let mut connection = h2::server::handshake(tls).await.unwrap();
                let mut requests = Vec::new();
                while let Some(Ok(request)) = connection.accept().await {
                    requests.push(request);
                }
            }
        });
        fails_in_time(&node, "timeout").await;
    });
}

#[test]
fn a_peer_that_closes_after_the_handshake() {
    run(async {
        let node = impatient().await;
        let acceptor = node.acceptor("other");
        node.serve_other(move |stream| {
            let accepting = acceptor.accept(stream);
            async {
                drop(accepting.await);
            }
        });
        fails_in_time(&node, "handshake_failed").await;
    });
}

#[test]
fn a_peer_that_takes_no_streams_in_the_tunnel_that_it_has_just_accepted() {
    /// SETTINGS with nothing in it, and GOAWAY with the highest stream and NO_ERROR, as both are sent
    /// by a server whose certificate is replaced just then.
    const RETIRED: [u8; 26] = [
        0, 0, 0, 4, 0, 0, 0, 0, 0, //
        0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0,
    ];
    run(async {
        for (retired, stands) in [(1, true), (usize::MAX, false)] {
            let node = impatient().await;
            let acceptor = node.acceptor("other");
            let accepted = std::rc::Rc::new(std::cell::Cell::new(0));
            let number = accepted.clone();
            node.serve_other(move |stream| {
                let accepting = acceptor.accept(stream);
                accepted.set(accepted.get() + 1);
                let retires = accepted.get() <= retired;
                async move {
                    let mut tls = accepting.await.unwrap();
                    if retires {
                        tls.write_all(&RETIRED).await.unwrap();
                        tls.read_to_end(&mut Vec::new()).await.unwrap();
                        return;
                    }
                    let mut connection = h2::server::handshake(tls).await.unwrap();
                    let mut answered = Vec::new();
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        let answer = http::Response::new(());
                        let mut stream = respond.send_response(answer, false).unwrap();
                        stream.send_data(bytes::Bytes::from("!"), false).unwrap();
                        answered.push(stream);
                    }
                }
            });
            let stream = node.try_connect("10.0.0.3:80").await;
            if stands {
                assert_eq!(stream.unwrap().read_u8().await.unwrap(), b'!');
                assert_eq!(number.get(), 2);
                let metrics = node.shared.metrics.render().unwrap();
                let failed = |line: &&str| line.contains("_failed") || line.contains("\"failed\"");
                assert_eq!(
                    metrics
                        .lines()
                        .filter(failed)
                        .find(|line| line.contains('}')),
                    None
                );
            } else {
                is_reset(stream).await;
                assert!(number.get() <= 3, "{} tunnels", number.get());
            }
        }
    });
}

#[test]
fn a_peer_with_another_identity() {
    run(async {
        let node = impatient().await;
        let acceptor = node.acceptor("stock");
        node.serve_other(move |stream| {
            let accepting = acceptor.accept(stream);
            async {
                let _failed = accepting.await;
            }
        });
        fails_in_time(&node, "peer_identity").await;
        node.counts(&["handshakes", "client", "wrong_identity"])
            .await;
    });
}

#[test]
fn a_client_that_is_silent_in_the_handshake() {
    run(async {
        let node = impatient().await;
        let address = format!("10.0.0.2:{}", Ports::default().tunnel);
        let stream = node
            .socket()
            .connect(address.parse().unwrap())
            .await
            .unwrap();
        let started = Instant::now();
        let mut buffer = [0; 16];
        let read = tokio::io::AsyncReadExt::read(&mut { stream }, &mut buffer).await;
        assert!(matches!(read, Ok(0) | Err(_)));
        assert!(started.elapsed() < LIMIT + Duration::from_secs(2));
        node.counts(&["handshakes", "server", "timeout"]).await;
    });
}

#[test]
fn a_client_that_asks_for_nothing_is_told_to_go() {
    run(async {
        let node = impatient().await;
        let cart = node.identities.current(&id("cart")).unwrap();
        let address = format!("10.0.0.2:{}", Ports::default().tunnel);
        let stream = node
            .socket()
            .connect(address.parse().unwrap())
            .await
            .unwrap();
        let tls = tokio_rustls::TlsConnector::from(cart.client(&id("stock")))
            .connect(crate::identity::server_name_for(&id("stock")), stream)
            .await
            .unwrap();
        let (_request, connection) = h2::client::handshake(tls).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(10), connection).await;
        assert!(ended.is_ok(), "the tunnel stays open");
    });
}
