//! Who is where and who may talk: one immutable value, swapped as a whole.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use reeve_common::{
    Action, Address, Direction, DryRun, PeerEntry, PeerPortKey, Reason, VerdictEntry, VerdictKey,
    WorkloadId, protocol,
};

use super::{
    Head, PolicySet,
    compile::{Rules, compile},
    far_ends::{FarEnd, FarEnds, common},
    identities::Identities,
    named_ports::as_written,
    narrowed::of_list,
    rule::{Mode, Rule, Unselected, judged_protocol},
    sets::{SelectorId, SetId, Sets},
    verdicts::{Answer, Proof, RuleIndex, RuleList, Told},
};
use crate::{
    identity::SpiffeId,
    workload::{Namespaces, Peer, RunningWorkload},
};

/// What the policy says of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The rule that said so, see [`Snapshot::rule_name`]; 0 is the default deny.
    pub rule: u32,
    /// What the policies in dry run would change.
    pub dry_run: DryRun,
    /// The rule that would say so, where `dry_run` is not [`DryRun::Same`]; 0 is the default deny.
    pub dry_run_rule: u32,
}

/// Where a rule is written; shown as `file:line`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RulePlace<'a> {
    /// The file.
    pub file: &'a Path,
    /// The line, from 1.
    pub line: usize,
}

/// The verdicts of a [`Snapshot`] in the form of the kernel's maps.
///
/// The numbers of classes and rules are made of their contents, so an entry means the same in
/// every version of the tables. Maps can be changed entry by entry without a moment in which
/// somebody is let in by a mixture of two policies: first add to `VERDICTS`, then change `PEERS`
/// and `PEER_PORTS`, then remove from `VERDICTS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelTables {
    /// `PEERS`: prefix length (0 to 128), address, value.
    pub peers: Vec<(u32, Address, PeerEntry)>,
    /// `PEER_PORTS`.
    pub peer_ports: Vec<(PeerPortKey, PeerEntry)>,
    /// `VERDICTS`: prefix length (0 to 96), key, value.
    pub verdicts: Vec<(u32, VerdictKey, VerdictEntry)>,
}

/// What a [`Snapshot`] is compiled from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The workloads of this node, in the order of their declaration.
    pub workloads: &'a [Arc<RunningWorkload>],
    /// The configured peers.
    pub peers: &'a [Arc<Peer>],
    /// Labels of the namespaces.
    pub namespaces: &'a Namespaces,
    /// The policies.
    pub policies: &'a PolicySet,
    /// What a workload may do in a direction that no policy is about.
    pub unselected: Unselected,
    /// Addresses of the node, from which plaintext is let in to every workload.
    pub node_addresses: &'a [IpAddr],
    /// Port on which the tunnels of this node's workloads listen.
    pub tunnel_port: u16,
}

/// Everything that a verdict depends on, at one moment. The default knows nobody and denies all.
#[derive(Debug, Default)]
pub struct Snapshot {
    workloads: Vec<Arc<RunningWorkload>>,
    workload_places: HashMap<WorkloadId, usize>,
    by_namespace: HashMap<u64, Vec<usize>>,
    /// Addresses that workloads declare, by their identities.
    declared: HashMap<SpiffeId, HashSet<IpAddr>>,
    peers: HashMap<u32, Arc<Peer>>,
    peers_by_identity: HashMap<SpiffeId, Arc<Peer>>,
    /// Place of the rule with a number.
    rule_places: HashMap<u32, usize>,
    compiled: Compiled,
    tables: KernelTables,
    heads: Arc<Vec<Head>>,
}

/// The compiled policies.
#[derive(Debug, Default)]
pub(super) struct Compiled {
    pub(super) rules: Vec<Rule>,
    /// The number of each rule.
    pub(super) rule_numbers: Vec<u32>,
    pub(super) by_workload: HashMap<WorkloadId, Rules>,
    pub(super) sets: Sets,
    pub(super) far_ends: FarEnds,
    pub(super) identities: Identities,
    /// The selectors that match who each peer is.
    pub(super) peer_identities: HashMap<u32, SetId>,
    /// The selectors that match whoever they could match.
    pub(super) possible: Vec<bool>,
}

// === impl KernelTables ===

impl KernelTables {
    /// Whether both have the same classes at the same addresses and ports.
    #[must_use]
    pub fn tells_apart_as(&self, other: &Self) -> bool {
        self.peers == other.peers && self.peer_ports == other.peer_ports
    }
}

// === impl Decision ===

impl Decision {
    /// Whether the connection may go on as it is.
    #[must_use]
    pub fn allows(&self) -> bool {
        matches!(self.action, Action::Allow | Action::Permissive)
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// Compiles policies for those who are there now.
    #[must_use]
    pub fn compile(inputs: &Inputs<'_>) -> Self {
        Self {
            heads: Arc::clone(&inputs.policies.heads),
            ..compile(inputs)
        }
    }

    pub(super) fn new(
        workloads: &[Arc<RunningWorkload>],
        peers: Vec<Arc<Peer>>,
        compiled: Compiled,
        tables: KernelTables,
    ) -> Self {
        let mut by_namespace: HashMap<u64, Vec<usize>> = HashMap::new();
        for (place, running) in workloads.iter().enumerate() {
            if let Some(netns) = &running.netns {
                by_namespace.entry(netns.cookie).or_default().push(place);
            }
        }
        let mut declared: HashMap<SpiffeId, HashSet<IpAddr>> = HashMap::new();
        for workload in workloads.iter().map(|running| &running.workload) {
            if !workload.addresses.is_empty() {
                let id = workload.attributes.spiffe_id.clone();
                let addresses = workload.addresses.iter().map(IpAddr::to_canonical);
                declared.entry(id).or_default().extend(addresses);
            }
        }
        let mut peers_by_identity = HashMap::new();
        for peer in &peers {
            if let Some(attributes) = &peer.attributes {
                let id = attributes.spiffe_id.clone();
                peers_by_identity
                    .entry(id)
                    .or_insert_with(|| Arc::clone(peer));
            }
        }
        Self {
            workload_places: (0..)
                .zip(workloads)
                .map(|(place, running)| (running.workload.id, place))
                .collect(),
            workloads: workloads.to_vec(),
            by_namespace,
            declared,
            peers: peers.into_iter().map(|peer| (peer.id, peer)).collect(),
            peers_by_identity,
            rule_places: compiled.rule_numbers.iter().copied().zip(0..).collect(),
            compiled,
            tables,
            heads: Arc::default(),
        }
    }

    /// The same verdicts, for the kernel.
    #[must_use]
    pub fn kernel_tables(&self) -> &KernelTables {
        &self.tables
    }

    /// Every declared workload, in the order of declaration.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<RunningWorkload>> {
        self.workloads.iter()
    }

    /// The workload with this number, if it is declared.
    #[must_use]
    pub fn workload(&self, id: WorkloadId) -> Option<&Arc<RunningWorkload>> {
        self.workloads.get(*self.workload_places.get(&id)?)
    }

    fn in_namespace(&self, netns_cookie: u64) -> impl Iterator<Item = &Arc<RunningWorkload>> {
        let places = self.by_namespace.get(&netns_cookie).into_iter().flatten();
        places.filter_map(|place| self.workloads.get(*place))
    }

    /// The workload that `ip:port` belongs to in a namespace: the owner of the port, else the
    /// first declared there that has the address and does not say which ports it owns.
    ///
    /// The one workload of a namespace has all its ports, whatever it says.
    #[must_use]
    pub fn workload_at(
        &self,
        netns_cookie: u64,
        ip: IpAddr,
        port: u16,
    ) -> Option<&Arc<RunningWorkload>> {
        let ip = ip.to_canonical();
        let here = || {
            self.in_namespace(netns_cookie)
                .filter(move |running| running.addresses.contains(&ip))
        };
        let owner = here().find(|running| running.workload.ports.contains(&port));
        owner.or_else(|| {
            here().find(|running| running.owns_netns || running.workload.ports.is_empty())
        })
    }

    /// The local workload with this SPIFFE ID in a namespace.
    #[must_use]
    pub fn workload_with_id(
        &self,
        netns_cookie: u64,
        id: &SpiffeId,
    ) -> Option<&Arc<RunningWorkload>> {
        self.in_namespace(netns_cookie)
            .find(|running| running.workload.attributes.spiffe_id == *id)
    }

    /// The workload that is alone in a namespace of its own.
    #[must_use]
    pub fn owner_of(&self, netns_cookie: u64) -> Option<&Arc<RunningWorkload>> {
        self.in_namespace(netns_cookie)
            .find(|running| running.owns_netns)
    }

    /// Whether a workload of this node with this SPIFFE ID declares an address.
    #[must_use]
    pub fn is_declared(&self, id: &SpiffeId, ip: IpAddr) -> bool {
        let declared = self.declared.get(id);
        declared.is_some_and(|declared| declared.contains(&ip.to_canonical()))
    }

    /// The peer with this number. Local workloads are peers of each other.
    #[must_use]
    pub fn peer(&self, id: u32) -> Option<&Arc<Peer>> {
        self.peers.get(&id)
    }

    /// A peer with this SPIFFE ID, for its name: the first declared where several have it.
    #[must_use]
    pub fn peer_with_id(&self, id: &SpiffeId) -> Option<&Arc<Peer>> {
        self.peers_by_identity.get(id)
    }

    /// Who is at a destination, as the kernel sees it: the peer's number, 0 for nobody known, and
    /// whether a tunnel reaches it.
    #[must_use]
    pub fn destination(&self, destination: SocketAddr, protocol: u8) -> (u32, bool) {
        let far_end = self.compiled.far_ends.at(destination.ip());
        far_end.map_or((0, false), |far_end| {
            let occupant = far_end.destination(protocol, destination.port());
            (occupant.peer, occupant.tunnel)
        })
    }

    /// Judges a connection that a local workload opens, by address, as the kernel does.
    #[must_use]
    pub fn judge_egress(
        &self,
        workload: WorkloadId,
        destination: SocketAddr,
        protocol: u8,
    ) -> Decision {
        let (protocol, port) = judged(protocol, destination.port());
        let far_end = self.compiled.far_ends.at(destination.ip());
        let set = far_end.map_or(SetId::EMPTY, |far_end| {
            far_end.destination(protocol, port).egress
        });
        self.decide(
            self.rules(workload).map(|rules| &rules.egress),
            self.compiled.sets.get(set),
            (protocol, port),
            Proof::None,
        )
    }

    /// Judges a connection that came through a tunnel, by the authenticated identity of the
    /// client and the address that the tunnel came from.
    ///
    /// Labels, and a namespace other than the ID's own, are those of the peer that is declared
    /// with this ID at this address.
    #[must_use]
    pub fn judge_ingress(
        &self,
        workload: WorkloadId,
        client: &SpiffeId,
        source: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Decision {
        let far_end = self.compiled.far_ends.at(source);
        let blocks = far_end.map_or(SetId::EMPTY, |far_end| far_end.blocks);
        let mut selectors = self.declared(client, far_end).unwrap_or_else(|| {
            let own = self.workload(workload);
            let own = own.map(|running| running.workload.attributes.spiffe_id.trust_domain());
            own.map_or_else(Vec::new, |domain| {
                self.compiled.identities.matching(client, domain)
            })
        });
        selectors.extend(self.compiled.sets.get(blocks));
        self.decide(
            self.rules(workload).map(|rules| &rules.ingress),
            &selectors,
            judged(protocol, port),
            Proof::Certificate,
        )
    }

    /// Judges what arrives at a local workload without a tunnel, by address, as the kernel does.
    #[must_use]
    pub fn judge_plaintext(
        &self,
        workload: WorkloadId,
        source: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Decision {
        let far_end = self.compiled.far_ends.at(source);
        let set = far_end.map_or(SetId::EMPTY, |far_end| far_end.rest.ingress);
        self.decide(
            self.rules(workload).map(|rules| &rules.ingress),
            self.compiled.sets.get(set),
            judged(protocol, port),
            Proof::None,
        )
    }

    /// `policy/rule` of a rule's number, for people.
    #[must_use]
    pub fn rule_name(&self, rule: u32) -> &str {
        match self.rule(rule) {
            Some(rule) => &rule.origin.name,
            None if rule == 0 => "default deny",
            None => "unknown rule",
        }
    }

    /// File and line of a rule's number, for people; none for the default deny and for rules that
    /// no policy holds.
    #[must_use]
    pub fn rule_place(&self, rule: u32) -> Option<RulePlace<'_>> {
        self.rule(rule)?.origin.place()
    }

    /// The policies, in the order in which they are written.
    #[must_use]
    pub fn policies(&self) -> &[Head] {
        &self.heads
    }

    /// The rules of all policies, in the order in which they are written, and what is implied. Ingress
    /// rules name their ports as they are written.
    pub(crate) fn rules_of_policies(&self) -> impl Iterator<Item = &Rule> {
        as_written(&self.compiled.rules)
    }

    /// Whether a policy is in dry run.
    #[must_use]
    pub fn has_dry_runs(&self) -> bool {
        let mut rules = self.compiled.rules.iter();
        rules.any(|rule| rule.mode != Mode::Enforce)
    }

    /// Labels of the namespaces.
    pub(super) fn namespaces(&self) -> &Namespaces {
        self.compiled.identities.namespaces()
    }

    /// Everybody who is known: local workloads first, in no further order.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }

    /// Whom a connection to this address and port is for, where somebody is known to be there.
    #[must_use]
    pub fn peer_at(&self, ip: IpAddr, protocol: u8, port: u16) -> Option<&Arc<Peer>> {
        let far_end = self.compiled.far_ends.at(ip)?;
        self.peer(far_end.destination(protocol, port).peer)
    }

    /// Every prefix that policies or peers name.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = ipnet::IpNet> {
        self.compiled.far_ends.iter().map(|(prefix, _)| *prefix)
    }

    /// Everybody who is known to be at an address.
    pub fn peers_at(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Peer>> {
        let far_end = self.compiled.far_ends.at(ip);
        let residents = far_end.map_or(&[][..], |far_end| &far_end.residents);
        residents.iter().filter_map(|peer| self.peer(*peer))
    }

    /// The rules of a workload and direction, without those in dry run.
    pub(super) fn rules_in_force(
        &self,
        workload: WorkloadId,
        direction: Direction,
    ) -> impl Iterator<Item = &Rule> {
        let rules = self.rules(workload);
        let list = rules.map(|rules| match direction {
            Direction::Egress => &rules.egress,
            Direction::Ingress => &rules.ingress,
        });
        list.into_iter()
            .flat_map(|list| of_list(list, &self.compiled.rules))
    }

    fn rule(&self, number: u32) -> Option<&Rule> {
        self.compiled.rules.get(*self.rule_places.get(&number)?)
    }

    fn rules(&self, workload: WorkloadId) -> Option<&Rules> {
        self.compiled.by_workload.get(&workload)
    }

    /// The selectors that match the peers that are declared with an ID where the client is.
    fn declared(&self, client: &SpiffeId, far_end: Option<&FarEnd>) -> Option<Vec<SelectorId>> {
        let has_id = |peer: &&u32| {
            let attributes = self
                .peers
                .get(peer)
                .and_then(|peer| peer.attributes.as_ref());
            attributes.is_some_and(|attributes| attributes.spiffe_id == *client)
        };
        let set = |peer: &u32| {
            let set = self.compiled.peer_identities.get(peer);
            set.copied().unwrap_or(SetId::EMPTY)
        };
        let peers: Vec<_> = far_end?.residents.iter().filter(has_id).map(set).collect();
        let Compiled { sets, possible, .. } = &self.compiled;
        (!peers.is_empty()).then(|| common(sets, &peers, possible))
    }

    fn decide(
        &self,
        list: Option<&Arc<RuleList>>,
        selectors: &[SelectorId],
        (protocol, port): (u8, u16),
        proof: Proof,
    ) -> Decision {
        let rules = &self.compiled.rules;
        let told = list.map(|list| list.decide(rules, selectors, protocol, port, proof));
        let Told {
            enforced,
            dry_run,
            dry_run_rule,
        } = told.unwrap_or_default();
        let number = |rule: RuleIndex| {
            let number = self.compiled.rule_numbers.get(rule as usize);
            number.copied().unwrap_or_default()
        };
        Decision {
            action: enforced.map_or(Action::Deny, Answer::action),
            reason: enforced.map_or(Reason::NoPolicy, Answer::reason),
            rule: enforced.map_or(0, |answer| number(answer.rule)),
            dry_run,
            dry_run_rule: dry_run_rule.map_or(0, number),
        }
    }
}

// === impl RulePlace ===

impl fmt::Display for RulePlace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// Protocol and port under which verdicts are asked: both ICMPs are one and have no ports.
pub(super) fn judged(protocol: u8, port: u16) -> (u8, u16) {
    match judged_protocol(protocol) {
        protocol::ICMP => (protocol::ICMP, 0),
        other => (other, port),
    }
}
