//! Which address families lead out of a network namespace (`rtnetlink(7)`).

use std::io;

use super::{
    diag::message::{find, word},
    netlink::{DUMP, Netlink, REQUEST},
    netns::Netns,
};

/// Bytes of a `struct rtmsg`, and where its length of the destination and its type are.
const LENGTH: usize = 12;
const DESTINATION_LENGTH: usize = 1;
const TYPE: usize = 7;
/// A route through a gateway or over a link.
const UNICAST: u8 = 1;
/// Attributes: the destination, and the device that leads there.
const DESTINATION: u16 = 1;
const DEVICE: u16 = 4;
/// The loopback device's index, in every namespace.
const LOOPBACK_DEVICE: u32 = 1;

/// The families in which a namespace has a route that leads further than a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Netns {
    /// Which families lead out of the namespace. Of its routes no more are read than it takes to know.
    ///
    /// # Errors
    /// From the kernel.
    pub fn families(&self) -> io::Result<Families> {
        Ok(Families {
            v4: leads_out(self, libc::AF_INET)?,
            v6: leads_out(self, libc::AF_INET6)?,
        })
    }
}

fn leads_out(netns: &Netns, family: i32) -> io::Result<bool> {
    let family = u8::try_from(family).map_err(io::Error::other)?;
    let mut request = [0; LENGTH];
    request[0] = family;
    let mut found = false;
    Netlink::open(netns, libc::NETLINK_ROUTE)?.ask_until(
        libc::RTM_GETROUTE,
        REQUEST | DUMP,
        &request,
        libc::RTM_NEWROUTE,
        |message| {
            found |= is_way_out(message, family);
            found
        },
    )?;
    Ok(found)
}

/// Whether a message is of this family, and of a route that leads out.
fn is_way_out(message: &[u8], family: u8) -> bool {
    let attributes = message.get(LENGTH..).unwrap_or_default();
    let device = find(attributes, DEVICE).and_then(|value| word(value, 0));
    // Only IPv6 has addresses of a link in every namespace that has a link.
    let on_link = find(attributes, DESTINATION).is_some_and(|destination| {
        let length = message.get(DESTINATION_LENGTH).copied().unwrap_or_default();
        let [first, second] = [0, 1].map(|place| destination.get(place).copied());
        length >= 8
            && destination.len() == 16
            && (first == Some(0xff)
                || first == Some(0xfe) && second.is_some_and(|second| second & 0xc0 == 0x80))
    });
    // A kernel without IPv6 answers with all that it has.
    message.first() == Some(&family)
        && message.get(TYPE) == Some(&UNICAST)
        && device != Some(LOOPBACK_DEVICE)
        && !on_link
}
