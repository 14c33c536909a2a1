//! The daemon's own cgroup: known to the kernel programs, and never inside what they judge.

use std::path::Path;

use super::guard::make_parents;
use crate::{
    config::Config,
    workload::{
        CgroupSelector,
        cgroup::{CgroupError, CgroupTree, id},
    },
};

/// Makes sure that the daemon is in a cgroup of its own below the root, and gives its id with all
/// depths that it may have. Makes the enforced parents that are not there.
///
/// A daemon in the root itself, outside of it, or in a cgroup that holds a workload, moves into
/// [`OWN_CGROUP`](crate::workload::cgroup::OWN_CGROUP): the programs would otherwise not see its
/// sockets, or would take the workload's for its own.
///
/// # Errors
/// When the own cgroup cannot be found, or the move is refused.
pub fn settle_in(tree: &CgroupTree, config: &Config) -> Result<Vec<(u64, u32)>, CgroupError> {
    make_parents(tree, config);
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
        });
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
