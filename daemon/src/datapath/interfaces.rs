//! The addresses of a network namespace (`rtnetlink(7)`). No more are read than are asked for: whoever
//! rules a namespace can give it millions.

use std::{io, net::IpAddr};

use super::{
    diag::message::{find, word},
    netlink::{DUMP, Netlink, REQUEST},
    netns::Netns,
};

/// Bytes of a `struct ifaddrmsg`; where in it its flags and its device are.
const LENGTH: usize = 8;
const FLAGS: usize = 2;
const DEVICE: usize = 4;
/// In the flags: another on the link has the address (`IFA_F_DADFAILED`).
const DUPLICATE: u8 = 0x08;
/// Attributes: an address, and the own one where the other is of the far end of a link.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub ip: IpAddr,
    /// Index of the device. 1 is the loopback device.
    pub device: u32,
}

impl Netns {
    /// The first `most` addresses of each family, by device in the order in which these were made.
    /// Those that are known to be another's on the link are left out.
    ///
    /// # Errors
    /// From the kernel.
    pub fn addresses(&self, most: usize) -> io::Result<Vec<InterfaceAddress>> {
        let mut addresses = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = u8::try_from(family).map_err(io::Error::other)?;
            let mut request = [0; LENGTH];
            request[0] = family;
            let mut left = most;
            Netlink::open(self, libc::NETLINK_ROUTE)?.ask_until(
                libc::RTM_GETADDR,
                REQUEST | DUMP,
                &request,
                libc::RTM_NEWADDR,
                |message| {
                    // A kernel without IPv6 answers with all that it has.
                    if let Some(address) = decode(message, family).filter(|_| left > 0) {
                        addresses.push(address);
                        left -= 1;
                    }
                    left == 0
                },
            )?;
        }
        Ok(addresses)
    }
}

/// The address in a message, if it is of this family and the namespace's own.
fn decode(message: &[u8], family: u8) -> Option<InterfaceAddress> {
    let attributes = message.get(LENGTH..)?;
    if *message.first()? != family || message.get(FLAGS)? & DUPLICATE != 0 {
        return None;
    }
    let octets = find(attributes, LOCAL).or_else(|| find(attributes, ADDRESS))?;
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(octets).ok().map(IpAddr::from);
    Some(InterfaceAddress {
        ip: v4().or_else(v6)?,
        device: word(message, DEVICE)?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_same_addresses_are_found_as_by_the_library_and_no_more_than_asked_for() {
        let own = Netns::of_pid(std::process::id()).unwrap();
        let found: BTreeSet<IpAddr> = own
            .addresses(1000)
            .unwrap()
            .into_iter()
            .map(|address| address.ip)
            .collect();
        let expected: BTreeSet<IpAddr> = nix::ifaddrs::getifaddrs()
            .unwrap()
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
            })
            .collect();
        assert!(!expected.is_empty());
        assert_eq!(found, expected);
        assert!(own.addresses(1).unwrap().len() <= 2);
        assert!(own.addresses(0).unwrap().is_empty());
        let loopback = own.addresses(1).unwrap()[0];
        assert_eq!((loopback.ip, loopback.device), ([127, 0, 0, 1].into(), 1));
    }
}
