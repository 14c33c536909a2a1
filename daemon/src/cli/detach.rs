//! `reeve detach`: everything that reeve left on the node, removed.

use std::{collections::BTreeSet, error::Error, fs, io, os::unix::fs::MetadataExt};

use tokio::runtime::Builder;

use crate::{
    config::Config,
    control,
    datapath::{self, netns::Netns},
    workload::cgroup::{CgroupTree, OWN_CGROUP, processes},
};

/// Removes it, and says what it was, one line each. Pins come first: with them enforcement ends.
pub(super) fn everything(config: &Config) -> Result<Vec<String>, Box<dyn Error>> {
    // Before anything is removed, and before there is a second thread.
    let tree = control::open_cgroups(config)?;
    let pins = datapath::detach(&config.node.bpffs)?;
    let mut removed: Vec<String> = pins.iter().map(|pin| pin.display().to_string()).collect();
    removed.extend(routes(&tree)?);
    let own = tree.root().join(OWN_CGROUP);
    match fs::remove_dir(&own) {
        Ok(()) => removed.push(format!("the cgroup {}", tree.path(&own))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("the cgroup {}: {error}", own.display()).into()),
    }
    Ok(removed)
}

/// What was routed in the network namespaces of whatever runs below the cgroup root.
fn routes(tree: &CgroupTree) -> Result<Vec<String>, Box<dyn Error>> {
    let mut seen = BTreeSet::new();
    let mut removed = Vec::new();
    let runtime = Builder::new_current_thread().enable_all().build()?;
    for process in processes(tree.root()) {
        // A process that is gone has no namespace that could be looked at.
        let Ok(file) = fs::metadata(format!("/proc/{process}/ns/net")) else {
            continue;
        };
        if !seen.insert(file.ino()) {
            continue;
        }
        let Ok(netns) = Netns::of_pid(process) else {
            continue;
        };
        if runtime.block_on(datapath::restore_namespace(&netns))? {
            removed.push(format!(
                "the routing of marked packets in the network namespace {}",
                netns.inode
            ));
        }
    }
    Ok(removed)
}
