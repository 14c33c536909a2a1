//! The daemon as a service of systemd: who is of the same unit, and how it leaves the unit to the next
//! daemon while it still serves what it has accepted.

use std::{
    env, fs,
    io::{self, PipeWriter, Read, Write},
    os::fd::AsFd,
};

use nix::{
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, fork},
};

use super::{process, systemd::Systemd};
use crate::{config::Config, handover::Asker, privileges::Confinement, workload::CgroupSelector};

/// Whether this daemon may hand over to another one, or why not. systemd takes what it hears from a
/// unit's own processes, and ends the unit where it hears nothing.
pub(super) fn admits(asker: &Asker) -> Result<(), String> {
    if !is_service() {
        return Ok(());
    }
    let own = cgroup("self");
    let is_inside = own.is_some() && cgroup(&asker.process.to_string()) == own;
    if is_inside && asker.is_notifying {
        return Ok(());
    }
    Err(
        "this daemon is a service of systemd, which would end a daemon that was started outside of \
         the unit: run `reeve upgrade`, which starts it inside"
            .to_owned(),
    )
}

/// Whether systemd keeps sockets for the next daemon (`FileDescriptorStoreMax=`).
pub(super) fn keeps_sockets() -> bool {
    // The variable is systemd's since version 254.
    if let Ok(most) = env::var("FDSTORE") {
        return most.parse::<u32>().is_ok_and(|most| most > 0);
    }
    let most = ask(|systemd, unit| systemd.descriptors_kept(unit));
    most.is_some_and(|most| most > 0)
}

/// Whether this daemon is stopped for another one to be started.
pub(super) fn is_restarting() -> bool {
    ask(Systemd::is_restarting).unwrap_or(false)
}

/// The units of a configuration's workloads that this machine's systemd does not know, with the workloads'
/// names. None where there is no systemd to ask.
#[must_use]
pub fn unknown_units(config: &Config) -> Vec<(String, String)> {
    let Some(mut systemd) = Systemd::connect() else {
        return Vec::new();
    };
    let units = config
        .workloads
        .iter()
        .filter_map(|workload| match &workload.selector {
            CgroupSelector::Unit(unit) => Some((workload.name.clone(), unit.clone())),
            CgroupSelector::Cgroup(_) => None,
        });
    units
        // What cannot be asked is not called a mistake.
        .filter(|(_, unit)| systemd.knows(unit).is_ok_and(|known| !known))
        .collect()
}

fn is_service() -> bool {
    env::var_os("NOTIFY_SOCKET").is_some()
}

/// Asks systemd about this daemon's unit; none where there is no answer.
fn ask<T>(question: impl FnOnce(&mut Systemd, &str) -> io::Result<T>) -> Option<T> {
    if !is_service() {
        return None;
    }
    let cgroup = cgroup("self")?;
    let unit = cgroup.rsplit('/').find(|part| part.ends_with(".service"))?;
    let answer = question(&mut Systemd::connect()?, unit);
    answer
        .inspect_err(|error| tracing::warn!(%error, unit, "systemd does not tell of this unit"))
        .ok()
}

/// Path of a process's cgroup.
fn cgroup(process: &str) -> Option<String> {
    let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(str::to_owned)
}

/// A process that does nothing but end when it is told to, or when this one ends. Named as the unit's main
/// process, its end is the service's, and systemd starts the next daemon while this one still drains.
#[derive(Debug)]
pub struct StandIn {
    process: Pid,
    /// Its end is the process's.
    _end: PipeWriter,
}

// === impl StandIn ===

impl StandIn {
    /// Starts it, as a child of process 1: systemd hears at once of the end of its own children alone. None
    /// where this process is no service. To be called before there is a second thread.
    ///
    /// # Errors
    /// From the kernel.
    pub fn start(confinement: Confinement) -> io::Result<Option<Self>> {
        if !is_service() {
            return Ok(None);
        }
        let (end, _end) = io::pipe()?;
        let (mut number, told) = io::pipe()?;
        // SAFETY: there is one thread, so the child is as whole as this process.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop((end, told));
                // It ends at once.
                waitpid(child, None)?;
                let mut bytes = [0; size_of::<i32>()];
                number.read_exact(&mut bytes)?;
                Ok(Some(Self {
                    process: Pid::from_raw(i32::from_ne_bytes(bytes)),
                    _end,
                }))
            }
            ForkResult::Child => {
                drop((number, _end));
                stand_in(confinement, end, told)
            }
        }
    }

    /// Has systemd take the end of the stand-in for the service's, and ends it.
    pub(super) fn end(self) {
        process::notify_successor(self.process.as_raw());
        // What is asked later is answered later: systemd has heard of the new main process.
        let _ = ask(Systemd::is_restarting);
    }
}

/// The stand-in: the child of a child, which goes on when that one ends.
fn stand_in(confinement: Confinement, mut end: io::PipeReader, mut told: PipeWriter) -> ! {
    let failed = |error: io::Error| -> ! {
        // Without it, the daemon drains before the next one starts.
        tracing::warn!(%error, "nothing can stand in for this daemon while it drains");
        // SAFETY: this ends a process that was forked, and runs nothing at its exit.
        unsafe { libc::_exit(1) }
    };
    // SAFETY: as above; the parent of the second child ends at once.
    match unsafe { fork() } {
        Err(error) => failed(error.into()),
        Ok(ForkResult::Parent { .. }) => {
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
        Ok(ForkResult::Child) => {}
    }
    // Signals to the unit are the daemon's business.
    if let Err(error) = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None) {
        failed(error.into());
    }
    if let Err(error) = told.write_all(&std::process::id().to_ne_bytes()) {
        failed(error);
    }
    drop(told);
    close_all_but(&end);
    // It holds nothing and does nothing; where the kernel lets it, it can do nothing either.
    let _ = confinement.enter_exposed();
    let _ = end.read(&mut [0]);
    // SAFETY: as above.
    unsafe { libc::_exit(0) }
}

/// Closes what this process has inherited: sockets that would stay open.
fn close_all_but(kept: &impl AsFd) {
    use std::os::fd::AsRawFd;
    let kept = kept.as_fd().as_raw_fd().unsigned_abs();
    for (first, last) in [(0, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if first <= last && !(first == 0 && kept == 0) {
            // SAFETY: nothing in this process uses a descriptor again but the one that is kept.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) };
        }
    }
}
