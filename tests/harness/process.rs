//! Programs that run somewhere: in a cgroup, and perhaps in a network namespace.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Cgroup, Netns, Programs, eventually, run::Run, wait};

/// For a program that is run to its end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where processes run.
#[derive(Clone, Debug)]
pub struct Place {
    netns: Option<Arc<Netns>>,
    cgroup: Arc<Cgroup>,
    folder: PathBuf,
}

impl Place {
    /// A place for processes that no daemon knows.
    #[must_use]
    pub fn new(netns: Option<Arc<Netns>>, cgroup: Arc<Cgroup>) -> Self {
        Self {
            netns,
            cgroup,
            folder: Run::this().folder("output"),
        }
    }

    /// The network namespace; none is the test's own.
    #[must_use]
    pub fn netns(&self) -> Option<&Netns> {
        self.netns.as_deref()
    }

    /// The cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A place in the same network namespace with another cgroup.
    #[must_use]
    pub fn with_cgroup(&self, cgroup: Arc<Cgroup>) -> Self {
        Self::new(self.netns.clone(), cgroup)
    }

    /// A folder for files of the processes here.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// Sets a parameter of the network namespace, as in `ipv4/tcp_tw_reuse`.
    pub fn sysctl(&self, name: &str, value: &str) {
        let file = format!("/proc/sys/net/{name}");
        let write = || fs::write(&file, value);
        let written = self
            .netns
            .as_ref()
            .expect("the place has a network namespace")
            .enter(write);
        written.unwrap_or_else(|error| panic!("writing {value} to {file}: {error}"));
    }

    /// Starts a program here.
    pub fn spawn<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Process {
        let mut command = Command::new(&Programs::get().peer);
        command.arg("enter").arg("--cgroup").arg(self.cgroup.path());
        if let Some(netns) = &self.netns {
            command.arg("--netns").arg(netns.path());
        }
        command.arg("--").args(words);
        Process::start(command, &self.folder)
    }

    /// Runs a program here to its end.
    pub fn exec<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Output {
        self.spawn(words).wait(PATIENCE)
    }

    /// Starts the tests' own program here, see `peer help`.
    pub fn spawn_peer<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Process {
        self.spawn(peer(words))
    }

    /// Runs the tests' own program here to its end, see `peer help`.
    pub fn peer<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Output {
        self.exec(peer(words))
    }

    /// Runs `ip` here with several command lines.
    pub(crate) fn ip(&self, lines: &[&str]) {
        let file = self.folder.join(Run::this().unique("ip"));
        fs::write(&file, lines.join("\n")).expect("writing commands for ip");
        self.exec([OsStr::new("ip"), OsStr::new("-batch"), file.as_os_str()])
            .ok();
    }
}

/// What a program printed; programs may print anything.
fn read(file: &std::path::Path) -> String {
    let bytes = fs::read(file).expect("reading what a program printed");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn peer<'a>(words: impl IntoIterator<Item = &'a str>) -> impl Iterator<Item = &'a OsStr> {
    std::iter::once(Programs::get().peer.as_os_str()).chain(words.into_iter().map(OsStr::new))
}

/// A running program; dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    line: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    fn start(mut command: Command, folder: &std::path::Path) -> Self {
        // Files rather than pipes: nobody needs to read them for the program to go on.
        let [stdout, stderr] =
            ["stdout", "stderr"].map(|name| folder.join(Run::this().unique(name)));
        let words: Vec<_> = command
            .get_args()
            .skip_while(|word| *word != "--")
            .skip(1)
            .collect();
        let line = words.join(OsStr::new(" ")).to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).expect("making a file for output"))
            .stderr(File::create(&stderr).expect("making a file for errors"))
            .spawn()
            .unwrap_or_else(|error| panic!("starting {line}: {error}"));
        Self {
            child,
            line,
            stdout,
            stderr,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed until now.
    #[must_use]
    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    /// The errors that it has printed until now.
    #[must_use]
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// The last whole line that it has printed until now. Costs the same however much it has printed.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        const TAIL: i64 = 4096;
        let mut file = File::open(&self.stdout).expect("a program's output is there");
        let length = file.metadata().map_or(0, |about| about.len());
        let tail = TAIL.min(i64::try_from(length).unwrap_or(TAIL));
        file.seek(SeekFrom::End(-tail)).ok()?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        let (whole, _) = text.rsplit_once('\n')?;
        whole.lines().last().map(str::to_owned)
    }

    /// Waits until its output has this text.
    pub fn wait_for(&mut self, text: &str) -> &mut Self {
        eventually(&format!("`{}` prints {text:?}", self.line), || {
            let found = self.stdout().contains(text);
            if !found && let Some(status) = self.ended() {
                // It may have printed between the look at its output and its end.
                assert!(
                    self.stdout().contains(text),
                    "`{}` ended ({status}): {}",
                    self.line,
                    self.stderr()
                );
            }
            found
        });
        self
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("asking for a process's end")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(self.child.id().try_into().expect("process ids are small"));
        kill(id, signal)
            .unwrap_or_else(|error| panic!("sending {signal} to `{}`: {error}", self.line));
    }

    /// Waits for its end.
    pub fn wait(mut self, patience: Duration) -> Output {
        let status = wait::until(patience, || self.ended());
        let Some(status) = status else {
            panic!(
                "`{}` did not end within {patience:?}; it said: {}{}",
                self.line,
                self.stdout(),
                self.stderr()
            );
        };
        Output {
            line: self.line.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }

    /// Asks it to end (`SIGTERM`), and waits.
    pub fn stop(mut self, patience: Duration) -> Output {
        if self.ended().is_none() {
            self.signal(Signal::SIGTERM);
        }
        self.wait(patience)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of a program.
#[derive(Debug)]
pub struct Output {
    line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// The errors that it printed.
    pub stderr: String,
}

impl Output {
    /// What it printed; fails the test unless the program succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(
            self.status.success(),
            "`{}` failed ({}): {}{}",
            self.line,
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout
    }

    /// The errors that it printed; fails the test if the program succeeded.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(
            !self.status.success(),
            "`{}` should have failed, and printed: {}",
            self.line,
            self.stdout
        );
        self.stderr
    }

    /// What it printed, read as JSON; fails the test unless the program succeeded.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let line = self.line.clone();
        let stdout = self.ok();
        serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("`{line}` printed no JSON ({error}): {stdout}"))
    }
}
