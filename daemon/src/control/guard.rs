//! `reeve guard`: the default deny, put in place before anything that it is for, and without what
//! may be missing at boot: certificates, policies, a network.

use std::{fs, path::PathBuf};

use super::{RunError, datapath_settings};
use crate::{
    config::Config,
    datapath::{self, Datapath},
    workload::{
        CgroupSelector,
        cgroup::{CgroupTree, id},
    },
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
}

/// Attaches the programs and has everything refused to enforced parents and workloads of which
/// the maps say nothing yet. Nothing is taken back, so it may run at any time.
///
/// # Errors
/// When the kernel refuses, or what is pinned has another layout.
pub fn guard(config: &Config) -> Result<Guarded, RunError> {
    let cgroups = CgroupTree::open(config.node.cgroup_root.as_deref())?;
    datapath::require_layout(&config.node.bpffs)?;
    make_parents(&cgroups, config);
    let datapath = Datapath::load(datapath_settings(config, &cgroups))?;

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
        if refuse(&cgroups.folder(path)) {
            guarded.parents.push(path.clone());
        }
    }
    for workload in &config.workloads {
        let (folders, below) = match &workload.selector {
            CgroupSelector::Cgroup(path) => (vec![cgroups.folder(path)], Some(path)),
            CgroupSelector::Unit(name) => (cgroups.units(name).0, None),
        };
        let found = folders.iter().filter(|folder| refuse(folder)).count();
        let names = if found > 0 {
            &mut guarded.workloads
        } else if below.is_some_and(|path| is_below(path, &guarded.parents)) {
            &mut guarded.covered
        } else {
            &mut guarded.uncovered
        };
        names.push(workload.name.clone());
    }
    datapath.guard(&refused)?;
    Ok(guarded)
}

/// Makes the enforced parents that are not there: what is born in one is refused from its birth
/// only where the kernel knows the parent already. Whoever makes it later finds it made.
pub(super) fn make_parents(cgroups: &CgroupTree, config: &Config) {
    for path in &config.enforced_parents {
        let folder = cgroups.folder(path);
        if folder.exists() {
            continue;
        }
        match fs::create_dir_all(&folder) {
            Ok(()) => tracing::info!(
                cgroup = path,
                "an enforced parent was not there and is made, so that what is born in it is refused"
            ),
            Err(error) => tracing::warn!(
                cgroup = path,
                %error,
                "an enforced parent is not there and cannot be made; it is waited for"
            ),
        }
    }
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
