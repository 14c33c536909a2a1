//! What the server makes of requests that are not as they should be.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tokio::task::spawn_local;

use super::{
    node::{ALLOW, NO_INGRESS, Node},
    rig::{id, run},
};
use crate::{config::Ports, identity::server_name_for};

/// A tunnel to `address`, from a client that does as the test tells it.
async fn tunnel_to(node: &Node, address: &str, client: &str, server: &str) -> SendRequest<Bytes> {
    let svid = node.identities.current(&id(client)).unwrap();
    let to = format!("{address}:{}", Ports::default().tunnel);
    let stream = node.socket().connect(to.parse().unwrap()).await.unwrap();
    let tls = tokio_rustls::TlsConnector::from(svid.client(&id(server)))
        .connect(server_name_for(&id(server)), stream)
        .await
        .unwrap();
    let (request, connection) = h2::client::handshake(tls).await.unwrap();
    spawn_local(async move {
        // The test ends it.
        let _ = connection.await;
    });
    request
}

async fn status(request: &SendRequest<Bytes>, asked: Request<()>) -> StatusCode {
    let mut request = request.clone().ready().await.unwrap();
    let (response, _stream) = request.send_request(asked, false).unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(5), response).await;
    answer.expect("no answer").unwrap().status()
}

fn connect(authority: &str) -> Request<()> {
    Request::connect(authority).body(()).unwrap()
}

#[test]
fn only_connect_to_an_address_of_the_tunnels_workload_is_served() {
    run(async {
        let node = Node::new(ALLOW).await;
        let _application = node.listen("10.0.0.2:80");
        let tunnel = tunnel_to(&node, "10.0.0.2", "cart", "stock").await;
        let ports = Ports::default();
        for (authority, expected) in [
            ("10.0.0.2:80", StatusCode::OK),
            ("10.0.0.1:80", StatusCode::MISDIRECTED_REQUEST),
            ("10.0.0.3:80", StatusCode::MISDIRECTED_REQUEST),
            ("127.0.0.1:80", StatusCode::MISDIRECTED_REQUEST),
            ("192.0.2.1:80", StatusCode::MISDIRECTED_REQUEST),
            ("stock.shop:80", StatusCode::BAD_REQUEST),
            ("10.0.0.2:0", StatusCode::BAD_REQUEST),
            ("10.0.0.2:81", StatusCode::UNAUTHORIZED),
            (
                &format!("10.0.0.2:{}", ports.tunnel),
                StatusCode::SERVICE_UNAVAILABLE,
            ),
            (
                &format!("10.0.0.2:{}", ports.outbound),
                StatusCode::SERVICE_UNAVAILABLE,
            ),
        ] {
            let answer = status(&tunnel, connect(authority)).await;
            assert_eq!(answer, expected, "{authority}");
        }
        let get = Request::builder()
            .method(Method::GET)
            .uri("https://10.0.0.2:80/")
            .body(())
            .unwrap();
        assert_eq!(status(&tunnel, get).await, StatusCode::BAD_REQUEST);
        node.counts(&["connections_failed", "ingress", "wrong_authority"])
            .await;
        node.counts(&["connections_failed", "ingress", "bad_request"])
            .await;
        node.counts(&["connections_failed", "ingress", "reserved_port"])
            .await;
    });
}

#[test]
fn a_tunnel_serves_only_the_identity_that_it_presented() {
    run(async {
        let node = Node::new(ALLOW).await;
        let _application = node.listen("10.0.0.2:80");
        // Cart's certificate is asked for at stock's address.
        let tunnel = tunnel_to(&node, "10.0.0.2", "other", "cart").await;
        let answer = status(&tunnel, connect("10.0.0.2:80")).await;
        assert_eq!(answer, StatusCode::MISDIRECTED_REQUEST);
    });
}

#[test]
fn without_a_server_name_the_address_says_who_answers() {
    run(async {
        let node = Node::new(ALLOW).await;
        let _application = node.listen("10.0.0.2:80");
        let svid = node.identities.current(&id("other")).unwrap();
        let to = format!("10.0.0.2:{}", Ports::default().tunnel);
        let stream = node.socket().connect(to.parse().unwrap()).await.unwrap();
        let address = rustls_pki_types::ServerName::from(std::net::Ipv4Addr::new(10, 0, 0, 2));
        let tls = tokio_rustls::TlsConnector::from(svid.client(&id("stock")))
            .connect(address, stream)
            .await
            .unwrap();
        let (request, connection) = h2::client::handshake(tls).await.unwrap();
        spawn_local(async move {
            let _ = connection.await;
        });
        assert_eq!(
            status(&request, connect("10.0.0.2:80")).await,
            StatusCode::OK
        );
    });
}

#[test]
fn who_is_denied_is_told_so_and_nothing_else() {
    run(async {
        let node = Node::new(NO_INGRESS).await;
        let tunnel = tunnel_to(&node, "10.0.0.2", "other", "stock").await;
        // Whether or not something listens there.
        for authority in ["10.0.0.2:80", "10.0.0.2:9999"] {
            let answer = status(&tunnel, connect(authority)).await;
            assert_eq!(answer, StatusCode::UNAUTHORIZED);
        }
    });
}
