//! Tunnels that are proven again underneath their connections, and attempts to prove what is not so.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::Response;
use reeve_common::Reason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    node::{ALLOW, Node, STOCK, is_reset},
    rig::{Authority, authority_for, id, run},
};
use crate::{
    config::{Limits, Ports, Timeouts},
    identity::{Svid, server_name_for},
    telemetry::Role,
    tunnel::proof::{Fresh, ProofStream, Secret, VALUE, open},
};

/// Of the certificates of most tests here: long enough for proofs that only the test begins.
const HOUR: Duration = Duration::from_secs(3600);

async fn node(lifetime: Duration) -> (Node, Arc<Authority>) {
    let source = authority_for(lifetime);
    let (limits, timeouts) = (Limits::default(), Timeouts::default());
    let node = Node::with_source(ALLOW, limits, timeouts, source.clone()).await;
    (node, source)
}

/// Sends back what arrives.
fn echo(listener: TcpListener) {
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

async fn answers(stream: &mut TcpStream) {
    let answered = async {
        stream.write_all(b"?").await?;
        stream.read_u8().await
    };
    let answered = timeout(Duration::from_secs(5), answered).await;
    assert_eq!(answered.expect("no answer in time").unwrap(), b'?');
}

/// How often the node's tunnels in this role were proven again.
async fn proofs(node: &Node, role: &str) -> u64 {
    let tunnels = node.status().await.tunnels;
    let tunnels = tunnels.iter().filter(|tunnel| tunnel.role == role);
    tunnels.map(|tunnel| tunnel.proofs).sum()
}

async fn until_proven(node: &Node, role: &str, number: u64) {
    let proven = async {
        while proofs(node, role).await < number {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let proven = timeout(Duration::from_secs(10), proven).await;
    proven.expect("not proven in time");
}

#[test]
fn connections_outlive_the_certificates_of_both_ends_in_one_tunnel() {
    run(async {
        let lifetime = Duration::from_secs(4);
        let (node, _) = node(lifetime).await;
        echo(node.listen("10.0.0.2:80"));
        let started = Instant::now();
        let mut streams = vec![node.connect("10.0.0.2:80").await];
        while started.elapsed() < 5 * lifetime {
            for stream in &mut streams {
                answers(stream).await;
            }
            sleep(Duration::from_millis(500)).await;
            streams.push(node.connect("10.0.0.2:80").await);
            assert_eq!(node.client_tunnels().await, 1);
        }
        for role in ["client", "server"] {
            let proofs = proofs(&node, role).await;
            assert!((4..40).contains(&proofs), "{role}: {proofs}");
        }
    });
}

#[test]
fn a_new_certificate_is_proven_in_the_tunnel_which_takes_new_connections_with_it() {
    run(async {
        let (node, source) = node(HOUR).await;
        echo(node.listen("10.0.0.2:80"));
        let mut old = node.connect("10.0.0.2:80").await;
        answers(&mut old).await;
        for round in 1..=10 {
            source.rotate();
            until_proven(&node, "client", round).await;
            let mut new = node.connect("10.0.0.2:80").await;
            answers(&mut new).await;
            answers(&mut old).await;
            assert_eq!(node.client_tunnels().await, 1);
        }
        node.counts(&["tunnel_proofs_total", "client", "\"ok\""])
            .await;
        node.counts(&["tunnel_proofs_total", "server", "\"ok\""])
            .await;
    });
}

#[test]
fn a_tunnel_whose_streams_are_all_taken_is_proven() {
    run(async {
        let source = authority_for(HOUR);
        let limits = Limits {
            streams_per_tunnel: 1,
            ..Limits::default()
        };
        let node = Node::with_source(ALLOW, limits, Timeouts::default(), source.clone()).await;
        echo(node.listen("10.0.0.2:80"));
        let mut first = node.connect("10.0.0.2:80").await;
        answers(&mut first).await;
        source.rotate();
        until_proven(&node, "client", 1).await;
        answers(&mut first).await;
        let mut second = node.connect("10.0.0.2:80").await;
        answers(&mut second).await;
        assert_eq!(node.client_tunnels().await, 2);
    });
}

#[test]
fn a_tunnel_is_proven_when_it_is_old_and_keeps_its_place() {
    run(async {
        let timeouts = Timeouts {
            tunnel_age: Duration::from_secs(1),
            ..Timeouts::default()
        };
        let source = authority_for(HOUR);
        let node = Node::with_source(ALLOW, Limits::default(), timeouts, source).await;
        echo(node.listen("10.0.0.2:80"));
        let mut old = node.connect("10.0.0.2:80").await;
        answers(&mut old).await;
        until_proven(&node, "client", 2).await;
        let mut new = node.connect("10.0.0.2:80").await;
        answers(&mut new).await;
        answers(&mut old).await;
        assert_eq!(node.client_tunnels().await, 1);
        // Neither end has another certificate.
        node.counts(&["tunnel_proofs_total", "client", "\"same\""])
            .await;
    });
}

#[test]
fn an_identity_that_is_withdrawn_is_proven_no_more() {
    run(async {
        let lifetime = Duration::from_secs(4);
        let (node, source) = node(lifetime).await;
        echo(node.listen("10.0.0.2:80"));
        let mut stream = node.connect("10.0.0.2:80").await;
        answers(&mut stream).await;
        until_proven(&node, "client", 1).await;
        source.withdraw();
        is_reset(Ok(&mut stream)).await;
        node.counts(&["connections_closed", "no_certificate"]).await;
    });
}

// === A client that is not what it says ===

/// A tunnel to stock that the test itself opens with a certificate of the node's.
struct Opened {
    request: SendRequest<Bytes>,
    secret: Secret,
    own: Arc<Svid>,
}

impl Opened {
    async fn by(node: &Node, own: &Arc<Svid>) -> Self {
        let to = format!("{STOCK}:{}", Ports::default().tunnel);
        let tcp = node.socket().connect(to.parse().unwrap()).await.unwrap();
        let stock = id("stock");
        let connector = TlsConnector::from(own.client(&stock));
        let stream = connector.connect(server_name_for(&stock), tcp).await;
        let stream = stream.unwrap();
        let secret = Secret::of(stream.get_ref().1)
            .unwrap()
            .expect("not settled");
        let (request, connection) = h2::client::handshake(stream).await.unwrap();
        spawn_local(connection);
        Self {
            request: request.ready().await.unwrap(),
            secret,
            own: own.clone(),
        }
    }

    async fn with_cart(node: &Node) -> Self {
        Self::by(node, &node.identities.current(&id("cart")).unwrap()).await
    }

    /// Proves it, with a certificate and the value that `value` makes. Gives what the client sent, and
    /// whether the server answered with its own value.
    async fn prove(
        &self,
        own: &Svid,
        value: impl FnOnce(&Fresh) -> [u8; VALUE],
    ) -> Result<[u8; VALUE], String> {
        let (send, recv) = open(self.request.clone())
            .await
            .map_err(|e| e.to_string())?;
        let stock = id("stock");
        let connector = TlsConnector::from(own.proof_client(&stock));
        let stream = ProofStream::new(send, recv);
        let stream = connector.connect(server_name_for(&stock), stream).await;
        let mut stream = stream.map_err(|error| error.to_string())?;
        let session = stream.get_ref().1;
        let server = session.peer_certificates().unwrap()[0].clone();
        let fresh = Fresh::of(session, &own.chain()[0], &server).unwrap();
        let sent = value(&fresh);
        stream.write_all(&sent).await.map_err(|e| e.to_string())?;
        let mut answer = [0; VALUE];
        let read = stream.read_exact(&mut answer).await;
        read.map_err(|error| error.to_string())?;
        assert!(self.secret.is_value(&answer, Role::Server, &fresh));
        Ok(sent)
    }

    async fn prove_rightly(&self) -> [u8; VALUE] {
        let value = |fresh: &Fresh| self.secret.value(Role::Client, fresh);
        self.prove(&self.own, value).await.unwrap()
    }
}

/// Two proofs of one tunnel do not follow each other at once.
async fn a_while() {
    sleep(Duration::from_millis(150)).await;
}

#[test]
fn only_who_holds_the_tunnel_can_prove_it() {
    run(async {
        let (node, _) = node(HOUR).await;
        let tunnel = Opened::with_cart(&node).await;
        let earlier = tunnel.prove_rightly().await;
        until_proven(&node, "server", 1).await;
        // Of the same workload, or of a sibling with its identity.
        let others = Opened::with_cart(&node).await;
        let own = &tunnel.own;
        let mut refused = Vec::new();
        a_while().await;
        refused.push(tunnel.prove(own, |_| earlier).await);
        a_while().await;
        let reflected = |fresh: &Fresh| tunnel.secret.value(Role::Server, fresh);
        refused.push(tunnel.prove(own, reflected).await);
        a_while().await;
        let of_another = |fresh: &Fresh| others.secret.value(Role::Client, fresh);
        refused.push(tunnel.prove(own, of_another).await);
        a_while().await;
        refused.push(tunnel.prove(own, |_| [0; VALUE]).await);
        a_while().await;
        // Another identity that knows the tunnel.
        let other = node.identities.current(&id("other")).unwrap();
        let right = |fresh: &Fresh| tunnel.secret.value(Role::Client, fresh);
        refused.push(tunnel.prove(&other, right).await);
        for (number, result) in refused.iter().enumerate() {
            assert!(result.is_err(), "{number}");
        }
        assert_eq!(proofs(&node, "server").await, 1);
        for result in ["wrong_tunnel", "wrong_identity"] {
            node.counts(&["tunnel_proofs_total", "server", result])
                .await;
        }
        // And it can be proven still.
        a_while().await;
        tunnel.prove_rightly().await;
        until_proven(&node, "server", 2).await;
    });
}

#[test]
fn a_value_that_is_relayed_from_another_handshake_proves_nothing() {
    run(async {
        let (node, _) = node(HOUR).await;
        // Two tunnels at each of which the test sits in the middle: a value of one handshake is sent
        // in the other.
        let [one, two] = [
            Opened::with_cart(&node).await,
            Opened::with_cart(&node).await,
        ];
        let mut taken = None;
        let take = |fresh: &Fresh| {
            taken = Some(one.secret.value(Role::Client, fresh));
            [0; VALUE]
        };
        two.prove(&two.own, take).await.unwrap_err();
        let relayed = taken.unwrap();
        one.prove(&one.own, |_| relayed).await.unwrap_err();
        assert_eq!(proofs(&node, "server").await, 0);
    });
}

#[test]
fn a_stolen_key_proves_nothing_after_its_certificate_has_expired() {
    run(async {
        let lifetime = Duration::from_secs(4);
        let (node, _) = node(lifetime).await;
        let stolen = node.identities.current(&id("cart")).unwrap();
        let tunnel = Opened::by(&node, &stolen).await;
        let owners = loop {
            sleep(Duration::from_millis(100)).await;
            let newest = node.identities.current(&id("cart")).unwrap();
            if newest.generation != stolen.generation {
                break Opened::by(&node, &newest).await;
            }
        };
        let closed = async {
            // A certificate counts up to its end.
            while SystemTime::now() <= stolen.not_after || node.status().await.tunnels_open > 1 {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(2 * lifetime, closed).await.expect("it goes on");
        let right = |fresh: &Fresh| tunnel.secret.value(Role::Client, fresh);
        tunnel.prove(&stolen, right).await.unwrap_err();
        // Nor in another's tunnel.
        let right = |fresh: &Fresh| owners.secret.value(Role::Client, fresh);
        owners.prove(&stolen, right).await.unwrap_err();
        assert_eq!(proofs(&node, "server").await, 0);
    });
}

#[test]
fn a_flood_of_proofs_is_refused_and_others_are_served() {
    run(async {
        let (node, _) = node(HOUR).await;
        echo(node.listen("10.0.0.2:80"));
        let tunnel = Opened::with_cart(&node).await;
        let mut under_way = Vec::new();
        // Each that is admitted stands still.
        for _ in 0..100 {
            let opened = timeout(Duration::from_secs(5), open(tunnel.request.clone()));
            under_way.push(opened.await.expect("no answer"));
        }
        let admitted = under_way.iter().filter(|result| result.is_ok()).count();
        assert_eq!(admitted, 1);
        node.counts(&["tunnel_proofs_total", "server", "\"limit\""])
            .await;
        let mut stream = node.connect("10.0.0.2:80").await;
        answers(&mut stream).await;
    });
}

#[test]
fn a_proof_of_a_tunnel_that_has_not_settled_it_is_no_valid_request() {
    run(async {
        let source = authority_for(HOUR);
        let (limits, timeouts) = (Limits::default(), Timeouts::default());
        let node = Node::without_proofs(limits, timeouts, source).await;
        let to = format!("{STOCK}:{}", Ports::default().tunnel);
        let tcp = node.socket().connect(to.parse().unwrap()).await.unwrap();
        let cart = node.identities.current(&id("cart")).unwrap();
        let connector = TlsConnector::from(cart.client(&id("stock")));
        let stream = connector.connect(server_name_for(&id("stock")), tcp).await;
        let stream = stream.unwrap();
        assert!(Secret::of(stream.get_ref().1).unwrap().is_none());
        let (request, connection) = h2::client::handshake(stream).await.unwrap();
        spawn_local(connection);
        let refused = open(request.ready().await.unwrap()).await.unwrap_err();
        assert!(refused.to_string().contains("400"), "{refused}");
    });
}

// === A server that is not what it says ===

#[test]
fn a_server_that_sends_the_clients_own_value_back_proves_nothing() {
    run(async {
        let lifetime = Duration::from_secs(4);
        let (node, _) = node(lifetime).await;
        let other = node.identities.current(&id("other")).unwrap();
        node.serve_other(move |tcp| reflect(tcp, other.clone()));
        let mut stream = node.connect("10.0.0.3:80").await;
        answers(&mut stream).await;
        is_reset(Ok(&mut stream)).await;
        assert_eq!(proofs(&node, "client").await, 0);
        node.counts(&["tunnel_proofs_total", "client", "wrong_tunnel"])
            .await;
        let reason = Reason::CertificateExpired.as_str();
        node.counts(&["connections_closed", reason]).await;
    });
}

/// Serves a tunnel: answers each connection's first byte, and in proofs sends back what it gets.
async fn reflect(tcp: TcpStream, own: Arc<Svid>) {
    let Ok(stream) = TlsAcceptor::from(own.server.clone()).accept(tcp).await else {
        return;
    };
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let own = own.clone();
        spawn_local(async move {
            let is_proof = request.uri().host() == Some("proof.reeve.internal");
            let send = respond.send_response(Response::new(()), false).unwrap();
            let mut stream = ProofStream::new(send, request.into_body());
            let mut value = [0; VALUE];
            if is_proof {
                let acceptor = TlsAcceptor::from(own.proof_server());
                let mut stream = acceptor.accept(stream).await.unwrap();
                stream.read_exact(&mut value).await.unwrap();
                stream.write_all(&value).await.unwrap();
                sleep(HOUR).await;
            } else {
                let first = stream.read_u8().await.unwrap();
                stream.write_all(&[first]).await.unwrap();
                sleep(HOUR).await;
            }
        });
    }
}
