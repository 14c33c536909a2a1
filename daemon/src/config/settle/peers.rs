//! Peers: who they are, and that no two claim the same place.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use ipnet::IpNet;

use super::{Identity, Report};
use crate::{
    config::{
        FIRST_PEER_ID,
        file::{RawPeer, RawTunnel},
    },
    identity::TrustDomain,
    workload::Peer,
    yaml::{Located, NodeId},
};

/// Who claimed an address so far: for each port, and for all other ports.
#[derive(Default)]
struct Claims {
    ports: HashMap<u16, NodeId>,
    rest: Option<NodeId>,
    count: usize,
}

// === impl Report ===

impl Report<'_> {
    pub(super) fn peers(
        &mut self,
        raw: Vec<Located<RawPeer>>,
        domain: &TrustDomain,
        tunnel_port: u16,
    ) -> Vec<Arc<Peer>> {
        self.claims(&raw);
        raw.iter()
            .zip(FIRST_PEER_ID..)
            .filter_map(|(peer, id)| self.peer(peer, id, domain, tunnel_port))
            .map(Arc::new)
            .collect()
    }

    fn peer(
        &mut self,
        raw: &Located<RawPeer>,
        id: u32,
        domain: &TrustDomain,
        tunnel_port: u16,
    ) -> Option<Peer> {
        let name = self.require(raw.node, "name", raw.name.as_ref());
        if let Some(name) = name {
            self.unique_name(name);
        }
        if raw.addresses.is_empty() && self.no_address_is_written(raw.node) {
            self.mistake(
                raw.node,
                "has no `addresses`; add the addresses or networks where it is",
            );
        }
        let identified = ["namespace", "serviceAccount", "labels", "spiffeId"]
            .iter()
            .any(|field| self.has(raw.node, field));
        let tunnel_port = match raw.tunnel {
            Some(RawTunnel::Off) => None,
            Some(RawTunnel::Port(port)) => Some(port),
            Some(RawTunnel::On) => Some(tunnel_port),
            None => identified.then_some(tunnel_port),
        };
        if tunnel_port.is_some() && !identified {
            let node = self.document.child(raw.node, "tunnel").unwrap_or(raw.node);
            self.mistake(
                node,
                "a tunnel needs an identity to expect; add `spiffeId`, or `namespace` and \
                 `serviceAccount`",
            );
        }
        let name = name?.as_str();
        let attributes = if identified {
            let identity = Identity {
                name,
                namespace: raw.namespace.as_ref(),
                service_account: raw.service_account.as_ref(),
                labels: raw.labels.clone().unwrap_or_default(),
                spiffe_id: raw.spiffe_id.as_ref(),
            };
            Some(self.attributes(&identity, domain, raw.node)?)
        } else {
            None
        };
        Some(Peer {
            id,
            name: name.to_owned(),
            addresses: raw.addresses.iter().map(|network| network.0).collect(),
            ports: raw.ports.iter().map(|port| port.0).collect(),
            attributes,
            tunnel_port,
            named_ports: super::named_ports(&raw.named_ports),
        })
    }

    /// Whether `addresses` is missing or empty, and not just mistaken in all its items.
    fn no_address_is_written(&self, peer: NodeId) -> bool {
        self.document
            .child(peer, "addresses")
            .is_none_or(|list| self.document.items(list) == Some(0))
    }

    /// Checks that peers at the same address own different ports.
    fn claims(&mut self, peers: &[Located<RawPeer>]) {
        let mut claims: HashMap<IpNet, Claims> = HashMap::new();
        for peer in peers {
            for network in &peer.addresses {
                let claim = claims.entry(network.0).or_default();
                claim.count += 1;
                let host = network.0.prefix_len() == network.0.max_prefix_len();
                let taken = if claim.count > 1 && !host {
                    claim.rest.or(claim.ports.values().next().copied())
                } else if peer.ports.is_empty() {
                    claim.rest
                } else {
                    peer.ports
                        .iter()
                        .find_map(|port| claim.ports.get(&port.0).copied())
                };
                if peer.ports.is_empty() {
                    claim.rest.get_or_insert(peer.node);
                }
                for port in &peer.ports {
                    if let Entry::Vacant(vacant) = claim.ports.entry(port.0) {
                        vacant.insert(peer.node);
                    }
                }
                if let Some(first) = taken {
                    self.mistake_claimed(network, first, host);
                }
            }
        }
    }

    fn mistake_claimed(
        &mut self,
        network: &Located<crate::yaml::values::Network>,
        first: NodeId,
        host: bool,
    ) {
        let line = self.document.line(first);
        let advice = if host {
            "give each of them different `ports`"
        } else {
            "only single addresses can be shared, by peers with different `ports`"
        };
        self.mistake(
            network.node,
            format!(
                "`{}` belongs to the peer on line {line} already; {advice}",
                network.0
            ),
        );
    }
}
