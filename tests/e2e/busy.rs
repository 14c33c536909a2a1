//! A pair of nodes under connections of every kind, through which one daemon takes over from another: short
//! ones by the thousand, long ones that rest or never do, transfers, plaintext to a guest, and some that are
//! denied.

use harness::{Capture, Daemon, Process, SOON, Workload, eventually};

use crate::arrange::{PORT, Pair, Probe, TCP, is_denied, of, say, serve, start_sending, tcp};

/// Of the server that answers and closes.
pub(crate) const ANSWERS: u16 = 8081;
/// Of the server that takes transfers.
const HASHES: u16 = 8082;
/// Of the guest, whom no tunnel leads to.
const GUEST: u16 = 8083;
/// Where no policy lets anybody.
const DENIED: u16 = 9999;

pub(crate) struct Busy {
    pub(crate) pair: Pair,
    pub(crate) daemons: [Daemon; 2],
    /// Those that are allowed.
    short: Vec<Probe>,
    denied: Probe,
    capture: Capture,
    _guest: Workload,
    _servers: [Process; 4],
}

impl Busy {
    pub(crate) fn start() -> Self {
        let pair = Pair::new();
        let guest = pair.two.pod("guest");
        let ports = [tcp(ANSWERS), tcp(HASHES), TCP];
        let calls = ports.iter().fold(of(&pair.client), |policy, port| {
            policy.calls(&pair.server, *port)
        });
        let hears = ports.iter().fold(of(&pair.server), |policy, port| {
            policy.hears(&pair.client, *port)
        });
        let calls = calls.calls_address(guest.addresses().v4, tcp(GUEST));
        let daemons = [
            pair.at_one().policy(&calls.text()).start(),
            pair.at_two().policy(&hears.text()).start(),
        ];
        let servers = [
            serve(&pair.server, PORT, &[]),
            serve(&pair.server, ANSWERS, &["--mode", "answer"]),
            serve(&pair.server, HASHES, &["--mode", "hash"]),
            serve(&guest, GUEST, &["--mode", "answer"]),
        ];
        let to = pair.server.addresses();
        let capture = pair.server.capture(&pair.network);
        let short = vec![
            Probe::start(&pair.client, to.port4(ANSWERS), &["--threads", "4"]),
            Probe::start(&pair.client, to.port6(ANSWERS), &["--threads", "4"]),
            Probe::start(&pair.client, guest.addresses().port4(GUEST), &[]),
        ];
        let denied = Probe::start(&pair.client, to.port4(DENIED), &[]);
        Self {
            short,
            denied,
            capture,
            daemons,
            pair,
            _guest: guest,
            _servers: servers,
        }
    }

    /// A long connection that says something every so many milliseconds.
    pub(crate) fn beat(&self, every: &str) -> Process {
        let to = self.pair.server.addresses().port4(PORT).to_string();
        let words = ["heartbeat", &to, "--every", every];
        let mut heart = self.pair.client.spawn_peer(words);
        heart.wait_for("beat 2");
        heart
    }

    /// A transfer of some seconds.
    pub(crate) fn transfer(&self) -> Process {
        let to = self.pair.server.addresses().port4(HASHES);
        let slowly = ["--bytes", "20000000", "--trickle", "10"];
        start_sending(&self.pair.client, to, &slowly)
    }

    /// Waits until each of the short ones has worked so often again.
    pub(crate) fn short_ones_go_on(&self, times: u64) {
        self.short.iter().for_each(|probe| probe.goes_on(times));
    }

    /// What holds once a node's daemon has taken over, and is no other than before.
    #[track_caller]
    pub(crate) fn is_served_by(&self, daemon: &Daemon, transfer: Process) {
        self.short_ones_go_on(300);
        let to = self.pair.server.addresses();
        say(&self.pair.client, to.port4(PORT), "by the new daemon");
        is_denied(&self.pair.client, to.port4(DENIED));
        assert!(daemon.is_ready());
        assert_eq!(daemon.status()["process"], daemon.id());
        let seen = transfer.wait(3 * SOON).json();
        assert_eq!(seen["received"]["head"], seen["sent"]["sha256"]);
    }

    /// That no short one has failed, and none that is denied has not. Gives how many have worked.
    #[track_caller]
    pub(crate) fn all_is_well(&self) -> u64 {
        self.short.iter().for_each(Probe::all_worked);
        self.denied.all_failed("not permitted");
        let seen: Vec<_> = self
            .short
            .iter()
            .map(|probe| probe.seen().to_string())
            .collect();
        eprintln!("short connections: {}", seen.join(" "));
        self.short.iter().map(Probe::worked).sum()
    }

    /// Ends all of it: nothing of what tunnels carry was plaintext on the wire.
    #[track_caller]
    pub(crate) fn finish(self) {
        drop(self.short);
        let captured = self.capture.finish();
        for port in [PORT, ANSWERS, HASHES] {
            let client = self.pair.client.addresses().v4;
            let plaintext = format!("tcp dst port {port} and src host {client}");
            assert_eq!(captured.packets(&plaintext), Vec::<String>::new());
        }
    }
}

/// A connection to the pair's server that lives for as long as nobody ends it.
pub(crate) fn beat(pair: &Pair) -> Process {
    let to = pair.server.addresses().port4(PORT).to_string();
    let mut heart = pair.client.spawn_peer(["heartbeat", &to]);
    heart.wait_for("beat 2");
    heart
}

/// Waits until a long connection has said so much more.
#[track_caller]
pub(crate) fn goes_on(heart: &Process, beats: usize) {
    let said = || heart.stdout().lines().count();
    let now = said();
    eventually("it goes on", || said() > now + beats);
}
