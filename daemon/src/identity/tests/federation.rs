//! Bundle endpoints: what is taken from them, what is refused, and what stays then. Each is a real
//! HTTPS server.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;

use super::{
    bundles::{BundleServer, document, web_certificate},
    certs::{Authority, Issued, expire},
    *,
};
use crate::privileges::Confinement;

/// How long something that is to happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);
const OTHER: &str = "other.example";
const PUBLISHER: &str = "spiffe://other.example/publisher";

/// A follower of endpoints, and where it keeps what it gets.
struct Scene {
    folder: tempfile::TempDir,
    identities: Arc<IdentityStore>,
    federation: Federation,
}

impl Scene {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(folder: tempfile::TempDir) -> Self {
        let identities = Arc::new(IdentityStore::new(Sources::new()));
        let kept = folder.path().join("bundles");
        let federation = Federation::new(identities.clone(), kept, Confinement::default());
        Self {
            folder,
            identities,
            federation,
        }
    }

    /// The daemon was started anew.
    fn restarted(self) -> Self {
        Self::at(self.folder)
    }

    fn file(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        path
    }

    fn follow(&self, endpoints: &[BundleEndpoint]) {
        self.federation.follow(endpoints).unwrap();
    }

    /// Asks, and gives the reason of the refusal.
    async fn refused(&self) -> Option<&'static str> {
        self.federation.refresh(SOON).await;
        let status = self.status();
        status.last_error.map(|error| error.as_str())
    }

    fn status(&self) -> EndpointStatus {
        self.federation.status().remove(0)
    }

    /// The authorities of a trust domain in force.
    fn trusted(&self, domain: &str) -> Option<Vec<rustls_pki_types::CertificateDer<'static>>> {
        let bundles = self.identities.configured_bundles();
        let bundle = bundles.get(&domain_of(domain))?;
        Some(bundle.certificates().to_vec())
    }

    fn kept(&self, domain: &str) -> PathBuf {
        self.folder.path().join(format!("bundles/{domain}.json"))
    }
}

fn domain_of(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn server(certificate: &Issued) -> BundleServer {
    BundleServer::start(TcpListener::bind("127.0.0.1:0").unwrap(), certificate)
}

fn url(server: &BundleServer, host: &str) -> EndpointUrl {
    let port = server.address().port();
    EndpointUrl::parse(&format!("https://{host}:{port}/bundle?of=them")).unwrap()
}

fn web(server: &BundleServer, host: &str, authorities: &Path) -> BundleEndpoint {
    BundleEndpoint {
        trust_domain: domain_of(OTHER),
        url: url(server, host),
        profile: EndpointProfile::Web {
            authorities: Some(authorities.to_owned()),
        },
    }
}

fn spiffe(server: &BundleServer, domain: &str, bootstrap: Option<PathBuf>) -> BundleEndpoint {
    BundleEndpoint {
        trust_domain: domain_of(domain),
        url: url(server, "127.0.0.1"),
        profile: EndpointProfile::Spiffe {
            id: SpiffeId::parse(PUBLISHER).unwrap(),
            bootstrap,
        },
    }
}

#[tokio::test]
async fn a_bundle_is_fetched_by_name_and_outlives_a_restart_without_its_endpoint() {
    let (public, root) = (Authority::root("public.example"), Authority::root(OTHER));
    let scene = Scene::new();
    let authorities = scene.file("authorities.pem", &public.certificate_pem());
    let server = server(&web_certificate(&public, &["localhost"]));
    server.serve(&document(&[root.certificate()], 7));
    let endpoint = web(&server, "localhost", &authorities);
    scene.follow(std::slice::from_ref(&endpoint));
    assert_eq!(scene.refused().await, None);
    assert_eq!(scene.trusted(OTHER), Some(vec![root.certificate()]));
    let status = scene.status();
    assert_eq!(status.origin, Some(BundleOrigin::Fetched));
    assert_eq!(status.sequence, Some(7));
    let head = server.asked().pop().unwrap();
    assert!(
        head.starts_with("GET /bundle?of=them HTTP/1.1\r\n"),
        "{head}"
    );
    let host = format!("host: localhost:{}\r\n", server.address().port());
    assert!(head.to_lowercase().contains(&host), "{head}");

    drop(server);
    let again = scene.restarted();
    again.follow(std::slice::from_ref(&endpoint));
    // At once, before anybody was asked.
    assert_eq!(again.trusted(OTHER), Some(vec![root.certificate()]));
    assert_eq!(again.status().origin, Some(BundleOrigin::Kept));
    assert!(again.status().last_success.is_some());
    assert_eq!(again.refused().await, Some("unreachable"));
    assert_eq!(again.trusted(OTHER), Some(vec![root.certificate()]));

    // Who is not followed any more is not trusted any more, and nothing is left of it.
    again.follow(&[]);
    assert_eq!(again.trusted(OTHER), None);
    assert!(!again.kept(OTHER).exists());
}

#[tokio::test]
async fn what_is_no_good_is_refused_and_leaves_the_bundle_before() {
    let (public, root) = (Authority::root("public.example"), Authority::root(OTHER));
    let scene = Scene::new();
    let authorities = scene.file("authorities.pem", &public.certificate_pem());
    let server = server(&web_certificate(&public, &["127.0.0.1"]));
    server.serve(&document(&[root.certificate()], 7));
    scene.follow(&[web(&server, "127.0.0.1", &authorities)]);
    assert_eq!(scene.refused().await, None);
    let before = std::fs::read(scene.kept(OTHER)).unwrap();

    let new = Authority::root(OTHER);
    let leaf = root.leaf(PUBLISHER).chain.remove(0);
    let whole = |body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let large = "x".repeat((1 << 20) + 1);
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{large}");
    for (answer, reason) in [
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "status",
        ),
        (
            "HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n",
            "redirect",
        ),
        (&whole(&large), "too_large"),
        (&endless, "too_large"),
        (&whole("hello"), "document"),
        (&whole("{\"spiffe_sequence\": 8}"), "document"),
        (
            &whole(&document(&[new.certificate(), leaf], 8).to_string()),
            "document",
        ),
        (
            &whole(&document(&[new.certificate()], 6).to_string()),
            "sequence_went_back",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{", "broken"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "broken"),
        ("", "broken"),
    ] {
        server.answer(answer.as_bytes());
        assert_eq!(scene.refused().await, Some(reason));
        assert_eq!(
            scene.trusted(OTHER),
            Some(vec![root.certificate()]),
            "{reason}"
        );
        let counts = scene.status().counts;
        assert!(counts.rejected.contains_key(reason), "{counts:?}");
    }
    assert_eq!(std::fs::read(scene.kept(OTHER)).unwrap(), before);
    // It is still followed.
    server.serve(&document(&[new.certificate()], 8));
    assert_eq!(scene.refused().await, None);
    assert_eq!(scene.trusted(OTHER), Some(vec![new.certificate()]));
    // The same again is no change.
    let accepted = scene.status().counts.accepted;
    assert_eq!(scene.refused().await, None);
    assert_eq!(scene.status().counts.accepted, accepted);
    assert_eq!(scene.status().last_result, Some(ReloadResult::Unchanged));
}

#[tokio::test]
async fn a_server_that_is_not_the_one_in_the_url_is_asked_for_nothing() {
    let (public, root) = (Authority::root("public.example"), Authority::root(OTHER));
    let scene = Scene::new();
    let authorities = scene.file("authorities.pem", &public.certificate_pem());
    let nobody = Authority::root("nobody.example");
    let server = server(&web_certificate(&nobody, &["127.0.0.1"]));
    server.serve(&document(&[root.certificate()], 1));
    scene.follow(&[web(&server, "127.0.0.1", &authorities)]);
    let ended = public.leaf_with("spiffe://unused.example/web", |params| {
        params.subject_alt_names = vec![rcgen::SanType::IpAddress([127, 0, 0, 1].into())];
        expire(params);
    });
    for certificate in [
        web_certificate(&nobody, &["127.0.0.1"]),
        web_certificate(&public, &["127.0.0.2", "localhost"]),
        public.leaf(PUBLISHER),
        ended,
    ] {
        server.present(&certificate);
        assert_eq!(scene.refused().await, Some("handshake"));
    }
    assert_eq!(server.asked(), [""; 0]);
    assert_eq!(scene.trusted(OTHER), None);
    let status = scene.status();
    assert_eq!((status.origin, status.last_success), (None, None));

    scene.follow(&[web(&server, "127.0.0.1", Path::new("/nowhere.pem"))]);
    assert_eq!(scene.refused().await, Some("authorities"));
}

#[tokio::test]
async fn a_server_is_known_by_its_spiffe_id_and_by_the_newest_bundle() {
    let (old, new) = (Authority::root(OTHER), Authority::root(OTHER));
    let scene = Scene::new();
    let bootstrap = scene.file("bootstrap.pem", &old.certificate_pem());
    // Another of the same trust domain is not the publisher, and is asked for nothing.
    let server = server(&old.leaf("spiffe://other.example/somebody"));
    let endpoint = spiffe(&server, OTHER, Some(bootstrap));
    server.serve(&document(&[old.certificate(), new.certificate()], 2));
    scene.follow(std::slice::from_ref(&endpoint));
    // What an operator gives is good before anybody was asked.
    assert_eq!(scene.status().origin, Some(BundleOrigin::Bootstrap));
    assert_eq!(scene.trusted(OTHER), Some(vec![old.certificate()]));
    assert_eq!(scene.refused().await, Some("handshake"));
    let said = scene.status().last_error.unwrap().to_string();
    assert!(said.contains("wrong_identity"), "{said}");
    // Nor is somebody whom it does not know yet.
    server.present(&new.leaf(PUBLISHER));
    assert_eq!(scene.refused().await, Some("handshake"));
    assert_eq!(server.asked(), [""; 0]);

    server.present(&old.leaf(PUBLISHER));
    assert_eq!(scene.refused().await, None);
    server.present(&new.leaf(PUBLISHER));
    server.serve(&document(&[new.certificate()], 3));
    assert_eq!(scene.refused().await, None);
    assert_eq!(scene.trusted(OTHER), Some(vec![new.certificate()]));
    // The one to begin with counts no more, after a restart neither.
    server.present(&old.leaf(PUBLISHER));
    assert_eq!(scene.refused().await, Some("handshake"));
    let again = scene.restarted();
    again.follow(std::slice::from_ref(&endpoint));
    assert_eq!(again.trusted(OTHER), Some(vec![new.certificate()]));

    // Unless the operator gives another one: then it is begun anew. A bundle document will do.
    let newest = Authority::root(OTHER);
    let text = document(&[newest.certificate()], 1).to_string();
    again.file("bootstrap.pem", &text);
    again.follow(std::slice::from_ref(&endpoint));
    assert_eq!(again.trusted(OTHER), Some(vec![newest.certificate()]));
    server.present(&newest.leaf(PUBLISHER));
    server.serve(&json!({"keys": []}));
    assert_eq!(again.refused().await, None);
    assert_eq!(
        again.trusted(OTHER),
        Some(Vec::new()),
        "everybody is revoked"
    );

    // A file that is no bundle changes nothing.
    again.file("bootstrap.pem", "{}");
    let (domain, _, error) = again.federation.follow(&[endpoint]).unwrap_err();
    assert_eq!(domain, domain_of(OTHER));
    assert!(error.to_string().contains("no `keys`"), "{error}");
    assert_eq!(again.trusted(OTHER), Some(Vec::new()));
}

#[tokio::test]
async fn one_trust_domain_may_publish_the_bundle_of_another_and_they_are_not_merged() {
    let (root, third) = (Authority::root(OTHER), Authority::root("third.example"));
    let scene = Scene::new();
    let bootstrap = scene.file("bootstrap.pem", &root.certificate_pem());
    let server = server(&root.leaf(PUBLISHER));
    server.serve(&document(&[third.certificate()], 1));
    let mirror = spiffe(&server, "third.example", None);
    scene.follow(std::slice::from_ref(&mirror));
    assert_eq!(scene.refused().await, Some("no_bundle"));

    // Given for the check alone, it is trusted for nothing else.
    scene.follow(&[spiffe(&server, "third.example", Some(bootstrap))]);
    assert_eq!(scene.refused().await, None);
    assert_eq!(
        scene.trusted("third.example"),
        Some(vec![third.certificate()])
    );
    assert_eq!(scene.trusted(OTHER), None);

    // Nor does either vouch for the other's identities.
    scene.identities.configure_trust(
        &[Arc::new(super::handshake::bundle(OTHER, &[&root]))],
        RevocationLists::new(),
    );
    scene.follow(&[mirror]);
    assert_eq!(scene.refused().await, None);
    let bundles = scene.identities.configured_bundles();
    let now = std::time::SystemTime::now();
    for (authority, id, vouches) in [
        (&root, PUBLISHER, true),
        (&third, "spiffe://third.example/a", true),
        (&third, PUBLISHER, false),
        (&root, "spiffe://third.example/a", false),
    ] {
        let leaf = authority.leaf(id).chain.remove(0);
        let judged = verify_chain(&bundles, &leaf, &[], now);
        assert_eq!(judged.is_ok(), vouches, "{id}: {judged:?}");
    }
}
