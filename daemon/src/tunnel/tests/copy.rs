//! Bytes, ends, resets and pressure through one tunnel.

use std::{
    hash::{DefaultHasher, Hasher},
    time::{Duration, Instant},
};

use reeve_common::Reason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::spawn_local,
    time::{sleep, timeout},
};

use super::rig::{Pair, run};
use crate::config::{Limits, Timeouts};

const BULK: usize = 64 << 20;

async fn pair() -> Pair {
    Pair::new(Limits::default(), Timeouts::default()).await
}

/// Sends bytes that repeat at no power of two, ends, and gives their hash.
async fn send_bulk(mut stream: impl tokio::io::AsyncWrite + Unpin, length: usize) -> u64 {
    let pattern: Vec<u8> = (0..251_u8).cycle().take(100_003).collect();
    let (mut hash, mut left) = (DefaultHasher::new(), length);
    while left > 0 {
        let part = &pattern[..left.min(pattern.len())];
        stream.write_all(part).await.unwrap();
        part.iter().for_each(|byte| hash.write_u8(*byte));
        left -= part.len();
    }
    stream.shutdown().await.unwrap();
    hash.finish()
}

/// Reads to the end, and gives the hash and the length.
async fn receive_bulk(mut stream: impl tokio::io::AsyncRead + Unpin) -> (u64, usize) {
    let (mut hash, mut length) = (DefaultHasher::new(), 0);
    let mut buffer = vec![0; 50_000];
    loop {
        let read = stream.read(&mut buffer).await.unwrap();
        if read == 0 {
            return (hash.finish(), length);
        }
        buffer[..read].iter().for_each(|byte| hash.write_u8(*byte));
        length += read;
    }
}

#[test]
fn bytes_arrive_as_they_were_sent_in_both_directions_at_once() {
    run(async {
        let pair = pair().await;
        let pipe = pair.pipe().await;
        let (near_read, near_write) = pipe.near.into_split();
        let (far_read, far_write) = pipe.far.into_split();
        let (there, arrived, back, came) = tokio::join!(
            spawn_local(send_bulk(near_write, BULK)),
            spawn_local(receive_bulk(far_read)),
            spawn_local(send_bulk(far_write, BULK)),
            spawn_local(receive_bulk(near_read)),
        );
        assert_eq!((there.unwrap(), BULK), arrived.unwrap());
        assert_eq!((back.unwrap(), BULK), came.unwrap());
        for end in pipe.ends {
            assert_eq!(end.await, Ok(Reason::Closed));
        }
    });
}

#[test]
fn many_streams_share_a_tunnel() {
    run(async {
        let pair = pair().await;
        let mut pipes = Vec::new();
        for _ in 0..100 {
            pipes.push(pair.pipe().await);
        }
        let transfers: Vec<_> = pipes
            .into_iter()
            .map(|pipe| {
                spawn_local(async move {
                    let (_near_read, near_write) = pipe.near.into_split();
                    let (sent, received) =
                        tokio::join!(send_bulk(near_write, 300_000), receive_bulk(pipe.far));
                    assert_eq!((sent, 300_000), received);
                })
            })
            .collect();
        for transfer in transfers {
            transfer.await.unwrap();
        }
    });
}

#[test]
fn small_frames_that_pile_up_behind_an_application_do_not_end_the_tunnel() {
    run(async {
        const FRAMES: usize = 30_000;
        for line in [b"a line of some log\n".as_slice(), b"."] {
            let pair = pair().await;
            let (mut send, _recv, mut app) = pair.half_pipe().await;
            for _ in 0..FRAMES {
                send.send_data(line.into(), false).unwrap();
            }
            send.send_data(bytes::Bytes::new(), true).unwrap();
            // Another stream of the tunnel feels nothing.
            let mut other = pair.pipe().await;
            for _ in 0..20 {
                other.near.write_all(b"?").await.unwrap();
                assert_eq!(other.far.read_u8().await.unwrap(), b'?');
                sleep(Duration::from_millis(10)).await;
            }
            // What piled up is whole, and in order.
            let mut received = Vec::new();
            app.read_to_end(&mut received).await.unwrap();
            assert!(received == line.repeat(FRAMES), "{} bytes", received.len());
        }
    });
}

async fn half_closed(mut ended: TcpStream, mut open: TcpStream) {
    ended.write_all(b"all I have").await.unwrap();
    ended.shutdown().await.unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "all I have");
    sleep(Duration::from_millis(50)).await;
    open.write_all(b"and the answer").await.unwrap();
    drop(open);
    let mut text = String::new();
    ended.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "and the answer");
}

#[test]
fn a_direction_goes_on_after_the_other_has_ended() {
    run(async {
        let pair = pair().await;
        let pipe = pair.pipe().await;
        half_closed(pipe.near, pipe.far).await;
        let pipe = pair.pipe().await;
        half_closed(pipe.far, pipe.near).await;
    });
}

#[test]
fn a_reset_reaches_the_other_application() {
    run(async {
        let pair = pair().await;
        for near_resets in [true, false] {
            let pipe = pair.pipe().await;
            let (resets, mut sees) = match near_resets {
                true => (pipe.near, pipe.far),
                false => (pipe.far, pipe.near),
            };
            socket2::SockRef::from(&resets)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(resets);
            let error = sees.read(&mut [0; 16]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            for end in pipe.ends {
                assert_eq!(end.await, Ok(Reason::Reset));
            }
        }
    });
}

#[test]
fn what_the_peer_has_said_before_it_cancels_is_the_applications() {
    run(async {
        let said = vec![7; 200 << 10];
        for cancelled in [h2::Reason::CANCEL, h2::Reason::NO_ERROR] {
            let pair = pair().await;
            let (mut send, _recv, mut app) = pair.half_pipe().await;
            send.send_data(said.clone().into(), false).unwrap();
            // More than the kernel takes: some of it waits for the application.
            sleep(Duration::from_millis(300)).await;
            send.send_reset(cancelled);
            let mut received = Vec::new();
            app.read_to_end(&mut received).await.unwrap();
            assert!(received == said, "{} bytes", received.len());
        }
    });
}

#[test]
fn what_one_side_says_before_it_resets_reaches_the_other() {
    run(async {
        let pair = pair().await;
        for near_resets in [true, false] {
            let pipe = pair.pipe().await;
            let (mut resets, mut sees) = match near_resets {
                true => (pipe.near, pipe.far),
                false => (pipe.far, pipe.near),
            };
            // Of the other direction nothing is read, and its writer goes on.
            let (mut seen, mut writes) = sees.split();
            let said = vec![7; 60_000];
            let mut received = Vec::new();
            let (_, error, ()) = tokio::join!(
                async { while writes.write_all(&[0; 9_000]).await.is_ok() {} },
                async { seen.read_to_end(&mut received).await },
                async {
                    sleep(Duration::from_millis(100)).await;
                    resets.write_all(&said).await.unwrap();
                    // With something unread, this is a reset.
                    drop(resets);
                }
            );
            assert!(received == said, "{} bytes", received.len());
            if let Err(error) = error {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
            for end in pipe.ends {
                assert_eq!(end.await, Ok(Reason::Reset));
            }
        }
    });
}

#[test]
fn what_a_tunnel_has_brought_before_it_breaks_reaches_the_application() {
    run(async {
        let said = vec![7; 200 << 10];
        let pair = pair().await;
        let (mut send, _recv, mut app) = pair.half_pipe().await;
        send.send_data(said.clone().into(), false).unwrap();
        // More than the kernel takes: some of it waits for the application.
        sleep(Duration::from_millis(300)).await;
        send.send_reset(h2::Reason::CONNECT_ERROR);
        sleep(Duration::from_millis(300)).await;
        let mut received = Vec::new();
        let error = app.read_to_end(&mut received).await.unwrap_err();
        assert!(received == said, "{} bytes", received.len());
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn of_a_workload_that_has_ended_what_it_said_arrives_and_the_connection_ends() {
    run(async {
        let pair = pair().await;
        for near_ends in [true, false] {
            let pipe = pair.pipe().await;
            let (mut ends, mut sees, which) = match near_ends {
                true => (pipe.near, pipe.far, 0),
                false => (pipe.far, pipe.near, 1),
            };
            let said = vec![7; 3 << 20];
            let (written, received) = tokio::join!(
                async {
                    let written = ends.write_all(&said).await;
                    drop(ends);
                    pipe.connections[which].set_forsaken(true);
                    written
                },
                async {
                    sleep(Duration::from_millis(200)).await;
                    let mut received = Vec::new();
                    sees.read_to_end(&mut received).await.map(|_| received)
                }
            );
            written.unwrap();
            assert!(received.unwrap() == said);
            // Though the other side says nothing, and does not end.
            let [near, far] = pipe.ends;
            let end = if near_ends { near } else { far };
            assert_eq!(end.await, Ok(Reason::Closed));
        }
    });
}

#[test]
fn a_stopped_connection_is_reset_with_its_reason() {
    run(async {
        let pair = pair().await;
        let mut pipe = pair.pipe().await;
        pipe.connections[0].stop(Reason::Revoked);
        for app in [&mut pipe.near, &mut pipe.far] {
            let error = app.read(&mut [0; 16]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let [near, far] = pipe.ends;
        assert_eq!(near.await, Ok(Reason::Revoked));
        assert_eq!(far.await, Ok(Reason::Reset));
    });
}

/// Writes until nothing is taken for a while, and gives the number of bytes.
async fn fill(stream: &mut TcpStream) -> usize {
    let (chunk, mut written) = (vec![7; 64 << 10], 0);
    while let Ok(result) = timeout(Duration::from_millis(300), stream.write(&chunk)).await {
        written += result.unwrap();
    }
    written
}

#[test]
fn a_reader_that_stalls_stops_the_writer_and_loses_nothing() {
    run(async {
        let pair = pair().await;
        let mut pipe = pair.pipe().await;
        let mut written = fill(&mut pipe.near).await;
        // Sockets' own buffers on both ends, the stream's window, and what HTTP/2 holds.
        assert!(written < 32 << 20, "{written} bytes were taken");
        pipe.near.shutdown().await.unwrap();
        while let Ok(Ok(read @ 1..)) =
            timeout(Duration::from_secs(1), pipe.far.read(&mut [0; 65536])).await
        {
            written -= read;
        }
        assert_eq!(written, 0);
    });
}

#[test]
fn a_reset_behind_bytes_that_wait_for_a_reader_reaches_it() {
    run(async {
        let pair = pair().await;
        tokio::task::spawn_local(crate::tunnel::sweep::run(pair.worker.clone()));
        let mut pipe = pair.pipe().await;
        fill(&mut pipe.near).await;
        socket2::SockRef::from(&pipe.near)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(pipe.near);
        // The reader still reads nothing.
        let [near, far] = pipe.ends;
        let ended = timeout(Duration::from_secs(10), async { (near.await, far.await) });
        assert_eq!(ended.await, Ok((Ok(Reason::Reset), Ok(Reason::Reset))));
    });
}

#[test]
fn readers_that_stall_do_not_stop_the_others() {
    run(async {
        let pair = pair().await;
        let mut stalled = Vec::new();
        for _ in 0..16 {
            let mut pipe = pair.pipe().await;
            fill(&mut pipe.near).await;
            stalled.push(pipe);
        }
        tokio::task::spawn_local(crate::tunnel::sweep::run(pair.worker.clone()));
        // More than the window of a whole tunnel is outstanding now.
        let start = Instant::now();
        let mut pipe = pair.pipe().await;
        let (sent, received) = {
            let (_read, write) = pipe.near.split();
            tokio::join!(send_bulk(write, 8 << 20), receive_bulk(&mut pipe.far))
        };
        assert_eq!((sent, 8 << 20), received);
        assert!(start.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn a_connection_that_carries_nothing_is_ended() {
    run(async {
        let timeouts = Timeouts {
            idle: Duration::from_secs(1),
            ..Timeouts::default()
        };
        let pair = Pair::new(Limits::default(), timeouts).await;
        let pipe = pair.pipe().await;
        tokio::task::spawn_local(crate::tunnel::sweep::run(pair.worker.clone()));
        let [near, _far] = pipe.ends;
        assert_eq!(near.await, Ok(Reason::Timeout));
    });
}

#[test]
fn a_tunnel_that_is_retired_lets_its_streams_end() {
    run(async {
        let pair = pair().await;
        let pipe = pair.pipe().await;
        for link in pair.links() {
            link.retire();
        }
        sleep(Duration::from_millis(50)).await;
        half_closed(pipe.near, pipe.far).await;
        for end in pipe.ends {
            assert_eq!(end.await, Ok(Reason::Closed));
        }
    });
}
