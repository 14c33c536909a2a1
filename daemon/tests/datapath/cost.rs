//! What the programs cost those who are not enrolled. The figures are printed; the bounds are wide,
//! for a machine may be busy.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use crate::world::{WORKLOAD, World};

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
