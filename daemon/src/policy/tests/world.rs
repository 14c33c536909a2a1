//! Workloads, peers and policies for tests, from a few words each.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use reeve_common::{Direction, DryRun, protocol};

use super::kernel::{self, Question};
use crate::{
    config::Config,
    datapath::netns::Netns,
    identity::SpiffeId,
    policy::{Decision, Inputs, Known, PolicySet, Snapshot},
    workload::RunningWorkload,
};

pub(super) const TCP: u8 = protocol::TCP;
pub(super) const UDP: u8 = protocol::UDP;

/// A node whose configuration and policies are given as they would be written. Workloads run in
/// namespaces of their own, with the addresses that they declare.
pub(super) struct World {
    pub(super) config: Config,
    pub(super) workloads: Vec<Arc<RunningWorkload>>,
    pub(super) snapshot: Snapshot,
}

/// A namespace with this cookie, which cannot be entered.
pub(super) fn netns(cookie: u64) -> Arc<Netns> {
    Arc::new(Netns {
        fd: File::open("/dev/null").unwrap().into(),
        cookie,
        inode: cookie,
    })
}

pub(super) fn config(text: &str) -> Config {
    Config::parse(Path::new("/reeve.yaml"), text).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

pub(super) fn running(config: &Config) -> Vec<Arc<RunningWorkload>> {
    let run = |workload: &Arc<crate::workload::Workload>| {
        Arc::new(RunningWorkload {
            link_local: Vec::new(),
            workload: Arc::clone(workload),
            cgroups: Vec::new(),
            netns: Some(netns(u64::from(workload.id))),
            owns_netns: true,
            addresses: workload.addresses.clone(),
        })
    };
    config.workloads.iter().map(run).collect()
}

pub(super) fn policies(config: &Config, text: &str) -> Result<PolicySet, Vec<String>> {
    let known = Known {
        workloads: &config.workloads,
        peers: &config.peers,
        namespaces: &config.namespaces,
    };
    PolicySet::parse(Path::new("policy.yaml"), text, &known)
        .map_err(|mistakes| mistakes.iter().map(ToString::to_string).collect())
}

/// A `ConnectionPolicy` with a specification in YAML's short form.
pub(super) fn connection_policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: reeve.dev/v1alpha1\nkind: ConnectionPolicy\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

// === impl World ===

impl World {
    pub(super) fn new(config_text: &str, policy_text: &str) -> Self {
        let config = config(config_text);
        let workloads = running(&config);
        Self::with(config, workloads, policy_text)
    }

    pub(super) fn with(
        config: Config,
        workloads: Vec<Arc<RunningWorkload>>,
        policy_text: &str,
    ) -> Self {
        let policies = policies(&config, policy_text).unwrap_or_else(|m| panic!("{m:#?}"));
        let snapshot = Snapshot::compile(&Inputs {
            workloads: &workloads,
            peers: &config.peers,
            namespaces: &config.namespaces,
            policies: &policies,
            unselected: config.unselected,
            node_addresses: &config.node.addresses,
            tunnel_port: config.ports.tunnel,
        });
        kernel::check(snapshot.kernel_tables());
        Self {
            config,
            workloads,
            snapshot,
        }
    }

    fn id(&self, workload: &str) -> u32 {
        let found = self.workloads.iter().find(|w| w.workload.name == workload);
        found.unwrap().workload.id
    }

    /// The name of the rule that allows, or `no`.
    fn told(&self, decision: Decision) -> &str {
        match decision.action {
            reeve_common::Action::Allow | reeve_common::Action::Permissive => {
                self.snapshot.rule_name(decision.rule)
            }
            reeve_common::Action::Deny | reeve_common::Action::NoRoom => "no",
            reeve_common::Action::TunnelOnly => "tunnel only",
        }
    }

    /// What the snapshot and the kernel say alike of a connection out of a workload.
    pub(super) fn egress(&self, workload: &str, protocol: u8, to: &str) -> &str {
        let to: SocketAddr = to.parse().unwrap();
        let decision = self.snapshot.judge_egress(self.id(workload), to, protocol);
        self.agree(workload, Direction::Egress, to, protocol, decision)
    }

    /// What the snapshot and the kernel say alike of plaintext from an address to a port of a
    /// workload.
    pub(super) fn plaintext(&self, workload: &str, protocol: u8, from: &str, port: u16) -> &str {
        let from: IpAddr = from.parse().unwrap();
        let id = self.id(workload);
        let decision = self.snapshot.judge_plaintext(id, from, protocol, port);
        self.agree(
            workload,
            Direction::Ingress,
            (from, port).into(),
            protocol,
            decision,
        )
    }

    fn agree(
        &self,
        workload: &str,
        direction: Direction,
        remote: SocketAddr,
        protocol: u8,
        decision: Decision,
    ) -> &str {
        let question = Question {
            workload: self.id(workload),
            direction,
            remote: remote.ip(),
            protocol,
            port: remote.port(),
        };
        let kernel = kernel::judge(self.snapshot.kernel_tables(), question);
        assert_eq!(kernel, kernel::entry(decision), "{question:?}");
        self.told(decision)
    }

    /// What the dry runs would change of a connection out of a workload: to what, and by which rule.
    pub(super) fn dry_egress(&self, workload: &str, protocol: u8, to: &str) -> (DryRun, &str) {
        let _agreed = self.egress(workload, protocol, to);
        let to = to.parse().unwrap();
        let decision = self.snapshot.judge_egress(self.id(workload), to, protocol);
        let rule = self.snapshot.rule_name(decision.dry_run_rule);
        (decision.dry_run, rule)
    }

    /// What the tunnel says of a client with a certificate.
    pub(super) fn tunnel(&self, workload: &str, client: &str, from: &str, port: u16) -> &str {
        let client = SpiffeId::parse(client).unwrap();
        let decision = self.snapshot.judge_ingress(
            self.id(workload),
            &client,
            from.parse().unwrap(),
            TCP,
            port,
        );
        self.told(decision)
    }
}

/// These, and no others, are found in `policy.yaml`: each on its line, with these words in it.
#[track_caller]
pub(super) fn are_the_mistakes(found: &[String], wanted: &[(u32, &str)]) {
    for (found, (line, what)) in found.iter().zip(wanted) {
        let place = format!("policy.yaml:{line}:");
        assert!(
            found.starts_with(&place) && found.contains(what),
            "{found}\n{line} {what}"
        );
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}
