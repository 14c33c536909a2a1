//! `reeve wait`: for units that connect as soon as they start, before the daemon has seen their cgroup.

use std::{
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Args;

use super::{args, failed};
use crate::{
    admin::{self, Answer, Status},
    workload::cgroup::{self, CgroupError, CgroupTree},
};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(20);

/// What `reeve wait` is told.
#[derive(Debug, Args)]
pub struct Wait {
    /// Give up after this time, as in 10s or 1min
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "30s",
        value_parser = humantime::parse_duration
    )]
    timeout: Duration,
    /// The daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = args::DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// Why the caller cannot connect yet.
#[derive(Debug, thiserror::Error)]
enum WaitError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("given up after {}: {missing}", humantime::format_duration(*.after))]
    Timeout { after: Duration, missing: String },
}

/// `reeve wait`.
#[must_use]
pub fn wait(words: &Wait) -> ExitCode {
    match wait_until_ready(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn wait_until_ready(words: &Wait) -> Result<(), WaitError> {
    let own = own_cgroups()?;
    let deadline = Instant::now() + words.timeout;
    loop {
        let missing = match admin::ask(&words.socket, admin::Command::Status) {
            Ok(Answer::Status(status)) => missing(&status, &own),
            Ok(Answer::Error(refusal)) => Some(format!("the daemon: {refusal}")),
            Ok(_) => {
                Some("the daemon answered another question: is it another version?".to_owned())
            }
            Err(error) => Some(error.to_string()),
        };
        let Some(missing) = missing else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(WaitError::Timeout {
                after: words.timeout,
                missing,
            });
        }
        thread::sleep(PAUSE);
    }
}

/// Ids of the caller's cgroup and of all above it, the deepest first.
fn own_cgroups() -> Result<Vec<u64>, CgroupError> {
    let tree = CgroupTree::open(None)?;
    let own = tree.own()?;
    let folders = own
        .ancestors()
        .take_while(|at| at.starts_with(tree.mount()));
    Ok(folders.filter_map(|at| cgroup::id(at).ok()).collect())
}

/// What the workload of these cgroups still lacks.
fn missing(status: &Status, cgroups: &[u64]) -> Option<String> {
    let workload = cgroups.iter().find_map(|cgroup| {
        let mut workloads = status.workloads.iter();
        workloads.find(|workload| workload.cgroups.contains(cgroup))
    });
    let Some(workload) = workload else {
        return Some("this cgroup belongs to no workload that the daemon knows".to_owned());
    };
    let name = &workload.name;
    if !workload.listening {
        return Some(format!("workload {name} has no listeners yet"));
    }
    (!workload.certificate).then(|| format!("workload {name} has no valid certificate"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::{WorkloadState, WorkloadStatus},
        workload::CgroupSelector,
    };

    #[test]
    fn waits_until_the_deepest_workload_around_has_all_that_a_connection_needs() {
        let workload = |name: &str, cgroup, listening, certificate| WorkloadStatus {
            name: name.to_owned(),
            id: 1,
            spiffe_id: format!("spiffe://example.org/{name}"),
            selector: CgroupSelector::Unit(format!("{name}.service")),
            state: WorkloadState::Running,
            cgroups: vec![cgroup],
            netns: None,
            owns_netns: false,
            addresses: Vec::new(),
            listening,
            certificate,
            remarks: Vec::new(),
        };
        let said = |workloads| {
            let status = Status {
                workloads,
                ..Status::default()
            };
            missing(&status, &[3, 2, 1]).unwrap_or_else(|| "nothing".to_owned())
        };
        assert!(said(vec![]).contains("no workload"));
        assert!(said(vec![workload("a", 4, true, true)]).contains("no workload"));
        assert!(said(vec![workload("a", 3, false, true)]).contains("a has no listeners"));
        assert!(said(vec![workload("a", 3, true, false)]).contains("a has no valid certificate"));
        let around = workload("around", 1, false, false);
        assert!(said(vec![around.clone()]).contains("around has no listeners"));
        assert_eq!(said(vec![around, workload("a", 3, true, true)]), "nothing");
    }
}
