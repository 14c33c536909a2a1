//! The address from which a tunnel comes: the one that its client would speak from.
//!
//! Where several workloads share an identity, the address tells the peer which of them it is and what
//! labels it has. So a connection goes through a tunnel from the address that its client is bound to,
//! a workload that declares its addresses never speaks from another one, and one that declares none
//! never speaks from those that another workload of its identity declares.

use std::net::{IpAddr, SocketAddr};

use crate::{policy::Snapshot, workload::RunningWorkload};

use super::TunnelError;

/// The address that the tunnel for a connection to `destination` is bound to; none for the one that
/// the kernel chooses. `client` is where the connection comes from: an address on loopback, unless
/// the application has bound another one.
///
/// # Errors
///
/// The address is not the workload's, or it has none in this family.
pub(super) fn of_tunnel(
    snapshot: &Snapshot,
    running: &RunningWorkload,
    client: IpAddr,
    destination: SocketAddr,
) -> Result<Option<IpAddr>, TunnelError> {
    let own = &running.addresses;
    if !client.is_loopback() {
        if !own.contains(&client) {
            return Err(TunnelError::ForgedSource(client));
        }
        // Of a namespace that several share, each has all addresses but those that it declares.
        let declares_none = !running.owns_netns && running.workload.addresses.is_empty();
        if declares_none && snapshot.is_declared(&running.workload.attributes.spiffe_id, client) {
            return Err(TunnelError::DeclaredSource(client));
        }
        return Ok(Some(client));
    }
    if running.owns_netns || running.workload.addresses.is_empty() {
        return Ok(None);
    }
    // Others have addresses in this namespace, and the kernel might choose one of theirs.
    let to = destination.ip();
    own.iter()
        .filter(|ip| ip.is_ipv4() == to.is_ipv4())
        .rev()
        .max_by_key(|ip| common_bits(**ip, to))
        .map(|ip| Some(*ip))
        .ok_or(TunnelError::NoSource(destination))
}

/// How many bits two addresses of a family begin with in common: the longer, the nearer.
fn common_bits(one: IpAddr, other: IpAddr) -> u32 {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        identity::SpiffeId,
        policy::{Inputs, PolicySet, Unselected},
        workload::{Attributes, CgroupSelector, NamedPorts, Namespaces, Workload},
    };

    /// A workload with addresses, declared or found, in a namespace of its own or one that is shared.
    fn running(addresses: &[&str], declared: bool, owns_netns: bool) -> RunningWorkload {
        let addresses: Vec<IpAddr> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        RunningWorkload {
            link_local: Vec::new(),
            workload: Arc::new(Workload {
                id: 1,
                name: "web".into(),
                attributes: Attributes {
                    namespace: "shop".into(),
                    service_account: "web".into(),
                    labels: Default::default(),
                    spiffe_id: SpiffeId::parse("spiffe://example.org/ns/shop/sa/web").unwrap(),
                },
                selector: CgroupSelector::Cgroup("/web".into()),
                ports: vec![],
                addresses: if declared { addresses.clone() } else { vec![] },
                certificates: None,
                named_ports: NamedPorts::new(),
                permissive: false,
            }),
            cgroups: vec![],
            netns: None,
            owns_netns,
            addresses,
        }
    }

    fn source(running: &RunningWorkload, client: &str, to: &str) -> Result<Option<String>, String> {
        source_beside(&[], running, client, to)
    }

    /// As [`source`], beside other workloads.
    fn source_beside(
        others: &[RunningWorkload],
        running: &RunningWorkload,
        client: &str,
        to: &str,
    ) -> Result<Option<String>, String> {
        let workloads: Vec<_> = others.iter().cloned().map(Arc::new).collect();
        let snapshot = Snapshot::compile(&Inputs {
            workloads: &workloads,
            peers: &[],
            namespaces: &Namespaces::default(),
            policies: &PolicySet::default(),
            unselected: Unselected::Deny,
            node_addresses: &[],
            tunnel_port: 15008,
        });
        let (client, to) = (client.parse().unwrap(), to.parse().unwrap());
        let found = of_tunnel(&snapshot, running, client, to);
        found
            .map(|ip| ip.map(|ip| ip.to_string()))
            .map_err(|error| error.reason().as_str().to_owned())
    }

    #[test]
    fn a_tunnel_comes_from_the_address_that_its_client_has_bound() {
        for (declared, owns_netns) in [(true, true), (true, false), (false, true), (false, false)] {
            let web = running(&["10.0.0.1", "10.0.0.2", "fd00::1"], declared, owns_netns);
            let from = |client, to| source(&web, client, to);
            assert_eq!(from("10.0.0.2", "10.0.0.9:80"), Ok(Some("10.0.0.2".into())));
            assert_eq!(from("fd00::1", "[fd00::9]:80"), Ok(Some("fd00::1".into())));
            let forged = Err("forged_source".to_owned());
            assert_eq!(from("10.0.0.3", "10.0.0.9:80"), forged);
            assert_eq!(from("fd00::3", "[fd00::9]:80"), forged);
        }
    }

    #[test]
    fn a_workload_that_declares_none_speaks_from_no_address_that_another_of_its_identity_declares()
    {
        let declaring = running(&["10.0.0.1"], true, false);
        let mut stranger = declaring.clone();
        let mut workload = Workload::clone(&stranger.workload);
        workload.attributes.spiffe_id = SpiffeId::parse("spiffe://example.org/other").unwrap();
        stranger.workload = Arc::new(workload);
        let addresses = ["10.0.0.1", "10.0.0.2"];
        for (other, declares, owns_netns, is_refused) in [
            (&declaring, false, false, true),
            // It may be shared.
            (&declaring, true, false, false),
            // What it has in its own namespace nobody else declares.
            (&declaring, false, true, false),
            // A certificate tells them apart.
            (&stranger, false, false, false),
        ] {
            let web = running(&addresses, declares, owns_netns);
            let others = std::slice::from_ref(other);
            let from = |client| source_beside(others, &web, client, "10.0.0.9:80");
            let expected = match is_refused {
                true => Err("forged_source".to_owned()),
                false => Ok(Some("10.0.0.1".to_owned())),
            };
            assert_eq!(from("10.0.0.1"), expected);
            assert_eq!(from("10.0.0.2"), Ok(Some("10.0.0.2".to_owned())));
        }
    }

    #[test]
    fn a_client_that_has_bound_none_speaks_from_an_address_of_its_workload() {
        let addresses = ["192.168.0.1", "10.0.0.1", "10.0.0.2"];
        // In its own namespace, or where all addresses are everybody's, the kernel chooses.
        for (declared, owns_netns) in [(true, true), (false, true), (false, false)] {
            let web = running(&addresses, declared, owns_netns);
            assert_eq!(source(&web, "127.0.0.1", "10.0.0.9:80"), Ok(None));
            assert_eq!(source(&web, "::1", "[fd00::9]:80"), Ok(None));
        }
        let web = running(&addresses, true, false);
        let from = |to| source(&web, "127.0.0.1", to);
        assert_eq!(from("10.0.0.9:80"), Ok(Some("10.0.0.1".into())));
        assert_eq!(from("192.168.0.9:80"), Ok(Some("192.168.0.1".into())));
        let none = source(&web, "::1", "[fd00::9]:80");
        assert_eq!(none, Err("forged_source".into()));
    }
}
