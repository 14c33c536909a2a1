//! What a peer is told, by the alert, of why we refuse its certificate.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{AlertDescription, Error};
use tokio::io::{AsyncReadExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    certs::{Authority, Flaw, Issued},
    handshake::{OURS, PEERS, World, bundle, unchecked},
    *,
};

/// What the peer hears, and why we have refused it, where we are the server and where we are the
/// client.
async fn told(world: &World, issued: &Issued) -> [(AlertDescription, RejectReason); 2] {
    let trust = || Arc::new(TrustStore::new([bundle("example.org", &[&world.root])]));
    let alert = |error: io::Error| match error.get_ref().and_then(|it| it.downcast_ref()) {
        Some(Error::AlertReceived(alert)) => *alert,
        other => panic!("{other:?}"),
    };
    let reason = |error: io::Error| RejectReason::of_io(&error).unwrap();

    let (near, far) = duplex(1 << 16);
    let verifier = SvidVerifier::any(trust());
    let client = crypto::client_config(unchecked(issued), verifier).unwrap();
    let ours = judged(TlsAcceptor::from(world.ours.server.clone()).accept(near));
    let theirs = async {
        let name = world.ours.server_name.clone();
        let mut stream = TlsConnector::from(Arc::new(client))
            .connect(name, far)
            .await?;
        // In TLS 1.3 a client hears of it after its own part is done.
        stream.read_u8().await
    };
    let (ours, theirs) = tokio::join!(ours, theirs);
    let as_server = (alert(theirs.unwrap_err()), reason(ours.unwrap_err()));

    let (near, far) = duplex(1 << 16);
    let server = crypto::server_config(unchecked(issued), SvidVerifier::any(trust())).unwrap();
    let expected = SpiffeId::parse(PEERS).unwrap();
    let name = server_name_for(&expected);
    let ours = judged(TlsConnector::from(world.ours.client(&expected)).connect(name, near));
    let theirs = TlsAcceptor::from(Arc::new(server)).accept(far);
    let (ours, theirs) = tokio::join!(ours, theirs);
    let as_client = (alert(theirs.unwrap_err()), reason(ours.unwrap_err()));
    [as_server, as_client]
}

/// What a server says, and what is proven of the clocks, where a client's certificate is refused.
async fn refused(world: &World, issued: &Issued) -> (String, Option<Duration>) {
    let (near, far) = duplex(1 << 16);
    let trust = Arc::new(TrustStore::new([bundle("example.org", &[&world.root])]));
    let client = crypto::client_config(unchecked(issued), SvidVerifier::any(trust)).unwrap();
    let ours = judged(TlsAcceptor::from(world.ours.server.clone()).accept(near));
    let name = world.ours.server_name.clone();
    let theirs = TlsConnector::from(Arc::new(client)).connect(name, far);
    let (ours, _theirs) = tokio::join!(ours, theirs);
    let error = ours.unwrap_err();
    (RejectReason::explain(&error), least_skew(&error))
}

#[tokio::test]
async fn a_refused_certificates_dates_tell_how_far_the_clocks_are_apart() {
    let world = World::new();
    let half_an_hour = Duration::from_secs(29 * 60)..=Duration::from_secs(30 * 60);
    let (said, skew) = refused(&world, &Flaw::NotYetValid.issue(&world.root, PEERS)).await;
    assert!(said.contains("from now by this node's clock"), "{said}");
    assert!(
        skew.is_some_and(|skew| half_an_hour.contains(&skew)),
        "{skew:?}"
    );
    // Whom nobody vouches for proves nothing.
    let (_, skew) = refused(
        &world,
        &Flaw::NotYetValid.issue(&Authority::root("example.org"), PEERS),
    )
    .await;
    assert_eq!(skew, None);
    let (said, skew) = refused(&world, &Flaw::Expired.issue(&world.root, PEERS)).await;
    assert!(said.contains("ago by this node's clock"), "{said}");
    assert_eq!(skew, None, "it may not have been renewed");
}

#[test]
fn a_peer_that_takes_a_valid_certificate_for_an_expired_one_has_another_clock() {
    let world = World::new();
    let now = SystemTime::now();
    let alert = |alert| rustls::Error::AlertReceived(alert);
    let (least, said) = skew_by_alert(
        &alert(AlertDescription::CertificateExpired),
        &world.ours,
        now,
    )
    .unwrap();
    assert!(least > Duration::from_secs(59 * 60), "{least:?}");
    assert!(said.contains("the clocks differ by at least"), "{said}");
    let other = alert(AlertDescription::UnknownCA);
    assert_eq!(skew_by_alert(&other, &world.ours, now), None);
}

#[tokio::test]
async fn a_peer_is_told_by_the_alert_why_it_is_refused_in_both_roles() {
    use AlertDescription as A;
    let root = Authority::root("example.org");
    let revoked = root.leaf(PEERS);
    let serial = svid_rules::parse(&revoked.chain[0])
        .unwrap()
        .raw_serial()
        .to_vec();
    let list = root.revocation_list(&[&serial], time::Duration::hours(1));
    let unlisted = root.intermediate(|_| {}).leaf(PEERS);
    let revoking = World::with_root(root, |root| {
        let domain = TrustDomain::parse("example.org").unwrap();
        vec![TrustBundle::new(domain, vec![root.certificate()], vec![list]).unwrap()]
    });
    for (issued, alert, reason) in [
        (&revoked, A::CertificateRevoked, RejectReason::Revoked),
        (&unlisted, A::UnknownCA, RejectReason::RevocationUnknown),
    ] {
        assert_eq!(told(&revoking, issued).await, [(alert, reason); 2]);
    }

    let world = World::new();
    let flawed = |flaw: Flaw| flaw.issue(&world.root, PEERS);
    let stranger = world.root.leaf("spiffe://other.example/ns/shop/sa/stock");
    let not_its_key = Issued {
        key: world.root.leaf(PEERS).key,
        ..world.root.leaf(PEERS)
    };
    for (issued, alert, reason) in [
        (
            flawed(Flaw::Expired),
            A::CertificateExpired,
            RejectReason::Expired,
        ),
        (
            flawed(Flaw::NotYetValid),
            A::CertificateExpired,
            RejectReason::NotYetValid,
        ),
        (
            flawed(Flaw::IntermediateExpired),
            A::CertificateExpired,
            RejectReason::Expired,
        ),
        (
            flawed(Flaw::Unknown),
            A::UnknownCA,
            RejectReason::UntrustedChain,
        ),
        (stranger, A::UnknownCA, RejectReason::UnknownTrustDomain),
        (not_its_key, A::DecryptError, RejectReason::KeyNotHeld),
        (
            flawed(Flaw::Tampered),
            A::BadCertificate,
            RejectReason::BadSignature,
        ),
        (flawed(Flaw::NoName), A::BadCertificate, RejectReason::NoUri),
        (
            flawed(Flaw::ClientOnly),
            A::UnsupportedCertificate,
            RejectReason::ExtendedKeyUsage,
        ),
    ] {
        assert_eq!(
            told(&world, &issued).await,
            [(alert, reason); 2],
            "{reason}"
        );
    }
    // Only a client expects one identity.
    let other = world.root.leaf(OURS);
    let (near, far) = duplex(1 << 16);
    let trust = Arc::new(TrustStore::new([bundle("example.org", &[&world.root])]));
    let server = crypto::server_config(unchecked(&other), SvidVerifier::any(trust)).unwrap();
    let client = world.ours.client(&SpiffeId::parse(PEERS).unwrap());
    let ours = TlsConnector::from(client).connect(world.ours.server_name.clone(), near);
    let theirs = TlsAcceptor::from(Arc::new(server)).accept(far);
    let (ours, theirs) = tokio::join!(judged(ours), theirs);
    let reason = RejectReason::of_io(&ours.unwrap_err());
    assert_eq!(reason, Some(RejectReason::WrongIdentity));
    let said = theirs.unwrap_err().to_string();
    assert!(said.contains("AccessDenied"), "{said}");
}
