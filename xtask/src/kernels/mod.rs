//! `cargo xtask kernels`: boots every kernel that reeve supports, and runs its tests there.
//!
//! In: Debian's kernels and systems, from the mirror that the machine is configured for, and this
//! workspace's programs. Out: what held on which kernel. Each guest is a virtual machine under
//! software emulation, so that no hardware is needed for it; kernels and systems are kept in
//! cargo's target folder, and a guest leaves nothing behind.

mod debian;
mod disk;
mod guest;
mod payload;

use std::{fs, time::Duration};

use anyhow::{Result, bail};

use crate::{setup, workspace::Workspace};
use guest::Guest;

/// A kernel, and the system that it is booted with.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    /// What it is called on the command line and in reports.
    name: &'static str,
    /// The Debian suite that has its packages.
    suite: &'static str,
    /// The Debian release of the root disk.
    release: &'static str,
}

/// What reeve supports: the oldest, what lies between, and the newest.
const KERNELS: [Kernel; 3] = [
    // systemd 252.
    Kernel {
        name: "6.1",
        suite: "bookworm",
        release: "bookworm",
    },
    // systemd 257.
    Kernel {
        name: "6.12",
        suite: "trixie",
        release: "trixie",
    },
    Kernel {
        name: "newest",
        suite: "trixie-backports",
        release: "trixie",
    },
];

/// What runs in a guest, in this order; see `guest/run.sh`.
const STEPS: [&str; 5] = ["load", "units", "datapath", "demo", "e2e"];

/// Tests of the datapath that `cargo xtask test` runs on the oldest kernel: one for each hook.
const QUICK_TESTS: [&str; 7] = [
    "programs::",
    "refusal::",
    "bind::",
    "connect::",
    "datagram::",
    "icmp::",
    "kernel::",
];

/// End-to-end tests whose daemons and clients need nothing that the guest lacks.
const END_TO_END: [&str; 4] = ["plaintext::", "udp::", "no_way_round::", "restart::"];

/// What to boot, and what to run there.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Boot only this one: 6.1, 6.12 or newest; may be given again
    #[arg(long, value_name = "KERNEL", value_parser = KERNELS.map(|kernel| kernel.name))]
    only: Vec<String>,
    /// Run only this step; may be given again
    #[arg(long, value_name = "STEP", value_parser = STEPS)]
    step: Vec<String>,
    /// Run only tests of the datapath with this in their name; may be given again
    #[arg(long, value_name = "FILTER")]
    tests: Vec<String>,
    /// Run what `cargo xtask test` runs: the steps load, units and a part of datapath
    #[arg(long, conflicts_with_all = ["step", "tests"])]
    quick: bool,
    /// Memory of a guest, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// Leave the guest running afterwards, with a shell at a socket
    #[arg(long)]
    keep: bool,
    /// Look for newer kernels of Debian's, rather than boot those of the last time
    #[arg(long)]
    update: bool,
}

/// What a guest is to do.
struct Plan {
    steps: Vec<String>,
    tests: Vec<String>,
    keep: bool,
    /// After this long it hangs.
    limit: Duration,
}

impl Plan {
    fn of(options: &Options) -> Self {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let (steps, tests, minutes) = if options.quick {
            (
                owned(&["load", "units", "datapath"]),
                owned(&QUICK_TESTS),
                20,
            )
        } else if options.step.is_empty() {
            (owned(&STEPS), options.tests.clone(), 120)
        } else {
            (options.step.clone(), options.tests.clone(), 120)
        };
        Self {
            steps,
            tests,
            keep: options.keep,
            limit: Duration::from_secs(minutes * 60),
        }
    }

    /// As the guest's shell reads it.
    fn for_guest(&self) -> String {
        format!(
            "STEPS='{}'\nTESTS='{}'\nEND_TO_END='{}'\nKEEP='{}'\n",
            self.steps.join(" "),
            self.tests.join(" "),
            END_TO_END.join(" "),
            if self.keep { "yes" } else { "" }
        )
    }
}

/// `cargo xtask kernels`.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_building(&workspace)?;
    boot(&workspace, options)
}

/// What `cargo xtask test` runs of it: the oldest kernel, and a part of the tests.
pub(crate) fn quick(workspace: &Workspace) -> Result<()> {
    boot(
        workspace,
        &Options {
            only: vec![KERNELS[0].name.to_owned()],
            step: Vec::new(),
            tests: Vec::new(),
            quick: true,
            memory: 2048,
            keep: false,
            update: false,
        },
    )
}

fn boot(workspace: &Workspace, options: &Options) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!(
            "the guests are x86-64 machines that run this machine's programs: use an x86-64 host"
        );
    }
    setup::for_kernels()?;
    let folder = workspace.target.join("kernels");
    fs::create_dir_all(&folder)?;
    let plan = Plan::of(options);
    let payload = payload::gather(workspace, &folder, &plan)?;
    let mut reports = Vec::new();
    for kernel in KERNELS {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == kernel.name) {
            continue;
        }
        let booted = debian::kernel(&kernel, &folder, options.update)?;
        let root = disk::root(&kernel, &folder)?;
        let name = format!("{} ({})", kernel.name, booted.release);
        println!("── booting {name}");
        let guest = Guest {
            kernel: &booted,
            root: &root,
            payload: &disk::payload(&booted, &payload, &folder)?,
            memory: options.memory,
            folder: folder.join("guest").join(kernel.name),
        };
        reports.push((name, guest.run(&plan)?));
    }
    println!();
    let mut failed = 0;
    for (name, steps) in &reports {
        for step in steps {
            println!("{name}: {step}");
            failed += usize::from(!step.held);
        }
    }
    if failed > 0 {
        bail!("{failed} steps failed; what the guests printed is above");
    }
    Ok(())
}
