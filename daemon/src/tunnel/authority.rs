//! The authority of a CONNECT request: an address and a port, never a name.

use std::net::{IpAddr, SocketAddr};

use http::uri::Authority;

/// Text of an authority, as HBONE wants it: `10.0.0.7:80` or `[fd00::7]:80`.
pub(super) fn format(destination: SocketAddr) -> String {
    destination.to_string()
}

/// The address and port that an authority names; none where it is a name, has user information,
/// a zone or no port. IPv4-mapped addresses come back as IPv4.
pub(super) fn parse(authority: &Authority) -> Option<SocketAddr> {
    // A zone, even one with the number 0, which the address would not show any more.
    if authority.as_str().contains('%') {
        return None;
    }
    let address: SocketAddr = authority.as_str().parse().ok()?;
    (address.port() != 0).then(|| canonical(address))
}

/// The same for the text of a CONNECT request's `:authority`.
#[must_use]
pub fn parse_text(authority: &str) -> Option<SocketAddr> {
    parse(&authority.parse().ok()?)
}

/// The same end with an IPv4-mapped address as IPv4, and without scope and flow.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An address of the kernel's maps.
pub(super) fn from_map(address: reeve_common::Address) -> IpAddr {
    IpAddr::from(address).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::parse_text as parsed;

    #[test]
    fn an_address_with_a_port_is_an_authority() {
        for text in ["10.0.0.7:80", "[fd00::7]:65535"] {
            let address = parsed(text).unwrap();
            assert_eq!(format(address), text);
        }
        assert_eq!(parsed("[::ffff:10.0.0.7]:80"), parsed("10.0.0.7:80"));
    }

    #[test]
    fn anything_else_is_not() {
        for text in [
            "localhost:80",
            "10.0.0.7",
            "10.0.0.7:",
            "10.0.0.7:0",
            "10.0.0.7:65536",
            "10.0.0:80",
            "010.0.0.7:80",
            "fd00::7:80",
            "[fd00::7]",
            "[fe80::7%0]:80",
            "[fe80::7%1]:80",
            "user@10.0.0.7:80",
            "10.0.0.7:+80",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }
}
