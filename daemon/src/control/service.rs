//! The daemon as a service of systemd: who is of the same unit.

use std::fs;

use crate::handover::Asker;

/// Whether this daemon may hand over to another one, or why not. systemd takes what it hears from a
/// unit's own processes, and ends the unit where it hears nothing.
pub(super) fn admits(asker: Asker) -> Result<(), String> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
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

/// Path of a process's cgroup.
fn cgroup(process: &str) -> Option<String> {
    let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(str::to_owned)
}
