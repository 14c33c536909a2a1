//! What an application says before the peer has answered.

use std::{future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Request, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};

use super::{
    node::{ALLOW, Node, is_reset},
    rig::run,
};

/// A policy that allows cart nothing.
const NOTHING: &str = "
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: nothing}
spec:
  workloads: {names: [cart, stock]}
";

/// For what is not to happen.
const A_WHILE: Duration = Duration::from_millis(200);

type Asked = (Request<RecvStream>, SendResponse<Bytes>);

/// The requests that arrive at the other node, whose handshakes wait for `permits`.
fn requests(node: &Node, permits: Arc<Semaphore>) -> mpsc::UnboundedReceiver<Asked> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let acceptor = node.acceptor("other");
    node.serve_other(move |stream| {
        let (acceptor, sender, permits) = (acceptor.clone(), sender.clone(), permits.clone());
        async move {
            permits.acquire().await.unwrap().forget();
            let tls = acceptor.accept(stream).await.unwrap();
            let mut connection = h2::server::handshake(tls).await.unwrap();
            while let Some(Ok(request)) = connection.accept().await {
                let _ = sender.send(request);
            }
        }
    });
    receiver
}

/// The next request.
async fn next(requests: &mut mpsc::UnboundedReceiver<Asked>) -> (RecvStream, SendResponse<Bytes>) {
    let (request, respond) = requests.recv().await.unwrap();
    (request.into_body(), respond)
}

async fn receive(stream: &mut RecvStream, bytes: usize) -> Vec<u8> {
    let mut received = Vec::new();
    while received.len() < bytes {
        let data = stream.data().await.unwrap().unwrap();
        let _ = stream.flow_control().release_capacity(data.len());
        received.extend_from_slice(&data);
    }
    received
}

/// Whether nothing more comes, ever. The end is a frame without bytes.
async fn ends(stream: &mut RecvStream) -> bool {
    while let Some(Ok(data)) = stream.data().await {
        if !data.is_empty() {
            return false;
        }
    }
    stream.is_end_stream()
}

async fn nothing_comes(stream: &mut RecvStream) {
    assert!(timeout(A_WHILE, stream.data()).await.is_err());
}

fn accept(mut respond: SendResponse<Bytes>) -> h2::SendStream<Bytes> {
    respond.send_response(Response::new(()), false).unwrap()
}

fn disown(mut respond: SendResponse<Bytes>) {
    let answer = Response::builder().status(421).body(()).unwrap();
    respond.send_response(answer, true).unwrap();
}

#[test]
fn it_comes_before_the_answer_and_once() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let mut app = node.connect("10.0.0.3:80").await;
        app.write_all(b"hello").await.unwrap();
        let (mut stream, respond) = next(&mut requests).await;
        assert_eq!(receive(&mut stream, 5).await, b"hello");
        let mut answer = accept(respond);
        app.write_all(b" again").await.unwrap();
        assert_eq!(receive(&mut stream, 6).await, b" again");
        answer.send_data("bye".into(), true).unwrap();
        app.shutdown().await.unwrap();
        assert!(ends(&mut stream).await);
        let mut rest = String::new();
        app.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "bye");
        node.counts(&["connection_bytes", "egress", "sent", " 11"])
            .await;
    });
}

#[test]
fn it_comes_when_it_is_said_late() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let mut app = node.connect("10.0.0.3:80").await;
        let (mut stream, _respond) = next(&mut requests).await;
        nothing_comes(&mut stream).await;
        app.write_all(b"hello").await.unwrap();
        assert_eq!(receive(&mut stream, 5).await, b"hello");
    });
}

#[test]
fn no_more_comes_before_the_answer_than_is_kept() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let mut app = node.connect("10.0.0.3:80").await;
        let said: Vec<u8> = (0..251).cycle().take(50_000).collect();
        app.write_all(&said).await.unwrap();
        let (mut stream, respond) = next(&mut requests).await;
        let mut received = receive(&mut stream, 1).await;
        assert!(received.len() <= 4096, "{}", received.len());
        nothing_comes(&mut stream).await;
        let _answer = accept(respond);
        let rest = receive(&mut stream, said.len() - received.len()).await;
        received.extend(rest);
        assert!(received == said);
    });
}

#[test]
fn a_request_that_was_not_looked_at_is_made_again_with_it() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let mut app = node.connect("10.0.0.3:80").await;
        app.write_all(b"hello").await.unwrap();
        let (mut stream, mut respond) = next(&mut requests).await;
        assert_eq!(receive(&mut stream, 5).await, b"hello");
        respond.send_reset(h2::Reason::REFUSED_STREAM);
        let (mut stream, respond) = next(&mut requests).await;
        let _answer = accept(respond);
        app.write_all(b" again").await.unwrap();
        assert_eq!(receive(&mut stream, 11).await, b"hello again");
    });
}

#[test]
fn a_tunnel_whose_server_disowns_the_address_is_replaced_and_the_request_made_again_with_it() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let _first = node.connect("10.0.0.3:80").await;
        let (_stream, respond) = next(&mut requests).await;
        let _answer = accept(respond);
        let mut app = node.connect("10.0.0.3:80").await;
        app.write_all(b"hello").await.unwrap();
        let (_, respond) = next(&mut requests).await;
        disown(respond);
        // In another tunnel.
        let (mut stream, respond) = next(&mut requests).await;
        let _answer = accept(respond);
        assert_eq!(receive(&mut stream, 5).await, b"hello");
        assert_eq!(node.client_tunnels().await, 2);
        // A tunnel that was just opened for that reason is not replaced again.
        let third = node.connect("10.0.0.3:80").await;
        let (_, respond) = next(&mut requests).await;
        disown(respond);
        is_reset(Ok(third)).await;
        node.counts(&["connections_failed", "egress", "wrong_authority"])
            .await;
        assert_eq!(node.client_tunnels().await, 2);
    });
}

#[test]
fn it_is_not_sent_when_the_policy_has_changed_meanwhile() {
    run(async {
        let node = Node::new(ALLOW).await;
        let permits = Arc::new(Semaphore::new(0));
        let mut requests = requests(&node, permits.clone());
        let mut app = node.connect("10.0.0.3:80").await;
        app.write_all(b"secret").await.unwrap();
        sleep(A_WHILE).await;
        node.set_policy(NOTHING);
        permits.add_permits(9);
        let (mut stream, _respond) = next(&mut requests).await;
        assert!(!matches!(stream.data().await, Some(Ok(_))));
        is_reset(Ok(app)).await;
        node.counts(&["connections_failed", "egress", "no_policy"])
            .await;
    });
}

#[test]
fn an_application_that_only_closes_its_side_is_connected() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let mut app = node.connect("10.0.0.3:80").await;
        app.shutdown().await.unwrap();
        let (mut stream, respond) = next(&mut requests).await;
        nothing_comes(&mut stream).await;
        let mut answer = accept(respond);
        assert!(ends(&mut stream).await);
        answer.send_data("bye".into(), true).unwrap();
        let mut rest = String::new();
        app.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "bye");
    });
}

#[test]
fn an_application_that_resets_takes_its_request_back() {
    run(async {
        let node = Node::new(ALLOW).await;
        let mut requests = requests(&node, Arc::new(Semaphore::new(9)));
        let app = node.connect("10.0.0.3:80").await;
        let (_stream, mut respond) = next(&mut requests).await;
        crate::tunnel::socket::reset(app);
        let reset = poll_fn(|cx| respond.poll_reset(cx)).await;
        assert_eq!(reset.unwrap(), h2::Reason::CANCEL);
        node.counts(&["connections_failed", "egress", "reset"])
            .await;
    });
}
