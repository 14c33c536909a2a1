//! The parts of a network that policies may judge differently.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::Snapshot;

impl Snapshot {
    /// The network, and each prefix inside it that policies or peers name, with an address that lies in
    /// no longer one of them. Every address of the network is judged as one of these.
    #[must_use]
    pub(crate) fn parts(&self, network: IpNet) -> Vec<(IpNet, IpAddr)> {
        let network = network.trunc();
        let inside: Vec<IpNet> = self
            .prefixes()
            .filter(|prefix| network.contains(prefix) && *prefix != network)
            .collect();
        std::iter::once(network)
            .chain(inside.iter().copied())
            .filter_map(|prefix| Some((prefix, own_address(prefix, &inside)?)))
            .collect()
    }
}

/// The first address of a prefix that lies in no longer one of these.
fn own_address(prefix: IpNet, all: &[IpNet]) -> Option<IpAddr> {
    let longer = all
        .iter()
        .filter(|other| **other != prefix && prefix.contains(*other));
    let mut longer: Vec<_> = longer.map(|other| range(*other)).collect();
    longer.sort_unstable();
    let (mut next, end) = range(prefix);
    for (first, last) in longer {
        if first > next {
            break;
        }
        next = next.max(last.checked_add(1)?);
    }
    let is_v4 = matches!(prefix, IpNet::V4(_));
    (next <= end).then(|| match (is_v4, u32::try_from(next)) {
        (true, Ok(bits)) => Ipv4Addr::from_bits(bits).into(),
        _ => Ipv6Addr::from_bits(next).into(),
    })
}

/// The first and the last address, as numbers.
fn range(prefix: IpNet) -> (u128, u128) {
    match prefix {
        IpNet::V4(net) => (
            net.network().to_bits().into(),
            net.broadcast().to_bits().into(),
        ),
        IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_a_prefix_lies_in_no_longer_one() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let all = ["10.0.0.0/25", "10.0.0.128/26", "10.0.0.0/30"].map(net);
        let own = |prefix: &str| own_address(net(prefix), &all).map(|address| address.to_string());
        assert_eq!(own("10.0.0.0/24").as_deref(), Some("10.0.0.192"));
        assert_eq!(own("10.0.0.0/25").as_deref(), Some("10.0.0.4"));
        assert_eq!(own("10.0.0.128/26").as_deref(), Some("10.0.0.128"));
        let both = ["10.0.0.0/25", "10.0.0.128/25"].map(net);
        assert_eq!(own_address(net("10.0.0.0/24"), &both), None);
        let whole = ["::/1", "8000::/1"].map(net);
        assert_eq!(own_address(net("::/0"), &whole), None);
    }
}
