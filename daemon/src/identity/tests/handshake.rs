//! A TLS handshake between two configurations, without a network.

use std::{sync::Arc, time::SystemTime};

use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, Error, ServerConfig, ServerConnection,
    sign::CertifiedKey,
};
use rustls_pki_types::ServerName;
use zeroize::Zeroizing;

use crate::telemetry::HandshakeReason;

use super::{
    certs::{Authority, Issued},
    *,
};

/// The identity that is ours in these tests, and the one that the peer should have.
pub(super) const OURS: &str = "spiffe://example.org/ns/shop/sa/cart";
pub(super) const PEERS: &str = "spiffe://example.org/ns/shop/sa/stock";

/// Both ends of a connection, and how each found the handshake.
pub(super) struct Handshake {
    pub(super) client: ClientConnection,
    pub(super) server: ServerConnection,
    pub(super) client_result: Result<(), Error>,
    pub(super) server_result: Result<(), Error>,
}

/// Carries bytes between the two until neither has any left to send.
pub(super) fn handshake(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    name: ServerName<'static>,
) -> Handshake {
    let mut client = ClientConnection::new(client.clone(), name).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    let (mut client_result, mut server_result) = (Ok(()), Ok(()));
    while client.wants_write() || server.wants_write() {
        carry(&mut client, &mut server, &mut server_result);
        carry(&mut server, &mut client, &mut client_result);
    }
    Handshake {
        client,
        server,
        client_result,
        server_result,
    }
}

fn carry<A, B>(
    from: &mut ConnectionCommon<A>,
    to: &mut ConnectionCommon<B>,
    result: &mut Result<(), Error>,
) {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut left = bytes.as_slice();
    while !left.is_empty() && result.is_ok() {
        to.read_tls(&mut left).unwrap();
        *result = to.process_new_packets().map(drop);
    }
}

impl Handshake {
    /// Fails the test unless both ends are content.
    pub(super) fn succeeded(&self) {
        assert_eq!(self.client_result, Ok(()));
        assert_eq!(self.server_result, Ok(()));
        assert!(!self.client.is_handshaking() && !self.server.is_handshaking());
    }
}

/// We, a peer, and the CA that certifies both of us.
pub(super) struct World {
    pub(super) root: Authority,
    pub(super) ours: Svid,
    /// What we trust.
    pub(super) trust: Arc<TrustStore>,
    /// What the peer trusts: always the CA.
    peers_trust: Arc<TrustStore>,
}

impl World {
    /// We trust the CA.
    pub(super) fn new() -> Self {
        Self::trusting(|root| vec![bundle("example.org", &[root])])
    }

    /// We trust what `bundles` makes of the CA.
    pub(super) fn trusting(bundles: impl FnOnce(&Authority) -> Vec<TrustBundle>) -> Self {
        Self::with_root(Authority::root("example.org"), bundles)
    }

    /// The same with another CA.
    pub(super) fn with_root(
        root: Authority,
        bundles: impl FnOnce(&Authority) -> Vec<TrustBundle>,
    ) -> Self {
        let trust = TrustStore::new(bundles(&root));
        Self::of(root, trust)
    }

    /// We trust the CA as far as chains to it keep to these rules.
    pub(super) fn with_rules(root: Authority, rules: CryptoRules) -> Self {
        let policy = Arc::new(CryptoPolicy::new(rules));
        let trust = TrustStore::with_policy(policy, [bundle("example.org", &[&root])]);
        Self::of(root, trust)
    }

    fn of(root: Authority, trust: TrustStore) -> Self {
        let peers_trust = Arc::new(TrustStore::new([bundle("example.org", &[&root])]));
        let trust = Arc::new(trust);
        let ours = check(OURS, &root.leaf(OURS), &peers_trust.current(), &trust).unwrap();
        Self {
            root,
            ours,
            trust,
            peers_trust,
        }
    }

    /// Our server name.
    pub(super) fn server_name(&self) -> String {
        self.ours.server_name.to_str().into_owned()
    }

    /// How we, as client, find a server that presents `issued` where [`PEERS`] is expected.
    pub(super) fn as_client(&self, issued: &Issued) -> Result<(), Error> {
        let verifier = SvidVerifier::any(self.peers_trust.clone());
        let peer = crypto::server_config(unchecked(issued), verifier).unwrap();
        let client = self.ours.client(&SpiffeId::parse(PEERS).unwrap());
        let name = self.ours.server_name.clone();
        handshake(&client, &Arc::new(peer), name).client_result
    }

    /// How we, as server, find a client that presents `issued`.
    pub(super) fn as_server(&self, issued: &Issued) -> Result<(), Error> {
        let verifier = SvidVerifier::any(self.peers_trust.clone());
        let peer = crypto::client_config(unchecked(issued), verifier).unwrap();
        let name = self.ours.server_name.clone();
        handshake(&Arc::new(peer), &self.ours.server, name).server_result
    }

    /// Fails the test unless `issued` is refused for `reason` in both roles.
    pub(super) fn refuses(&self, issued: &Issued, reason: RejectReason) {
        for (role, result) in [
            ("client", self.as_client(issued)),
            ("server", self.as_server(issued)),
        ] {
            let error = result.expect_err(role);
            assert_eq!(RejectReason::of(&error), Some(reason), "{role}: {error}");
            assert_eq!(HandshakeReason::from(&error), reason.handshake_reason());
        }
    }

    /// Fails the test unless `issued` is accepted in both roles.
    pub(super) fn accepts(&self, issued: &Issued) {
        assert_eq!(self.as_client(issued), Ok(()));
        assert_eq!(self.as_server(issued), Ok(()));
    }
}

/// A bundle of these CAs.
pub(super) fn bundle(trust_domain: &str, roots: &[&Authority]) -> TrustBundle {
    try_bundle(trust_domain, roots).unwrap()
}

/// Bundles as a store holds them.
pub(super) fn bundles<const N: usize>(bundles: [TrustBundle; N]) -> TrustBundles {
    let by_domain = |bundle: TrustBundle| (bundle.trust_domain().clone(), Arc::new(bundle));
    let mut all = TrustBundles::default();
    all.extend(bundles.into_iter().map(by_domain));
    all
}

/// A bundle of these CAs, some of which may not sign.
pub(super) fn try_bundle(
    trust_domain: &str,
    roots: &[&Authority],
) -> Result<TrustBundle, BundleError> {
    let trust_domain = TrustDomain::parse(trust_domain).unwrap();
    let certificates = roots.iter().map(|root| root.certificate()).collect();
    TrustBundle::new(trust_domain, certificates, Vec::new())
}

/// What the store does with material before it puts it in force.
pub(super) fn check(
    id: &str,
    issued: &Issued,
    bundles: &TrustBundles,
    trust: &Arc<TrustStore>,
) -> Result<Svid, ReloadError> {
    let id = SpiffeId::parse(id).unwrap();
    Svid::check(&id, &material(issued), bundles, trust, SystemTime::now())
}

/// What a source gives.
pub(super) fn material(issued: &Issued) -> Material {
    Material {
        chain: issued.chain.clone(),
        key: Zeroizing::new(issued.private_key()),
        bundles: Vec::new(),
    }
}

/// A key that nobody has looked at.
pub(super) fn unchecked(issued: &Issued) -> Arc<CertifiedKey> {
    let provider = provider().key_provider;
    let key = provider.load_private_key(issued.private_key()).unwrap();
    Arc::new(CertifiedKey::new(issued.chain.clone(), key))
}
