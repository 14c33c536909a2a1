//! Which TLS is spoken: 1.3 only, every handshake a full one, client and server with certificates.

use std::sync::{Arc, LazyLock};

use rustls::{
    ClientConfig, Error, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{
            self,
            cipher_suite::{
                TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
            },
            kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768},
        },
    },
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::SvidVerifier;

/// HBONE is HTTP/2.
pub const ALPN: &[u8] = b"h2";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        // AES-128 first: it is the cheapest per byte where the processor has AES, which is where
        // the data path's time goes, and its key is not the weakest link beside P-256. Istio's
        // ztunnel takes both AES suites; ChaCha20 is for processors without AES.
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        // The hybrid first: what is recorded today stays secret from tomorrow's quantum computer.
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

/// Suites and groups of every handshake, over aws-lc-rs.
#[must_use]
pub fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}

/// What a tunnel listener presents and asks for.
///
/// # Errors
/// Only for a provider without TLS 1.3.
pub(super) fn server_config(
    key: Arc<CertifiedKey>,
    verifier: SvidVerifier,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
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
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
