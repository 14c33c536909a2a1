//! A machine with a systemd of its own: a container that boots, on a node.
//!
//! Its files are those of a small Debian that `cargo xtask setup` makes once; what is written in
//! the machine is gone with it. It has the node's network, and its cgroups are below the node's.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{Cgroup, Node, Output, Place, Process, Programs, eventually, run::Run, wait};

/// Folder of the machine's files, in cargo's target folder.
const FILES: &str = "machines/trixie";

/// System calls that a container is usually kept from and the daemon needs.
const SYSTEM_CALLS: &str =
    "bpf perf_event_open landlock_create_ruleset landlock_add_rule landlock_restrict_self";

/// A machine that has booted; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    _process: Process,
    cgroup: Arc<Cgroup>,
    outside: Place,
    /// The number that its first process has outside.
    first: u32,
    name: String,
}

impl Machine {
    /// Boots a machine on a node. `files`, which it may change, are in their places before it does.
    #[must_use]
    pub fn boot(node: &Node, files: &[(&Path, &str)]) -> Self {
        let name = Run::this().name_of_machine();
        let cgroup = Arc::new(node.cgroup().child("machine"));
        fs::create_dir(node.pins()).expect("making a folder for pins");
        let programs = Programs::get();
        let mut words: Vec<OsString> = [
            "env",
            // One hierarchy of cgroups, and others may boot from the same files.
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1",
            "SYSTEMD_NSPAWN_LOCK=0",
            // Its own network's settings are its own, and no others.
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network",
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--capability=all",
            "--volatile=overlay",
            "--console=passive",
            "--resolv-conf=off",
            "--timezone=off",
        ]
        .map(OsString::from)
        .into();
        let mut option = |option: &str, value: &OsStr| {
            let mut word = OsString::from(option);
            word.push("=");
            word.push(value);
            words.push(word);
        };
        option("--machine", name.as_ref());
        option("--system-call-filter", SYSTEM_CALLS.as_ref());
        option("--directory", files_of_machine().as_ref());
        option("--bind", &bind(node.pins(), "/sys/fs/bpf"));
        let programs = [
            (programs.reeve.as_path(), "/usr/local/bin/reeve"),
            (programs.peer.as_path(), "/usr/local/bin/peer"),
        ];
        for (file, place) in programs {
            option("--bind-ro", &bind(file, place));
        }
        for (file, place) in files {
            option("--bind", &bind(file, place));
        }
        words.push("--boot".into());

        let place = node.host().with_cgroup(cgroup.clone());
        let process = place.spawn(words);
        let mut first = None;
        eventually("the machine has a first process", || {
            first = first_process(&cgroup);
            first.is_some()
        });
        let machine = Self {
            _process: process,
            outside: node.host().clone(),
            cgroup,
            first: first.expect("it was found"),
            name,
        };
        let booted = wait::until(wait::START, || {
            let state = machine.run(["systemctl", "is-system-running"]).stdout;
            // A container lacks things that units want: degraded is as good.
            ["running", "degraded"]
                .contains(&state.trim())
                .then_some(())
        });
        assert!(booted.is_some(), "the machine has not booted");
        machine
    }

    /// Runs a program inside, by nobody's unit.
    pub fn run<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Output {
        let first = self.first.to_string();
        let enter = ["nsenter", "--target", &first, "--all", "--"].map(OsString::from);
        let words = words.into_iter().map(|word| word.as_ref().to_owned());
        self.outside.exec(enter.into_iter().chain(words))
    }

    /// Runs a shell command inside.
    pub fn shell(&self, command: &str) -> Output {
        self.run(["sh", "-c", command])
    }

    /// Writes a file inside; its folder is made.
    pub fn write(&self, file: &str, text: &str) {
        let path = format!("/proc/{}/root{file}", self.first);
        let folder = Path::new(&path).parent().expect("files are in folders");
        fs::create_dir_all(folder).expect("making a folder inside the machine");
        fs::write(&path, text).expect("writing a file inside the machine");
    }

    /// A property of a unit, as `systemctl show` tells it.
    #[must_use]
    pub fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.run(["systemctl", "show", "--value", "--property", name, unit]);
        shown.ok().trim().to_owned()
    }

    /// The number that a unit's main process has outside.
    #[must_use]
    pub fn main_process(&self, slice: &str, unit: &str) -> u32 {
        let cgroup = self.cgroup.path().join("payload").join(slice).join(unit);
        let mut found = None;
        eventually("the unit has a process", || {
            let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            found = text.lines().find_map(|line| line.parse().ok());
            found.is_some()
        });
        found.expect("it was found")
    }

    /// The number outside of a process that has this one inside.
    #[must_use]
    pub fn number_of(&self, inside: &str) -> u32 {
        let mut numbers = Vec::new();
        collect_processes(&self.cgroup.path().join("payload"), &mut numbers);
        let found = numbers.into_iter().find(|number| {
            let status = fs::read_to_string(format!("/proc/{number}/status")).unwrap_or_default();
            let names = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            names.is_some_and(|names| names.split_whitespace().last() == Some(inside))
        });
        found.expect("the process runs")
    }

    /// What a unit has logged.
    #[must_use]
    pub fn log(&self, unit: &str) -> String {
        self.run([
            "journalctl",
            "--no-pager",
            "--output",
            "cat",
            "--unit",
            unit,
        ])
        .ok()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.run(["journalctl", "--no-pager", "--boot"]);
            eprintln!("--- journal of the machine ---\n{}", journal.stdout);
        }
        self.cgroup.kill();
        // What the container's manager keeps for each container, and removes when it ends well.
        for folder in ["propagate", "unix-export"] {
            let folder = Path::new("/run/systemd/nspawn")
                .join(folder)
                .join(&self.name);
            let _ = nix::mount::umount2(&folder, nix::mount::MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&folder);
        }
    }
}

/// The processes of a cgroup and of all below.
fn collect_processes(folder: &Path, numbers: &mut Vec<u32>) {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    numbers.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            collect_processes(&entry.path(), numbers);
        }
    }
}

/// The first process of the container, which leads it: the one in systemd's own cgroup.
fn first_process(cgroup: &Cgroup) -> Option<u32> {
    let scope = cgroup.path().join("payload/init.scope/cgroup.procs");
    fs::read_to_string(scope).ok()?.lines().next()?.parse().ok()
}

fn bind(file: &Path, place: &str) -> OsString {
    let mut bind = file.as_os_str().to_owned();
    bind.push(":");
    bind.push(place);
    bind
}

/// Beside the folder of cargo's profile that the daemon or this program was built in.
fn files_of_machine() -> PathBuf {
    let program = env::current_exe().expect("the running program has a path");
    let found = program
        .ancestors()
        .map(|folder| folder.join(FILES))
        .find(|files| files.is_dir());
    found.unwrap_or_else(|| panic!("{FILES} is not there: run `cargo xtask setup`"))
}
