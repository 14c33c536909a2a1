//! Every handshake is a full one of TLS 1.3: nothing of an old session is taken over.

use std::sync::Arc;

use rustls::{
    ClientConfig, HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig, client::Resumption,
    server::ServerSessionMemoryCache,
};

use super::{
    handshake::{Handshake, OURS, World, handshake},
    *,
};

fn client(world: &World) -> Arc<ClientConfig> {
    world.ours.client(&SpiffeId::parse(OURS).unwrap())
}

/// Our server's configuration, made to hand out tickets and take them back.
fn with_tickets(world: &World) -> Arc<ServerConfig> {
    let mut server = ServerConfig::clone(&world.ours.server);
    server.session_storage = ServerSessionMemoryCache::new(16);
    server.send_tls13_tickets = 2;
    Arc::new(server)
}

/// Our client's configuration, made to keep tickets and offer them.
fn with_resumption(world: &World) -> Arc<ClientConfig> {
    let mut client = ClientConfig::clone(&client(world));
    client.resumption = Resumption::in_memory_sessions(16);
    Arc::new(client)
}

fn speak(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, world: &World) -> Handshake {
    let done = handshake(client, server, world.ours.server_name.clone());
    done.succeeded();
    done
}

#[test]
fn a_client_that_offers_an_old_session_gets_a_full_handshake_and_no_ticket() {
    let world = World::new();
    let (client, tickets) = (with_resumption(&world), with_tickets(&world));
    // A server that takes tickets, to show that this client has some and offers them.
    let first = speak(&client, &tickets, &world);
    assert_eq!(first.client.tls13_tickets_received(), 2);
    let second = speak(&client, &tickets, &world);
    assert_eq!(second.server.handshake_kind(), Some(HandshakeKind::Resumed));

    let ours = speak(&client, &world.ours.server, &world);
    assert_eq!(ours.server.handshake_kind(), Some(HandshakeKind::Full));
    assert_eq!(ours.client.tls13_tickets_received(), 0);
    let again = speak(&client, &world.ours.server, &world);
    assert_eq!(again.server.handshake_kind(), Some(HandshakeKind::Full));
}

#[test]
fn the_server_remembers_no_session_and_takes_no_early_data() {
    let server = World::new().ours.server;
    assert!(!server.session_storage.can_cache());
    assert!(!server.ticketer.enabled());
    assert_eq!(server.send_tls13_tickets, 0);
    assert_eq!(server.max_early_data_size, 0);
}

#[test]
fn our_client_offers_no_old_session() {
    let world = World::new();
    let (client, tickets) = (client(&world), with_tickets(&world));
    assert!(!client.enable_early_data);
    for _ in 0..2 {
        let done = speak(&client, &tickets, &world);
        assert_eq!(done.server.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn no_session_key_is_written_to_a_file() {
    let world = World::new();
    assert!(
        !world
            .ours
            .server
            .key_log
            .will_log("CLIENT_TRAFFIC_SECRET_0")
    );
    assert!(!client(&world).key_log.will_log("CLIENT_TRAFFIC_SECRET_0"));
}

#[test]
fn the_key_exchange_is_hybrid_and_the_protocol_is_that_of_provable_tunnels() {
    let world = World::new();
    let done = speak(&client(&world), &world.ours.server, &world);
    let group = done.server.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(
        done.server.protocol_version(),
        Some(ProtocolVersion::TLSv1_3)
    );
    assert_eq!(done.server.alpn_protocol(), Some(PROVABLE_ALPN));
    assert_eq!(done.client.alpn_protocol(), Some(PROVABLE_ALPN));
    assert_eq!(
        done.server.server_name(),
        Some(world.server_name().as_str())
    );
}
