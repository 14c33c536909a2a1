//! `reeve guard`: the default deny, put in place before anything that it is for, and without what
//! may be missing at boot: certificates, policies, a network.

use std::path::PathBuf;

use super::{RunError, datapath_settings, open_cgroups, parents::Parents};
use crate::{
    config::Config,
    datapath::{self, Datapath},
    workload::{CgroupSelector, cgroup::id},
};

/// What a guard did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guarded {
    /// Enforced parents, by cgroup path: all that is born below is refused.
    pub parents: Vec<String>,
    /// Workloads whose cgroups are there, by name: refused until the daemon knows them.
    pub workloads: Vec<String>,
    /// Workloads whose cgroups are still to come, below an enforced parent.
    pub covered: Vec<String>,
    /// Workloads whose cgroups are still to come, below none: nothing can refuse them before the
    /// daemon runs.
    pub uncovered: Vec<String>,
    /// Enforced parents that are not there or will not stay, and what lies where no program is
    /// attached, with the reasons: what is there or born there may be open.
    pub failed: Vec<String>,
}

/// Attaches the programs and has everything refused to enforced parents and workloads of which
/// the maps say nothing yet. Nothing is taken back, so it may run at any time.
///
/// # Errors
/// When the kernel refuses, or what is pinned has another layout.
pub fn guard(config: &Config) -> Result<Guarded, RunError> {
    let cgroups = open_cgroups(config)?;
    datapath::require_layout(&config.node.bpffs)?;
    let datapath = Datapath::load(datapath_settings(config, &cgroups, None))?;

    let mut parents = Parents::new(&cgroups);
    let mut guarded = Guarded::default();
    let mut refused = Vec::new();
    let mut refuse = |folder: &PathBuf| {
        let Ok(number) = id(folder) else {
            return false;
        };
        let depths = cgroups.depths(folder);
        refused.extend(depths.iter().map(|depth| (number, *depth)));
        !depths.is_empty()
    };
    for path in &config.enforced_parents {
        if let Err(error) = cgroups.require_below_root("an enforced parent", path) {
            guarded.failed.push(error.to_string());
            continue;
        }
        let held = parents.hold(path);
        // What is there is refused, for as long as it is.
        let is_refused = refuse(&cgroups.folder(path));
        match held {
            Ok(()) if is_refused => guarded.parents.push(path.clone()),
            Ok(()) => guarded.failed.push(format!(
                "the enforced parent {path} is no cgroup, or lies too deep to be enforced"
            )),
            Err(error) => guarded.failed.push(error.to_string()),
        }
    }
    for workload in &config.workloads {
        if let CgroupSelector::Cgroup(path) = &workload.selector
            && let Err(error) =
                cgroups.require_below_root(&format!("workload {}", workload.name), path)
        {
            guarded.failed.push(error.to_string());
            continue;
        }
        let (folders, path) = match &workload.selector {
            CgroupSelector::Cgroup(path) => (vec![cgroups.folder(path)], Some(path.clone())),
            CgroupSelector::Unit(name) => {
                let path = parents.cgroup_of(name);
                if let (true, Some(path)) = (name.ends_with(".slice"), &path)
                    && let Err(error) = parents.hold(path)
                {
                    guarded
                        .failed
                        .push(format!("workload {}: {error}", workload.name));
                }
                (cgroups.units(name).0, path)
            }
        };
        let found = folders.iter().filter(|folder| refuse(folder)).count();
        let names = if found > 0 {
            &mut guarded.workloads
        } else if path.is_some_and(|path| is_below(&path, &guarded.parents)) {
            &mut guarded.covered
        } else {
            &mut guarded.uncovered
        };
        names.push(workload.name.clone());
    }
    datapath.guard(&refused)?;
    Ok(guarded)
}

fn is_below(path: &str, parents: &[String]) -> bool {
    parents.iter().any(|parent| {
        path.strip_prefix(parent.trim_end_matches('/'))
            .is_some_and(|rest| rest.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_of_an_enforced_parent_is_not_below_it() {
        let parents = ["/kube".to_owned()];
        assert!(is_below("/kube/pod/web", &parents));
        assert!(!is_below("/kubelet/web", &parents));
        assert!(!is_below("/kube", &parents));
    }
}
