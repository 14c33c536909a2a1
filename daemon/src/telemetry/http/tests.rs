use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Tell {
    readiness: watch::Sender<Readiness>,
    health: watch::Sender<Health>,
}

fn start(readiness: Readiness) -> (SocketAddr, Tell) {
    start_for(readiness, CONNECTION_TIMEOUT)
}

/// With connections that live no longer than this.
fn start_for(readiness: Readiness, lifetime: Duration) -> (SocketAddr, Tell) {
    let (readiness, ready) = watch::channel(readiness);
    let (health, healthy) = watch::channel(Health::starting());
    let told = Told {
        readiness: ready,
        health: healthy,
    };
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut server = HttpServer::bind(loopback, Metrics::default(), told).unwrap();
    server.lifetime = lifetime;
    let address = server.local_addr().unwrap();
    // Until the process ends.
    std::mem::forget(server.start(Confinement::default()).unwrap());
    (address, Tell { readiness, health })
}

async fn request(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_are_prometheus_text() {
    let (address, _tell) = start(Readiness::default());
    let answer = request(address, "GET /metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("content-type: text/plain; version=0.0.4"));
    assert!(answer.contains("# TYPE reeve_build_info gauge"));
}

#[tokio::test]
async fn readyz_says_what_is_missing_and_changes_with_it() {
    let (address, tell) = start(Readiness {
        missing: vec!["workload web has no certificate".into()],
    });
    let answer = request(address, "GET /readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("- workload web has no certificate\n"));
    assert!(
        request(address, "GET /healthz")
            .await
            .starts_with("HTTP/1.1 200")
    );

    tell.readiness.send(Readiness::default()).unwrap();
    assert!(
        request(address, "GET /readyz")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn healthz_says_what_does_not_answer_and_when_nothing_is_heard() {
    let (address, tell) = start(Readiness::default());
    tell.health.send_modify(|health| {
        health.problem = Some("tunnel worker 1 does not answer".into());
    });
    let answer = request(address, "GET /healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("tunnel worker 1"), "{answer}");

    tell.health.send_modify(|health| {
        health.problem = None;
        health.valid = Duration::ZERO;
    });
    let answer = request(address, "GET /healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("nothing has been heard"), "{answer}");
}

#[tokio::test]
async fn other_methods_and_paths_are_refused() {
    let (address, _tell) = start(Readiness::default());
    assert!(
        request(address, "POST /metrics")
            .await
            .starts_with("HTTP/1.1 405")
    );
    assert!(request(address, "GET /").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn a_client_that_sends_nothing_is_dropped() {
    let (address, _tell) = start(Readiness::default());
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer).await;
    assert!(read.is_err() || answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"));
}

#[tokio::test]
async fn whoever_takes_all_places_and_says_nothing_keeps_nobody_from_an_answer() {
    let (address, _tell) = start(Readiness::default());
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let moment = Duration::from_secs(2);
    for path in ["GET /healthz", "GET /readyz", "GET /metrics"] {
        let answer = timeout(moment, request(address, path)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    // The oldest have made room, the others are still served.
    let gone = timeout(moment, silent[0].read(&mut [0])).await.unwrap();
    assert!(!matches!(gone, Ok(1..)));
    let last = silent.last_mut().unwrap();
    last.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    assert_ne!(last.read(&mut [0; 64]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_connection_lives_no_longer_than_it_may_whatever_is_asked_on_it() {
    let lifetime = Duration::from_secs(1);
    let (address, _tell) = start_for(Readiness::default(), lifetime);
    let started = Instant::now();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let ask = async {
        loop {
            stream
                .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
                .await?;
            if stream.read(&mut [0; 1024]).await? == 0 {
                return io::Result::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // A reset, or an end.
    let _ = timeout(lifetime * 5, ask).await.expect("it has ended");
    assert!(started.elapsed() >= lifetime);
}

#[tokio::test]
async fn a_head_beyond_the_bound_is_refused() {
    let (address, _tell) = start(Readiness::default());
    let with = |bytes| format!("GET /{}", "x".repeat(bytes));
    let answer = request(address, &with(MAX_HEAD / 2)).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may hang up in the middle.
    let _ = stream.write_all(with(MAX_HEAD * 2).as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.starts_with("HTTP/1.1 4") && !answer.contains("404"),
        "{answer}"
    );
}
