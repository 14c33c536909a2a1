//! The one X.509-SVID verifier, for both roles of a handshake and for our own certificates.
//!
//! webpki builds and checks the chain; [`svid_rules`] adds what the SPIFFE standards ask beyond it.

use std::{
    cell::{Cell, RefCell},
    iter,
    sync::Arc,
    time::SystemTime,
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{
    EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter, VerifiedPath,
};
use x509_parser::certificate::X509Certificate;

use super::{
    CryptoPolicy, KeyKind, RejectReason, SpiffeId, TrustBundle, TrustBundles, TrustStore,
    bundle::key_id,
    clock,
    clocks::Refusal,
    crypto,
    describe::rfc3339,
    revocation::{self, Issuer},
    svid_rules,
    verdict::refusal,
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

/// A chain that was found to be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The ID that it proves.
    pub id: SpiffeId,
    /// When the first certificate along its path expires, the authority in the bundle included.
    pub not_after: SystemTime,
    /// The signer along the path, the authority included, that expires first.
    pub signer: Validity,
    /// Which of the intermediates are on the path, counted from 0.
    pub intermediates: Vec<usize>,
}

/// From when until when a certificate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Validity {
    /// Start.
    #[serde(serialize_with = "rfc3339")]
    pub not_before: SystemTime,
    /// End.
    #[serde(serialize_with = "rfc3339")]
    pub not_after: SystemTime,
}

/// Checks a chain against the bundle of its own trust domain, and gives the ID that it proves. Of
/// several paths that are right it takes the one that is so for the longest.
///
/// Whether that is the *expected* ID is a question of its own, for the caller to ask afterwards.
///
/// # Errors
/// The rule that the chain breaks.
pub fn verify_chain(
    bundles: &TrustBundles,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<Verified, RejectReason> {
    let parsed = svid_rules::parse(leaf)?;
    if svid_rules::is_reversed(&parsed, intermediates) {
        return Err(RejectReason::ChainReversed);
    }
    // Not believed yet: it selects the bundle that has to vouch for it.
    let id = svid_rules::leaf_id(&parsed)?;
    let bundle = bundles
        .get(id.trust_domain())
        .ok_or(RejectReason::UnknownTrustDomain)?;
    if bundle.is_empty() {
        return Err(RejectReason::TrustDomainRevoked);
    }
    let judge = Judge {
        leaf: &parsed,
        intermediates,
        bundle,
        policy: bundles.policy(),
        now,
    };
    let path = judge.best_path(leaf)?;
    svid_rules::check_leaf(&parsed)?;
    bundles.policy().check_leaf(&parsed)?;
    Ok(Verified {
        id,
        not_after: path.signer.not_after.min(validity(&parsed).not_after),
        signer: path.signer,
        intermediates: path.intermediates,
    })
}

/// What a path to an authority is judged by.
struct Judge<'a> {
    leaf: &'a X509Certificate<'a>,
    intermediates: &'a [CertificateDer<'a>],
    bundle: &'a TrustBundle,
    policy: &'a CryptoPolicy,
    now: SystemTime,
}

/// A path that is right.
struct RightPath {
    signer: Validity,
    intermediates: Vec<usize>,
}

// === impl Judge ===

impl Judge<'_> {
    fn best_path(&self, leaf: &CertificateDer<'_>) -> Result<RightPath, RejectReason> {
        let end_entity = EndEntityCert::try_from(leaf)?;
        let end = validity(self.leaf).not_after;
        // webpki leaves revocation to us, since it asks one list only. When this refuses a path,
        // webpki looks for another one, and then gives the error of that: the path that was right
        // but for us says more.
        let (best, refused) = (RefCell::new(None::<RightPath>), Cell::new(None));
        let check = |path: &VerifiedPath<'_>| match self.path(path) {
            Ok(found) => {
                let enough = found.signer.not_after >= end;
                let mut best = best.borrow_mut();
                let known = best.as_ref().map(|best| best.signer.not_after);
                if known < Some(found.signer.not_after) {
                    *best = Some(found);
                }
                // Where the leaf is not what expires first, another path may be good for longer.
                if enough {
                    Ok(())
                } else {
                    Err(webpki::Error::UnknownIssuer)
                }
            }
            Err(reason) => {
                refused.set(Some(reason));
                Err(webpki::Error::UnknownIssuer)
            }
        };
        let result = end_entity.verify_for_usage(
            crypto::provider().signature_verification_algorithms.all,
            self.bundle.anchors(),
            self.intermediates,
            clock::to_unix(self.now),
            ClientAndServer,
            None,
            Some(&check),
        );
        match (best.take(), refused.get(), result) {
            (Some(best), ..) => {
                // webpki knows whole seconds only.
                check_validity(validity(self.leaf), self.now)?;
                Ok(best)
            }
            (None, Some(reason), _) => Err(reason),
            (None, None, Err(error)) => Err(error.into()),
            (None, None, Ok(_)) => Err(RejectReason::UntrustedChain),
        }
    }

    /// Rules for whoever signed along a path that webpki found to be right, and whether anything on
    /// it is revoked. The bundle's own certificates were checked when it was made, except for what
    /// depends on the path and on the time.
    fn path(&self, path: &VerifiedPath<'_>) -> Result<RightPath, RejectReason> {
        let ders: Vec<_> = path
            .intermediate_certificates()
            .map(|it| it.der())
            .collect();
        let anchor = self
            .bundle
            .check_anchor(path.anchor(), ders.len(), self.policy, self.now)?;
        let mut signer = Validity {
            not_before: anchor.not_before,
            not_after: anchor.not_after,
        };
        let parsed = ders.iter().map(|der| svid_rules::parse(der));
        let parsed: Vec<_> = parsed.collect::<Result<_, _>>()?;
        for certificate in &parsed {
            svid_rules::check_signer(certificate)?;
            self.policy.check_key(KeyKind::of(certificate))?;
            let valid = validity(certificate);
            check_validity(valid, self.now)?;
            if valid.not_after < signer.not_after {
                signer = valid;
            }
        }
        self.check_revocation(&ders, &parsed, &anchor.issuer)?;
        let place = |der: &CertificateDer<'_>| self.intermediates.iter().position(|it| it == der);
        Ok(RightPath {
            signer,
            intermediates: ders.iter().filter_map(place).collect(),
        })
    }

    /// From the authority down, so that a list counts only where its signer does.
    fn check_revocation(
        &self,
        ders: &[CertificateDer<'_>],
        parsed: &[X509Certificate<'_>],
        anchor: &Issuer<'_>,
    ) -> Result<(), RejectReason> {
        let lists = self.bundle.lists();
        if lists.is_empty() {
            return Ok(());
        }
        let below = parsed.iter().zip(ders).rev().map(|(certificate, der)| {
            Ok(Issuer {
                der,
                public_key: certificate.public_key().raw,
                key_id: key_id(certificate),
                may_sign_lists: svid_rules::may_sign_lists(certificate)?,
            })
        });
        let below: Vec<Issuer<'_>> = below.collect::<Result<_, RejectReason>>()?;
        let issuers = iter::once(anchor).chain(&below);
        let certificates = parsed.iter().rev().map(|it| (it, true));
        let certificates = certificates.chain(iter::once((self.leaf, false)));
        for (issuer, (certificate, is_signer)) in issuers.zip(certificates) {
            revocation::check(lists, certificate, is_signer, issuer, self.now)?;
        }
        Ok(())
    }
}

fn validity(certificate: &X509Certificate<'_>) -> Validity {
    Validity {
        not_before: clock::from_asn1(certificate.validity().not_before),
        not_after: clock::from_asn1(certificate.validity().not_after),
    }
}

fn check_validity(validity: Validity, now: SystemTime) -> Result<(), RejectReason> {
    if now < validity.not_before {
        return Err(RejectReason::NotYetValid);
    }
    if now > validity.not_after {
        return Err(RejectReason::Expired);
    }
    Ok(())
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
    ) -> Result<(), Error> {
        // The TLS library gives the time in whole seconds, in which what has just expired has not.
        let now = SystemTime::now();
        let bundles = self.trust.current();
        let verified = verify_chain(&bundles, leaf, intermediates, now)
            .map_err(|reason| refusal(Refusal::of(reason, &bundles, leaf, intermediates)))?;
        match &self.expected {
            Some(expected) if *expected != verified.id => Err(refusal(RejectReason::WrongIdentity)),
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
                Error::InvalidCertificate(_) => refusal(RejectReason::KeyNotHeld),
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
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates)?;
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
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates)?;
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
