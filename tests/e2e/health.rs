//! Health: systemd's watchdog is told that all is well, and `/healthz` says so, only while the
//! control loop, every tunnel worker and the kernel's side answer.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use harness::{Daemon, Network, Node, Programs, eventually};
use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

/// `WatchdogSec=` of the daemon under test.
const WATCHDOG: Duration = Duration::from_secs(2);

#[test]
fn a_worker_that_hangs_silences_the_watchdog_and_is_named() {
    let watched = Watched::start();
    watched.hears_that_all_is_well();
    let hung = Hung::thread(&watched.daemon, "tunnel-0");
    watched.hears_nothing();
    let answer = watched.daemon.get("/healthz").unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("tunnel worker 0 does not answer"),
        "{answer}"
    );
    watched
        .daemon
        .wait_for_log(&["not well", "tunnel worker 0 does not answer"]);

    drop(hung);
    watched.hears_that_all_is_well();
    eventually("it is healthy again", || is_healthy(&watched.daemon));
}

#[test]
fn a_program_that_is_detached_silences_the_watchdog_and_is_named() {
    let watched = Watched::start();
    watched.hears_that_all_is_well();
    // Somebody who does not see that a daemon runs.
    let config = fs::read_to_string(watched.daemon.config()).unwrap();
    let other = watched.node.folder().join("other.yaml");
    fs::write(&other, config.replace("admin.sock", "other.sock")).unwrap();
    let reeve = Programs::get().reeve.to_str().unwrap();
    let detach = [reeve, "detach", "--config", other.to_str().unwrap()];
    watched.node.host().exec(detach).ok();
    watched.hears_nothing();
    let answer = watched.daemon.get("/healthz").unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("no longer attached"), "{answer}");
}

#[test]
fn a_control_loop_that_hangs_is_noticed_by_who_asks() {
    let watched = Watched::start();
    // Before it has looked for the first time, a daemon is given longer.
    watched.hears_that_all_is_well();
    let daemon = &watched.daemon;
    assert!(is_healthy(daemon));
    // Whoever would notice hangs as well, and whoever takes over.
    let mut hung = HashMap::new();
    eventually("it is not healthy", || {
        for thread in daemon.threads() {
            if thread.name == "control" || thread.id == daemon.id() {
                hung.entry(thread.id).or_insert_with(|| Hung::of(thread.id));
            }
        }
        !is_healthy(daemon)
    });
    let answer = daemon.get("/healthz").unwrap();
    assert!(answer.contains("nothing has been heard"), "{answer}");
}

fn is_healthy(daemon: &Daemon) -> bool {
    let answer = daemon.get("/healthz");
    answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// A daemon, and what stands for systemd: the socket that it reports to.
struct Watched {
    daemon: Daemon,
    node: Node,
    reports: UnixDatagram,
}

impl Watched {
    fn start() -> Self {
        let node = Node::new(&Network::new(), "one");
        let socket = node.folder().join("notify");
        let reports = UnixDatagram::bind(&socket).unwrap();
        let daemon = node
            .reeve()
            .environment("NOTIFY_SOCKET", &socket)
            .environment("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .start();
        Self {
            daemon,
            node,
            reports,
        }
    }

    /// Within the time after which systemd would give the daemon up, and then some for a busy machine.
    fn hears_that_all_is_well(&self) {
        self.forget();
        self.reports.set_read_timeout(Some(harness::SOON)).unwrap();
        while self.read().unwrap() != "WATCHDOG=1" {}
    }

    fn hears_nothing(&self) {
        // A look that began before it hung may end well.
        std::thread::sleep(WATCHDOG / 2);
        self.forget();
        let until = Instant::now() + 2 * WATCHDOG;
        self.reports
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        while Instant::now() < until {
            if let Ok(report) = self.read() {
                assert_ne!(report, "WATCHDOG=1");
            }
        }
    }

    /// Reads what was reported until now.
    fn forget(&self) {
        self.reports.set_nonblocking(true).unwrap();
        while self.read().is_ok() {}
        self.reports.set_nonblocking(false).unwrap();
    }

    fn read(&self) -> io::Result<String> {
        let mut report = [0; 256];
        let length = self.reports.recv(&mut report)?;
        Ok(String::from_utf8_lossy(&report[..length]).trim().to_owned())
    }
}

/// A thread that is stopped in the middle of what it does, as by a debugger; it goes on when this
/// is dropped. For the test's own thread only, which is the tracer.
pub(crate) struct Hung(Pid);

impl Hung {
    fn thread(daemon: &Daemon, name: &str) -> Self {
        let threads = daemon.threads();
        let thread = threads.iter().find(|thread| thread.name == name).unwrap();
        Self::of(thread.id)
    }

    pub(crate) fn of(thread: u32) -> Self {
        let thread = Pid::from_raw(thread.try_into().unwrap());
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Self(thread)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        if ptrace::detach(self.0, None).is_err() {
            // It has ended with its process, which waits for its tracer to have seen it.
            let _ = waitpid(self.0, Some(WaitPidFlag::__WALL));
        }
    }
}
