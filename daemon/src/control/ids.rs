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
    let workloads = config.workloads.iter();
    let workloads = workloads.map(|workload| name(Kind::Workload, &workload.name));
    let peers = config.peers.iter().map(|peer| name(Kind::Peer, &peer.name));
    let names: Vec<NameDigest> = workloads.chain(peers).collect();
    let ids = datapath.ids(&names)?;
    Ok(config.with_ids(ids))
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
