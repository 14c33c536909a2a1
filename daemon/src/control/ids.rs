//! Ids of workloads and peers: those by which the kernel's maps know them, which outlive the daemon.

use aws_lc_rs::digest::{SHA256, digest};
use reeve_common::NameDigest;

use crate::{
    config::Config,
    datapath::{self, Datapath},
};

/// What has a name.
#[derive(Clone, Copy)]
enum Kind {
    Workload,
    Peer,
}

/// The configuration with the ids that its workloads and peers have, or with new ones. The ids of
/// whom it does not declare are retired.
///
/// # Errors
/// When no id is left, or from the kernel.
pub fn give_ids(config: Config, datapath: &Datapath) -> Result<Config, datapath::Error> {
    let ids = datapath.ids(&names(&config))?;
    Ok(config.with_ids(ids))
}

/// The configuration with the ids that another daemon has given, for a daemon that has handed over.
/// Whom the other one does not know is left out: this one serves nobody new.
///
/// # Errors
/// From the kernel.
pub(super) fn ids_of_others(
    mut config: Config,
    datapath: &Datapath,
) -> Result<Config, datapath::Error> {
    let found = datapath.ids_of_others(&names(&config))?;
    let mut known = found.iter().map(Option::is_some);
    // In the order of the names; there is one for each.
    config.workloads.retain(|_| known.next().unwrap_or(false));
    config.peers.retain(|_| known.next().unwrap_or(false));
    Ok(config.with_ids(found.into_iter().flatten()))
}

/// The names of workloads, and then of peers, in the order of declaration.
fn names(config: &Config) -> Vec<NameDigest> {
    let workloads = config.workloads.iter();
    let workloads = workloads.map(|workload| name(Kind::Workload, &workload.name));
    let peers = config.peers.iter().map(|peer| name(Kind::Peer, &peer.name));
    workloads.chain(peers).collect()
}

/// A name as the map of ids has it. A workload and a peer of the same name are two.
fn name(kind: Kind, name: &str) -> NameDigest {
    let kind: u8 = match kind {
        Kind::Workload => b'w',
        Kind::Peer => b'p',
    };
    let text: Vec<u8> = std::iter::once(kind).chain(name.bytes()).collect();
    let mut short = NameDigest::default();
    for (to, from) in short.iter_mut().zip(digest(&SHA256, &text).as_ref()) {
        *to = *from;
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_and_a_peer_of_one_name_are_two() {
        assert_eq!(name(Kind::Peer, "web"), name(Kind::Peer, "web"));
        assert_ne!(name(Kind::Peer, "web"), name(Kind::Workload, "web"));
        assert_ne!(name(Kind::Peer, "web"), name(Kind::Peer, "db"));
    }
}
