//! Ids of workloads and peers: given once for as long as the maps live.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use aya::maps::{Array, Map, MapData};
use reeve::datapath::Error;
use reeve_common::{Direction, NameDigest, Settings, UNKNOWN_WORKLOAD, protocol::TCP};

use crate::world::{CLASS, PATIENCE, Scope, WORKLOAD, World};

const A: NameDigest = [1; 32];
const B: NameDigest = [2; 32];
const C: NameDigest = [3; 32];
const D: NameDigest = [4; 32];

#[test]
fn an_id_is_given_once_whoever_comes_and_goes() {
    let mut world = World::new();
    let ids = |world: &World, names: &[NameDigest]| world.datapath().ids(names).unwrap();
    assert_eq!(ids(&world, &[A, B, C]), [1, 2, 3]);
    assert_eq!(ids(&world, &[C, A, B]), [3, 1, 2]);
    // One is gone for a moment, and another comes.
    assert_eq!(ids(&world, &[A, B]), [1, 2]);
    assert_eq!(ids(&world, &[A, B, D]), [1, 2, 4]);
    assert_eq!(ids(&world, &[A, B, C]), [1, 2, 5]);
    // The next daemon goes on with both: who has which, and which have been given.
    world.stop();
    world.start().unwrap();
    assert_eq!(ids(&world, &[B, D, C]), [2, 6, 5]);
    assert_eq!(ids(&world, &[]), [0; 0]);
    world.stop();
    world.start().unwrap();
    assert_eq!(ids(&world, &[A, B, C, D]), [7, 8, 9, 10]);
}

#[test]
fn when_every_id_has_been_given_none_is_given_again() {
    let mut world = World::new();
    assert_eq!(world.datapath().ids(&[A]).unwrap(), [1]);
    world.stop();
    let settings = world.settings.pins.join("SETTINGS");
    let mut map: Array<_, Settings> = Map::Array(MapData::from_pin(settings).unwrap())
        .try_into()
        .unwrap();
    let mut last = map.get(&0, 0).unwrap();
    last.next_id = UNKNOWN_WORKLOAD - 1;
    map.set(0, last, 0).unwrap();
    world.start().unwrap();
    let ids = |names: &[NameDigest]| world.datapath().ids(names);
    assert!(matches!(ids(&[A, B, C]), Err(Error::NoIds)));
    // Nothing has changed by that: there is one left.
    assert_eq!(ids(&[A, B]).unwrap(), [1, UNKNOWN_WORKLOAD - 1]);
    assert!(matches!(ids(&[A, C]), Err(Error::NoIds)));
    assert_eq!(ids(&[A, B]).unwrap(), [1, UNKNOWN_WORKLOAD - 1]);
}

#[test]
fn what_a_workload_that_is_gone_has_opened_is_refused_whoever_is_allowed_now() {
    let mut world = World::enrolled();
    world.peer(0);
    world.allow(Direction::Egress, Scope::Port(TCP, 80));
    world.apply();
    let server = world.as_far_end(|| TcpListener::bind("[::]:80").unwrap());
    let mut open = [world.there.port4(80), world.there.port6(80)].map(|to| {
        let client = world.as_workload(|| TcpStream::connect(to)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        (client, server.accept().unwrap().0)
    });
    let mut echo = |is_heard: bool| {
        for (client, accepted) in &mut open {
            client.write_all(b"x").unwrap();
            accepted
                .set_nonblocking(false)
                .and_then(|()| accepted.set_read_timeout(Some(PATIENCE / 10)))
                .unwrap();
            assert_eq!(
                accepted.read(&mut [0]).is_ok_and(|read| read == 1),
                is_heard
            );
        }
    };
    echo(true);
    // It goes, and another with an id of its own may do what it was allowed.
    world
        .state
        .workloads
        .retain(|(_, _, entry)| entry.workload != WORKLOAD);
    world.state.namespaces.clear();
    world.state.local_addresses.clear();
    world.add_workload(world.stranger.id(), world.stranger.depth(), WORKLOAD + 1);
    for (_, key, _) in &mut world.state.tables.verdicts {
        assert_eq!((key.workload, key.class), (WORKLOAD, CLASS));
        key.workload = WORKLOAD + 1;
    }
    world.apply();
    echo(false);
}
