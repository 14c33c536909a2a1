//! Load balancers between a far end that answers and one whose node is gone: they turn to the other one,
//! and lose no request of those that must not be sent twice.

use std::net::SocketAddr;

use harness::{HaProxy, Nginx, Workload};
use serde_json::json;

use crate::arrange::{PORT, Pair, TCP, of};

/// An address of the server's where nobody is.
const GONE: &str = "10.77.0.199";
/// After which that is found out.
const PATIENCE: &str = "200ms";
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
        let reeve = [
            pair.at_one()
                .policy(&of(client).calls(server, TCP).text())
                .set("/peers/0/addresses/2", json!(GONE))
                .set("/timeouts/connect", json!(PATIENCE))
                .start(),
            pair.at_two()
                .policy(&of(server).hears(client, TCP).text())
                .start(),
        ];
        let answers = Nginx::start(server, PORT, "an answer");
        Self {
            pair,
            _reeve: reeve,
            _answers: answers,
        }
    }

    fn ends(&self) -> [SocketAddr; 2] {
        let gone = GONE.parse().expect("it is an address");
        let answers = self.pair.server.addresses().port4(PORT);
        [answers, SocketAddr::new(gone, PORT)]
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
fn nginx_turns_to_the_node_that_answers() {
    let far = Far::start();
    let _near = Nginx::balance(&far.pair.client, NEAR, &far.ends());
    // The first that meets the other one, which nginx leaves alone for 10 s then.
    let lost = lost(&far.pair.client, 100);
    assert!(lost <= 1, "{lost}");
}

#[test]
fn haproxy_turns_to_the_node_that_answers() {
    let far = Far::start();
    let _near = HaProxy::balance(&far.pair.client, NEAR, &far.ends());
    // Half of them meet the other one, of which the first may have been sent before that is found out.
    let lost = lost(&far.pair.client, 200);
    assert!(lost <= 1, "{lost}");
}
