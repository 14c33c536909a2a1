//! Load balancers between a far end that answers and one that is down: what they are told at
//! `connect()` lets them turn to the other one without losing a request.

use std::net::SocketAddr;

use harness::{HaProxy, Nginx, Workload};

use crate::arrange::{PORT, Pair, TCP, of, tcp};

/// Where nobody listens.
const DOWN: u16 = PORT + 1;
/// Of the balancer.
const NEAR: u16 = 8080;

/// The far ends, both allowed, the first of which answers.
struct Far {
    pair: Pair,
    _reeve: [harness::Daemon; 2],
    _answers: Nginx,
}

impl Far {
    fn start() -> Self {
        let pair = Pair::new();
        let (client, server) = (&pair.client, &pair.server);
        let calls = of(client).calls(server, TCP).calls(server, tcp(DOWN));
        let hears = of(server).hears(client, TCP).hears(client, tcp(DOWN));
        let reeve = [
            pair.at_one().policy(&calls.text()).start(),
            pair.at_two().policy(&hears.text()).start(),
        ];
        let answers = Nginx::start(server, PORT, "an answer");
        Self {
            pair,
            _reeve: reeve,
            _answers: answers,
        }
    }

    fn ends(&self) -> [SocketAddr; 2] {
        let addresses = self.pair.server.addresses();
        [addresses.port4(PORT), addresses.port4(DOWN)]
    }
}

/// Requests one after the other, none of which may be sent twice; how many had no answer.
fn lost(client: &Workload, requests: usize) -> usize {
    let url = format!("http://127.0.0.1:{NEAR}/[1-{requests}]");
    let ask = [
        "curl",
        "--silent",
        "--data",
        "not twice",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}\n",
        "--no-keepalive",
        &url,
    ];
    let codes = client.exec(ask).ok();
    let codes: Vec<_> = codes.lines().collect();
    assert_eq!(codes.len(), requests);
    codes.iter().filter(|code| **code != "200").count()
}

#[test]
fn nginx_turns_to_the_server_that_is_up() {
    let far = Far::start();
    let _near = Nginx::balance(&far.pair.client, NEAR, &far.ends());
    // The first that meets the one that is down; nginx leaves that alone for 10 s then.
    let lost = lost(&far.pair.client, 100);
    assert!(lost <= 1, "{lost}");
}

#[test]
fn haproxy_turns_to_the_server_that_is_up() {
    let far = Far::start();
    let _near = HaProxy::balance(&far.pair.client, NEAR, &far.ends());
    let begun = std::time::Instant::now();
    let lost = lost(&far.pair.client, 200);
    // Half of them meet the one that is down. Those that are let through to try are lost: the first
    // ones after 50, 100, 200 ms and so on, then one a second.
    let tried = 6 + begun.elapsed().as_secs() as usize;
    assert!(lost <= tried, "{lost} of 200 in {:?}", begun.elapsed());
}
