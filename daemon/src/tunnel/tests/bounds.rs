//! Bounds of a tunnel: what each end lets the other have outstanding, and what it holds for one that
//! does not read.

use std::time::Duration;

use http::{HeaderValue, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{
    node::{ALLOW, Node},
    rig::{Pair, run, unread_wire},
};
use crate::{
    config::{Limits, Timeouts},
    tunnel::{client::SEND_BUFFER, driver::MOST_OUTSTANDING},
};

const KIB: usize = 1 << 10;
/// For what is on its way to arrive, or for what must not happen.
const MOMENT: Duration = Duration::from_millis(300);

/// What each of `number` streams may send at once, from either end, of the bytes that it wants to.
async fn capacities(
    limits: Limits,
    number: usize,
    wanted: usize,
    stalled: usize,
) -> [Vec<usize>; 2] {
    let pair = Pair::new(limits, Timeouts::default()).await;
    for link in pair.links() {
        link.set_stalled(stalled);
    }
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for _ in 0..number {
        let [one, other] = pair.stream().await;
        near.push(one);
        far.push(other);
    }
    // What is granted goes to who asks, one after the other.
    for (send, _) in near.iter_mut().chain(&mut far) {
        send.reserve_capacity(wanted);
    }
    sleep(MOMENT).await;
    [near, far].map(|end| end.iter().map(|(send, _)| send.capacity()).collect())
}

#[test]
fn a_stream_and_a_tunnel_have_no_more_outstanding_than_their_windows() {
    run(async {
        let (stream, tunnel) = (128 * KIB, 320 * KIB);
        let limits = Limits {
            stream_window: stream as u32,
            tunnel_window: tunnel as u32,
            ..Limits::default()
        };
        for end in capacities(limits, 4, SEND_BUFFER, 0).await {
            assert_eq!(end.iter().sum::<usize>(), tunnel, "{end:?}");
            assert_eq!(end.iter().max(), Some(&stream), "{end:?}");
        }
    });
}

#[test]
fn for_streams_that_stall_a_tunnel_has_more_outstanding_and_not_without_end() {
    run(async {
        let limits = Limits {
            streams_per_tunnel: 300,
            ..Limits::default()
        };
        for end in capacities(limits, 300, SEND_BUFFER, 300).await {
            assert_eq!(end.iter().sum::<usize>(), MOST_OUTSTANDING as usize);
        }
    });
}

#[test]
fn of_one_stream_no_more_is_held_than_a_send_buffer_whatever_its_window() {
    run(async {
        let limits = Limits {
            stream_window: 8 << 20,
            tunnel_window: 8 << 20,
            ..Limits::default()
        };
        for end in capacities(limits, 1, 8 << 20, 0).await {
            assert_eq!(end, [SEND_BUFFER]);
        }
    });
}

#[test]
fn for_a_peer_that_reads_nothing_a_tunnel_holds_next_to_nothing() {
    run(async {
        let (mut wire, unread) = unread_wire().await;
        socket2::SockRef::from(&unread)
            .set_recv_buffer_size(4 * KIB)
            .unwrap();
        let (frame, mut written) = (vec![7; 16 * KIB], 0);
        while let Ok(result) = timeout(MOMENT, wire.write(&frame)).await {
            written += result.unwrap();
            assert!(written < 32 << 20, "it is taken without end");
        }
        assert!(written > 0);
    });
}

#[test]
fn an_answer_with_headers_without_end_is_none() {
    run(async {
        let pair = Pair::new(Limits::default(), Timeouts::default()).await;
        for (bytes, taken) in [(8 * KIB, true), (32 * KIB, false)] {
            let (answer, _send, (_request, mut respond)) = pair.asked().await;
            let mut response = Response::new(());
            let header = HeaderValue::from_bytes(&vec![b'x'; bytes]).unwrap();
            response.headers_mut().insert("baggage", header);
            let _stream = respond.send_response(response, false).unwrap();
            let answered = timeout(Duration::from_secs(10), answer).await.unwrap();
            assert_eq!(answered.is_ok(), taken, "{bytes}: {answered:?}");
        }
    });
}

#[test]
fn tunnels_to_one_peer_are_few_and_who_comes_after_waits_for_a_place() {
    run(async {
        let limits = Limits {
            workers: 1,
            streams_per_tunnel: 2,
            tunnels_per_peer: 2,
            ..Limits::default()
        };
        let node = Node::with(ALLOW, limits, Timeouts::default()).await;
        let listener = node.listen("10.0.0.2:80");
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                spawn_local(async move {
                    stream.write_all(b"!").await.unwrap();
                    // Until the client goes.
                    let _ = stream.read(&mut [0]).await;
                });
            }
        });
        let mut waiting = Vec::new();
        for _ in 0..6 {
            waiting.push(node.connect("10.0.0.2:80").await);
        }
        let mut standing = Vec::new();
        stand(&mut waiting, &mut standing).await;
        assert_eq!((standing.len(), waiting.len()), (4, 2));
        assert_eq!(node.client_tunnels().await, 2);
        standing.truncate(3);
        stand(&mut waiting, &mut standing).await;
        assert_eq!((standing.len(), waiting.len()), (4, 1));
        assert_eq!(node.client_tunnels().await, 2);
    });
}

/// Moves the connections on which the far end has said something.
async fn stand(waiting: &mut Vec<TcpStream>, standing: &mut Vec<TcpStream>) {
    for mut stream in std::mem::take(waiting) {
        let said = timeout(Duration::from_secs(1), stream.read_u8()).await;
        match said {
            Ok(said) => {
                said.unwrap();
                standing.push(stream);
            }
            Err(_) => waiting.push(stream),
        }
    }
}
