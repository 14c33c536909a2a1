//! Connections from one workload to another, through a whole data path.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{
    node::{ALLOW, NO_INGRESS, Node, is_reset},
    rig::run,
};
use crate::config::{Limits, Timeouts};

/// A policy that allows nothing to cart and stock.
const NOTHING: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: nothing}
spec:
  workloads: {names: [cart, stock]}
";

/// Answers every connection with what it sent.
fn echo(listener: TcpListener) {
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let (mut read, mut write) = stream.split();
                // A client that resets is some tests' point.
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
}

async fn says(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, text);
}

#[test]
fn an_allowed_connection_reaches_the_application() {
    run(async {
        let node = Node::new(ALLOW).await;
        echo(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        says(&mut stream, b"hello").await;
        stream.shutdown().await.unwrap();
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        sleep(Duration::from_millis(50)).await;
        let status = node.status().await;
        assert_eq!((status.connections, status.tunnels_open), (0, 2));
        for direction in ["egress", "ingress"] {
            node.counts(&["connections_closed", direction, "closed", "cart", "stock"])
                .await;
        }
    });
}

#[test]
fn one_that_the_far_policy_denies_is_reset() {
    run(async {
        let node = Node::new(NO_INGRESS).await;
        let listener = node.listen("10.0.0.2:80");
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        node.counts(&["connections_failed", "ingress", "no_policy"])
            .await;
        node.counts(&["connections_failed", "egress", "peer_denied"])
            .await;
        assert!(
            timeout(Duration::from_millis(100), listener.accept())
                .await
                .is_err()
        );
    });
}

#[test]
fn the_port_that_counts_is_the_applications() {
    run(async {
        let node = Node::new(ALLOW).await;
        let _other_port = node.listen("10.0.0.2:81");
        is_reset(node.try_connect("10.0.0.2:81").await).await;
        node.counts(&["connections_failed", "egress", "peer_denied"])
            .await;
    });
}

#[test]
fn one_that_the_own_policy_denies_is_reset_without_a_tunnel() {
    run(async {
        let node = Node::new(NOTHING).await;
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        assert_eq!(node.status().await.tunnels_open, 0);
        node.counts(&["connections_failed", "egress", "no_policy"])
            .await;
    });
}

#[test]
fn one_without_an_original_destination_is_reset() {
    run(async {
        let node = Node::new(ALLOW).await;
        is_reset(node.redirected(node.socket()).await).await;
        node.counts(&["connections_failed", "egress", "no_origin"])
            .await;
    });
}

#[test]
fn one_to_an_application_that_does_not_listen_is_reset() {
    run(async {
        let node = Node::new(ALLOW).await;
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        node.counts(&["connections_failed", "ingress", "application_unreachable"])
            .await;
        node.counts(&["connections_failed", "egress", "peer_failed"])
            .await;
    });
}

#[test]
fn a_change_of_policy_ends_what_it_no_longer_allows() {
    run(async {
        let node = Node::new(ALLOW).await;
        echo(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        says(&mut stream, b"hello").await;
        node.set_policy(ALLOW);
        says(&mut stream, b"still here").await;
        node.set_policy(NO_INGRESS);
        is_reset(Ok(&mut stream)).await;
        node.counts(&["connections_closed", "ingress", "revoked"])
            .await;
    });
}

#[test]
fn many_connections_at_once_share_few_tunnels() {
    run(async {
        let node = Node::new(ALLOW).await;
        echo(node.listen("10.0.0.2:80"));
        let mut streams = Vec::new();
        for _ in 0..450 {
            streams.push(node.connect("10.0.0.2:80").await);
        }
        for stream in &mut streams {
            says(stream, b"hello").await;
        }
        assert_eq!(node.client_tunnels().await, 3);
    });
}

#[test]
fn a_connection_beyond_the_limit_is_reset_and_the_others_go_on() {
    run(async {
        let limits = Limits {
            // Each is counted where it goes out and where it comes in.
            connections: 4,
            ..Limits::default()
        };
        let node = Node::with(ALLOW, limits, Timeouts::default()).await;
        echo(node.listen("10.0.0.2:80"));
        let mut first = node.connect("10.0.0.2:80").await;
        says(&mut first, b"hello").await;
        let mut second = node.connect("10.0.0.2:80").await;
        says(&mut second, b"hello").await;
        is_reset(node.try_connect("10.0.0.2:80").await).await;
        says(&mut first, b"still here").await;
        node.counts(&["connections_failed", "egress", "limit"])
            .await;
    });
}
