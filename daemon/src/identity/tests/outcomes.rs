//! What a handshake that fails for other reasons than the peer's certificate is counted as.

use std::{
    io,
    sync::{Arc, Mutex},
};

use rustls::{
    AlertDescription, ClientConfig, Error, SignatureScheme, client::ResolvesClientCert,
    sign::CertifiedKey,
};

use crate::telemetry::HandshakeReason;

use super::{
    handshake::{Handshake, OURS, World, handshake},
    *,
};

/// A handshake with our server of a client that `change` spoils.
fn with_client(world: &World, change: impl FnOnce(&mut ClientConfig)) -> Handshake {
    let mut client = ClientConfig::clone(&world.ours.client(&SpiffeId::parse(OURS).unwrap()));
    change(&mut client);
    let name = world.ours.server_name.clone();
    handshake(&Arc::new(client), &world.ours.server, name)
}

/// A client that presents nothing, and remembers which authorities it was told of.
#[derive(Debug, Default)]
struct Nothing(Mutex<Option<Vec<Vec<u8>>>>);

impl ResolvesClientCert for Nothing {
    fn resolve(&self, hints: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let hints = hints.iter().map(|hint| hint.to_vec()).collect();
        *self.0.lock().unwrap() = Some(hints);
        None
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_and_told_of_no_authority() {
    let world = World::new();
    let nothing = Arc::new(Nothing::default());
    let done = with_client(&world, |client| {
        client.client_auth_cert_resolver = nothing.clone();
    });
    let error = done.server_result.unwrap_err();
    assert_eq!(
        HandshakeReason::from(&error),
        HandshakeReason::NoCertificate
    );
    assert_eq!(*nothing.0.lock().unwrap(), Some(Vec::new()));
}

#[test]
fn a_client_of_another_protocol_is_refused() {
    let world = World::new();
    let done = with_client(&world, |client| {
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
    });
    let error = done.server_result.unwrap_err();
    assert_eq!(HandshakeReason::from(&error), HandshakeReason::Protocol);
}

#[test]
fn a_peer_that_refuses_our_certificate_is_told_apart_from_one_that_we_refuse() {
    let world = World::new();
    let stranger = SpiffeId::parse("spiffe://example.org/ns/shop/sa/other").unwrap();
    let client = world.ours.client(&stranger);
    let name = world.ours.server_name.clone();
    let done = handshake(&client, &world.ours.server, name);
    let ours = done.client_result.unwrap_err();
    assert_eq!(HandshakeReason::from(&ours), HandshakeReason::WrongIdentity);
    let theirs = done.server_result.unwrap_err();
    assert_eq!(HandshakeReason::from(&theirs), HandshakeReason::PeerAlert);
}

#[test]
fn an_alert_about_something_else_is_a_matter_of_protocol() {
    let alert = Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    assert_eq!(HandshakeReason::from(&alert), HandshakeReason::Protocol);
}

#[test]
fn the_reason_is_found_inside_an_io_error() {
    let tls = |error: Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let refused = tls(RejectReason::Expired.into());
    assert_eq!(RejectReason::of_io(&refused), Some(RejectReason::Expired));
    for (error, reason) in [
        (refused, HandshakeReason::Validity),
        (
            tls(Error::NoCertificatesPresented),
            HandshakeReason::NoCertificate,
        ),
        (io::ErrorKind::TimedOut.into(), HandshakeReason::Timeout),
        (
            io::ErrorKind::UnexpectedEof.into(),
            HandshakeReason::Transport,
        ),
        (
            io::ErrorKind::ConnectionReset.into(),
            HandshakeReason::Transport,
        ),
    ] {
        assert_eq!(HandshakeReason::from(&error), reason, "{error}");
    }
}

#[test]
fn names_of_reasons_are_distinct() {
    let mut names: Vec<_> = RejectReason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), RejectReason::ALL.len());
}
