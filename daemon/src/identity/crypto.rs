//! Which TLS is spoken: 1.3 only, every handshake a full one, client and server with certificates.

use std::sync::Arc;

use rustls::{
    ClientConfig, Error, ServerConfig,
    client::{Resumption, danger::ServerCertVerifier},
    crypto::CryptoProvider,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::{CryptoPolicy, SvidVerifier};

/// HBONE is HTTP/2.
pub const ALPN: &[u8] = b"h2";

/// The same of a tunnel that can be proven again. Which of both it is, the handshake settles.
pub const PROVABLE_ALPN: &[u8] = b"h2-reeve-proof-1";

/// Of the handshake inside of a tunnel that proves it again: it is good for nothing else.
pub(super) const PROOF_ALPN: &[u8] = b"reeve-proof-1";

/// aws-lc-rs with the default profile's suites and groups.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    CryptoPolicy::shared_default().provider().clone()
}

/// What a tunnel listener presents and asks for.
///
/// # Errors
/// Only for a provider without TLS 1.3.
pub(super) fn server_config(
    key: Arc<CertifiedKey>,
    verifier: SvidVerifier,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(verifier.provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![PROVABLE_ALPN.to_vec(), ALPN.to_vec()];
    // A resumed session takes over the old one's certificate without a look at it: an expired or
    // revoked one would live on.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// What a tunnel's client presents and asks for.
///
/// # Errors
/// Only for a provider without TLS 1.3.
pub(super) fn client_config(
    key: Arc<CertifiedKey>,
    verifier: SvidVerifier,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(verifier.provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![PROVABLE_ALPN.to_vec(), ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// What a client of a bundle endpoint asks for: it presents nothing, since no endpoint asks for it
/// (SPIFFE Federation, section 5.2.1.3).
///
/// # Errors
/// Only for a provider without TLS 1.3.
pub(super) fn anonymous_client_config(
    provider: Arc<CryptoProvider>,
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
