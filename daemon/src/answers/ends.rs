//! Who is meant: from what people write to what a verdict is asked about.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

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
    pub(super) addresses: Vec<Place>,
    /// The workload of this node that it is.
    pub(super) local: Option<&'a Arc<RunningWorkload>>,
    /// Whether it is behind a tunnel.
    pub(super) tunnel: bool,
}

/// An address for which a verdict is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) address: IpAddr,
    /// The network for whose addresses it stands, except those of longer prefixes that are named.
    pub(super) network: Option<IpNet>,
}

impl From<IpAddr> for Place {
    fn from(address: IpAddr) -> Self {
        Self {
            address,
            network: None,
        }
    }
}

// === impl End ===

impl<'a> End<'a> {
    /// Finds who is meant by a name, SPIFFE ID or address. `asked` is the protocol and port of a
    /// destination: where several share its address, they tell which of them is meant.
    ///
    /// # Errors
    /// A sentence that says what would be right.
    pub(super) fn find(
        snapshot: &'a Snapshot,
        text: &str,
        asked: Option<(u8, u16)>,
    ) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::at(snapshot, address.to_canonical(), asked));
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
            return Ok(Self::peer(snapshot, peer));
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
        let mut addresses = &running.addresses;
        if addresses.is_empty() {
            addresses = &workload.addresses;
        }
        let mut addresses: Vec<_> = addresses.iter().copied().map(Place::from).collect();
        if addresses.is_empty() {
            // It does not run; what will be said of it holds for any address.
            addresses.push(stand_in(workload.id).into());
        }
        Self {
            name: workload.name.clone(),
            id: Some(workload.attributes.spiffe_id.clone()),
            addresses,
            local: Some(running),
            tunnel: true,
        }
    }

    fn peer(snapshot: &Snapshot, peer: &Peer) -> Self {
        let places = |network: &IpNet| -> Vec<Place> {
            if network.prefix_len() == network.max_prefix_len() {
                return vec![network.addr().into()];
            }
            let parts = snapshot.parts(*network).into_iter();
            parts
                .map(|(network, address)| Place {
                    address,
                    network: Some(network),
                })
                .collect()
        };
        Self {
            name: peer.name.clone(),
            id: peer.attributes.as_ref().map(|a| a.spiffe_id.clone()),
            addresses: peer.addresses.iter().flat_map(places).collect(),
            local: None,
            tunnel: peer.tunnel_port.is_some(),
        }
    }

    fn at(snapshot: &'a Snapshot, address: IpAddr, asked: Option<(u8, u16)>) -> Self {
        let there: Vec<&Peer> = match asked {
            Some((protocol, port)) => {
                let owner = snapshot.peer_at(address, protocol, port);
                owner.into_iter().map(AsRef::as_ref).collect()
            }
            None => snapshot.peers_at(address).map(AsRef::as_ref).collect(),
        };
        let mut end = match there[..] {
            [one] => match snapshot.workload(one.id) {
                Some(running) => Self::local(running),
                None => Self::peer(snapshot, one),
            },
            // A source's address does not say which of them is meant.
            ref several => {
                let names: Vec<_> = several.iter().map(|peer| peer.name.as_str()).collect();
                let name = match names.is_empty() {
                    true => address.to_string(),
                    false => format!("{address} (shared by {})", names.join(", ")),
                };
                Self {
                    name,
                    id: None,
                    addresses: Vec::new(),
                    local: None,
                    tunnel: false,
                }
            }
        };
        end.addresses = vec![address.into()];
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
            Some(peer) => Self::peer(snapshot, peer),
            None => Self {
                name: id.to_string(),
                id: Some(id),
                addresses: vec![stand_in(0).into()],
                local: None,
                tunnel: true,
            },
        }
    }
}
