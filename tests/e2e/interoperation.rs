//! Istio's ztunnel at the other end of a tunnel, as far as its manners can be imitated: its HTTP/2
//! settings, no server name, and the headers that it adds. The real one was tried by hand: see
//! docs/hbone.md.

use std::time::Duration;

use bytes::Bytes;
use harness::{
    eventually,
    hbone::raw::{connect, frame, settings},
};
use http::{Method, Request};
use time::OffsetDateTime;

use crate::opposite::{CLIENT, Guarded};

const MIB: u32 = 1 << 20;

/// Answer to the PING by which HTTP/2's library finds out whether its GOAWAY has arrived.
fn pong_of_the_library() -> Vec<u8> {
    const PING: u8 = 6;
    const ACK: u8 = 1;
    let payload = [0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];
    frame(PING, ACK, 0, &payload)
}

#[test]
fn a_client_with_ztunnels_settings_and_headers_is_served() {
    let guarded = Guarded::start();
    let tunnel = guarded
        .right_client()
        .tunnel_with(guarded.tunnel_port(), &as_ztunnel())
        .unwrap();
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(guarded.authority())
        .header(
            "baggage",
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.pod.name=client,\
             service.name=client,service.version=latest,cloud.region=,cloud.availability_zone=",
        )
        .header("forwarded", "for=\"10.0.0.1:49152\";host=server.example:80")
        .header(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
        )
        .body(())
        .unwrap();
    let mut stream = tunnel.ask(request).unwrap();
    assert_eq!(stream.status, 200);
    // More than a frame of reeve's, and than its window at the start, comes through whole.
    let sent = Bytes::from(vec![7; 3 * MIB as usize]);
    stream.send(sent.clone()).unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.receive().unwrap(), sent);
}

#[test]
fn a_request_that_crosses_the_goaway_of_an_old_tunnel_is_served() {
    let guarded = Guarded::start();
    // A tunnel is old at half of what is left of its certificates.
    let passing = guarded.root.leaf_with(CLIENT, |params| {
        params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(16);
    });
    let mut client = guarded.client(&passing).raw(guarded.tunnel_port()).unwrap();
    let request = |stream| connect(stream, &guarded.authority());
    client.send(&[settings(&[]), request(1)].concat()).unwrap();
    eventually("the client is told to open another tunnel", || {
        client.seen().goaway == Some(0)
    });
    // In ztunnel the answer to a PING overtakes requests that are queued already, and it does not
    // ask again.
    client
        .send(&[pong_of_the_library(), request(3)].concat())
        .unwrap();
    eventually("both requests are answered", || {
        client.seen().connected == 2
    });
}

fn as_ztunnel() -> h2::client::Builder {
    let mut settings = h2::client::Builder::new();
    settings
        .initial_window_size(4 * MIB)
        .initial_connection_window_size(16 * MIB)
        .max_frame_size(MIB)
        .initial_max_send_streams(100)
        .max_header_list_size(16 << 10)
        .max_send_buffer_size(4 * MIB as usize)
        .enable_push(false);
    settings
}
