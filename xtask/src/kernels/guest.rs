//! Booting a guest, and following what it prints.

use std::{
    fmt, fs,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Plan, debian::Booted};

/// How often what it printed is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Start of the lines of `guest/run.sh` that are for us.
const OURS: &str = "kernels: ";

/// A virtual machine.
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Booted,
    /// Its disks. Neither is written to.
    pub(super) root: &'a Path,
    pub(super) payload: &'a Path,
    /// In MiB.
    pub(super) memory: u32,
    /// For what it prints.
    pub(super) folder: PathBuf,
}

/// What became of a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    name: String,
    seconds: u64,
    pub(super) held: bool,
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.held { "held" } else { "FAILED" };
        write!(formatter, "{} {what} after {} s", self.name, self.seconds)
    }
}

/// Ends the virtual machine, whatever happens here.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guest<'_> {
    /// Boots it, shows what it prints, and says what became of each step.
    pub(super) fn run(&self, plan: &Plan) -> Result<Vec<Step>> {
        fs::create_dir_all(&self.folder)?;
        let printed = self.folder.join("printed");
        File::create(&printed)?;
        let started = Instant::now();
        let mut machine = Machine(self.start(&printed)?);
        let mut file = File::open(&printed)?;
        let mut rest = String::new();
        let mut steps = Vec::new();
        let mut done = false;
        while !done {
            let ended = machine.0.try_wait()?.is_some();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            rest.push_str(&String::from_utf8_lossy(&bytes).replace('\r', ""));
            while let Some((line, after)) = rest.split_once('\n') {
                println!("{line}");
                if let Some(ours) = line.strip_prefix(OURS) {
                    done |= ours == "done";
                    steps.extend(step(ours));
                }
                rest = after.to_owned();
            }
            if ended && !done {
                bail!("the guest ended early; {}", self.console());
            }
            if started.elapsed() > plan.limit {
                bail!("the guest hangs after {:?}; {}", plan.limit, self.console());
            }
            thread::sleep(LOOK);
        }
        if plan.keep {
            println!(
                "the guest stays: `socat - UNIX:{}` is its console; end it with `poweroff -f` there",
                self.folder.join("console.socket").display()
            );
            machine.0.wait()?;
        }
        if steps.len() < plan.steps.len() {
            bail!("the guest did not run all of its steps; {}", self.console());
        }
        Ok(steps)
    }

    fn start(&self, printed: &Path) -> Result<Child> {
        let disk = |file: &Path, options: &str| {
            format!("file={},format=raw,if=virtio,{options}", file.display())
        };
        let console = self.folder.join("console");
        let socket = self.folder.join("console.socket");
        let log = File::create(self.folder.join("qemu"))?;
        Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2"])
            .args(["-m", &self.memory.to_string()])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&self.kernel.initrd)
            // An emulated processor does not speculate, and needs no guard against it.
            .args([
                "-append",
                "console=ttyS0 loglevel=5 panic=5 net.ifnames=0 systemd.show_status=0 mitigations=off",
            ])
            .args(["-drive", &disk(self.root, "snapshot=on")])
            .args(["-drive", &disk(self.payload, "readonly=on")])
            .args([
                "-chardev",
                &format!(
                    "socket,id=console,path={},server=on,wait=off,logfile={}",
                    socket.display(),
                    console.display()
                ),
            ])
            .args(["-serial", "chardev:console"])
            .args(["-serial", &format!("file:{}", printed.display())])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting qemu-system-x86_64")
    }

    /// Where to look when it says nothing.
    fn console(&self) -> String {
        format!("its console is {}", self.folder.join("console").display())
    }
}

/// Of `held NAME SECONDS` or `failed NAME SECONDS`.
fn step(line: &str) -> Option<Step> {
    let mut words = line.split(' ');
    let held = match words.next()? {
        "held" => true,
        "failed" => false,
        _ => return None,
    };
    Some(Step {
        name: words.next()?.to_owned(),
        seconds: words.next()?.parse().ok()?,
        held,
    })
}

#[cfg(test)]
mod tests {
    use super::{Step, step};

    #[test]
    fn a_guest_says_what_became_of_each_step() {
        let held = step("held load 12").unwrap();
        assert_eq!(held.to_string(), "load held after 12 s");
        assert_eq!(
            step("failed units 3"),
            Some(Step {
                name: "units".to_owned(),
                seconds: 3,
                held: false
            })
        );
        assert_eq!(step("done"), None);
    }
}
