//! What lies below HTTP/2.

use std::future::poll_fn;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::rig::{run, wires};

#[test]
fn what_was_written_goes_before_the_goodbye() {
    run(async {
        let [(mut near, control), (mut far, _far_control)] = wires().await;
        near.write_all(b"last words").await.unwrap();
        poll_fn(|cx| {
            control.close(cx);
            std::task::Poll::Ready(())
        })
        .await;
        let mut heard = String::new();
        far.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "last words");
    });
}
