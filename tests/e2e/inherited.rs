//! An old daemon has its certificates from the one that serves, and asks no source by itself while
//! that one is there.

use std::{
    fs::File,
    io::{IoSlice, Read, Seek, Write},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, Weak},
    thread,
    time::Duration,
};

use harness::{
    Daemon, Process, SOON,
    agent::{Agent, Grant, Subject},
    certs::{Authority, Issued},
    eventually,
};
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    socket::{ControlMessage, MsgFlags, sendmsg},
};
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use time::OffsetDateTime;

use crate::arrange::{PORT, Pair, TRUST_DOMAIN, serve};

/// Of the certificates of both ends.
const LIFETIME: Duration = Duration::from_secs(10);
/// After which both ends get their next one.
const RENEWED_AFTER: Duration = Duration::from_secs(4);

#[test]
fn old_daemons_have_their_certificates_from_the_one_that_serves() {
    let mut two = Two::start();
    let mut hearts = vec![two.beat()];
    two.calls_once_open([1, 1]);

    // One after the other, at both ends.
    let mut old: Vec<_> = two.daemons.iter_mut().map(Daemon::take_over).collect();
    old.iter().for_each(asks_nobody);
    let calls = two.calls_once_open([1, 1]);
    two.live_through_renewals(5, &mut hearts);
    assert_eq!(two.calls(), calls);
    for old in &old {
        assert!(certificates(old, "passed") >= 5, "{}", old.stderr());
    }

    // A second one at the client's end: the first of its old daemons moves.
    hearts.push(two.beat());
    old.push(two.daemons[0].take_over());
    asks_nobody(&old[2]);
    let calls = [calls[0] + 1, calls[1]];
    assert_eq!(two.calls_once_open([1, 1]), calls);
    let passed = |two: &Two| {
        let known = two.daemons[0].status()["predecessors"].clone();
        let known = known.as_array().unwrap().iter();
        known
            .filter(|old| old["certificates"]["passed"] == json!(true))
            .count()
    };
    eventually("both say that certificates are passed", || {
        passed(&two) == 2
    });
    let page = two.daemons[0].command(["status"]).ok();
    let said = "certificates: 1 of 1, passed by the daemon that serves, the first expires in";
    assert!(page.contains(said), "{page}");
    two.live_through_renewals(4, &mut hearts);
    assert_eq!(two.calls(), calls);

    // When nobody serves they ask by themselves, and no longer than that.
    two.daemons[0].kill();
    for old in [&old[0], &old[2]] {
        eventually("it asks again", || {
            old.stderr().contains("sources are asked again")
        });
    }
    assert_eq!(two.calls_once_open([2, 1]), [calls[0] + 2, calls[1]]);
    two.live_through_renewals(3, &mut hearts);
    two.daemons[0].start_again();
    two.daemons[0].wait_until_ready();
    assert_eq!(two.calls_once_open([1, 1]), [calls[0] + 3, calls[1]]);
    two.live_through_renewals(3, &mut hearts);
}

#[test]
fn an_old_daemon_has_the_embedded_ca_issue_nothing() {
    let (pair, mut one, _two) = Pair::started();
    let _server = serve(&pair.server, PORT, &[]);
    let mut hearts = vec![beat(&pair)];
    let old = one.take_over();
    asks_nobody(&old);
    let own = certificates(&old, "embedded");
    for number in 1..=3 {
        one.command(["reload"]).ok();
        eventually("the next one is passed", || {
            certificates(&old, "passed") > number
        });
    }
    assert_eq!(certificates(&old, "embedded"), own);
    // They are the same, and not others of the same CA.
    let serial = &one.status()["certificates"][0]["serial"];
    let serial = format!("\"serial\":{serial}");
    eventually("the last one arrives", || {
        let log = old.stderr();
        let mut passed = log.lines().filter(|line| is_certificate(line, "passed"));
        passed.next_back().is_some_and(|it| it.contains(&serial))
    });
    goes_on(&mut hearts);
}

#[test]
fn what_an_agent_withdraws_from_the_daemon_that_serves_the_old_one_drops() {
    let mut two = Two::start();
    let mut hearts = [two.beat()];
    let old = two.daemons[0].take_over();
    asks_nobody(&old);
    eventually("it has one", || certificates(&old, "passed") >= 1);
    goes_on(&mut hearts);
    two.ends.withdraw();
    let [heart] = hearts;
    assert!(!heart.wait(SOON).status.success());
    let ended = old.wait(2 * SOON);
    assert!(ended.stderr.contains("withdrawn"), "{}", ended.stderr);
}

#[test]
fn an_old_daemon_refuses_what_is_not_its_certificate_and_asks_where_nothing_is_passed() {
    let two = Two::start();
    let mut hearts = [two.beat()];
    let Ends { root, ids, .. } = &*two.ends;
    let client = &ids[0];
    // What takes over is of a version that passes nothing.
    let new = TakesOver::from(&two.daemons[0]);
    let old = &two.daemons[0];
    let passed = |source: &str| in_force(&old.log(), source);
    let own = passed("own");
    for number in 1..=3 {
        eventually("it follows its agent", || passed("own") >= own + number);
    }
    goes_on(&mut hearts);

    // It says that it passes certificates: now it is told whose are used.
    new.says(r#"{"tell":"certificates"}"#);
    new.hears(&format!(
        r#"{{"uses":{{"identities":["{client}"],"more":false}}}}"#
    ));
    two.calls_once_open([0, 1]);
    let own = passed("own");
    let stranger = Authority::root(TRUST_DOMAIN);
    let mut other_key = two.ends.issue(0);
    other_key.key = two.ends.issue(0).key;
    for (issued, reason) in [
        (two.ends.issue(1), "wrong_identity"),
        (stranger.leaf(client), "untrusted_chain"),
        (other_key, "key_mismatch"),
    ] {
        new.passes(client, &issued, root);
        old.wait_for_log(&["no new certificate", r#""source":"passed""#, reason]);
    }
    new.says(&format!(
        r#"{{"pass":{{"identity":"{client}","what":{{"material":{{"key":9,"chain":[],"bundles":[]}}}}}}}}"#
    ));
    old.wait_for_log(&["that the daemon that serves passes is refused", "no file"]);
    assert_eq!(passed("passed"), 0);
    new.passes(client, &two.ends.issue(0), root);
    eventually("the right one is taken", || passed("passed") == 1);
    goes_on(&mut hearts);
    assert_eq!(passed("own"), own);
    two.calls_once_open([0, 1]);
    let log = old.log();
    assert!(!log.contains("PRIVATE KEY"), "{log}");

    // It ends, and nobody comes.
    drop(new);
    old.wait_for_log(&["sources are asked again"]);
    two.calls_once_open([1, 1]);
    goes_on(&mut hearts);
}

/// Two nodes, each with an agent that gives certificates to the daemons there, and renews them late.
struct Two {
    pair: Pair,
    ends: Arc<Ends>,
    daemons: [Daemon; 2],
    _server: Process,
}

/// Who gives certificates to both ends.
struct Ends {
    root: Authority,
    agents: [Agent; 2],
    ids: [String; 2],
    /// The client's end gets nothing any more.
    withdrawn: Mutex<bool>,
}

impl Two {
    fn start() -> Self {
        let pair = Pair::new();
        let ends = Arc::new(Ends {
            root: Authority::root(TRUST_DOMAIN),
            agents: [Agent::start(), Agent::start()],
            ids: [&pair.client, &pair.server].map(|end| end.spiffe_id(TRUST_DOMAIN)),
            withdrawn: Mutex::default(),
        });
        ends.renew();
        let renewed = Arc::downgrade(&ends);
        thread::spawn(move || {
            while let Some(ends) = Weak::upgrade(&renewed) {
                ends.renew();
                drop(ends);
                thread::sleep(RENEWED_AFTER);
            }
        });
        let source = |agent: &Agent| json!({"sources": [{"name": "own", "workloadApi": {"socket": agent.socket()}}]});
        let [one, two] = ends.agents.each_ref().map(source);
        let daemons = [
            pair.allowing_at_one().set("/certificates", one).start(),
            pair.allowing_at_two().set("/certificates", two).start(),
        ];
        Self {
            _server: serve(&pair.server, PORT, &["--mode", "echo"]),
            pair,
            ends,
            daemons,
        }
    }

    /// Sees that connections go on while the certificates of both ends are replaced so often.
    fn live_through_renewals(&self, times: u32, hearts: &mut [Process]) {
        thread::sleep(RENEWED_AFTER * times);
        goes_on(hearts);
    }

    fn beat(&self) -> Process {
        beat(&self.pair)
    }

    /// Calls that there have been of each agent.
    fn calls(&self) -> [usize; 2] {
        self.ends.agents.each_ref().map(Agent::calls)
    }

    /// The same, once so many are open.
    #[track_caller]
    fn calls_once_open(&self, open: [usize; 2]) -> [usize; 2] {
        eventually("so many subscriptions are open", || {
            self.ends.agents.each_ref().map(Agent::open_calls) == open
        });
        self.calls()
    }
}

impl Ends {
    fn issue(&self, end: usize) -> Issued {
        self.root.leaf_with(&self.ids[end], |params| {
            params.not_after = OffsetDateTime::now_utc() + LIFETIME;
        })
    }

    fn renew(&self) {
        let withdrawn = self.withdrawn.lock().unwrap();
        for (end, agent) in self.agents.iter().enumerate() {
            if end > 0 || !*withdrawn {
                let issued = [(self.ids[end].as_str(), self.issue(end))];
                agent.grant(Subject::Caller, Grant::issued(&self.root, issued));
            }
        }
    }

    fn withdraw(&self) {
        *self.withdrawn.lock().unwrap() = true;
        self.agents[0].withdraw(&Subject::Caller);
    }
}

/// Something that takes over from a daemon, and says to it what a test has it say.
struct TakesOver {
    socket: Socket,
}

impl TakesOver {
    fn from(daemon: &Daemon) -> Self {
        let greet = |layout: u64| {
            let new = Self {
                socket: Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap(),
            };
            new.socket.set_read_timeout(Some(SOON)).unwrap();
            let path = SockAddr::unix(daemon.handover_socket()).unwrap();
            new.socket.connect(&path).unwrap();
            let hello = json!({"hello": {
                "protocol": 1,
                "version": "0.0.9",
                "layout": layout,
                "outboundPort": 15001,
                "tunnelPort": 15008,
            }});
            new.says(&hello.to_string());
            new
        };
        let refused = greet(0).hear();
        let layout = refused.rsplit("layout ").next().unwrap();
        let layout = layout.split(',').next().unwrap().parse().unwrap();
        let new = greet(layout);
        let offer: Value = serde_json::from_str(&new.hear()).unwrap();
        assert!(offer["offer"]["sockets"].as_u64() > Some(0), "{offer}");
        new.says(r#""take""#);
        new.hears("taken");
        new
    }

    fn says(&self, text: &str) {
        (&self.socket).write_all(text.as_bytes()).unwrap();
    }

    fn hear(&self) -> String {
        let mut said = [0; 64 << 10];
        let length = (&mut &self.socket).read(&mut said).unwrap();
        String::from_utf8_lossy(&said[..length]).into_owned()
    }

    /// Waits until it is told something.
    fn hears(&self, text: &str) {
        while !self.hear().contains(text) {}
    }

    fn passes(&self, id: &str, issued: &Issued, root: &Authority) {
        let (key, root) = (issued.key.secret_pkcs8_der(), root.certificate());
        let mut file = File::from(memfd_create("passed", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(key).unwrap();
        for der in issued.chain.iter().chain([&root]) {
            file.write_all(der).unwrap();
        }
        file.rewind().unwrap();
        let chain: Vec<_> = issued.chain.iter().map(|der| der.len()).collect();
        let bundle = json!({
            "trustDomain": TRUST_DOMAIN,
            "certificates": [root.len()],
            "lists": [],
        });
        let material = json!({"key": key.len(), "chain": chain, "bundles": [bundle]});
        let pass = json!({"pass": {"identity": id, "what": {"material": material}}});
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(pass.to_string().as_bytes())],
            &[ControlMessage::ScmRights(&[file.as_raw_fd()])],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }
}

/// A connection that lives for as long as nobody ends it.
fn beat(pair: &Pair) -> Process {
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to, "--every", "200"]);
    heart.wait_for("beat 2");
    heart
}

#[track_caller]
fn goes_on(hearts: &mut [Process]) {
    for heart in hearts {
        let beats = heart.stdout().lines().count();
        eventually("another beat", || {
            heart.stdout().lines().count() > beats + 1 || heart.ended().is_some()
        });
        assert!(heart.ended().is_none(), "{}", heart.stderr());
    }
}

/// Waits until an old daemon knows that certificates are passed to it.
#[track_caller]
fn asks_nobody(old: &Process) {
    eventually("it asks nobody", || {
        old.stderr().contains("sources are not asked")
    });
}

/// Certificates that a daemon has put in force, by the source that they came from.
fn certificates(daemon: &Process, source: &str) -> usize {
    in_force(&daemon.stderr(), source)
}

fn in_force(log: &str, source: &str) -> usize {
    log.lines()
        .filter(|line| is_certificate(line, source))
        .count()
}

fn is_certificate(line: &str, source: &str) -> bool {
    line.contains("certificate in force") && line.contains(&format!("\"source\":\"{source}\""))
}
