//! The daemon as a process: what it may use, what may look into it, and what systemd is told.

use std::{
    fs, io, ops::Range, os::unix::process::CommandExt, path::Path, process::Command, time::Duration,
};

use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use sd_notify::NotifyState;

/// Bytes of the longest status: systemd passes over messages of more than 4096.
const LONGEST_STATUS: usize = 2000;

/// Raises the number of file descriptors to what the system allows, and keeps private keys out of
/// core dumps and other users' debuggers. What is refused is logged: the daemon runs without it.
pub fn prepare() {
    let files = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = files {
        tracing::warn!(%error, "the limit of open files cannot be raised; many connections may fail");
    }
    let dumps = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| prctl::set_dumpable(false));
    if let Err(error) = dumps {
        tracing::warn!(%error, "core dumps cannot be switched off; one would hold private keys");
    }
}

/// Starts a program as a child of process 1, or of whichever process adopts orphans here. systemd
/// knows the end of its own children alone. To be called before there is a second thread.
///
/// # Errors
/// When it cannot be started.
pub fn spawn_orphan(command: &mut Command) -> io::Result<()> {
    // SAFETY: between fork and exec, nothing is called but fork and _exit, which are
    // async-signal-safe; the parent of what is started ends at once, with nothing run at its exit.
    unsafe {
        command.pre_exec(|| match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(()),
            _ => libc::_exit(0),
        });
    }
    command.spawn()?.wait()?;
    Ok(())
}

/// Unmaps the program's code: what only the start needed is not mapped again, and no longer counts as
/// the daemon's resident memory. Where this fails it stays, as it does for any program.
pub(super) fn give_back_code() {
    let (Ok(maps), Ok(program)) = (
        fs::read_to_string("/proc/self/maps"),
        fs::read_link("/proc/self/exe"),
    ) else {
        return;
    };
    for code in maps.lines().filter_map(|line| code_of(&program, line)) {
        // SAFETY: these pages are a file's, private and never written to: what is needed is read from
        // the file again, and is the same.
        unsafe {
            libc::madvise(code.start as *mut _, code.len(), libc::MADV_DONTNEED);
        }
    }
}

/// The addresses in a line of `/proc/PID/maps` (proc_pid_maps(5)), if it is of the program's code.
fn code_of(program: &Path, line: &str) -> Option<Range<usize>> {
    let mut words = line.split_ascii_whitespace();
    let (addresses, access) = (words.next()?, words.next()?);
    let path = words.nth(3)?;
    if access != "r-xp" || Path::new(path) != program {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// For how long systemd waits to hear that the daemon is well before it starts another; none where
/// it does not (`WatchdogSec=` is not set, or there is no systemd).
pub(super) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Tells systemd that the daemon is well.
pub(super) fn notify_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

/// Tells systemd, where it listens (`NOTIFY_SOCKET`), that the daemon is ready.
pub(super) fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// Tells systemd that the configuration is read again; [`notify_ready`] ends it.
pub(super) fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "systemd is not told of the reload"),
    }
}

/// Tells systemd that another process is the service now.
pub(super) fn notify_successor(process: i32) {
    notify(&[NotifyState::MainPid(process.unsigned_abs())]);
}

/// Tells systemd how the daemon is, for `systemctl status`.
pub(super) fn notify_status(status: &str) {
    let mut line = status.replace('\n', " ");
    line.truncate(line.floor_char_boundary(LONGEST_STATUS));
    notify(&[NotifyState::Status(&line)]);
}

/// Tells systemd that the daemon is stopping.
pub(super) fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_code_is_given_back() {
        let program = Path::new("/usr/bin/reeve");
        let code = "55d0a000-55d0b000 r-xp 00001000 fe:01 1234    /usr/bin/reeve";
        assert_eq!(code_of(program, code), Some(0x55d0_a000..0x55d0_b000));
        // Data may have been written to, as by the loader.
        for other in [
            "55d0a000-55d0b000 r--p 00001000 fe:01 1234    /usr/bin/reeve",
            "55d0a000-55d0b000 rw-p 00001000 fe:01 1234    /usr/bin/reeve",
            "7f00a000-7f00b000 r-xp 00001000 fe:01 1235    /usr/lib/libc.so.6",
            "7f00a000-7f00b000 r-xp 00000000 00:00 0",
        ] {
            assert_eq!(code_of(program, other), None);
        }
    }

    #[test]
    fn a_program_that_gave_its_code_back_goes_on() {
        give_back_code();
        assert_eq!(std::hint::black_box(2) + 2, 4);
    }
}
