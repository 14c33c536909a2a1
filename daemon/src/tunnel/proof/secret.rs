//! What binds a proof to its tunnel: values that only the two ends of the tunnel can compute.

use std::fmt;

use aws_lc_rs::{
    digest::{self, SHA256, SHA256_OUTPUT_LEN},
    hmac,
};
use rustls::ConnectionCommon;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::{identity::PROVABLE_ALPN, telemetry::Role};

/// Labels of the keying material that is exported from both sessions. RFC 5705, section 4, keeps this
/// prefix for private use.
const OF_TUNNEL: &[u8] = b"EXPERIMENTAL reeve tunnel";
const OF_PROOF: &[u8] = b"EXPERIMENTAL reeve proof";

const KEY: usize = 32;
/// Length of a value that an end sends.
pub(in crate::tunnel) const VALUE: usize = SHA256_OUTPUT_LEN;
/// Of what is authenticated: the role, the keying material, and a hash of each leaf.
const MESSAGE: usize = ROLE + KEY + 2 * SHA256_OUTPUT_LEN;
const ROLE: usize = 6;

/// Keying material of a tunnel's own session. It never leaves the process, and is wiped at the end.
pub(in crate::tunnel) struct Secret(Zeroizing<[u8; KEY]>);

/// What the ends of a fresh session have in common.
pub(in crate::tunnel) struct Fresh {
    exported: Zeroizing<[u8; KEY]>,
    /// Hash of the client's leaf, then of the server's. The exported material does not depend on the
    /// client's certificate (RFC 8446, section 7.5).
    leaves: [digest::Digest; 2],
}

impl Secret {
    /// Of a tunnel whose handshake is done; none where it has not settled that the tunnel can be
    /// proven again. To be taken at once: what seals the tunnel's bytes later may use up the session.
    pub(in crate::tunnel) fn of<Data>(
        session: &ConnectionCommon<Data>,
    ) -> Result<Option<Self>, rustls::Error> {
        if session.alpn_protocol() != Some(PROVABLE_ALPN) {
            return Ok(None);
        }
        let key = Zeroizing::new([0; KEY]);
        let key = session.export_keying_material(key, OF_TUNNEL, None)?;
        Ok(Some(Self(key)))
    }

    /// The value that the end with this role sends.
    pub(in crate::tunnel) fn value(&self, role: Role, fresh: &Fresh) -> [u8; VALUE] {
        let tag = hmac::sign(&self.key(), &*message(role, fresh));
        let mut value = [0; VALUE];
        value.copy_from_slice(tag.as_ref());
        value
    }

    /// Whether this is the value of the end with this role, compared in constant time.
    pub(in crate::tunnel) fn is_value(&self, value: &[u8], role: Role, fresh: &Fresh) -> bool {
        hmac::verify(&self.key(), &*message(role, fresh), value).is_ok()
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.0)
    }
}

impl Fresh {
    /// Of a session whose handshake is done, in which these leaves were presented.
    pub(in crate::tunnel) fn of<Data>(
        session: &ConnectionCommon<Data>,
        client: &CertificateDer<'_>,
        server: &CertificateDer<'_>,
    ) -> Result<Self, rustls::Error> {
        let exported = Zeroizing::new([0; KEY]);
        Ok(Self {
            exported: session.export_keying_material(exported, OF_PROOF, None)?,
            leaves: [client, server].map(|leaf| digest::digest(&SHA256, leaf)),
        })
    }
}

fn message(role: Role, fresh: &Fresh) -> Zeroizing<[u8; MESSAGE]> {
    let mut message = Zeroizing::new([0; MESSAGE]);
    let [client, server] = &fresh.leaves;
    let parts = [
        role_name(role).as_slice(),
        &*fresh.exported,
        client.as_ref(),
        server.as_ref(),
    ];
    let bytes = parts.into_iter().flatten();
    message
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = *from);
    message
}

const fn role_name(role: Role) -> &'static [u8; ROLE] {
    match role {
        Role::Client => b"client",
        Role::Server => b"server",
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(exported: u8, client: &[u8], server: &[u8]) -> Fresh {
        Fresh {
            exported: Zeroizing::new([exported; KEY]),
            leaves: [client, server].map(|leaf| digest::digest(&SHA256, leaf)),
        }
    }

    #[test]
    fn a_value_is_of_one_tunnel_one_handshake_one_pair_of_leaves_and_one_role() {
        let [tunnel, other] = [1, 2].map(|byte| Secret(Zeroizing::new([byte; KEY])));
        let now = || fresh(7, b"client", b"server");
        let value = tunnel.value(Role::Client, &now());
        assert!(tunnel.is_value(&value, Role::Client, &now()));
        // Of another tunnel, reflected, replayed, of other certificates, cut short, changed.
        assert!(!other.is_value(&value, Role::Client, &now()));
        assert!(!tunnel.is_value(&value, Role::Server, &now()));
        assert!(!tunnel.is_value(&value, Role::Client, &fresh(8, b"client", b"server")));
        for (client, server) in [
            ("client", "sibling"),
            ("sibling", "server"),
            ("server", "client"),
        ] {
            let others = fresh(7, client.as_bytes(), server.as_bytes());
            assert!(!tunnel.is_value(&value, Role::Client, &others));
        }
        assert!(!tunnel.is_value(&value[..VALUE - 1], Role::Client, &now()));
        assert!(!tunnel.is_value(&[], Role::Client, &now()));
        for bit in 0..VALUE * 8 {
            let mut changed = value;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!tunnel.is_value(&changed, Role::Client, &now()));
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret = Secret(Zeroizing::new([7; KEY]));
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }
}
