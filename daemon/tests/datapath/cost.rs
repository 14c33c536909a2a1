//! What the programs cost those who are not enrolled. The figures are printed; the bounds are wide,
//! for a machine may be busy.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use aya::{
    maps::MapData,
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use reeve_common::{Direction, protocol};

use crate::world::{PATIENCE, Scope, WORKLOAD, World};

const ROUNDS: u32 = 20_000;
const REPETITIONS: usize = 7;

/// The quickest of several runs: what is slower is somebody else's doing.
fn each(mut work: impl FnMut()) -> Duration {
    (0..REPETITIONS)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed() / ROUNDS
        })
        .min()
        .unwrap()
}

fn connects(world: &World) -> Duration {
    let to = world.there.port4(9);
    world.here.run(&world.stranger, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        each(|| (0..ROUNDS).for_each(|_| socket.connect(to).unwrap()))
    })
}

/// A byte there and back: four packets and more.
fn exchanges(world: &World) -> Duration {
    world.here.run(&world.stranger, || {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        each(|| {
            for _ in 0..ROUNDS {
                client.write_all(b"x").unwrap();
                accepted.read_exact(&mut [0]).unwrap();
                accepted.write_all(b"x").unwrap();
                client.read_exact(&mut [0]).unwrap();
            }
        })
    })
}

#[test]
fn who_is_not_enrolled_hardly_notices() {
    let mut world = World::new();
    let before = (connects(&world), exchanges(&world));
    // Somebody is: at three depths, in a namespace that he shares.
    let inner = world.workload.child("inner");
    let innermost = inner.child("innermost");
    for (number, cgroup) in [&world.workload, &inner, &innermost]
        .into_iter()
        .enumerate()
    {
        let entry = (cgroup.id(), cgroup.depth());
        let workload = WORKLOAD + u32::try_from(number).unwrap();
        world.state.workloads.push((
            entry.0,
            entry.1,
            reeve_common::WorkloadEntry { workload, flags: 0 },
        ));
    }
    world.apply();
    let after = (connects(&world), exchanges(&world));
    println!(
        "connect(): {:?} unloaded, {:?} with workloads",
        before.0, after.0
    );
    println!(
        "exchange: {:?} unloaded, {:?} with workloads",
        before.1, after.1
    );
    assert!(after.0 < before.0 + Duration::from_micros(5));
    assert!(after.1 < before.1 + Duration::from_micros(20));
    drop(innermost);
    drop(inner);
}

/// What the kernel says of the programs of one datapath, by name: nanoseconds, runs, and
/// instructions that the verifier looked at.
fn programs(world: &World) -> BTreeMap<String, (Duration, u64, u32)> {
    let map = MapData::from_pin(world.settings.pins.join("SETTINGS")).unwrap();
    let map = map.info().unwrap().id();
    let of_world = loaded_programs().filter_map(Result::ok).filter(|program| {
        let maps = program.map_ids().ok().flatten();
        maps.is_some_and(|maps| maps.contains(&map))
    });
    of_world
        .map(|program| {
            let name = program.name_as_str().unwrap().to_owned();
            let verified = program.verified_instruction_count().unwrap_or_default();
            (name, (program.run_time(), program.run_count(), verified))
        })
        .collect()
}

/// Does something, and prints what each program took for it.
fn programs_of(world: &World, what: &str, number: u32, work: impl FnOnce()) {
    let before = programs(world);
    work();
    let mut all = Duration::ZERO;
    for (name, (time, runs, _)) in programs(world) {
        let (time_before, runs_before, _) = before.get(&name).copied().unwrap_or_default();
        let (time, runs) = (time - time_before, runs - runs_before);
        if runs > 0 {
            all += time;
            let each = time.as_nanos() / u128::from(runs);
            println!("{what}: {name}: {each} ns a run, {runs} runs");
        }
    }
    println!(
        "{what}: all: {} ns each",
        all.as_nanos() / u128::from(number)
    );
}

/// Prints figures for docs/performance.md, on request.
#[test]
#[ignore = "measures: run it alone, by name and with --nocapture"]
fn what_a_packet_and_a_connection_cost() {
    let mut world = World::enrolled();
    world.peer(0);
    for direction in [Direction::Egress, Direction::Ingress] {
        world.allow(direction, Scope::Protocol(protocol::TCP));
        world.allow(direction, Scope::Protocol(protocol::UDP));
    }
    world.apply();
    world
        .datapath()
        .attach_namespace(&world.here.netns)
        .unwrap();
    let _stats = enable_stats(Stats::RunTime).unwrap();
    for (name, (_, _, verified)) in programs(&world) {
        println!("verified: {name}: {verified} instructions");
    }
    for inet6 in [false, true] {
        let family = if inet6 { "IPv6" } else { "IPv4" };
        let at = |place: &crate::place::Place, port| {
            if inet6 {
                place.port6(port)
            } else {
                place.port4(port)
            }
        };
        let (here, there) = (at(&world.here, 7), at(&world.there, 7));
        let listener = world.as_far_end(|| TcpListener::bind(there).unwrap());
        let mut client = world.as_workload(|| TcpStream::connect(there).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        programs_of(&world, &format!("{family} TCP exchange"), ROUNDS, || {
            for _ in 0..ROUNDS {
                client.write_all(b"x").unwrap();
                server.read_exact(&mut [0]).unwrap();
                server.write_all(b"x").unwrap();
                client.read_exact(&mut [0]).unwrap();
            }
        });
        let of_workload = world.as_workload(|| TcpListener::bind(here).unwrap());
        let number = ROUNDS / 10;
        // Who accepts is who serves: the other end is in another thread, and another place.
        let serve = |listener: &TcpListener| {
            for _ in 0..number {
                let (mut server, _) = listener.accept().unwrap();
                assert_eq!(server.read(&mut [0]).unwrap(), 0);
            }
        };
        let open = |to| (0..number).for_each(|_| drop(TcpStream::connect(to).unwrap()));
        programs_of(
            &world,
            &format!("{family} TCP connection opened"),
            number,
            || {
                thread::scope(|scope| {
                    scope.spawn(|| world.as_far_end(|| serve(&listener)));
                    world.as_workload(|| open(there));
                });
            },
        );
        programs_of(
            &world,
            &format!("{family} TCP connection accepted"),
            number,
            || {
                thread::scope(|scope| {
                    scope.spawn(|| world.as_workload(|| serve(&of_workload)));
                    world.as_far_end(|| open(here));
                });
            },
        );
        let server = world.as_far_end(|| UdpSocket::bind(there).unwrap());
        let echo = |number: u32| {
            for _ in 0..number {
                let (_, from) = server.recv_from(&mut [0]).unwrap();
                server.send_to(b"x", from).unwrap();
            }
        };
        let ask = |client: &UdpSocket| {
            client.send(b"x").unwrap();
            client.recv(&mut [0]).unwrap();
        };
        let client = |local: &str| {
            let socket = UdpSocket::bind(local).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect(there).unwrap();
            socket
        };
        let unspecified = if inet6 { "[::]:0" } else { "0.0.0.0:0" };
        programs_of(
            &world,
            &format!("{family} UDP question and answer"),
            ROUNDS,
            || {
                thread::scope(|scope| {
                    scope.spawn(|| world.as_far_end(|| echo(ROUNDS)));
                    world.as_workload(|| {
                        let client = client(unspecified);
                        (0..ROUNDS).for_each(|_| ask(&client));
                    });
                });
            },
        );
        programs_of(
            &world,
            &format!("{family} UDP socket with a question and answer"),
            number,
            || {
                thread::scope(|scope| {
                    scope.spawn(|| world.as_far_end(|| echo(number)));
                    world.as_workload(|| (0..number).for_each(|_| ask(&client(unspecified))));
                });
            },
        );
    }
}
