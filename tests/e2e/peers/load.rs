//! Certificates, agents, servers and authorities that change under load.

use std::time::Duration;

use harness::{Daemon, Process, certs::Authority, holds_for, spire::Step};
use serde_json::Value;

use super::{Spired, delegated, serials, within};
use crate::arrange::{PORT, Pair, Policy, Probe, TRUST_DOMAIN, of, serve, tcp};

/// SPIRE replaces these after half a minute.
const A_MINUTE: &str = "1m";
/// For certificates of a minute to be replaced, with time to spare.
const ROTATION: u64 = 60;
/// Where the server echoes.
const ECHO: u16 = 8081;

/// Short connections one after the other, and one that lasts, from the client to the server.
struct Load {
    short: Probe,
    lasting: Process,
    _servers: [Process; 2],
}

// === impl Load ===

impl Load {
    fn start(pair: &Pair) -> Self {
        let servers = [
            serve(&pair.server, PORT, &["--mode", "answer"]),
            serve(&pair.server, ECHO, &[]),
        ];
        let there = pair.server.addresses();
        let to = there.port4(ECHO).to_string();
        let mut lasting = pair.client.spawn_peer(["heartbeat", &to, "--every", "100"]);
        lasting.wait_for("beat 1\n");
        Self {
            short: Probe::start(&pair.client, there.port4(PORT), &["--pause", "10"]),
            lasting,
            _servers: servers,
        }
    }

    /// Fails the test unless every connection has worked, and the one that lasts does.
    #[track_caller]
    fn nothing_failed(&mut self) {
        self.short.goes_on(200);
        self.short.all_worked();
        let ended = self.lasting.ended();
        assert!(ended.is_none(), "{ended:?}: {}", self.lasting.stderr());
    }
}

/// Both daemons, with certificates from the agents, and what they carry.
fn under_load(spired: &mut Spired) -> ([Daemon; 2], Load) {
    spired.grant_all();
    let pair = &spired.pair;
    let echo = [
        of(&pair.client).calls(&pair.server, tcp(ECHO)),
        of(&pair.server).hears(&pair.client, tcp(ECHO)),
    ];
    let [one, two] = spired.daemons(delegated);
    let named = |policy: Policy| policy.text().replace("\"of-", "\"echo-of-");
    let [out, into] = echo.map(named);
    let daemons = [one.policy(&out).start(), two.policy(&into).start()];
    (daemons, Load::start(pair))
}

/// Number of proofs of tunnels that have succeeded at both daemons.
fn proofs(daemons: &[Daemon; 2]) -> f64 {
    let of = |daemon: &Daemon| {
        let ok = [("result", "ok")];
        daemon.metrics().sum("reeve_tunnel_proofs_total", &ok)
    };
    daemons.iter().map(of).sum()
}

/// Authorities that the daemons trust.
fn authorities(daemon: &Daemon) -> Value {
    let status = daemon.status();
    let bundles = status["bundles"].as_array().unwrap();
    let own = bundles.iter().find(|it| it["trustDomain"] == TRUST_DOMAIN);
    own.map_or(Value::Null, |bundle| bundle["certificates"].clone())
}

fn trust(daemons: &[Daemon; 2], count: u64) {
    within(ROTATION, &format!("both trust {count} authorities"), || {
        daemons.iter().all(|daemon| authorities(daemon) == count)
    });
}

#[track_caller]
fn both_are_replaced(daemons: &[Daemon; 2]) {
    let before = serials(daemons);
    within(ROTATION, "both certificates are replaced", || {
        let now = serials(daemons);
        now[0] != before[0] && now[1] != before[1]
    });
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn certificates_of_a_minute_are_replaced_under_load_and_nothing_fails() {
    let mut spired = Spired::new(A_MINUTE);
    let (daemons, mut load) = under_load(&mut spired);
    for _ in 0..3 {
        both_are_replaced(&daemons);
        load.nothing_failed();
    }
    // Longer than the first certificates were valid.
    assert!(proofs(&daemons) > 0.0);
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn an_agent_and_a_server_that_are_restarted_break_nothing() {
    let mut spired = Spired::new(A_MINUTE);
    let (daemons, mut load) = under_load(&mut spired);

    spired.agents[0].stop();
    let away = ["cannot be reached", r#""identities":1"#];
    daemons[0].wait_for_log(&away);
    let before = serials(&daemons);
    spired.agents[0].start_again();
    daemons[0].wait_for_log(&["can be reached again", r#""identities":1"#]);
    within(ROTATION, "the restarted agent gives a certificate", || {
        serials(&daemons)[0] != before[0]
    });
    load.nothing_failed();

    spired.spire.stop();
    holds_for(Duration::from_secs(5), "both have certificates", || {
        serials(&daemons).iter().all(|it| *it != Value::Null)
    });
    spired.spire.start_again();
    both_are_replaced(&daemons);
    load.nothing_failed();
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn an_authority_is_replaced_under_load_and_nothing_fails() {
    let mut spired = Spired::new(A_MINUTE);
    let (daemons, mut load) = under_load(&mut spired);
    trust(&daemons, 1);
    spired.spire.authority(Step::Prepare);
    trust(&daemons, 2);
    load.nothing_failed();
    spired.spire.authority(Step::Activate);
    let before = serials(&daemons);
    spired.spire.authority(Step::Taint);
    // Sooner than after half of their lifetime.
    within(
        ROTATION,
        "what the tainted authority has signed is replaced",
        || {
            let now = serials(&daemons);
            now[0] != before[0] && now[1] != before[1]
        },
    );
    // Of the tunnel that lasts: by certificates of the next authority.
    let proven = proofs(&daemons);
    within(2 * ROTATION, "the tunnel is proven again", || {
        proofs(&daemons) >= proven + 2.0
    });
    load.nothing_failed();
    spired.spire.authority(Step::Revoke);
    trust(&daemons, 1);
    load.nothing_failed();
}

#[test]
#[ignore = "needs a SPIRE: run `cargo xtask peers`"]
fn an_authority_above_the_servers_is_replaced_under_load_and_nothing_fails() {
    let mut spired = Spired::with_upstream(A_MINUTE, Some(&Authority::root(TRUST_DOMAIN)));
    let (daemons, mut load) = under_load(&mut spired);
    trust(&daemons, 1);
    spired.spire.put_upstream(&Authority::root(TRUST_DOMAIN));
    spired.spire.authority(Step::Prepare);
    trust(&daemons, 2);
    spired.spire.authority(Step::Activate);
    both_are_replaced(&daemons);
    let proven = proofs(&daemons);
    within(2 * ROTATION, "the tunnel is proven again", || {
        proofs(&daemons) >= proven + 2.0
    });
    load.nothing_failed();
    spired.spire.upstream(Step::Taint);
    spired.spire.upstream(Step::Revoke);
    trust(&daemons, 1);
    both_are_replaced(&daemons);
    load.nothing_failed();
}
