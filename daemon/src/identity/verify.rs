//! The one X.509-SVID verifier, for both roles of a handshake and for our own certificates.
//!
//! webpki builds and checks the chain; [`svid_rules`] adds what the SPIFFE standards ask beyond it.

use std::{cell::Cell, sync::Arc};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{
    EndEntityCert, ExpirationPolicy, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter,
    RevocationOptionsBuilder, VerifiedPath,
};

use super::{
    CryptoPolicy, KeyKind, RejectReason, SpiffeId, TrustBundle, TrustBundles, TrustStore, crypto,
    svid_rules,
};

/// DER of 1.3.6.1.5.5.7.3.1 (RFC 5280, section 4.2.1.12).
const SERVER_AUTH: KeyPurposeId<'static> =
    KeyPurposeId::new(&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01]);
/// DER of 1.3.6.1.5.5.7.3.2.
const CLIENT_AUTH: KeyPurposeId<'static> =
    KeyPurposeId::new(&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02]);

/// Verifies the peer's X.509-SVID in a TLS 1.3 handshake, as client or as server.
///
/// The trust bundles are read at each handshake, so that a replaced one counts at once.
#[derive(Clone, Debug)]
pub struct SvidVerifier {
    trust: Arc<TrustStore>,
    expected: Option<SpiffeId>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// The SPIFFE ID of a peer whose handshake has succeeded, from the chain that it presented.
///
/// # Errors
/// When the chain is empty or its first certificate has no SPIFFE ID; after a handshake that
/// [`SvidVerifier`] has judged, neither can be.
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, RejectReason> {
    let leaf = chain.first().ok_or(RejectReason::Malformed)?;
    svid_rules::leaf_id(&svid_rules::parse(leaf)?)
}

/// Checks a chain against the bundle of its own trust domain, and gives the ID that it proves.
///
/// Whether that is the *expected* ID is a question of its own, for the caller to ask afterwards.
///
/// # Errors
/// The rule that the chain breaks.
pub fn verify_chain(
    bundles: &TrustBundles,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<SpiffeId, RejectReason> {
    let parsed = svid_rules::parse(leaf)?;
    // Not believed yet: it selects the bundle that has to vouch for it.
    let id = svid_rules::leaf_id(&parsed)?;
    let bundle = bundles
        .get(id.trust_domain())
        .ok_or(RejectReason::UnknownTrustDomain)?;
    if bundle.is_empty() {
        return Err(RejectReason::TrustDomainRevoked);
    }
    verify_path(bundle, bundles.policy(), leaf, intermediates, now)?;
    svid_rules::check_leaf(&parsed)?;
    bundles.policy().check_leaf(&parsed)?;
    Ok(id)
}

fn verify_path(
    bundle: &TrustBundle,
    policy: &CryptoPolicy,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), RejectReason> {
    let leaf = EndEntityCert::try_from(leaf)?;
    let crls: Vec<_> = bundle.crls().collect();
    // Fails only without a list, which is how a bundle says that revocation is not checked.
    let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
        options
            .with_expiration_policy(ExpirationPolicy::Enforce)
            .build()
    });

    // When this refuses a path, webpki looks for another one, and then gives the error of that. The
    // path that was right but for us says more.
    let refused = Cell::new(None);
    let check_signers = |path: &VerifiedPath<'_>| {
        signers(path, bundle, policy, now).map_err(|reason| {
            refused.set(Some(reason));
            webpki::Error::UnknownIssuer
        })
    };
    let path = leaf.verify_for_usage(
        crypto::provider().signature_verification_algorithms.all,
        bundle.anchors(),
        intermediates,
        now,
        ClientAndServer,
        revocation,
        Some(&check_signers),
    );
    match (path, refused.get()) {
        (Ok(_), _) => Ok(()),
        (Err(_), Some(reason)) => Err(reason),
        (Err(error), None) => Err(error.into()),
    }
}

/// Rules for whoever signed along a path that webpki found to be right. The bundle's own
/// certificates were checked when it was made, except for their validity now.
fn signers(
    path: &VerifiedPath<'_>,
    bundle: &TrustBundle,
    policy: &CryptoPolicy,
    now: UnixTime,
) -> Result<(), RejectReason> {
    for signer in path.intermediate_certificates() {
        let der = signer.der();
        let signer = svid_rules::parse(&der)?;
        svid_rules::check_signer(&signer)?;
        policy.check_key(KeyKind::of(&signer))?;
    }
    bundle.check_anchor(path.anchor(), policy, now)
}

/// ExtendedKeyUsage, where it is present, has both purposes (X509-SVID, section 4.4): a workload is
/// client and server with the same certificate.
struct ClientAndServer;

impl ExtendedKeyUsageValidator for ClientAndServer {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let (mut any, mut client, mut server) = (false, false, false);
        for purpose in purposes {
            let purpose = purpose?;
            any = true;
            client |= purpose == CLIENT_AUTH;
            server |= purpose == SERVER_AUTH;
        }
        if any && !(client && server) {
            return Err(webpki::Error::EmptyEkuExtension);
        }
        Ok(())
    }
}

// === impl SvidVerifier ===

impl SvidVerifier {
    /// Accepts every identity that a bundle of `trust` vouches for.
    #[must_use]
    pub fn any(trust: Arc<TrustStore>) -> Self {
        Self {
            trust,
            expected: None,
            algorithms: crypto::provider().signature_verification_algorithms,
        }
    }

    /// Accepts this identity only.
    #[must_use]
    pub fn exactly(trust: Arc<TrustStore>, expected: SpiffeId) -> Self {
        Self {
            expected: Some(expected),
            ..Self::any(trust)
        }
    }

    /// Suites and groups of its handshakes.
    pub(super) fn provider(&self) -> Arc<CryptoProvider> {
        self.trust.current().policy().provider().clone()
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), RejectReason> {
        let id = verify_chain(&self.trust.current(), leaf, intermediates, now)?;
        match &self.expected {
            Some(expected) if *expected != id => Err(RejectReason::WrongIdentity),
            _ => Ok(()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms).map_err(|error| {
            match error {
                Error::InvalidCertificate(_) => RejectReason::KeyNotHeld.into(),
                other => other,
            }
        })
    }
}

/// Never asked: no configuration of ours offers TLS 1.2.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for SvidVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for SvidVerifier {
    /// No hints: they would tell an unauthenticated peer whom we trust, and a client could take
    /// them for a reason to present nothing.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
