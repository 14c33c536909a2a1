//! Tunnels whose identities are proven again while they carry connections: these live on while the
//! certificates of both ends are replaced, late, at once, or by those of another root.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use harness::{
    Daemon, FileIssuer, Process, Reeve, Workload,
    certs::{self, Authority, Issued},
    eventually,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::arrange::{PORT, Pair, say, send, serve};

/// Of the certificates of both ends.
const LIFETIME: Duration = Duration::from_secs(10);
/// After which an end gets its next one.
const RENEWED_AFTER: Duration = Duration::from_secs(4);
/// Between two words of a connection that says little.
const RARELY: Duration = Duration::from_secs(5);
const TRUST_DOMAIN: &str = "example.org";

#[test]
fn connections_live_through_ten_renewals_of_both_ends_at_the_same_moment() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    for _ in 0..11 {
        proven.wait_and_renew(&[&proven.pair.client, &proven.pair.server]);
        beating.push(proven.beat(false));
    }
    goes_on(&mut beating);
    proven.is_in_one_tunnel();
    for daemon in &proven.daemons {
        daemon.wait_for_metric("reeve_tunnel_proofs_total", &[("result", "ok")], 11.0);
    }
    let status = proven.daemons[0].command(["status"]).stdout;
    assert!(status.contains("PROOFS"), "{status}");
}

#[test]
fn a_pair_has_the_same_tunnels_after_a_hundred_renewals_with_a_long_connection_opened_at_each() {
    const RENEWALS: usize = 100;
    const EVERY: Duration = Duration::from_millis(900);
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    let mut longest = 2;
    for _ in 0..RENEWALS {
        let begun = Instant::now();
        proven.renew(&proven.pair.client);
        proven.renew(&proven.pair.server);
        beating.push(proven.rarely());
        longest = longest.max(proven.tunnels().len());
        thread::sleep(EVERY.saturating_sub(begun.elapsed()));
    }
    // A word from each now, and all of them are where they were.
    thread::sleep(RARELY);
    for beating in &mut beating {
        assert!(beating.ended().is_none(), "{}", beating.stderr());
    }
    proven.is_in_one_tunnel();
    assert_eq!(longest, 2, "tunnels at one moment");
    let streams = |tunnel: &Value| tunnel["streams"].as_u64();
    let streams: u64 = proven.tunnels().iter().filter_map(streams).sum();
    assert_eq!(streams, RENEWALS as u64 + 2);
    for daemon in &proven.daemons {
        let ok = [("result", "ok")];
        daemon.wait_for_metric("reeve_tunnel_proofs_total", &ok, RENEWALS as f64);
    }
}

#[test]
fn a_server_that_renews_late_is_asked_again() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    for _ in 0..3 {
        proven.wait_and_renew(&[&proven.pair.client]);
        // 2.5 s before its certificate expires, which is late for a client that asks at half of it.
        thread::sleep(LIFETIME - RENEWED_AFTER - Duration::from_millis(2500));
        proven.renew(&proven.pair.server);
    }
    thread::sleep(Duration::from_secs(2));
    goes_on(&mut beating);
    let same = [("role", "client"), ("result", "same")];
    proven.daemons[0].wait_for_metric("reeve_tunnel_proofs_total", &same, 1.0);
}

#[test]
fn a_server_that_has_renewed_says_so_long_before_it_would_be_asked() {
    let proven = Proven::made(false, Duration::from_secs(300), |reeve| reeve);
    let mut beating = proven.beating();
    let proofs = || {
        let labels = [("role", "client"), ("result", "ok")];
        let metrics = proven.daemons[0].metrics();
        metrics.sum("reeve_tunnel_proofs_total", &labels)
    };
    // The client's last certificate may still be on its way.
    thread::sleep(Duration::from_secs(2));
    let before = proofs();
    proven.renew(&proven.pair.server);
    // The answer to the next connection has it.
    eventually("a proof", || {
        let _next = proven.beat(false);
        proofs() > before
    });
    goes_on(&mut beating);
}

#[test]
fn a_proof_that_fails_is_tried_at_growing_intervals_and_told() {
    let proven = Proven::made(false, Duration::from_secs(300), |reeve| reeve);
    let mut beating = proven.beating();
    let [one, two] = &proven.daemons;
    let attempts = || {
        let client = [("role", "client")];
        one.metrics().sum("reeve_tunnel_proofs_total", &client)
    };
    // The client's last certificate may still be on its way.
    thread::sleep(Duration::from_secs(2));
    // The server's next certificate is of an authority that its own node alone trusts.
    let next = Authority::root(TRUST_DOMAIN);
    let both = proven.folder.join("both.pem");
    put(
        &both,
        &(proven.root.certificate_pem() + &next.certificate_pem()),
    );
    let mut settings: Value =
        serde_json::from_str(&fs::read_to_string(two.config()).unwrap()).unwrap();
    settings["certificates"]["trustBundles"] = json!({TRUST_DOMAIN: both});
    fs::write(two.config(), settings.to_string()).unwrap();
    two.command(["reload"]).ok();
    let before = attempts();
    issue(&proven.folder, &next, &proven.pair.server, proven.lifetime);
    // Each answer to a connection says that a proof is wanted.
    let to = proven.pair.server.addresses().port4(PORT);
    let next = || say(&proven.pair.client, to, "more");
    eventually("the first has failed", || {
        next();
        attempts() > before
    });
    let begun = Instant::now();
    let mut connections = 0;
    while begun.elapsed() < Duration::from_secs(10) {
        next();
        connections += 1;
        // What is looked for below must not be pushed out of the newest events.
        thread::sleep(Duration::from_millis(50));
    }
    assert!(connections > 20, "{connections}");
    goes_on(&mut beating);
    // In each tunnel that carried some of these: the first, then after 0.5, 1, 2 and 4 s.
    let tunnels = proven.tunnels();
    let failures = |tunnel: &Value| tunnel["proofsFailed"].as_u64().unwrap();
    assert!(
        tunnels.iter().all(|tunnel| failures(tunnel) <= 5),
        "{tunnels:#?}"
    );
    let failed = tunnels.iter().find(|tunnel| failures(tunnel) >= 3);
    let failed = failed.unwrap_or_else(|| panic!("{connections} connections: {tunnels:#?}"));
    let error = failed["proofError"].as_str().unwrap();
    let page = one.command(["status"]).ok();
    assert!(
        page.contains(&format!("proofs in succession have failed: {error}")),
        "{page}"
    );
    let seen = one.command(["observe", "--last", "1000", "--json"]).ok();
    let unproven = seen
        .lines()
        .find(|line| line.contains(r#""event":"unproven""#));
    assert!(
        unproven.is_some_and(|line| line.contains("/sa/server")),
        "{seen}"
    );
}

#[test]
fn a_source_that_is_away_for_longer_than_one_proof_costs_no_connection() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    thread::sleep(LIFETIME - Duration::from_secs(3));
    for _ in 0..2 {
        proven.renew(&proven.pair.client);
        proven.renew(&proven.pair.server);
        thread::sleep(RENEWED_AFTER);
    }
    goes_on(&mut beating);
}

#[test]
fn a_source_that_is_away_for_good_ends_connections_with_their_certificates() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    let renewed = Instant::now();
    proven.wait_and_renew(&[&proven.pair.client]);
    eventually("the connections have ended", || {
        beating.iter_mut().all(|beating| beating.ended().is_some())
    });
    let after = renewed.elapsed();
    assert!(
        after > RENEWED_AFTER && after < LIFETIME + Duration::from_secs(2),
        "{after:?}"
    );
    let expired = [("reason", "certificate_expired")];
    let closed = |daemon: &Daemon| daemon.metrics().sum("reeve_tunnels_closed_total", &expired);
    eventually("it is counted", || {
        proven.daemons.iter().map(closed).sum::<f64>() >= 1.0
    });
}

#[test]
fn a_daemon_that_stands_still_over_a_proof_costs_no_connection() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    for daemon in &proven.daemons {
        let ends = [&proven.pair.client, &proven.pair.server];
        let _ = ends.map(|end| proven.renew(end));
        thread::sleep(RENEWED_AFTER - Duration::from_secs(1));
        daemon.signal(Signal::SIGSTOP);
        let _ = ends.map(|end| proven.renew(end));
        thread::sleep(RENEWED_AFTER);
        daemon.signal(Signal::SIGCONT);
        thread::sleep(Duration::from_secs(2));
        goes_on(&mut beating);
    }
}

#[test]
fn a_cut_over_an_expiry_ends_connections_with_their_certificates() {
    let proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    let pair = &proven.pair;
    pair.server.cut(&pair.network);
    thread::sleep(LIFETIME + Duration::from_secs(2));
    for end in [&pair.client, &pair.server] {
        proven.renew(end);
    }
    eventually("the connections have ended", || {
        beating.iter_mut().all(|beating| beating.ended().is_some())
    });
    for daemon in &proven.daemons {
        let expired = [("reason", "certificate_expired")];
        daemon.wait_for_metric("reeve_tunnels_closed_total", &expired, 2.0);
    }
    pair.server.mend(&pair.network);
    for end in [&pair.client, &pair.server] {
        proven.renew(end);
    }
    let to = pair.server.addresses().port4(PORT);
    eventually("a new connection works", || {
        let words = ["--text", "again", "--patience", "3"];
        send(&pair.client, to, &words).status.success()
    });
}

#[test]
fn connections_of_daemons_that_were_taken_over_live_through_renewals() {
    let mut proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    let old: Vec<_> = proven.daemons.iter_mut().map(Daemon::take_over).collect();
    for _ in 0..5 {
        proven.wait_and_renew(&[&proven.pair.client, &proven.pair.server]);
        // New ones go through the new daemons, and do not end the old tunnels.
        proven.beat(false);
    }
    goes_on(&mut beating);
    drop(old);
}

#[test]
fn a_root_is_replaced_underneath_connections() {
    let mut proven = Proven::start(|reeve| reeve);
    let mut beating = proven.beating();
    let next = Authority::root(TRUST_DOMAIN);
    proven.trust(&[&proven.root, &next]);
    thread::sleep(Duration::from_secs(2));
    proven.root = next;
    // One end after the other.
    proven.renew(&proven.pair.client);
    thread::sleep(Duration::from_secs(2));
    proven.renew(&proven.pair.server);
    proven.wait_and_renew(&[&proven.pair.client, &proven.pair.server]);
    thread::sleep(Duration::from_secs(2));
    proven.trust(&[&proven.root]);
    for _ in 0..3 {
        proven.wait_and_renew(&[&proven.pair.client, &proven.pair.server]);
    }
    goes_on(&mut beating);
}

#[test]
fn a_certificate_that_is_revoked_closes_the_tunnel_that_it_has_once_proven() {
    let proven = Proven::revocable();
    // Proves nothing before connections do.
    let first = proven.renew(&proven.pair.client);
    thread::sleep(Duration::from_secs(1));
    let mut beating = proven.beating();
    proven.renew(&proven.pair.client);
    // In the tunnel of each family.
    let proofs = [("role", "server"), ("result", "ok")];
    proven.daemons[1].wait_for_metric("reeve_tunnel_proofs_total", &proofs, 2.0);
    goes_on(&mut beating);
    proven.revoke(&[&first]);
    eventually("the connections have ended", || {
        beating.iter_mut().all(|beating| beating.ended().is_some())
    });
    let revoked = [("reason", "peer_revoked")];
    proven.daemons[1].wait_for_metric("reeve_tunnels_closed_total", &revoked, 1.0);
    // The certificate that it has now opens tunnels.
    proven.renew(&proven.pair.server);
    let to = proven.pair.server.addresses().port4(PORT);
    eventually("a new connection works", || {
        let words = ["--text", "again", "--patience", "3"];
        send(&proven.pair.client, to, &words).status.success()
    });
}

#[test]
fn many_tunnels_are_proven_at_the_same_moment() {
    const TUNNELS: usize = 60;
    let proven = Proven::start(|reeve| {
        reeve
            .set("/limits/streamsPerTunnel", json!(1))
            .set("/limits/tunnelsPerPeer", json!(1024))
    });
    let mut beating: Vec<_> = (0..TUNNELS)
        .map(|number| proven.beat(number % 2 == 0))
        .collect();
    for _ in 0..4 {
        proven.wait_and_renew(&[&proven.pair.client, &proven.pair.server]);
    }
    goes_on(&mut beating);
    let proofs = (4 * TUNNELS) as f64;
    let labels = [("role", "server"), ("result", "ok")];
    proven.daemons[1].wait_for_metric("reeve_tunnel_proofs_total", &labels, proofs);
}

#[test]
#[ignore = "measures: run it alone, by name and with --nocapture"]
fn what_a_thousand_tunnels_cost_that_are_proven_at_the_same_moment() {
    const TUNNELS: &str = "1000";
    let proven = Proven::made(false, Duration::from_secs(3600), |reeve| {
        reeve
            .set("/limits/streamsPerTunnel", json!(1))
            .set("/limits/tunnelsPerPeer", json!(1024))
    });
    // Proves nothing before the tunnels are there.
    thread::sleep(Duration::from_secs(2));
    let to = proven.pair.server.addresses().port4(PORT).to_string();
    let words = ["flood", &to, "--connections", TUNNELS];
    let hold = ["--hold", "60", "--again"];
    let begun = Instant::now();
    let mut flood = proven.pair.client.spawn_peer(words.into_iter().chain(hold));
    flood.wait_for("open 1000");
    let tell = |what: &str, since: Instant, before: [Duration; 2]| {
        let used = proven.daemons.each_ref().map(Daemon::processor_time);
        let [client, server] = [0, 1].map(|end| used[end] - before[end]);
        eprintln!(
            "{what}: {:?}; processor time {client:?} at the client, {server:?} at the server; \
             memory {:?}",
            since.elapsed(),
            proven.daemons.each_ref().map(Daemon::resident)
        );
    };
    tell("opened", begun, [Duration::ZERO; 2]);
    let proofs = || {
        let labels = [("role", "server"), ("result", "ok")];
        let metrics = proven.daemons[1].metrics();
        metrics.sum("reeve_tunnel_proofs_total", &labels)
    };
    for ends in [
        vec![&proven.pair.client],
        vec![&proven.pair.client, &proven.pair.server],
    ] {
        thread::sleep(Duration::from_secs(5));
        let (before, begun) = (proofs(), Instant::now());
        let used = proven.daemons.each_ref().map(Daemon::processor_time);
        for end in &ends {
            proven.renew(end);
        }
        while proofs() < before + 1000.0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", proofs());
            thread::sleep(Duration::from_millis(20));
        }
        tell(&format!("proven, {} renewed", ends.len()), begun, used);
    }
    let ended = flood.wait(Duration::from_secs(90)).ok();
    assert!(ended.contains("open still 1000"), "{ended}");
}

/// Two nodes whose workloads have certificates of a lifetime.
struct Proven {
    pair: Pair,
    daemons: [Daemon; 2],
    root: Authority,
    folder: PathBuf,
    lifetime: Duration,
    _server: Process,
}

impl Proven {
    fn start(configure: impl for<'n> Fn(Reeve<'n>) -> Reeve<'n>) -> Self {
        Self::made(false, LIFETIME, configure)
    }

    /// With revocation lists, which revoke nobody yet.
    fn revocable() -> Self {
        Self::made(true, LIFETIME, |reeve| reeve)
    }

    fn made(
        revocable: bool,
        lifetime: Duration,
        configure: impl for<'n> Fn(Reeve<'n>) -> Reeve<'n>,
    ) -> Self {
        let pair = Pair::new();
        let root = Authority::root(TRUST_DOMAIN);
        let folder = pair.one.folder().join("certificates");
        trust(&folder, &[&root]);
        let mut lists = json!({});
        if revocable {
            revoke(&folder, &root, &[]);
            lists[TRUST_DOMAIN] = json!([folder.join("crl.pem")]);
        }
        let mut source = FileIssuer::source(&folder);
        source["files"]["key"] = json!("svid.pem");
        source["files"]["bundle"] = json!(null);
        for workload in [&pair.client, &pair.server] {
            issue(&folder, &root, workload, lifetime);
        }
        let with = |reeve| {
            let bundles = json!({TRUST_DOMAIN: folder.join("roots.pem")});
            configure(reeve)
                .set("/certificates/sources", json!([source]))
                .set("/certificates/trustBundles", bundles)
                .set("/certificates/revocationLists", lists.clone())
                .start()
        };
        let daemons = [with(pair.allowing_at_one()), with(pair.allowing_at_two())];
        let server = serve(&pair.server, PORT, &["--mode", "echo"]);
        for workload in [&pair.client, &pair.server] {
            issue(&folder, &root, workload, lifetime);
        }
        Self {
            daemons,
            root,
            folder,
            lifetime,
            _server: server,
            pair,
        }
    }

    fn renew(&self, workload: &Workload) -> Issued {
        issue(&self.folder, &self.root, workload, self.lifetime)
    }

    /// Publishes that these are revoked.
    fn revoke(&self, revoked: &[&Issued]) {
        revoke(&self.folder, &self.root, revoked);
    }

    fn wait_and_renew(&self, workloads: &[&Workload]) {
        thread::sleep(RENEWED_AFTER);
        for workload in workloads {
            self.renew(workload);
        }
    }

    fn trust(&self, roots: &[&Authority]) {
        trust(&self.folder, roots);
    }

    /// A connection that says something all the time.
    fn beat(&self, ipv6: bool) -> Process {
        let to = self.pair.server.addresses();
        let to = if ipv6 { to.port6(PORT) } else { to.port4(PORT) };
        let words = ["heartbeat", &to.to_string(), "--every", "200"];
        let mut beating = self.pair.client.spawn_peer(words);
        beating.wait_for("beat 1");
        beating
    }

    /// A connection that says something now and then.
    fn rarely(&self) -> Process {
        let to = self.pair.server.addresses().port4(PORT).to_string();
        let every = RARELY.as_millis().to_string();
        let words = ["heartbeat", &to, "--every", &every];
        let mut beating = self.pair.client.spawn_peer(words);
        beating.wait_for("beat 1");
        beating
    }

    /// The tunnels of the client's daemon, which are all of this pair.
    fn tunnels(&self) -> Vec<Value> {
        let status = self.daemons[0].status();
        let tunnels = status["tunnels"]["tunnels"].as_array();
        tunnels.expect("it is a list").clone()
    }

    fn beating(&self) -> Vec<Process> {
        vec![self.beat(false), self.beat(true)]
    }

    /// Nothing has come to need another tunnel: there is one for each family.
    fn is_in_one_tunnel(&self) {
        let tunnels = self.tunnels();
        assert_eq!(tunnels.len(), 2, "{tunnels:#?}");
        for tunnel in &tunnels {
            assert_eq!(tunnel["proof"], "bound");
            assert!(tunnel["proofs"].as_u64() >= Some(10), "{tunnel:#}");
            assert_eq!(tunnel["retired"], false);
        }
    }
}

#[track_caller]
fn goes_on(beating: &mut [Process]) {
    let beats = |beating: &Process| beating.stdout().lines().count();
    let before: Vec<_> = beating.iter().map(beats).collect();
    eventually("another beat", || {
        let mut counts = beating.iter().map(beats).zip(&before);
        let all = counts.all(|(now, before)| now > before + 1);
        all || beating.iter_mut().any(|beating| beating.ended().is_some())
    });
    for beating in beating {
        assert!(beating.ended().is_none(), "{}", beating.stderr());
    }
}

fn trust(folder: &Path, roots: &[&Authority]) {
    let text: String = roots.iter().map(|root| root.certificate_pem()).collect();
    put(&folder.join("roots.pem"), &text);
}

/// Writes a certificate and its key, which lie in one file and change at once.
fn issue(folder: &Path, root: &Authority, workload: &Workload, lifetime: Duration) -> Issued {
    let issued = root.leaf_with(&workload.spiffe_id(TRUST_DOMAIN), |params| {
        params.not_after = OffsetDateTime::now_utc() + lifetime;
    });
    let text = issued.chain_pem() + &issued.key_pem();
    put(&folder.join(workload.name()).join("svid.pem"), &text);
    issued
}

fn revoke(folder: &Path, root: &Authority, revoked: &[&Issued]) {
    let serials: Vec<_> = revoked.iter().map(|issued| issued.serial()).collect();
    let serials: Vec<&[u8]> = serials.iter().map(Vec::as_slice).collect();
    let list = root.revocation_list(&serials, time::Duration::hours(1));
    put(&folder.join("crl.pem"), &certs::crl_pem(&list));
}

fn put(file: &Path, text: &str) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, file).unwrap();
}
