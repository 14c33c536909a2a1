//! Flows: who is answered, for how long, and that nobody else is.

use std::{
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use nix::time::{ClockId, clock_gettime};
use reeve_common::{
    Action, Direction, FLOW_IDLE_NANOSECONDS, FLOW_SHARES, Flow, FlowSlot, Hook, NamespaceEntry,
    Reason, protocol::UDP,
};
use socket2::Domain;

use crate::{
    room,
    world::{CLASS, MOMENT, Scope, WORKLOAD, World, assert_refused, udp_lite},
};

const SECOND: u64 = 1_000_000_000;

fn now() -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    u64::try_from(now.as_nanos()).unwrap()
}

/// A workload that asks port 53 of the far end, and both ends' sockets.
struct Asking {
    world: World,
    here: UdpSocket,
    there: UdpSocket,
}

fn udp(at: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(MOMENT)).unwrap();
    socket
}

impl Asking {
    fn new() -> Self {
        let mut world = World::enrolled();
        world.peer(0);
        world.allow(Direction::Egress, Scope::Port(UDP, 53));
        world.apply();
        Self::within(world)
    }

    /// The same with little room: eight slots for what a workload opens, and eight for what arrives.
    fn in_little_room() -> Self {
        let mut world = room::with(|maps| maps.flows = 2 * 8 * FLOW_SHARES);
        world.allow(Direction::Egress, Scope::Port(UDP, 53));
        world.apply();
        Self::within(world)
    }

    fn within(world: World) -> Self {
        let here = world.as_workload(|| udp(world.here.port4(1000)));
        let there = world.as_far_end(|| udp(world.there.port4(53)));
        Self { world, here, there }
    }

    fn ask(&self) {
        let to = self.world.there.port4(53);
        self.world
            .as_workload(|| self.here.send_to(b"x", to))
            .unwrap();
        self.there.recv(&mut [0]).unwrap();
    }

    /// Whether what the far end says now is heard.
    fn hears(&self) -> bool {
        hears(&self.here, || {
            let to = self.world.here.port4(1000);
            self.world
                .as_far_end(|| self.there.send_to(b"y", to))
                .unwrap();
        })
    }

    /// Has the workload's port be another socket's, which has asked nothing yet.
    fn ends_and_begins_again(&mut self) {
        for port in [1001, 1000] {
            let at = self.world.here.port4(port);
            self.here = self.world.as_workload(|| udp(at));
        }
    }

    fn flows(&self) -> HashMap<MapData, FlowSlot, Flow> {
        let pin = self.world.settings.pins.join("FLOWS");
        let map = Map::HashMap(MapData::from_pin(pin).unwrap());
        map.try_into().unwrap()
    }

    fn last_seen(&self) -> u64 {
        let flow = self.flows().iter().next().unwrap().unwrap();
        flow.1.last_seen
    }

    /// Has the flow be as old as it would be after this time without a packet.
    fn age(&self, nanoseconds: u64) {
        // A machine that has only just started has no past that is long enough.
        while now() < nanoseconds {
            thread::sleep(MOMENT);
        }
        let mut flows = self.flows();
        let (key, mut entry) = flows.iter().next().unwrap().unwrap();
        entry.last_seen = now() - nanoseconds;
        flows.insert(key, entry, 0).unwrap();
    }
}

fn hears(socket: &UdpSocket, send: impl FnOnce()) -> bool {
    send();
    socket.recv(&mut [0]).is_ok()
}

#[test]
fn a_flow_that_has_been_silent_for_long_is_judged_anew() {
    let mut asking = Asking::new();
    asking.ask();
    asking.age(FLOW_IDLE_NANOSECONDS - 60 * SECOND);
    assert!(asking.hears());
    asking.age(FLOW_IDLE_NANOSECONDS + SECOND);
    assert!(!asking.hears());
    let world = &mut asking.world;
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    // Whoever may ask may ask again.
    asking.ask();
    assert!(asking.hears());
}

#[test]
fn a_question_and_its_answers_keep_a_flow_alive() {
    let mut asking = Asking::new();
    asking.ask();
    let age = 60 * SECOND;
    for _ in 0..6 {
        asking.age(age);
        assert!(asking.hears(), "an answer, though nothing was asked since");
        assert!(asking.last_seen() > now() - age / 2);
    }
    asking.age(age);
    asking.ask();
    assert!(asking.last_seen() > now() - age / 2, "a question");
    // For no longer than a policy allows the question.
    asking.world.state.tables.verdicts.clear();
    asking.world.apply();
    assert!(!asking.hears());
}

#[test]
fn a_server_goes_on_answering_who_has_asked_once() {
    let mut asking = Asking::new();
    asking
        .world
        .allow(Direction::Ingress, Scope::Port(UDP, 1000));
    asking.world.apply();
    // A port that the workload may not ask.
    let (own, far) = (asking.world.here.port4(1000), asking.world.there.port4(54));
    let (here, there) = (&asking.here, asking.world.as_far_end(|| udp(far)));
    asking
        .world
        .as_far_end(|| there.send_to(b"x", own))
        .unwrap();
    here.recv(&mut [0]).unwrap();
    for _ in 0..6 {
        asking.age(60 * SECOND);
        asking
            .world
            .as_workload(|| here.send_to(b"y", far))
            .unwrap();
        there.recv(&mut [0]).unwrap();
        assert!(asking.last_seen() > now() - 30 * SECOND);
    }
    asking.world.state.tables.verdicts.clear();
    asking.world.apply();
    assert_refused(asking.world.as_workload(|| here.send_to(b"y", far)));
}

#[test]
fn answers_keep_no_flow_alive_for_another_socket_than_the_one_that_asked() {
    let mut asking = Asking::new();
    asking.ask();
    asking.ends_and_begins_again();
    let age = 60 * SECOND;
    asking.age(age);
    assert!(asking.hears());
    assert!(asking.last_seen() < now() - age / 2);
    asking.age(FLOW_IDLE_NANOSECONDS + SECOND);
    assert!(!asking.hears());
    // Once it asks, it is answered as well, though the flow has been seen a moment ago.
    asking.ask();
    asking.ends_and_begins_again();
    asking.ask();
    asking.age(age);
    assert!(asking.hears());
    assert!(asking.last_seen() > now() - age / 2);
}

#[test]
fn an_answer_is_let_in_whatever_else_has_changed() {
    let mut asking = Asking::new();
    asking.ask();
    for port in [54, 55] {
        let world = &mut asking.world;
        world.allow(Direction::Egress, Scope::Port(UDP, port));
        world.apply();
        assert!(asking.hears());
    }
    asking.world.state.tables.verdicts.clear();
    asking.world.apply();
    assert!(!asking.hears());
}

#[test]
fn an_answer_is_for_who_asked_by_what_he_asked_and_from_whom() {
    let mut asking = Asking::new();
    asking.ask();
    let world = &mut asking.world;
    // Another port of the workload's.
    let other = world.as_workload(|| udp(world.here.port4(1001)));
    let to = world.here.port4(1001);
    let there = &asking.there;
    let heard = hears(&other, || {
        world.as_far_end(|| there.send_to(b"y", to)).unwrap();
    });
    assert!(!heard, "another port");
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);

    // Another address of the same class, from the same port.
    world.there.ip(&["addr add 10.0.0.3/24 dev wire".into()]);
    let third = world.as_far_end(|| udp("10.0.0.3:53".parse().unwrap()));
    let to = world.here.port4(1000);
    let heard = hears(&asking.here, || {
        world.as_far_end(|| third.send_to(b"y", to)).unwrap();
    });
    assert!(!heard, "another address");
    world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);

    // Another protocol, between the same ports.
    let light = |at: SocketAddr| {
        let socket = udp_lite(Domain::IPV4)?;
        socket.bind(&at.into()).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        Some(UdpSocket::from(socket))
    };
    let (own, far) = (world.here.port4(1000), world.there.port4(53));
    let here = world.as_workload(|| light(own));
    let there = world.as_far_end(|| light(far));
    if let (Some(here), Some(there)) = (here, there) {
        let heard = hears(&here, || {
            world.as_far_end(|| there.send_to(b"y", own)).unwrap();
        });
        assert!(!heard, "another protocol");
        world.verdict_event(Hook::PacketIngress, false, Reason::NoPolicy);
    }
    assert!(asking.hears());
}

#[test]
fn a_workload_that_shares_an_address_does_not_share_flows() {
    let mut world = World::new();
    let both = [(&world.workload, WORKLOAD), (&world.stranger, WORKLOAD + 1)];
    let both = both.map(|(cgroup, workload)| (cgroup.id(), cgroup.depth(), workload));
    for (cgroup, depth, workload) in both {
        world.add_workload(cgroup, depth, workload);
    }
    let shared = (world.here.netns.cookie, NamespaceEntry::default());
    world.state.namespaces.push(shared);
    world.peer(0);
    world.verdict(
        Direction::Egress,
        CLASS,
        Scope::Port(UDP, 53),
        Action::Allow,
    );
    world.apply();
    let (own, to) = (world.here.port4(1000), world.there.port4(53));
    world.as_workload(|| udp(own).send_to(b"x", to)).unwrap();
    // The same ports and the same far end, in the same generation.
    let sent = world
        .here
        .run(&world.stranger, || udp(own).send_to(b"x", to));
    assert_refused(sent);
    let event = world.event("the other is refused", |event| event.allowed == 0);
    assert_eq!(event.workload, WORKLOAD + 1);
}

/// More than a share has room for, many times over.
const FLOOD: std::ops::Range<u16> = 20_000..21_000;

#[test]
fn a_workload_that_floods_the_map_evicts_no_flow_of_another() {
    let mut asking = Asking::in_little_room();
    let other = WORKLOAD + 1;
    let world = &mut asking.world;
    // Both in one namespace, so that nothing but the workload tells their flows apart.
    let flooding = world.stranger.child("flooding");
    world.add_workload(flooding.id(), flooding.depth(), other);
    for entry in &mut world.state.namespaces {
        entry.1 = NamespaceEntry::default();
    }
    world.state.local_addresses.clear();
    for index in 0..world.state.tables.verdicts.len() {
        let (bits, mut key, entry) = world.state.tables.verdicts[index];
        key.workload = other;
        world.state.tables.verdicts.push((bits, key, entry));
    }
    world.apply();
    asking.ask();
    let world = &asking.world;
    let to = world.there.port4(53);
    world.here.run(&flooding, || {
        for port in FLOOD {
            let socket = UdpSocket::bind(world.here.port4(port)).unwrap();
            socket.send_to(b"x", to).unwrap();
        }
    });
    assert!(asking.hears(), "the flow is still there");
    let flows: Vec<_> = asking.flows().iter().map(Result::unwrap).collect();
    let of = |workload| {
        flows
            .iter()
            .filter(|(slot, _)| slot.workload == workload)
            .count()
    };
    assert_eq!(of(WORKLOAD), 1);
    assert_eq!(of(other), 8, "its share for what it opens");
}

#[test]
fn clients_of_an_open_port_evict_no_question_of_its_workload() {
    let mut asking = Asking::in_little_room();
    asking
        .world
        .allow(Direction::Ingress, Scope::Port(UDP, 5454));
    asking.world.apply();
    let open = asking.world.here.port4(5454);
    let server = asking.world.as_workload(|| udp(open));
    asking.ask();
    for port in FLOOD {
        asking.world.as_far_end(|| {
            let client = udp(asking.world.there.port4(port));
            client.send_to(b"x", open).unwrap();
        });
        server.recv(&mut [0]).unwrap();
    }
    assert!(asking.hears(), "the question is still there");
    // The newest of them is answered, however many there were.
    let newest = asking.world.there.port4(FLOOD.end);
    let client = asking.world.as_far_end(|| {
        let client = udp(newest);
        client.send_to(b"x", open).unwrap();
        client
    });
    server.recv(&mut [0]).unwrap();
    asking
        .world
        .as_workload(|| server.send_to(b"y", newest))
        .unwrap();
    client.recv(&mut [0]).unwrap();
}

#[test]
fn idle_flows_give_their_slots_back() {
    let asking = Asking::new();
    let forget = || asking.world.datapath().forget_idle_flows(now()).unwrap();
    asking.ask();
    assert_eq!(forget(), 0);
    asking.age(FLOW_IDLE_NANOSECONDS + SECOND);
    assert_eq!(forget(), 1);
    assert_eq!(asking.flows().iter().count(), 0);
    asking.ask();
    assert!(asking.hears());
}

#[test]
fn a_restarted_daemon_finds_the_flows_of_the_previous_one() {
    let mut asking = Asking::new();
    asking.ask();
    asking.world.stop();
    asking.world.start().unwrap();
    assert!(asking.hears());
}
