//! What becomes of a connection, in both halves, and why.

use std::net::IpAddr;

use ipnet::IpNet;
use reeve_common::{Action, Direction, DryRun, Reason, WorkloadId, protocol};
use serde::{Deserialize, Serialize};

use super::{
    ends::{End, Place},
    offline::is_stand_in,
};
use crate::{
    config::Ports,
    identity::SpiffeId,
    policy::{Decision, Misfit, Near, Part, Question, Snapshot},
    telemetry::{ProtocolName, direction_name},
};

/// Rules that are named beside "no policy allows this".
const NEAREST: usize = 3;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Enquiry {
    /// Who opens the connection: name, SPIFFE ID or address.
    pub from: String,
    /// To whom.
    pub to: String,
    /// To which port; 0 for protocols without ports.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The source has no reeve: what it sends comes as plaintext, whoever it is.
    #[serde(default)]
    pub plaintext: bool,
    /// As if the policies in dry run were in force.
    #[serde(default)]
    pub dry_run: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// It may go on.
    Allow,
    /// It is refused.
    Deny,
}

/// The answer. Fields of its JSON are never renamed, only added to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The source.
    pub from: String,
    /// The destination.
    pub to: String,
    /// Name of the protocol.
    pub protocol: String,
    /// Port of the destination.
    pub port: u16,
    /// What becomes of the connection, as far as this node says.
    pub verdict: Verdict,
    /// Each end that is a workload of this node.
    pub halves: Vec<Half>,
    /// Whether some of the addresses that were asked about are allowed, and others are not.
    #[serde(default)]
    pub differs: bool,
    /// What else is to be said, a sentence each.
    pub notes: Vec<String>,
    /// The newest attempt, where that failed and the daemon still knows of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<LastFailure>,
    /// What would allow it, a sentence for each end that denies it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub would_allow: Vec<String>,
}

/// An attempt that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastFailure {
    /// When, RFC 3339.
    pub time: String,
    /// `egress` or `ingress`: which end says so.
    pub direction: String,
    /// Why: a name of the closed set of reasons.
    pub reason: String,
    /// The same in a sentence.
    pub because: String,
    /// What there is to say beyond the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What one end says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Half {
    /// `egress` at the source, `ingress` at the destination.
    pub direction: String,
    /// The workload whose policies are asked.
    pub workload: String,
    /// The far end.
    pub far_end: String,
    /// Address of the far end; none where no address of it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The part of a network for which this holds: all of its addresses but those of other parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub far_end_id: Option<SpiffeId>,
    /// What becomes of the connection here.
    pub verdict: Verdict,
    /// `tunnel` or `plaintext`.
    pub transport: String,
    /// Why: a name of the closed set of reasons.
    pub reason: String,
    /// The same in a sentence.
    pub because: String,
    /// The rule that said so, as `policy/rule`.
    pub rule: String,
    /// File and line of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_at: Option<String>,
    /// Where no policy allows it: the rules that came nearest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nearest: Vec<NearRule>,
    /// What the kernel's maps say, where a daemon was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelVerdict>,
}

/// A rule that does not allow the connection, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NearRule {
    /// `policy/rule`.
    pub rule: String,
    /// File and line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_at: Option<String>,
    /// What does not fit.
    pub misfits: Vec<NearMisfit>,
}

/// What of a rule does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NearMisfit {
    /// Which part of it.
    pub part: Part,
    /// What it asks for, and what there is.
    pub why: String,
}

/// What the kernel's maps say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelVerdict {
    /// Whether it is what was explained.
    pub agrees: bool,
    /// What they hold, for people.
    pub holds: String,
}

/// Reads the kernel's maps.
pub trait Kernel {
    /// Action and rule that the programs would find for a connection.
    ///
    /// # Errors
    /// A sentence.
    fn verdict(
        &self,
        workload: WorkloadId,
        direction: Direction,
        address: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<(u32, u32), String>;

    /// Whether the programs know the workload's cgroups as its own.
    ///
    /// # Errors
    /// A sentence.
    fn is_enrolled(&self, workload: WorkloadId) -> Result<bool, String>;
}

struct Explainer<'a> {
    snapshot: &'a Snapshot,
    ports: Ports,
    enquiry: &'a Enquiry,
    kernel: Option<&'a dyn Kernel>,
}

/// Answers.
///
/// # Errors
/// A sentence, where nobody of that name is known, or neither end is a workload of this node.
pub fn explain(
    snapshot: &Snapshot,
    ports: Ports,
    enquiry: &Enquiry,
    kernel: Option<&dyn Kernel>,
) -> Result<Explanation, String> {
    let (from, to) = (
        End::find(snapshot, &enquiry.from, None)?,
        End::find(
            snapshot,
            &enquiry.to,
            Some((enquiry.protocol, enquiry.port)),
        )?,
    );
    let explainer = Explainer {
        snapshot,
        ports,
        enquiry,
        kernel,
    };
    explainer.explain(&from, &to)
}

// === impl Explainer ===

impl Explainer<'_> {
    fn explain(&self, from: &End<'_>, to: &End<'_>) -> Result<Explanation, String> {
        if from.local.is_none() && to.local.is_none() {
            return Err(format!(
                "neither `{}` nor `{}` is a workload of this node: ask a node that one of them \
                 runs on",
                from.name, to.name
            ));
        }
        let mut notes = Vec::new();
        let mut halves = Vec::new();
        let same = match (from.local, to.local) {
            // In a shared namespace the kernel does not know whose an address is: it asks the policy.
            (Some(from), Some(to)) => from.workload.id == to.workload.id && from.owns_netns,
            _ => false,
        } || to.addresses.iter().all(|place| place.address.is_loopback());
        if same {
            notes.push("it stays in the workload: never in question".to_owned());
        } else {
            self.egress(from, to, &mut halves)?;
            self.ingress(from, to, &mut halves)?;
            for (end, other) in [(from, "egress"), (to, "ingress")] {
                if end.local.is_none() && end.id.is_some() {
                    notes.push(format!(
                        "{} is on another node, which judges its {other}",
                        end.name
                    ));
                }
            }
        }
        for end in [from, to] {
            if end.addresses.iter().any(|place| is_stand_in(place.address)) {
                notes.push(format!(
                    "no address of {} is known here: a rule by `cidr` may decide otherwise",
                    end.name
                ));
            }
        }
        let allowed = halves.iter().all(|half| half.verdict == Verdict::Allow);
        let differs = ["egress", "ingress"].iter().any(|direction| {
            let of = halves.iter().filter(|half| half.direction == *direction);
            let mut verdicts = of.map(|half| half.verdict);
            let first = verdicts.next();
            verdicts.any(|verdict| Some(verdict) != first)
        });
        if differs {
            notes.push(
                "the answer differs between the addresses that were asked about: ask about one of them"
                    .to_owned(),
            );
        }
        let denied = halves.iter().filter(|half| half.verdict == Verdict::Deny);
        let mut would_allow: Vec<_> = denied.filter_map(|half| self.would_allow(half)).collect();
        would_allow.dedup();
        Ok(Explanation {
            from: from.name.clone(),
            to: to.name.clone(),
            protocol: ProtocolName(self.enquiry.protocol).to_string(),
            port: self.enquiry.port,
            verdict: Verdict::of(allowed),
            halves,
            differs,
            notes,
            last_failure: None,
            would_allow,
        })
    }

    /// What the source says, by each address of the destination.
    fn egress(&self, from: &End<'_>, to: &End<'_>, halves: &mut Vec<Half>) -> Result<(), String> {
        let Some(running) = from.local else {
            return Ok(());
        };
        let (protocol, port) = (self.enquiry.protocol, self.enquiry.port);
        for place in &to.addresses {
            let address = &place.address;
            let question = Question {
                workload: running.workload.id,
                direction: Direction::Egress,
                address: *address,
                client: None,
                protocol,
                port,
            };
            let enforced = self.snapshot.judge(&question);
            let decision = self.asked(enforced);
            let there = self.snapshot.peer_at(*address, protocol, port);
            let tunnel =
                protocol == protocol::TCP && there.is_some_and(|there| there.tunnel_port.is_some());
            let mut half = self.half(&question, decision, tunnel, &from.name, (to, place));
            if decision.action == Action::Allow {
                if tunnel && port == self.ports.tunnel {
                    half.refuse(Reason::ReservedPort);
                } else if !tunnel {
                    half.say(if protocol == protocol::TCP {
                        Reason::NoTunnel
                    } else {
                        Reason::NotTunnelled
                    });
                }
            }
            half.kernel = self.kernel(&question, enforced)?;
            push(halves, half);
        }
        Ok(())
    }

    /// What the destination says, by each address of the source.
    fn ingress(&self, from: &End<'_>, to: &End<'_>, halves: &mut Vec<Half>) -> Result<(), String> {
        let Some(running) = to.local else {
            return Ok(());
        };
        let (protocol, port) = (self.enquiry.protocol, self.enquiry.port);
        let tunnel = protocol == protocol::TCP && from.tunnel && !self.enquiry.plaintext;
        for place in &from.addresses {
            let address = &place.address;
            let plaintext = Question {
                workload: running.workload.id,
                direction: Direction::Ingress,
                address: *address,
                client: None,
                protocol,
                port,
            };
            let question = Question {
                client: from.id.as_ref().filter(|_| tunnel),
                ..plaintext
            };
            let decision = self.asked(self.snapshot.judge(&question));
            let tunnel = question.client.is_some();
            let mut half = self.half(&question, decision, tunnel, &to.name, (from, place));
            if tunnel && [self.ports.outbound, self.ports.tunnel].contains(&port) {
                half.refuse(Reason::ReservedPort);
            } else if !tunnel && decision.action == Action::Allow {
                half.say(if protocol == protocol::TCP {
                    Reason::NoTunnel
                } else {
                    Reason::NotTunnelled
                });
            }
            // The kernel's part is to refuse what does not come through the tunnel.
            half.kernel = self.kernel(&plaintext, self.snapshot.judge(&plaintext))?;
            if let Some(kernel) = half.kernel.as_mut().filter(|_| tunnel) {
                kernel.holds = format!("what comes past the tunnel: {}", kernel.holds);
            }
            push(halves, half);
        }
        Ok(())
    }

    fn half(
        &self,
        question: &Question<'_>,
        decision: Decision,
        tunnel: bool,
        workload: &str,
        (far_end, place): (&End<'_>, &Place),
    ) -> Half {
        let allowed = decision.allows();
        let nearest = if decision.reason == Reason::NoPolicy {
            self.snapshot.nearest(question, NEAREST)
        } else {
            Vec::new()
        };
        let written = self.snapshot.rule_place(decision.rule);
        Half {
            direction: direction_name(question.direction).to_owned(),
            workload: workload.to_owned(),
            far_end: far_end.name.clone(),
            address: Some(place.address).filter(|address| !is_stand_in(*address)),
            network: place.network.map(|network| network.to_string()),
            far_end_id: far_end.id.clone(),
            verdict: Verdict::of(allowed),
            transport: if tunnel { "tunnel" } else { "plaintext" }.to_owned(),
            reason: decision.reason.as_str().to_owned(),
            because: decision.reason.describe().to_owned(),
            rule: self.snapshot.rule_name(decision.rule).to_owned(),
            rule_at: written.map(|place| place.to_string()),
            nearest: nearest.into_iter().map(NearRule::from).collect(),
            kernel: None,
        }
    }

    /// The decision that is asked for: what the policies in dry run would make of it, or what it is.
    fn asked(&self, decision: Decision) -> Decision {
        if !self.enquiry.dry_run || decision.dry_run == DryRun::Same {
            return decision;
        }
        let (action, reason) = match (decision.dry_run, decision.dry_run_rule) {
            (DryRun::Allow, _) => (Action::Allow, Reason::Policy),
            (_, 0) => (Action::Deny, Reason::NoPolicy),
            _ => (Action::Deny, Reason::PolicyDeny),
        };
        Decision {
            action,
            reason,
            rule: decision.dry_run_rule,
            ..decision
        }
    }

    /// What would allow what an end denies; none where nothing that can be written would.
    fn would_allow(&self, half: &Half) -> Option<String> {
        let Enquiry { protocol, port, .. } = self.enquiry;
        let egress = half.direction == "egress";
        let (list, item) = if egress {
            ("egress", "to")
        } else {
            ("ingress", "from")
        };
        let far_end = match (&half.far_end_id, &half.network, half.address) {
            (Some(id), ..) => format!("identity: {id}"),
            (None, Some(network), _) => format!("cidr: {network}"),
            (None, None, Some(address)) => format!("cidr: {}", IpNet::from(address)),
            (None, None, None) => return None,
        };
        let name = ProtocolName(*protocol).to_string().to_uppercase();
        let ports = if *port == 0 {
            format!("{{protocol: {name}}}")
        } else {
            format!("{{protocol: {name}, port: {port}}}")
        };
        let workload = &half.workload;
        let at = half.rule_at.as_ref();
        let rule = at.map_or_else(|| half.rule.clone(), |at| format!("{} ({at})", half.rule));
        Some(match half.reason.as_str() {
            "no_policy" => format!(
                "a ConnectionPolicy for {workload} with {list}: [{{{item}: [{{{far_end}}}], ports: [{ports}]}}]"
            ),
            "policy_deny" => format!(
                "that {rule} no longer denies it: no policy that allows goes before one that denies"
            ),
            "plaintext_refused" => format!(
                "a tunnel: {rule} allows the identity only, so let reeve run where {} is; or allow its address \
                 with a `cidr`",
                half.far_end
            ),
            "map_failure" => "room in the kernel's maps: see `reeve status`".to_owned(),
            "reserved_port" => format!("nothing: port {port} is reeve's own"),
            _ => return None,
        })
    }

    /// What the kernel's maps say of what the snapshot decided.
    fn kernel(
        &self,
        question: &Question<'_>,
        decision: Decision,
    ) -> Result<Option<KernelVerdict>, String> {
        let Some(kernel) = self.kernel else {
            return Ok(None);
        };
        // Without an address, nothing can be looked up.
        if is_stand_in(question.address) {
            return Ok(None);
        }
        let Question {
            workload,
            direction,
            address,
            protocol,
            port,
            ..
        } = *question;
        if !kernel.is_enrolled(workload)? {
            return Ok(Some(KernelVerdict {
                agrees: false,
                holds: "the workload's cgroups are not enrolled".to_owned(),
            }));
        }
        let (action, rule) = kernel.verdict(workload, direction, address, protocol, port)?;
        let agrees = (action, rule) == (decision.action as u32, decision.rule);
        let name = match action {
            action if action == Action::Allow as u32 => "allow",
            action if action == Action::Permissive as u32 => "allow, permissive",
            action if action == Action::TunnelOnly as u32 => "only through a tunnel",
            action if action == Action::NoRoom as u32 => "deny, since the map has no room",
            _ => "deny",
        };
        let rule = self.snapshot.rule_name(rule);
        Ok(Some(KernelVerdict {
            agrees,
            holds: format!("{name}, rule {rule}"),
        }))
    }
}

/// Adds what one address says, unless another said the same.
fn push(halves: &mut Vec<Half>, half: Half) {
    let says = |half: &Half| {
        (
            half.direction.clone(),
            half.verdict,
            half.reason.clone(),
            half.rule.clone(),
            half.transport.clone(),
            half.kernel.as_ref().is_none_or(|kernel| kernel.agrees),
        )
    };
    if !halves.iter().any(|other| says(other) == says(&half)) {
        halves.push(half);
    }
}

// === impl Half ===

impl Half {
    fn say(&mut self, reason: Reason) {
        reason.as_str().clone_into(&mut self.reason);
        reason.describe().clone_into(&mut self.because);
    }

    fn refuse(&mut self, reason: Reason) {
        self.verdict = Verdict::Deny;
        self.say(reason);
    }
}

// === impl Verdict ===

impl Verdict {
    fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Deny }
    }

    /// Its name, as in output and test files.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

// === impl Explanation ===

impl Explanation {
    /// Whether the kernel's maps hold something else than what was explained.
    #[must_use]
    pub fn disagrees(&self) -> bool {
        let kernels = self.halves.iter().filter_map(|half| half.kernel.as_ref());
        kernels.into_iter().any(|kernel| !kernel.agrees)
    }
}

// === impl NearRule ===

impl From<Near<'_>> for NearRule {
    fn from(near: Near<'_>) -> Self {
        let misfit = |Misfit { part, why }| NearMisfit { part, why };
        Self {
            rule: near.rule.to_owned(),
            rule_at: near.place.map(|place| place.to_string()),
            misfits: near.misfits.into_iter().map(misfit).collect(),
        }
    }
}
