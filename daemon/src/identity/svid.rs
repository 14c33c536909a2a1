//! One identity's checked certificate, and the TLS configurations made from it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{ClientConfig, ServerConfig, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, ServerName};

use super::{
    BundleError, Material, RejectReason, SourceError, SpiffeId, SvidVerifier, TrustBundles,
    TrustStore, Validity, clock, crypto, server_name_for, svid_rules, verify_chain,
};

/// Client configurations that one certificate keeps, one for each peer. Beyond, all are forgotten
/// and made anew: a node seldom has that many peers, and making one costs microseconds.
const MAX_CLIENT_CONFIGS: usize = 4096;

/// Part of its lifetime, as a divisor, that a signer has left when its end is announced: five weeks of
/// a year, two hours of a day. Of ten years, eight weeks.
const ANNOUNCED: u32 = 10;
const ANNOUNCED_AT_MOST: Duration = Duration::from_secs(56 * 24 * 3600);

/// One identity's checked material: a certificate, and the TLS configurations made from it.
/// A value is never changed; a reload publishes a new one with a higher generation.
pub struct Svid {
    /// The identity that the certificate holds.
    pub id: SpiffeId,
    /// Higher at each reload, and never the same for two certificates, of whichever identity.
    pub generation: u64,
    /// Start of the certificate's validity.
    pub not_before: SystemTime,
    /// When the first certificate of the chain expires, the authority that vouches for it included:
    /// from then on every peer refuses it.
    pub not_after: SystemTime,
    /// The signer of the chain, the authority included, that expires first.
    pub signer: Validity,
    /// Serial number, lower case hexadecimal.
    pub serial: String,
    /// Distinguished name of the certificate's issuer.
    pub issuer: String,
    /// What a client sends as TLS server name to ask for this identity.
    pub server_name: ServerName<'static>,
    /// What the tunnel listener presents. TLS 1.3, ALPN of tunnels, client certificate required.
    pub server: Arc<ServerConfig>,
    /// Configuration for a client that trusts any identity; [`Svid::client`] narrows it.
    any_client: ClientConfig,
    key: Arc<CertifiedKey>,
    trust: Arc<TrustStore>,
    clients: Mutex<HashMap<SpiffeId, Arc<ClientConfig>>>,
}

/// Why material was not put in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReloadError {
    /// The source has none.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The source did not answer in time.
    #[error("the source did not answer in time")]
    Timeout,
    /// A trust bundle cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// There is no certificate in it.
    #[error("the chain has no certificate")]
    EmptyChain,
    /// The key cannot be read, or is of a kind that cannot be used.
    #[error("the private key cannot be used: {0}")]
    Key(String),
    /// Key and certificate are not of one pair.
    #[error("the private key does not fit the certificate")]
    KeyMismatch,
    /// A peer with the same trust bundle would refuse the certificate.
    #[error("the certificate is refused: {0}")]
    Rejected(RejectReason),
    /// No TLS configuration could be made from it.
    #[error("no TLS configuration could be made from it: {0}")]
    Tls(String),
}

// === impl Svid ===

impl Svid {
    /// Checks `material` as a peer would, with the bundles that are to be in force together with
    /// it, and makes the TLS configurations. The generation is for the caller to set.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn check(
        id: &SpiffeId,
        material: &Material,
        bundles: &TrustBundles,
        trust: &Arc<TrustStore>,
        now: SystemTime,
    ) -> Result<Self, ReloadError> {
        let (leaf, intermediates) = material
            .chain
            .split_first()
            .ok_or(ReloadError::EmptyChain)?;
        let key = crypto::provider()
            .key_provider
            .load_private_key(material.key.clone_key())
            .map_err(|error| ReloadError::Key(error.to_string()))?;
        let key = Arc::new(CertifiedKey::new(material.chain.clone(), key));
        let verified = verify_chain(bundles, leaf, intermediates, now)?;
        if verified.id != *id {
            return Err(RejectReason::WrongIdentity.into());
        }
        key.keys_match().map_err(|_| ReloadError::KeyMismatch)?;

        let certificate = svid_rules::parse(leaf)?;
        let verifier = SvidVerifier::any(trust.clone());
        Ok(Self {
            id: id.clone(),
            generation: 0,
            not_before: clock::from_asn1(certificate.validity().not_before),
            not_after: verified.not_after,
            signer: verified.signer,
            serial: super::hex(certificate.raw_serial()),
            issuer: certificate.issuer().to_string(),
            server_name: server_name_for(id),
            server: Arc::new(crypto::server_config(key.clone(), verifier.clone())?),
            any_client: crypto::client_config(key.clone(), verifier)?,
            key,
            trust: trust.clone(),
            clients: Mutex::default(),
        })
    }

    /// Configuration for a tunnel from this identity to a server that must hold exactly `expected`.
    #[must_use]
    pub fn client(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        // Taken once per tunnel, not per connection; whoever panicked under it left it whole.
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(expected) {
            return client.clone();
        }
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        let verifier = SvidVerifier::exactly(self.trust.clone(), expected.clone());
        let mut client = self.any_client.clone();
        client
            .dangerous()
            .set_certificate_verifier(Arc::new(verifier));
        let client = Arc::new(client);
        clients.insert(expected.clone(), client.clone());
        client
    }

    /// Configuration for the client of a handshake that proves a tunnel again.
    #[must_use]
    pub fn proof_client(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.client(expected));
        config.alpn_protocols = vec![crypto::PROOF_ALPN.to_vec()];
        Arc::new(config)
    }

    /// Configuration for the server of such a handshake.
    #[must_use]
    pub fn proof_server(&self) -> Arc<ServerConfig> {
        let mut config = ServerConfig::clone(&self.server);
        config.alpn_protocols = vec![crypto::PROOF_ALPN.to_vec()];
        Arc::new(config)
    }

    /// The certificate, then the intermediates.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The same certificate as these bundles judge it: an authority that is reissued, or one more
    /// path, changes for how long it is good. None where nothing changes, and where the bundles do
    /// not vouch for it: peers with other bundles may.
    pub(super) fn judged_again(&self, bundles: &TrustBundles, now: SystemTime) -> Option<Self> {
        let (leaf, intermediates) = self.key.cert.split_first()?;
        let verified = verify_chain(bundles, leaf, intermediates, now).ok()?;
        if (verified.not_after, verified.signer) == (self.not_after, self.signer) {
            return None;
        }
        Some(Self {
            id: self.id.clone(),
            generation: self.generation,
            not_before: self.not_before,
            not_after: verified.not_after,
            signer: verified.signer,
            serial: self.serial.clone(),
            issuer: self.issuer.clone(),
            server_name: self.server_name.clone(),
            server: self.server.clone(),
            any_client: self.any_client.clone(),
            key: self.key.clone(),
            trust: self.trust.clone(),
            clients: Mutex::default(),
        })
    }

    /// Whether a signer of the chain is near its end: a tenth of its lifetime is left, or eight weeks.
    #[must_use]
    pub fn signer_expires_soon(&self, now: SystemTime) -> bool {
        let Validity {
            not_before,
            not_after,
        } = self.signer;
        let lifetime = not_after.duration_since(not_before).unwrap_or_default();
        let left = not_after.duration_since(now).unwrap_or_default();
        left < (lifetime / ANNOUNCED).min(ANNOUNCED_AT_MOST)
    }

    /// Whether both hold the same chain; then they hold the same key.
    pub(super) fn same_as(&self, other: &Self) -> bool {
        self.key.cert == other.key.cert
    }

    /// Whether the whole chain is within its validity at `now`.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("generation", &self.generation)
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

// === impl ReloadError ===

impl ReloadError {
    /// Whether the source itself is not there, or does not answer.
    #[must_use]
    pub const fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Source(
                SourceError::Unavailable(_) | SourceError::Unreachable(_) | SourceError::Pending(_)
            ) | Self::Timeout
        )
    }

    /// Name of the kind of error in metrics and status: one of a closed set.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Source(SourceError::Denied(denied)) => denied.as_str(),
            Self::Source(
                SourceError::Unavailable(_) | SourceError::Unreachable(_) | SourceError::Pending(_),
            ) => "unavailable",
            Self::Source(SourceError::Unreadable(_)) => "unreadable",
            Self::Source(SourceError::Bundle(_)) | Self::Bundle(_) => "bundle",
            Self::Timeout => "timeout",
            Self::EmptyChain => "empty_chain",
            Self::Key(_) => "key",
            Self::KeyMismatch => "key_mismatch",
            Self::Rejected(reason) => reason.as_str(),
            Self::Tls(_) => "tls",
        }
    }
}

impl From<RejectReason> for ReloadError {
    fn from(reason: RejectReason) -> Self {
        Self::Rejected(reason)
    }
}

impl From<rustls::Error> for ReloadError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string())
    }
}
