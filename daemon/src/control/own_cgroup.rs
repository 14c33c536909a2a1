//! The daemon's own cgroup: known to the kernel programs, and never inside what they judge.

use std::path::Path;

use super::{
    RunError,
    parents::{Parents, require_below_root},
};
use crate::{
    config::Config,
    workload::{
        CgroupSelector,
        cgroup::{CgroupError, CgroupTree, enter_host_view, id, require_process_numbers},
    },
};

/// Opens the cgroup tree as the host sees it, also where this process has a view of its own, as in a
/// container. To be called before there is a second thread.
///
/// # Errors
/// When the host's view cannot be had, or there is no cgroup2.
pub fn open_cgroups(config: &Config) -> Result<CgroupTree, RunError> {
    if enter_host_view()? {
        tracing::info!(
            "paths of cgroups are those of process 1, whose cgroup namespace reeve has entered"
        );
    }
    require_process_numbers(&config.node.proc)?;
    Ok(CgroupTree::open(config.node.cgroup_root.as_deref())?)
}

/// Makes sure that the daemon is in a cgroup of its own below the root, and gives its id with all
/// depths that it may have. Makes the enforced parents that are not there.
///
/// At the start this comes before the daemon's sandbox: in the root of the hierarchy cgroups are made
/// by those alone who may write wherever they like (`CAP_DAC_OVERRIDE`).
///
/// A daemon in the root itself, outside of it, or in a cgroup that holds a workload, moves into
/// [`OWN_CGROUP`](crate::workload::cgroup::OWN_CGROUP): the programs would otherwise not see its
/// sockets, or would take the workload's for its own.
///
/// # Errors
/// When the own cgroup cannot be found, the move is refused, an enforced parent cannot be made, or
/// something that is declared lies where no program is attached.
pub fn settle_in(tree: &CgroupTree, config: &Config) -> Result<Vec<(u64, u32)>, RunError> {
    require_below_root(tree, config)?;
    let mut parents = Parents::new(tree);
    for path in &config.enforced_parents {
        parents.make(path)?;
    }
    let mut own = tree.own()?;
    if !is_apart(tree, config, &own) {
        let from = own;
        own = tree.move_self()?;
        tracing::info!(
            from = tree.path(&from),
            to = tree.path(&own),
            "the daemon has moved into a cgroup of its own"
        );
    }
    let number = id(&own).map_err(|error| CgroupError::Own {
        reason: format!("{}: {error}", own.display()),
    })?;
    let depths = tree.depths(&own);
    if depths.is_empty() {
        return Err(CgroupError::Own {
            reason: format!(
                "{} lies deeper than {} levels; start the daemon in another cgroup",
                own.display(),
                reeve_common::MAX_CGROUP_DEPTH
            ),
        }
        .into());
    }
    Ok(depths.into_iter().map(|depth| (number, depth)).collect())
}

fn is_apart(tree: &CgroupTree, config: &Config, own: &Path) -> bool {
    let below_root = own.starts_with(tree.root()) && own != tree.root();
    let holds = |path: &str| tree.folder(path).starts_with(own);
    let holds_workload = config
        .workloads
        .iter()
        .any(|workload| match &workload.selector {
            CgroupSelector::Cgroup(path) => holds(path),
            CgroupSelector::Unit(name) => tree
                .units(name)
                .0
                .iter()
                .any(|folder| folder.starts_with(own)),
        });
    below_root && !holds_workload && !config.enforced_parents.iter().any(|path| holds(path))
}
