//! For any policies and any connection, three say the same: a naive reading of the documents, the
//! snapshot, and the kernel's tables.

mod model;
mod naive;
mod programs;

use std::{cell::RefCell, collections::BTreeMap, net::IpAddr, path::Path, sync::Arc};

use proptest::{prelude::*, test_runner::TestError};
use reeve_common::Direction;

use self::model::{Draw, Model};
use super::{
    kernel::{self, Question},
    world::netns,
};
use crate::{
    identity::SpiffeId,
    policy::{Decision, Inputs, PolicySet, Snapshot, Unselected},
    workload::{
        CgroupSelector, NamedPort, NamedPorts, Namespaces, Peer, RunningWorkload, Workload,
    },
};

/// Where somebody or nobody is.
const ADDRESSES: [&str; 12] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "10.0.1.1",
    "10.9.0.0",
    "11.0.0.0",
    "0.0.0.0",
    "255.255.255.255",
    "2001:db8::1",
    "2001:db8::2",
    "2001:db9::",
    "::1",
];
const PORTS: [u16; 9] = [1, 79, 80, 81, 8000, 8050, 8100, 8101, 65535];
/// TCP, UDP, both ICMPs, SCTP, and GRE as one without rules of its own.
const PROTOCOLS: [u8; 6] = [6, 17, 1, 58, 132, 47];
const CLIENTS: [&str; 6] = [
    "spiffe://example.org/ns/a/sa/x",
    "spiffe://example.org/ns/a/sa/y",
    "spiffe://example.org/ns/b/sa/x",
    "spiffe://example.org/ns/ab/sa/x",
    "spiffe://example.org/else",
    "spiffe://other.org/ns/a/sa/x",
];

fn compile(model: &Model) -> Snapshot {
    let workloads: Vec<_> = model
        .places
        .iter()
        .filter(|place| place.local)
        .map(|place| {
            Arc::new(RunningWorkload {
                link_local: Vec::new(),
                workload: Arc::new(Workload {
                    id: place.number,
                    name: place.name.clone(),
                    attributes: place.who.clone().unwrap(),
                    selector: CgroupSelector::Cgroup(format!("/{}", place.name)),
                    ports: place.ports.clone(),
                    addresses: Vec::new(),
                    certificates: None,
                    named_ports: named_ports(place),
                    permissive: place.permissive,
                }),
                cgroups: Vec::new(),
                netns: Some(netns(1)),
                owns_netns: place.exclusive,
                addresses: place.addresses.iter().map(|net| net.addr()).collect(),
            })
        })
        .collect();
    let peers: Vec<_> = model
        .places
        .iter()
        .filter(|place| !place.local)
        .map(|place| {
            Arc::new(Peer {
                id: place.number,
                name: place.name.clone(),
                addresses: place.addresses.clone(),
                ports: place.ports.clone(),
                attributes: place.who.clone(),
                tunnel_port: None,
                named_ports: named_ports(place),
            })
        })
        .collect();
    let owned = |labels: &BTreeMap<&str, &str>| {
        let labels = labels.iter();
        labels
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    let namespaces = model.namespaces.iter();
    let namespaces = namespaces.map(|(name, labels)| ((*name).to_owned(), owned(labels)));
    let namespaces = Namespaces(namespaces.collect());
    let text = model.documents();
    let policies = PolicySet::parse_alone(Path::new("p.yaml"), &text)
        .unwrap_or_else(|mistakes| panic!("{mistakes}\n{text}"));
    Snapshot::compile(&Inputs {
        workloads: &workloads,
        peers: &peers,
        namespaces: &namespaces,
        policies: &policies,
        unselected: if model.open {
            Unselected::Allow
        } else {
            Unselected::Deny
        },
        node_addresses: &model.node,
        tunnel_port: 15008,
    })
}

fn named_ports(place: &model::Place) -> NamedPorts {
    let named = place.named.iter();
    named
        .map(|(name, (protocol, port))| {
            let (protocol, port) = (*protocol, *port);
            ((*name).to_owned(), NamedPort { protocol, port })
        })
        .collect()
}

/// Compares what the naive reading allows with a decision: the action, and that the rule which is
/// named is one of those that say so.
fn compare(snapshot: &Snapshot, naive: &naive::Verdict, decision: Decision, what: &str) {
    assert_eq!(naive.action, decision.action, "{what}: {naive:?}");
    assert_eq!(naive.dry_run, decision.dry_run, "{what}: {naive:?}");
    assert_eq!(
        naive.rules.is_empty(),
        decision.rule == 0,
        "{what}: {naive:?}"
    );
    if decision.rule != 0 {
        let name = snapshot.rule_name(decision.rule);
        assert!(
            naive.rules.iter().any(|rule| rule == name),
            "{what}: {name} {naive:?}"
        );
    }
}

fn ask_everything(model: &Model) {
    let snapshot = compile(model);
    let tables = snapshot.kernel_tables();
    kernel::check(tables);
    let addresses: Vec<IpAddr> = ADDRESSES.iter().map(|a| a.parse().unwrap()).collect();
    for place in model.places.iter().filter(|place| place.local) {
        let workload = place.number;
        for (remote, protocol, port) in addresses.iter().flat_map(|remote| {
            let protocols = PROTOCOLS.iter();
            protocols
                .flat_map(move |protocol| PORTS.iter().map(move |port| (*remote, *protocol, *port)))
        }) {
            let what = format!("{} {remote} {protocol}/{port}", place.name);
            let kernel = |direction| {
                let question = Question {
                    workload,
                    direction,
                    remote,
                    protocol,
                    port,
                };
                kernel::judge(tables, question)
            };

            let naive = naive::egress(model, place, remote, protocol, port);
            let decision = snapshot.judge_egress(workload, (remote, port).into(), protocol);
            compare(&snapshot, &naive, decision, &format!("{what} egress"));
            let told = kernel(Direction::Egress);
            assert_eq!(told, kernel::entry(decision), "{what} egress");

            let naive = naive::plaintext(model, place, remote, protocol, port);
            let decision = snapshot.judge_plaintext(workload, remote, protocol, port);
            compare(&snapshot, &naive, decision, &format!("{what} plaintext"));
            let told = kernel(Direction::Ingress);
            assert_eq!(told, kernel::entry(decision), "{what} ingress");
        }
        for (source, client) in addresses
            .iter()
            .flat_map(|a| CLIENTS.map(|client| (*a, client)))
        {
            for port in PORTS {
                let id = SpiffeId::parse(client).unwrap();
                let naive = naive::tunnel(model, place, &id, source, port);
                let decision = snapshot.judge_ingress(workload, &id, source, 6, port);
                let what = format!("{} {client} {source} {port} tunnel", place.name);
                compare(&snapshot, &naive, decision, &what);
            }
        }
    }
}

/// The same questions to the programs themselves.
fn ask_programs(model: &Model, programs: &mut programs::Programs) {
    let snapshot = compile(model);
    let addresses: Vec<IpAddr> = ADDRESSES.iter().map(|a| a.parse().unwrap()).collect();
    for place in model.places.iter().filter(|place| place.local) {
        let workload = place.number;
        programs.enforce(&snapshot, workload);
        for (remote, protocol) in addresses
            .iter()
            .flat_map(|remote| PROTOCOLS.map(|protocol| (*remote, protocol)))
        {
            for direction in [Direction::Egress, Direction::Ingress] {
                for port in PORTS {
                    let question = Question {
                        workload,
                        direction,
                        remote,
                        protocol,
                        port,
                    };
                    programs.ask(&snapshot, question);
                }
            }
        }
    }
}

/// Runs a check on random models, and shows the least that fails.
fn check(cases: u32, check: impl Fn(&Model)) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases,
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    // Every byte is a choice, and no byte is the first one: what is left of a failure is short.
    let choices = prop::collection::vec(any::<u8>(), 0..600);
    let result = runner.run(&choices, |choices| {
        check(&Model::draw(&mut Draw::new(choices)));
        Ok(())
    });
    if let Err(TestError::Fail(reason, choices)) = result {
        let model = Model::draw(&mut Draw::new(choices));
        panic!("{reason}\n{model:#?}\n{}", model.documents());
    }
}

#[test]
fn documents_snapshot_and_kernel_agree() {
    check(400, ask_everything);
}

#[test]
fn the_programs_in_the_kernel_agree_with_the_snapshot() {
    let programs = RefCell::new(programs::Programs::load());
    check(40, |model| {
        // What the check before has left behind if it failed is of no matter.
        ask_programs(model, &mut programs.borrow_mut());
    });
}
