//! A TLS handshake with somebody of whom only the certificate is wanted.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, Error,
    SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::{ALPN, CryptoPolicy, SpiffeId, server_name_for};

/// What opens an HTTP/2 connection, with empty SETTINGS (RFC 9113, section 3.4): some servers wait
/// for it before they say anything.
const HTTP2_OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// What to present, where the other end asks for a certificate.
#[derive(Debug)]
pub struct Presented {
    /// The certificate, then those above it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

/// What a handshake showed.
#[derive(Clone, Debug)]
pub struct Probed {
    /// The chain that the other end presented.
    pub chain: Vec<CertificateDer<'static>>,
    /// Key exchange group.
    pub group: Option<String>,
    /// Cipher suite.
    pub cipher_suite: Option<String>,
    /// Whether it asked for a certificate of ours.
    pub asked_for_certificate: bool,
    /// Why it did not want us; none where it went on to speak HTTP/2. Without a certificate of ours
    /// to present, this is what to expect.
    pub refusal: Option<String>,
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No TCP connection.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// To whom.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The key or the certificate to be presented cannot be used.
    #[error("the certificate to be presented cannot be used: {0}")]
    Presented(Error),
    /// The other end presented no certificate.
    #[error("{address} presented no certificate over TLS 1.3: {error}")]
    Handshake {
        /// Who.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
}

/// Shakes hands with the tunnel port at `address`, asking for `wanted` where several identities
/// share it. Nothing that is presented is judged, except that the other end has to hold the key.
///
/// # Errors
/// When no certificate is seen within `patience`, which holds for each step by itself.
pub fn probe(
    address: SocketAddr,
    wanted: Option<&SpiffeId>,
    presented: Option<Presented>,
    policy: &CryptoPolicy,
    patience: Duration,
) -> Result<Probed, ProbeError> {
    let seen = Arc::new(Seen {
        chain: Mutex::default(),
        algorithms: policy.provider().signature_verification_algorithms,
    });
    let ours = Arc::new(Ours {
        key: presented.map(|ours| certified(ours, policy)).transpose()?,
        asked: Mutex::new(false),
    });
    let mut config = ClientConfig::builder_with_provider(policy.provider().clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(ProbeError::Presented)?
        .dangerous()
        .with_custom_certificate_verifier(seen.clone())
        .with_client_cert_resolver(ours.clone());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    let name = match wanted {
        Some(id) => server_name_for(id),
        // An address is not sent: the server presents what it presents to somebody who asks for
        // nobody.
        None => ServerName::IpAddress(address.ip().into()),
    };

    let failed = |error| ProbeError::Connect { address, error };
    let mut tcp = TcpStream::connect_timeout(&address, patience).map_err(failed)?;
    tcp.set_read_timeout(Some(patience)).map_err(failed)?;
    tcp.set_write_timeout(Some(patience)).map_err(failed)?;
    let handshake = |error| ProbeError::Handshake { address, error };
    let mut tls = ClientConnection::new(Arc::new(config), name)
        .map_err(|error| handshake(io::Error::other(error)))?;
    let refusal = converse(&mut tls, &mut tcp).err();
    let chain = std::mem::take(&mut *lock(&seen.chain));
    if chain.is_empty() {
        let silence = || io::Error::other("it said nothing");
        return Err(handshake(refusal.unwrap_or_else(silence)));
    }
    let group = tls.negotiated_key_exchange_group();
    let suite = tls.negotiated_cipher_suite();
    Ok(Probed {
        chain,
        group: group.map(|group| format!("{:?}", group.name())),
        cipher_suite: suite.map(|suite| format!("{:?}", suite.suite())),
        asked_for_certificate: *lock(&ours.asked),
        refusal: refusal.map(|error| error.to_string()),
    })
}

/// Goes on until the server has said something: in TLS 1.3 a client is done before the server has
/// judged its certificate.
fn converse(tls: &mut ClientConnection, tcp: &mut TcpStream) -> io::Result<()> {
    let mut stream = rustls::Stream::new(tls, tcp);
    stream.write_all(HTTP2_OPENING)?;
    stream.flush()?;
    let mut first = [0];
    stream.read_exact(&mut first)
}

fn certified(ours: Presented, policy: &CryptoPolicy) -> Result<Arc<CertifiedKey>, ProbeError> {
    let key = policy.provider().key_provider.load_private_key(ours.key);
    let key = key.map_err(ProbeError::Presented)?;
    Ok(Arc::new(CertifiedKey::new(ours.chain, key)))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the chain that is presented, whatever it is.
#[derive(Debug)]
struct Seen {
    chain: Mutex<Vec<CertificateDer<'static>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let all = std::iter::once(leaf).chain(intermediates);
        *lock(&self.chain) = all.map(|der| der.clone().into_owned()).collect();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// Presents what there is, and notes that it was asked for.
#[derive(Debug)]
struct Ours {
    key: Option<Arc<CertifiedKey>>,
    asked: Mutex<bool>,
}

impl ResolvesClientCert for Ours {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        *lock(&self.asked) = true;
        self.key.clone()
    }

    fn has_certs(&self) -> bool {
        // True, so that `resolve` is asked.
        true
    }
}
