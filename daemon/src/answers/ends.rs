//! Who is meant: from what people write to what a verdict is asked about.

use std::{net::IpAddr, sync::Arc};

use super::offline::stand_in;
use crate::{
    identity::SpiffeId,
    policy::Snapshot,
    workload::{Peer, RunningWorkload},
    yaml::nearest,
};

/// One end of a connection.
#[derive(Clone, Debug)]
pub(super) struct End<'a> {
    /// Name, SPIFFE ID or address, for people.
    pub(super) name: String,
    /// Its identity.
    pub(super) id: Option<SpiffeId>,
    /// Where it is: at least one address.
    pub(super) addresses: Vec<IpAddr>,
    /// The workload of this node that it is.
    pub(super) local: Option<&'a Arc<RunningWorkload>>,
    /// Whether it is behind a tunnel.
    pub(super) tunnel: bool,
}

// === impl End ===

impl<'a> End<'a> {
    /// Finds who is meant by a name, SPIFFE ID or address.
    ///
    /// # Errors
    /// A sentence that says what would be right.
    pub(super) fn find(snapshot: &'a Snapshot, text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::at(snapshot, address.to_canonical()));
        }
        if text.contains("://") {
            let id = SpiffeId::parse(text).map_err(|error| format!("`{text}`: {error}"))?;
            return Ok(Self::with_id(snapshot, id));
        }
        let local = snapshot
            .workloads()
            .find(|running| running.workload.name == text);
        if let Some(running) = local {
            return Ok(Self::local(running));
        }
        if let Some(peer) = snapshot.peers().find(|peer| peer.name == text) {
            return Ok(Self::peer(peer));
        }
        let mut what = format!("no workload and no peer has the name `{text}`");
        let names = snapshot.peers().map(|peer| peer.name.as_str());
        match nearest(text, names) {
            Some(near) => what.push_str(&format!("; did you mean `{near}`?")),
            None => what.push_str("; a SPIFFE ID or an address would do too"),
        }
        Err(what)
    }

    fn local(running: &'a Arc<RunningWorkload>) -> Self {
        let workload = &running.workload;
        let mut addresses = running.addresses.clone();
        if addresses.is_empty() {
            addresses.clone_from(&workload.addresses);
        }
        if addresses.is_empty() {
            // It does not run; what will be said of it holds for any address.
            addresses.push(stand_in(workload.id));
        }
        Self {
            name: workload.name.clone(),
            id: Some(workload.attributes.spiffe_id.clone()),
            addresses,
            local: Some(running),
            tunnel: true,
        }
    }

    fn peer(peer: &Peer) -> Self {
        let address = |network: &ipnet::IpNet| network.hosts().next().unwrap_or(network.addr());
        Self {
            name: peer.name.clone(),
            id: peer.attributes.as_ref().map(|a| a.spiffe_id.clone()),
            addresses: peer.addresses.iter().map(address).collect(),
            local: None,
            tunnel: peer.tunnel_port.is_some(),
        }
    }

    fn at(snapshot: &'a Snapshot, address: IpAddr) -> Self {
        let mut end = Self {
            name: address.to_string(),
            id: None,
            addresses: Vec::new(),
            local: None,
            tunnel: false,
        };
        let local = snapshot
            .workloads()
            .find(|running| running.addresses.contains(&address));
        // Where several share an address, it does not say which of them is meant.
        let mut there = snapshot.peers_at(address);
        if let (Some(running), 1) = (local, snapshot.peers_at(address).count()) {
            end = Self::local(running);
        } else if let (Some(peer), None) = (there.next(), there.next()) {
            end = Self::peer(peer);
        }
        end.addresses = vec![address];
        end
    }

    fn with_id(snapshot: &'a Snapshot, id: SpiffeId) -> Self {
        let local = snapshot
            .workloads()
            .find(|running| running.workload.attributes.spiffe_id == id);
        if let Some(running) = local {
            return Self::local(running);
        }
        match snapshot.peer_with_id(&id) {
            Some(peer) => Self::peer(peer),
            None => Self {
                name: id.to_string(),
                id: Some(id),
                addresses: vec![stand_in(0)],
                local: None,
                tunnel: true,
            },
        }
    }
}
