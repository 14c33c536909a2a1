//! The TLS server name that asks for one identity where several share an address.

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{DnsName, ServerName};

use super::SpiffeId;

/// Bytes of the hash in the name: 128 bits cannot be hit by chance, and fit a DNS label.
const HASH_BYTES: usize = 16;
/// `internal` is reserved for names that never are in the public DNS.
const SUFFIX: &str = ".svid.reeve.internal";

/// What a client sends to ask for the certificate of `id`.
///
/// A SPIFFE ID is no DNS name, so the name is the start of its SHA-256. A server that does not
/// know this convention ignores it; nothing is verified by it.
#[must_use]
pub fn server_name_for(id: &SpiffeId) -> ServerName<'static> {
    // A hexadecimal label and a constant: always a DNS name.
    DnsName::try_from(name(id)).map_or_else(
        |_| ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()),
        ServerName::DnsName,
    )
}

/// Whether a client that sent `server_name` asks for `id`.
#[must_use]
pub fn server_name_matches(server_name: &str, id: &SpiffeId) -> bool {
    server_name.eq_ignore_ascii_case(&name(id))
}

fn name(id: &SpiffeId) -> String {
    let hash = digest(&SHA256, id.as_str().as_bytes());
    super::hex(hash.as_ref().iter().take(HASH_BYTES)) + SUFFIX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_asks_for_one_identity_only() {
        let cart = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
        let stock = SpiffeId::parse("spiffe://example.org/ns/shop/sa/stock").unwrap();
        let ServerName::DnsName(name) = server_name_for(&cart) else {
            panic!("no DNS name");
        };
        // printf spiffe://example.org/ns/shop/sa/cart | sha256sum | cut -c-32
        assert_eq!(
            name.as_ref(),
            "2b1a4a837fb8724e56e67264d7d6a04c.svid.reeve.internal"
        );
        assert!(server_name_matches(name.as_ref(), &cart));
        assert!(server_name_matches(&name.as_ref().to_uppercase(), &cart));
        assert!(!server_name_matches(name.as_ref(), &stock));
    }
}
