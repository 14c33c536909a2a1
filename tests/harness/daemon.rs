//! A daemon under test.

use std::{
    ffi::{OsStr, OsString},
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{Metrics, Node, Output, Place, Process, Programs, eventually, wait};

/// For a daemon to stop after it was asked to; longer than its own longest wait.
const STOP: Duration = Duration::from_secs(60);

/// A running daemon; dropping it kills it, and shows its log if the test is failing.
#[derive(Debug)]
pub struct Daemon {
    process: Option<Process>,
    place: Place,
    config: PathBuf,
    socket: PathBuf,
    policies: PathBuf,
    environment: Vec<OsString>,
    launcher: Vec<OsString>,
    program: PathBuf,
}

impl Daemon {
    /// Where it serves metrics and its health, in the node's network namespace.
    pub const METRICS_PORT: u16 = 15020;

    pub(crate) fn start(
        node: &Node,
        config: PathBuf,
        environment: Vec<OsString>,
        launcher: Vec<OsString>,
    ) -> Self {
        let place = node
            .host()
            .with_cgroup(Arc::new(node.cgroup().child("daemon")));
        let socket = node.folder().join("admin.sock");
        let mut daemon = Self {
            process: None,
            place,
            config,
            socket,
            policies: node.folder().join("policies"),
            environment,
            launcher,
            program: Programs::get().reeve.clone(),
        };
        daemon.start_again();
        daemon
    }

    /// Has this binary be the daemon from the next start or takeover on.
    pub fn use_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// Starts it, after it was stopped or killed, with the same files.
    pub fn start_again(&mut self) {
        assert!(self.process.is_none(), "the daemon runs");
        let reeve = self.program.as_os_str();
        let words = [
            reeve,
            OsStr::new("run"),
            OsStr::new("--config"),
            self.config.as_os_str(),
        ];
        let environment = self.environment.iter().map(OsString::as_os_str);
        let launcher = self.launcher.iter().map(OsString::as_os_str);
        let words = launcher
            .chain([OsStr::new("env")])
            .chain(environment)
            .chain(words);
        self.process = Some(self.place.spawn(words));
    }

    /// Starts another daemon with the same files, which is to take over, and gives the one that
    /// ran until now. Whether it has taken over is to be seen in its log.
    pub fn start_taking_over(&mut self) -> Process {
        self.start_taking_over_with(&[])
    }

    /// As [`Self::start_taking_over`], with more words on its command line.
    pub fn start_taking_over_with(&mut self, more: &[&str]) -> Process {
        let reeve = self.program.as_os_str();
        let words = [
            reeve,
            OsStr::new("run"),
            OsStr::new("--takeover"),
            OsStr::new("--config"),
            self.config.as_os_str(),
        ];
        let environment = self.environment.iter().map(OsString::as_os_str);
        let words = [OsStr::new("env")]
            .into_iter()
            .chain(environment)
            .chain(words)
            .chain(more.iter().map(OsStr::new));
        let new = self.place.spawn(words);
        self.process.replace(new).expect("the daemon runs")
    }

    /// Has another daemon take over, and gives the one that ran until now, which drains.
    pub fn take_over(&mut self) -> Process {
        self.take_over_with(&[])
    }

    /// As [`Self::take_over`], with more words on the new one's command line.
    pub fn take_over_with(&mut self, more: &[&str]) -> Process {
        let old = self.start_taking_over_with(more);
        self.wait_for_log(&["took over from another daemon"]);
        old
    }

    /// Puts another process in its place, as one that was given by [`Self::start_taking_over`].
    pub fn replace(&mut self, process: Process) -> Process {
        self.process.replace(process).expect("the daemon runs")
    }

    /// Where it is asked to hand over.
    #[must_use]
    pub fn handover_socket(&self) -> PathBuf {
        let mut path = self.socket.as_os_str().to_owned();
        path.push(".handover");
        path.into()
    }

    /// Waits until it says that it is ready.
    pub fn wait_until_ready(&mut self) {
        let ready = wait::until(wait::START, || {
            if let Some(status) = self.process_mut().ended() {
                panic!("the daemon ended ({status}): {}", self.log());
            }
            self.is_ready().then_some(())
        });
        assert!(
            ready.is_some(),
            "the daemon does not become ready: {}",
            self.log()
        );
    }

    /// Whether it says that it is ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.get("/readyz")
            .is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// What it says about a path of its HTTP endpoint, headers and all; none without an answer.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<String> {
        let netns = self.place.netns().expect("a node has a namespace");
        netns
            .enter(|| {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, Self::METRICS_PORT))?;
                stream.set_read_timeout(Some(wait::SOON))?;
                let request =
                    format!("GET {path} HTTP/1.1\r\nHost: reeve\r\nConnection: close\r\n\r\n");
                stream.write_all(request.as_bytes())?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                std::io::Result::Ok(answer)
            })
            .ok()
    }

    /// Its metrics as they are now.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let answer = self.get("/metrics").expect("the daemon answers");
        let (_, body) = answer
            .split_once("\r\n\r\n")
            .expect("the answer has a body");
        Metrics::parse(body)
    }

    /// Waits until series of its metrics, summed, have reached a value.
    #[track_caller]
    pub fn wait_for_metric(&self, name: &str, labels: &[(&str, &str)], at_least: f64) {
        eventually(&format!("{name}{labels:?} is at least {at_least}"), || {
            self.metrics().sum(name, labels) >= at_least
        });
    }

    /// Where its policy files are; it is for the daemon to notice what is done there.
    #[must_use]
    pub fn policies(&self) -> &Path {
        &self.policies
    }

    /// Its admin socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What `reeve status --json` prints.
    #[must_use]
    pub fn status(&self) -> Value {
        self.command(["status", "--json"]).json()
    }

    /// Takes away what it left in the kernel when it stopped.
    pub fn detach(&self) -> Output {
        assert!(self.process.is_none(), "the daemon runs");
        let reeve = Programs::get().reeve.as_os_str();
        let words = ["detach", "--config"].map(OsStr::new);
        let config = [self.config.as_os_str()];
        self.place
            .exec(std::iter::once(reeve).chain(words).chain(config))
    }

    /// Runs a command that talks to it.
    pub fn command<'a>(&'a self, words: impl IntoIterator<Item = &'a str>) -> Output {
        let reeve = Programs::get().reeve.as_os_str();
        let socket = [OsStr::new("--socket"), self.socket.as_os_str()];
        let words = words.into_iter().map(OsStr::new);
        self.place
            .exec(std::iter::once(reeve).chain(words).chain(socket))
    }

    /// Its log until now.
    #[must_use]
    pub fn log(&self) -> String {
        self.process
            .as_ref()
            .map_or_else(String::new, |process| process.stdout() + &process.stderr())
    }

    /// The lines of its log that have all of these texts.
    #[must_use]
    pub fn logged(&self, texts: &[&str]) -> Vec<String> {
        let has_all = |line: &&str| texts.iter().all(|text| line.contains(text));
        self.log()
            .lines()
            .filter(has_all)
            .map(str::to_owned)
            .collect()
    }

    /// Waits until there is a line in its log that has all of these texts.
    #[track_caller]
    pub fn wait_for_log(&self, texts: &[&str]) -> String {
        let line = wait::until(wait::SOON, || self.logged(texts).pop());
        line.unwrap_or_else(|| panic!("the daemon did not log {texts:?}: {}", self.log()))
    }

    /// Files and sockets that it has open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.id());
        std::fs::read_dir(folder).expect("the daemon runs").count()
    }

    /// The same once the number has stood still for a second: sockets that are kept ready are opened
    /// beside the connection that has asked for the first of them.
    #[must_use]
    pub fn settled_files(&self) -> usize {
        let (mut files, mut since) = (self.open_files(), Instant::now());
        let settled = wait::until(wait::SOON, || {
            let now = self.open_files();
            if now != files {
                (files, since) = (now, Instant::now());
            }
            (since.elapsed() >= Duration::from_secs(1)).then_some(files)
        });
        settled.unwrap_or_else(|| panic!("files are opened and closed all the time, now {files}"))
    }

    /// Fails the test if there are soon still more than these.
    #[track_caller]
    pub fn closes_files(&self, but: usize) {
        let closed = wait::until(wait::SOON, || (self.open_files() <= but).then_some(()));
        if closed.is_some() {
            return;
        }
        let folder = format!("/proc/{}/fd", self.id());
        let files = std::fs::read_dir(folder).expect("the daemon runs");
        // One that is closed meanwhile has no target.
        let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        let targets: Vec<_> = targets.collect();
        panic!("more than {but} files are open: {targets:#?}");
    }

    /// Bytes of memory that it has.
    #[must_use]
    pub fn resident(&self) -> u64 {
        resident(self.id()).expect("the daemon runs")
    }

    /// Processor time of it, of those before it and of the commands that talk to them.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        self.place.cgroup().processor_time()
    }

    /// A path as it is for the daemon, whatever is mounted there.
    #[must_use]
    pub fn sees(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.id()));
        root.join(path.strip_prefix("/").expect("the path is absolute"))
    }

    /// Runs a program among the daemon's mounts.
    pub fn beside<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Output {
        let id = self.id().to_string();
        let enter = ["nsenter", "--target", &id, "--mount", "--"].map(OsString::from);
        let words = words.into_iter().map(|word| word.as_ref().to_owned());
        self.place.exec(enter.into_iter().chain(words))
    }

    /// Its threads: each one's number, name and the kernel's status of it.
    #[must_use]
    pub fn threads(&self) -> Vec<Thread> {
        Thread::all_of(self.id())
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process
            .as_ref()
            .expect("the daemon runs")
            .signal(signal);
    }

    /// How it ended, once it has by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process_mut().ended()
    }

    /// Asks it to stop, and waits until it has.
    pub fn stop(&mut self) -> Output {
        self.process.take().expect("the daemon runs").stop(STOP)
    }

    /// Kills it as the kernel's memory killer would.
    pub fn kill(&mut self) {
        self.process.take().expect("the daemon runs");
    }

    fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("the daemon runs")
    }
}

/// Bytes of memory that a process has; none of a process that has ended.
pub(crate) fn resident(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib = line.trim().trim_end_matches(" kB").parse::<u64>();
    Some(kib.expect("it is a number") << 10)
}

/// A thread of a process.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    status: String,
}

impl Thread {
    /// The threads of a process.
    #[must_use]
    pub fn all_of(process: u32) -> Vec<Self> {
        let folder = std::fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
        let read = |path: PathBuf, file: &str| std::fs::read_to_string(path.join(file)).ok();
        let threads = folder.flatten().filter_map(|entry| {
            Some(Self {
                id: entry.file_name().to_str()?.parse().ok()?,
                name: read(entry.path(), "comm")?.trim().to_owned(),
                status: read(entry.path(), "status")?,
            })
        });
        threads.collect()
    }

    /// What the kernel says of it, as in `CapEff`.
    #[must_use]
    pub fn status(&self, field: &str) -> &str {
        let mut lines = self.status.lines();
        let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.expect("the kernel tells this of every thread").trim()
    }

    /// A set of capabilities, as in `CapEff`: bits by the numbers of `capability.h`.
    #[must_use]
    pub fn capabilities(&self, set: &str) -> u64 {
        u64::from_str_radix(self.status(set), 16).expect("sets are hexadecimal")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- log of the daemon with {} ---\n{}",
                self.config.display(),
                self.log()
            );
        }
    }
}
