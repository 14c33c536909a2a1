//! Policies that change while somebody connects: what both the old and the new one allow is never
//! refused, and what both refuse never passes.

use std::{
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use reeve::{
    config::Config,
    control::steps,
    datapath::Order,
    policy::{Inputs, Known, PolicySet, Snapshot},
    workload::RunningWorkload,
};

use crate::world::{WORKLOAD, World};

/// Changes of policy; each is several of the maps.
const CHANGES: usize = 400;

const NODE: &str = "
trustDomain: example.org
workloads: [{name: w, cgroup: /w, addresses: [10.0.0.1]}]
peers:
- {name: a, namespace: shop, addresses: [10.0.0.2], tunnel: false}
- {name: b, namespace: shop, addresses: [10.0.0.3], tunnel: false}
";

/// Policies of which each is about other far ends, by other rules, than the one before.
const POLICIES: [&str; 7] = [
    // The one is allowed by name; the other by nothing.
    "egress: [{to: [{cidr: 10.0.0.2}], ports: [{protocol: UDP}]}]",
    // Everybody is allowed; the other is denied by name.
    "egress: [{}]}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: deny}
spec: {action: Deny, workloads: {}, egress: [{to: [{cidr: 10.0.0.3}]}]",
    // Both by a name that they share; the other is denied by its address, on some ports.
    "egress: [{to: [{namespace: shop}]}]}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: deny}
spec: {action: Deny, workloads: {}, egress: [{to: [{cidr: 10.0.0.3}], ports: [{protocol: UDP, port: 8000, endPort: 8100}]}]",
    // Narrow for the one, and everybody on a port that is not asked for.
    "egress: [{to: [{cidr: 10.0.0.2/32}], ports: [{protocol: UDP, port: 8000, endPort: 8063}]}, {ports: [{protocol: UDP, port: 53}]}]",
    // As the first tells apart, on other ports: only verdicts change between the two.
    "egress: [{to: [{cidr: 10.0.0.2}], ports: [{protocol: UDP, port: 7000, endPort: 9000}]}, {ports: [{protocol: UDP, port: 53}]}]",
    // The same, the other way round: everybody but the other, and the one by what holds for all.
    "egress: [{to: [{cidr: 10.0.0.2}], ports: [{protocol: UDP, port: 53}]}, {ports: [{protocol: UDP, port: 8000, endPort: 8191}]}]}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: deny}
spec: {action: Deny, workloads: {}, egress: [{to: [{cidr: 10.0.0.3}], ports: [{protocol: UDP, port: 8000, endPort: 8015}]}]",
    // And once more: the one by its name alone, the other on no port.
    "egress: [{to: [{cidr: 10.0.0.2}]}, {ports: [{protocol: UDP, port: 53}]}]}
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: deny}
spec: {action: Deny, workloads: {}, egress: [{to: [{cidr: 10.0.0.3}]}]",
];

struct Compiler {
    config: Config,
    workloads: Vec<Arc<RunningWorkload>>,
}

impl Compiler {
    fn new() -> Self {
        let config = Config::parse(Path::new("reeve.yaml"), NODE).unwrap();
        let workload = Arc::clone(&config.workloads[0]);
        assert_eq!(workload.id, WORKLOAD);
        let running = RunningWorkload {
            link_local: Vec::new(),
            addresses: workload.addresses.clone(),
            workload,
            cgroups: Vec::new(),
            netns: None,
            owns_netns: true,
        };
        Self {
            config,
            workloads: vec![Arc::new(running)],
        }
    }

    fn read(&self, spec: &str) -> PolicySet {
        let text = format!(
            "apiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {{name: p}}\nspec: {{workloads: {{}}, {spec}}}\n"
        );
        let known = Known {
            workloads: &self.config.workloads,
            peers: &self.config.peers,
            namespaces: &self.config.namespaces,
        };
        PolicySet::parse(Path::new("p.yaml"), &text, &known).unwrap()
    }

    fn compile(&self, policies: &PolicySet) -> Snapshot {
        Snapshot::compile(&Inputs {
            workloads: &self.workloads,
            peers: &self.config.peers,
            namespaces: &self.config.namespaces,
            policies,
            unselected: self.config.unselected,
            node_addresses: &[],
            tunnel_port: self.config.ports.tunnel,
        })
    }
}

#[test]
fn what_two_policies_agree_on_holds_while_one_takes_the_place_of_the_other() {
    hold_while(|compiler, world, before, new| {
        let snapshot = compiler.compile(new);
        for (between, order) in steps((before, &compiler.compile(before)), (new, &snapshot)) {
            world.state.tables = compiler.compile(&between).kernel_tables().clone();
            world.datapath().apply_in(&world.state, order).unwrap();
        }
        world.state.tables = snapshot.kernel_tables().clone();
        let order = Order::Shrinks;
        world.datapath().apply_in(&world.state, order).unwrap();
    });
}

#[test]
fn it_holds_as_well_where_nobody_knows_which_policy_was_there_before() {
    hold_while(|compiler, world, _, new| {
        world.state.tables = compiler.compile(new).kernel_tables().clone();
        let order = Order::Replaces;
        world.datapath().apply_in(&world.state, order).unwrap();
    });
}

/// Asks for what all policies allow, and for what they all refuse, while they follow each other.
fn hold_while(change: impl Fn(&Compiler, &mut World, &PolicySet, &PolicySet)) {
    let mut world = World::enrolled();
    let compiler = Compiler::new();
    let policies = POLICIES.map(|spec| compiler.read(spec));
    let (allowed, denied): (SocketAddr, SocketAddr) =
        (([10, 0, 0, 2], 8004).into(), ([10, 0, 0, 3], 8004).into());
    world.state.tables = compiler.compile(&policies[0]).kernel_tables().clone();
    world.apply();

    let done = AtomicBool::new(false);
    let asked = AtomicU64::new(0);
    let (here, workload) = (world.here.clone(), world.workload.path().to_owned());
    thread::scope(|scope| {
        let hammers = [allowed, denied, allowed].map(|to| {
            let (here, workload, done, asked) = (&here, &workload, &done, &asked);
            scope.spawn(move || {
                here.run_in(workload, || {
                    while !done.load(Ordering::Relaxed) {
                        // From another port each time: what is remembered is not asked for.
                        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                        let passed = socket.send_to(b"x", to).is_ok();
                        assert_eq!(passed, to == allowed, "{to} of {asked:?}");
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                });
            })
        });
        let mut current = 0;
        for number in 0..CHANGES {
            // Each of them after each of the others.
            let next = (current + 1 + number % (policies.len() - 1)) % policies.len();
            let (before, new) = (&policies[current], &policies[next]);
            current = next;
            change(&compiler, &mut world, before, new);
            if hammers.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    let asked = asked.into_inner();
    println!("{asked} connections in {CHANGES} changes");
    assert!(asked > 10_000, "{asked}");
}
